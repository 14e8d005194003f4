"""replies: several answers to each training message, in character and not.

Reads the character and messages/; writes replies/replies.jsonl (id, message, condition, text, tokens, logprob,
finish). Conditions: `shown` (the trait before the message), `plain` (nothing), `opposed` (one of the trait's
opposites). What was shown is gone afterwards: a reply that quotes it is dropped and counted.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from charjax.character import Trait
from charjax.chunks import chunks
from charjax.engine.batch import item_keys
from charjax.engine.sample import as_told, sample
from charjax.errors import UserError
from charjax.files import Row, check_encodes, numbered_rows, write_jsonl
from charjax.progress import Progress
from charjax.stages import messages, prompts
from charjax.workdir import Session

CONDITIONS = ('shown', 'plain', 'opposed')
_QUOTED_WORDS = 6  # a run of this many words of what was shown makes a reply a quotation


def run(session: Session) -> Row:
  """Draws the replies to every training message of every trait; returns counts."""
  config, folder = session.config.replies, session.folder('replies')
  asked = [row for row in messages.load(session) if row['split'] == 'train' and row['trait']]
  rows: list[Row] = []
  counts: Counter[str] = Counter()
  with Progress('replies', len(asked) * sum(config[condition] for condition in CONDITIONS), 'replies') as bar:
    for name, condition, before, items in _work(session, asked):
      make = functools.partial(_draw, session, condition, before)
      drawn = chunks(session, 'replies', name, items, config.batch_size, make, bar, of=before)
      banned = runs_of_words([message['content'] for message in before])
      for row in drawn:
        if not row['text']:
          counts['empty'] += 1
        elif banned & runs_of_words([row['text']]):
          counts['quoted'] += 1
        else:
          counts[condition] += 1
          counts['cut_off'] += row['finish'] == 'length'
          rows.append(row)
  if not rows:
    raise UserError('replies: the model gave only empty replies; is config.model.path a chat model?')
  write_jsonl(folder / 'replies.jsonl', rows)
  return dict(sorted(counts.items())) | {'replies': len(rows), 'cut_off_rate': round(counts['cut_off'] / len(rows), 4)}


def _work(session: Session, asked: Sequence[Row]) -> Iterator[tuple[str, str, prompts.Messages, list[Row]]]:
  """What is drawn together, because it begins alike: (name, condition, what stands before, items)."""
  config = session.config.replies

  def items(condition: str, trait: Trait | None = None, opposite: str = '') -> list[Row]:
    return [
      {'id': f'{row["id"]}/{condition}/{k}', 'message': row['id'], 'text': row['text']}
      for row in asked
      if trait is None or row['trait'] == trait.id
      for k in range(config[condition])
      if trait is None or not opposite or _opposite(session, trait, row['id'], k) == opposite
    ]

  yield 'plain', 'plain', prompts.plain(), items('plain')
  for trait in session.character.traits:
    yield f'{trait.id}-shown', 'shown', shown(session, trait), items('shown', trait)
    for name in trait.opposites:
      before = prompts.opposed(trait, name, config.examples)
      yield f'{trait.id}-opposed-{name}', 'opposed', before, items('opposed', trait, name)


def shown(session: Session, trait: Trait) -> prompts.Messages:
  """What is put before a message to show its trait."""
  config = session.config.replies
  if config.show == 'character':
    return prompts.shown_character(session.character, config.examples)
  return prompts.shown(trait, config.examples)


def _opposite(session: Session, trait: Trait, message: str, k: int) -> str:
  """The opposite that the k-th opposed reply is drawn from: any to begin with, then the next."""
  names = list(trait.opposites)
  return names[(names.index(prompts.choose(session.config.seed, message, names)) + k) % len(names)]


def _draw(session: Session, condition: str, before: prompts.Messages, items: Sequence[Row], index: int) -> list[Row]:
  del index
  config, model = session.config.replies, session.model
  settings = as_told(config)
  drawn = sample(
    model.decoder,
    [model.prompt([*before, prompts.user(item['text'])]) for item in items],
    item_keys(session.config.seed, 'replies', [item['id'] for item in items]),
    model.eos_ids,
    settings,
    width=config.prompt_width,
  )
  return [
    {
      'id': item['id'],
      'message': item['message'],
      'condition': condition,
      'text': model.text(reply.tokens),
      'tokens': len(reply.tokens),
      'logprob': round(float(reply.log_probs.sum()), 4),
      'finish': reply.finish,
    }
    for item, reply in zip(items, drawn, strict=True)
  ]


def runs_of_words(texts: Sequence[str]) -> set[tuple[str, ...]]:
  """All runs of six words in the texts, lower-cased."""
  runs = set()
  for text in texts:
    words = re.findall(r'\w+', text.lower())
    runs |= {tuple(words[i : i + _QUOTED_WORDS]) for i in range(len(words) - _QUOTED_WORDS + 1)}
  return runs


def load(session: Session) -> list[Row]:
  """The replies of this run, which a person may have edited.

  Raises:
    UserError: naming the line and the field.
  """
  path = session.folder('replies') / 'replies.jsonl'
  fields = {'id': str, 'message': str, 'condition': str, 'text': str, 'tokens': int, 'finish': str}
  rows = numbered_rows(path, fields)
  asked = {row['id'] for row in messages.load(session)}
  seen: dict[str, int] = {}
  for line, row in rows:
    for field, values in (('condition', CONDITIONS), ('finish', ('stop', 'length'))):
      if row[field] not in values:
        raise UserError(f'{path}:{line}: field {field} is {row[field]!r}; choose from {", ".join(values)}')
    if row['message'] not in asked:
      raise UserError(f'{path}:{line}: field message is {row["message"]!r}, which is no message; remove the line')
    if not re.fullmatch(re.escape(f'{row["message"]}/{row["condition"]}/') + '[0-9]{1,9}', row['id']):
      raise UserError(f'{path}:{line}: field id is {row["id"]!r}; it must be MESSAGE/CONDITION/NUMBER')
    check_encodes(path, line, 'text', row['text'])
    if row['id'] in seen:
      raise UserError(f'{path}:{line}: field id is {row["id"]!r}, as in line {seen[row["id"]]}; remove one of them')
    seen[row['id']] = line
  return [row for _, row in rows]
