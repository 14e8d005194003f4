"""messages: the model writes human messages for which each trait matters, and neutral ones for which none does.

Reads the character; writes messages/messages.jsonl (id, trait, split, text, origin). Near-duplicates and broken
messages are rejected and counted. The split is by message: what is held out is never trained on.
"""

import functools
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from charjax.character import Character, Trait
from charjax.chunks import chunks
from charjax.engine.batch import item_keys
from charjax.engine.sample import as_told, sample
from charjax.errors import UserError
from charjax.files import Row, check_encodes, numbered_rows, read_jsonl, write_jsonl
from charjax.progress import Progress
from charjax.stages import prompts
from charjax.workdir import Session

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
NEUTRAL_FILE = epath.Path(__file__).parent / 'neutral.jsonl'
_ROUNDS = 6  # of writing more where too many were rejected
_LEAKS = re.compile(
  r'<\||\b(as an ai language model|a (short|medium|long) message|ai assistant|system prompt)\b', re.IGNORECASE
)


def run(session: Session) -> Row:
  """Writes messages until every trait has as many as the config asks for; returns counts."""
  config, folder = session.config.messages, session.folder('messages')
  rows: list[Row] = []
  rejected: Counter[str] = Counter()
  written = 0
  neutral = (None, config.train_neutral, config.heldout_neutral)
  kinds = [*((t, config.train_per_trait, config.heldout_per_trait) for t in session.character.traits), neutral]
  # One for all traits: what is held out for one must not be trained on for another.
  kept = Kept(authored(session.character), config.near_duplicate)
  with Progress('messages', sum(train + heldout for _, train, heldout in kinds), 'messages') as bar:
    for trait, train, heldout in kinds:
      name, wanted = trait.id if trait else 'neutral', train + heldout
      made: list[Row] = []
      own: Counter[str] = Counter()
      for attempt in range(_ROUNDS):
        missing = wanted - len(made)
        if missing <= 0:
          break
        # A whole number of batches: the rest of one would be computed all the same.
        count = -(-missing // config.batch_size) * config.batch_size
        items = [f'{name}/{attempt}/{i}' for i in range(count)]
        make = functools.partial(write, session, trait, attempt)
        for candidate in chunks(
          session,
          'messages',
          f'{name}-{attempt}',
          items,
          config.batch_size,
          make,
          of=_written_from(trait),
        ):
          written += 1
          reason = broken(candidate) or kept.reject(candidate['text'])
          if reason:
            own[reason] += 1
          else:
            made.append(candidate)
        bar.advance(missing - max(0, wanted - len(made)))
      if len(made) < wanted:
        remedy = 'add seeds to the trait, or lower config.messages.train_per_trait or heldout_per_trait'
        raise UserError(
          f'messages: only {len(made)} of {wanted} messages for {name} after {_ROUNDS} rounds (rejected: '
          f'{dict(own)}); {remedy if trait else "lower config.messages.train_neutral or heldout_neutral"}'
        )
      rejected += own
      rows += _split(session.config.seed, trait, made[:wanted], heldout)
  write_jsonl(folder / 'messages.jsonl', rows)
  return {'messages': len(rows), 'written': written, 'rejected': dict(sorted(rejected.items()))}


def _split(seed: int, trait: Trait | None, made: Sequence[Row], heldout: int) -> list[Row]:
  """Messages as rows, in an order drawn by lot, the first `heldout` of them held out."""
  order = sorted(made, key=lambda row: hashlib.sha256(f'{seed}/split/{row["origin"]["item"]}'.encode()).digest())
  return [
    {
      'id': f'{trait.id if trait else "neutral"}-{i:04d}',
      'trait': trait.id if trait else None,
      'split': 'heldout' if i < heldout else 'train',
      'text': row['text'],
      'origin': row['origin'],
    }
    for i, row in enumerate(order)
  ]


def authored(character: Character) -> list[str]:
  """Texts that a written message must not repeat: seeds, the messages of all pairs, and neutral requests."""
  written = [text for trait in character.traits for text in (*trait.seeds, *(pair.message for pair in trait.pairs))]
  return [*written, *NEUTRAL_SEEDS, *(row['message'] for row in read_jsonl(NEUTRAL_FILE))]


def write(session: Session, trait: Trait | None, attempt: int, items: Sequence[str], index: int) -> list[Row]:
  """One batch of candidates, each from its own topic, asker, length and opening."""
  group = f'{trait.id if trait else "neutral"}/{attempt}/{index}'
  config, seed, model = session.config.messages, session.config.seed, session.model
  seeds, openings = _written_from(trait)
  origins, beginnings, asked = [], [], []
  for item in items:
    origin = {
      'topic': prompts.choose(seed, f'{item}/topic', prompts.TOPICS),
      'asker': prompts.choose(seed, f'{item}/asker', prompts.ASKERS),
      'length': prompts.choose(seed, f'{item}/length', tuple(prompts.LENGTHS)),
    }
    before = prompts.write_message(seeds, **origin, group=group, seed=seed, shown=config.seeds_shown)
    # A small model asked for a message of a kind loses the kind; begun for it, it goes on in kind.
    begun = prompts.opening(seed, item, openings, config.opening_words)
    origins.append(origin | {'opening': begun})
    beginnings.append(model.reply(begun, ended=False) if begun else [])
    asked.append(model.prompt(before) + beginnings[-1])
  settings = as_told(config)
  keys = item_keys(seed, 'messages', items)
  drawn = sample(model.decoder, asked, keys, model.eos_ids, settings, width=config.prompt_width)
  return [
    {
      'text': model.text([*beginning, *reply.tokens]).strip('"'),
      'finish': reply.finish,
      'origin': {'item': item, **origin},
    }
    for item, beginning, reply, origin in zip(items, beginnings, drawn, origins, strict=True)
  ]


def _written_from(trait: Trait | None) -> tuple[Sequence[str], Sequence[str]]:
  """The seeds, and the messages whose first words others may begin with: those of a trait's worked examples, too."""
  if trait is None:
    return NEUTRAL_SEEDS, NEUTRAL_SEEDS
  return trait.seeds, (*trait.seeds, *(pair.message for pair in trait.pairs_for('shown')))


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
  return frozenset(itertools.pairwise(words))


def load(session: Session) -> list[Row]:
  """The messages of this run, which a person may have edited.

  Raises:
    UserError: naming the line and the field.
  """
  path = session.folder('messages') / 'messages.jsonl'
  fields = {'id': str, 'trait': (str, type(None)), 'split': str, 'text': str}
  rows = numbered_rows(path, fields)
  allowed: dict[str, list[Any]] = {
    'trait': [*(trait.id for trait in session.character.traits), None],
    'split': ['train', 'heldout'],
  }
  seen: dict[str, int] = {}
  for line, row in rows:
    for field, values in allowed.items():
      if row[field] not in values:
        raise UserError(f'{path}:{line}: field {field} is {row[field]!r}; choose from {", ".join(map(str, values))}')
    if not row['id'] or '/' in row['id']:
      raise UserError(f'{path}:{line}: field id is {row["id"]!r}; give it a name of its own, without a slash')
    if not row['text'].strip():
      raise UserError(f'{path}:{line}: field text is empty; write some, or remove the line')
    check_encodes(path, line, 'text', row['text'])
    if row['id'] in seen:
      raise UserError(f'{path}:{line}: field id is {row["id"]!r}, as in line {seen[row["id"]]}; rename one of them')
    seen[row['id']] = line
  learned = {row['trait'] is None for _, row in rows if row['split'] == 'train'}
  if len(learned) < 2:
    raise UserError(
      f'{path}: no message is left whose split is "train" and whose trait is {"one" if True in learned else "null"}; '
      'write some'
    )
  return [row for _, row in rows]
