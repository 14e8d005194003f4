"""messages: the model writes human messages for which each trait matters, and neutral ones for which none does.

Reads the character; writes messages/messages.jsonl (id, trait, split, text, origin). Near-duplicates and broken
messages are rejected and counted. The split is by message: what is held out is never trained on.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from charjax.character import Trait
from charjax.engine.batch import item_keys
from charjax.engine.sample import Sampling, sample
from charjax.errors import UserError
from charjax.progress import Progress
from charjax.stages import prompts
from charjax.workdir import Row, Session, chunks, read_jsonl, write_jsonl

NEUTRAL_SEEDS = (
  'How long should I cook spaghetti?',
  'Convert 3 kilometers to meters.',
  "What does the word 'ancient' mean?",
  'Give me a simple recipe for pancakes.',
  'How do I change a bicycle tire?',
  'What is the tallest mountain in the world?',
  'Fix the grammar in this sentence: She go to school every day.',
  "What is the German word for 'apple'?",
  'What should I pack for a weekend camping trip?',
  'Why do leaves change color in autumn?',
  'Make a grocery list for a vegetable soup.',
  'How often should I water a cactus?',
  'Draft a one-line email asking to move a meeting to Friday.',
  'Summarize the water cycle in two sentences.',
)
_ROUNDS = 6  # of writing more where too many were rejected
_LEAKS = re.compile(r'<\||\b(chat assistant|as an ai language model|a message from|system prompt)\b', re.IGNORECASE)


def run(session: Session) -> Row:
  """Writes messages until every trait has as many as the config asks for; returns counts."""
  config, folder = session.config.messages, session.folder('messages')
  rows: list[Row] = []
  rejected: Counter[str] = Counter()
  written = 0
  kinds: list[Trait | None] = [*session.character.traits, None]
  wanted = {
    kind: (config.train_neutral + config.heldout_neutral)
    if kind is None
    else (config.train_per_trait + config.heldout_per_trait)
    for kind in kinds
  }
  with Progress('messages', sum(wanted.values()), 'messages') as bar:
    for kind in kinds:
      kept = Kept(authored(session, kind), config.near_duplicate)
      texts: list[Row] = []
      for attempt in range(_ROUNDS):
        missing = wanted[kind] - len(texts)
        if missing <= 0:
          break
        # A fixed number of rows, so that the sampler is compiled once.
        items = [f'{kind.id if kind else "neutral"}/{attempt}/{i}' for i in range(_round_up(missing, config.batch_size))]
        make = functools.partial(_write, session, kind)
        name = f'{kind.id if kind else "neutral"}-{attempt}'
        for candidate in chunks(folder, name, items, config.batch_size, make):
          written += 1
          reason = broken(candidate) or kept.reject(candidate['text'])
          if reason:
            rejected[reason] += 1
          else:
            texts.append(candidate)
        bar.advance(min(missing, missing - (wanted[kind] - len(texts))))
      if len(texts) < wanted[kind]:
        raise UserError(
          f'messages: only {len(texts)} of {wanted[kind]} messages for {kind.id if kind else "neutral"} after '
          f'{_ROUNDS} rounds (rejected: {dict(rejected)}); add seeds to the trait or lower config.messages.*_per_trait'
        )
      heldout = config.heldout_neutral if kind is None else config.heldout_per_trait
      rows += _numbered(kind, texts[: wanted[kind]], heldout)
  write_jsonl(folder / 'messages.jsonl', rows)
  return {'messages': len(rows), 'written': written, 'rejected': dict(sorted(rejected.items()))}


def _round_up(count: int, step: int) -> int:
  return -(-count // step) * step


def _numbered(kind: Trait | None, texts: Sequence[Row], heldout: int) -> list[Row]:
  rows = []
  for i, text in enumerate(texts):
    rows.append(
      {
        'id': f'{kind.id if kind else "neutral"}-{i:04d}',
        'trait': kind.id if kind else None,
        'split': 'heldout' if i < heldout else 'train',
        'text': text['text'],
        'origin': text['origin'],
      }
    )
  return rows


def authored(session: Session, kind: Trait | None) -> list[str]:
  """Texts that a written message must not repeat: seeds and the messages of all contrast pairs."""
  if kind is None:
    return list(NEUTRAL_SEEDS)
  return [*kind.seeds, *(pair.message for pair in kind.pairs)]


def _write(session: Session, kind: Trait | None, items: Sequence[str], index: int) -> list[Row]:
  """One batch of candidates, each from its own topic, asker, length and choice of seeds."""
  del index
  config, seed, model = session.config.messages, session.config.seed, session.model
  origins, asked = [], []
  for item in items:
    origin = {
      'topic': prompts.choose(seed, f'{item}/topic', prompts.TOPICS),
      'asker': prompts.choose(seed, f'{item}/asker', prompts.ASKERS),
      'length': prompts.choose(seed, f'{item}/length', tuple(prompts.LENGTHS)),
    }
    seeds = NEUTRAL_SEEDS if kind is None else kind.seeds
    origins.append(origin)
    asked.append(prompts.write_message(seeds, **origin, item=item, seed=seed, shown=config.seeds_shown))
  settings = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.batch_size)
  keys = item_keys(seed, 'messages', items)
  drawn = sample(model.decoder, [model.prompt(m) for m in asked], keys, model.eos_ids, settings, width=config.prompt_width)
  return [
    {'text': model.text(reply.tokens).strip('"'), 'finish': reply.finish, 'origin': {'item': item, **origin}}
    for item, reply, origin in zip(items, drawn, origins, strict=True)
  ]


def broken(candidate: Row) -> str:
  """Why a candidate is no usable message, or ''."""
  text = candidate['text']
  words = text.split()
  if candidate['finish'] == 'length':
    return 'cut off'
  if len(words) < 3:
    return 'too short'
  if _LEAKS.search(text):
    return 'quotes its instructions'
  if '\ufffd' in text or not text.isprintable():
    return 'broken characters'
  if len(set(words)) < 0.5 * len(words):
    return 'repeats itself'
  return ''


class Kept:
  """The messages kept so far, by their word pairs: what is too like one of them is a near-duplicate."""

  def __init__(self, texts: Iterable[str], limit: float):
    self._limit = limit
    self._seen = [_pairs_of_words(text) for text in texts]

  def reject(self, text: str) -> str:
    """'near-duplicate', or '' and the text is kept."""
    pairs = _pairs_of_words(text)
    if any(len(pairs & other) > self._limit * min(len(pairs), len(other)) for other in self._seen):
      return 'near-duplicate'
    self._seen.append(pairs)
    return ''


def _pairs_of_words(text: str) -> frozenset[tuple[str, str]]:
  words = re.findall(r'\w+', text.lower())
  return frozenset(zip(words, words[1:], strict=False))


def load(session: Session) -> list[Row]:
  """The messages of this run."""
  return read_jsonl(session.folder('messages') / 'messages.jsonl')
