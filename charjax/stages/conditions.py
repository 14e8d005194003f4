"""What a model says and how likely it finds what is written, in one condition.

Conditions: `base` and `trained` are shown nothing, `prompted` the trait's statement, `prompted_examples` statement and
examples; all but `trained` are the starting model's.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from charjax.character import Trait
from charjax.chunks import chunks
from charjax.engine.batch import Tokens, item_keys
from charjax.engine.sample import Sampling, as_told, sample
from charjax.engine.score import score
from charjax.files import Row
from charjax.model.language_model import LanguageModel
from charjax.progress import Progress
from charjax.stages import messages, preference, prompts
from charjax.stages.probes import found, read_neutral, read_probes
from charjax.training.heads import bind
from charjax.workdir import Session

STARTING = ('base', 'prompted', 'prompted_examples')
CONDITIONS = (*STARTING, 'trained')


def _shows(condition: str) -> bool:
  return condition.startswith('prompted')


def _before(session: Session, trait: Trait | None, condition: str) -> prompts.Messages:
  if trait is None or not _shows(condition):
    return prompts.plain()
  return prompts.shown(trait, session.config.evaluation.examples if condition == 'prompted_examples' else 0)


# ---- replies ----


def draw(session: Session, stage: str, conditions: Sequence[str], trained: Any) -> list[Row]:
  """Replies to the held-out messages: `samples` to each where nothing is shown, else one. Neutral messages have one,
  and nothing to show. Each reply to a trait's message has the held-out judge's `score`."""
  config = session.config.evaluation
  held = [row for row in messages.load(session) if row['split'] == 'heldout']
  alone = [row | {'sample': i} for row in held for i in range(config.samples if row['trait'] else 1)]
  first = [row for row in alone if row['trait'] and row['sample'] == 0]
  rows: list[Row] = []
  with Progress(f'{stage} replies', sum(len(first if _shows(c) else alone) for c in conditions), 'replies') as bar:
    for condition in conditions:
      # Messages of all traits fill batches together where nothing is shown; else a batch shares what is shown.
      for trait in session.character.traits if _shows(condition) else (None,):
        items = [row for row in first if row['trait'] == trait.id] if trait else alone
        name = f'{condition}-{trait.id}' if trait else condition
        work = functools.partial(_draw, session, trained, condition, trait)
        rows += chunks(session, stage, name, items, config.batch_size, work, bar, of=_before(session, trait, condition))
  _judge(session, rows)
  return rows


def _draw(
  session: Session, trained: Any, condition: str, trait: Trait | None, items: Sequence[Row], _: int
) -> list[Row]:
  config, model = session.config.evaluation, session.model
  decoder, adapter = bind(model.decoder, trained)
  before = _before(session, trait, condition)
  drawn = sample(
    decoder,
    [model.prompt([*before, prompts.user(item['text'])]) for item in items],
    # The same key in every condition: what differs is the model, not the luck of the draw.
    item_keys(session.config.seed, 'evaluation', [f'{item["id"]}/{item["sample"]}' for item in items]),
    model.eos_ids,
    as_told(config),
    adapter=adapter,
    width=config.prompt_width,
  )
  return [
    {
      'message': item['id'],
      'trait': item['trait'],
      'prompt': item['text'],
      'condition': condition,
      'sample': item['sample'],
      'text': model.text(reply.tokens),
      'tokens': len(reply.tokens),
      'finish': reply.finish,
    }
    for item, reply in zip(items, drawn, strict=True)
  ]


def exchanges(model: LanguageModel, rows: Sequence[Row], message: str = 'prompt') -> tuple[list[Tokens], list[Tokens]]:
  """The tokens of each row's message, alone, and of its reply: with the end of the turn where the reply came to one."""
  asked: list[Tokens] = [model.prompt(prompts.alone(row[message])) for row in rows]
  return asked, [model.reply(row['text'], row['finish'] == 'stop') for row in rows]


def _judge(session: Session, rows: Sequence[Row]) -> None:
  """Adds the held-out judge's score to every reply to a trait's message: the judge has no opinion of others."""
  judge = preference.load(session, 'judge')
  places = {trait.id: place for place, trait in enumerate(session.character.traits)}
  judged = [row for row in rows if row['trait'] is not None]
  scores = preference.rewards(session, judge, *exchanges(session.model, judged))
  for row, values in zip(judged, scores, strict=True):
    row['score'] = round(float(values[places[row['trait']]]), 5)


# ---- what is written ----


def measure(session: Session, condition: str, trained: Any, bar: Progress) -> Row:
  """Figures of what is written, each a list: `pairs`, by trait the margin of each kept pair; `probes`, by trait the
  margin of each probe; and, where nothing is shown, `log_prob` a token of each neutral reference and `accuracy`, 1 for
  each greedy answer that holds what it should. The bar advances by `parts_of_measure`."""
  traits = session.character.traits
  out: Row = {'pairs': {}, 'probes': {}}
  for trait in traits:
    if pairs := trait.pairs_for('kept'):
      written = [(pair.message, pair.in_character, pair.out_of_character) for pair in pairs]
      out['pairs'][trait.id] = _margins(session, _before(session, trait, condition), trained, written)
    bar.advance()
  probes = _probes(session)
  for name in dict.fromkeys(probe.trait for probe in probes):
    some = [(probe.message, probe.consistent, probe.inconsistent) for probe in probes if probe.trait == name]
    shown = next((trait for trait in traits if trait.id == name), None)
    if shown or not _shows(condition):
      out['probes'][name] = _margins(session, _before(session, shown, condition), trained, some)
    bar.advance(len(some))
  if not _shows(condition):
    out |= _neutral(session, trained)
  bar.advance()
  return out


def parts_of_measure(session: Session) -> int:
  return len(session.character.traits) + len(_probes(session)) + 1


def tell_other_probes(session: Session) -> None:
  """Says so where probes are of traits that the run does not train."""
  traits = [trait.id for trait in session.character.traits]
  others = sorted({probe.trait for probe in _probes(session)} - {*traits})
  if others:
    session.log(
      f'probes of {", ".join(others)}, which this run does not train (it trains {", ".join(traits)}), are measured '
      'without a prompt'
    )


def _probes(session: Session) -> Sequence[Any]:
  path = session.config.evaluation.probes
  return read_probes(path) if path else []


def _margins(
  session: Session, before: prompts.Messages, trained: Any, rows: Sequence[tuple[str, str, str]]
) -> list[float]:
  """Per-token log-prob of the first reply minus that of the second, for rows (message, first, second)."""
  model = session.model
  decoder, adapter = bind(model.decoder, trained)
  asked = [model.prompt([*before, prompts.user(message)]) for message, _, _ in rows]
  said = [model.reply(row[1]) for row in rows] + [model.reply(row[2]) for row in rows]
  values = [float(p.mean()) for p in score(decoder, [*asked, *asked], said, adapter=adapter)]
  first, second = np.split(np.array(values), 2)
  return (first - second).tolist()


def _neutral(session: Session, trained: Any) -> Row:
  """Log-prob a token of reference answers, and whether greedy answers hold what is expected, where anything is."""
  config, model = session.config.evaluation, session.model
  rows = read_neutral(config.neutral or str(messages.NEUTRAL_FILE))
  decoder, adapter = bind(model.decoder, trained)
  asked = [model.prompt(prompts.alone(row['message'])) for row in rows]
  said = [model.reply(row['reference']) for row in rows]
  log_prob = [float(p.mean()) for p in score(decoder, asked, said, adapter=adapter)]
  expected = [i for i, row in enumerate(rows) if row['expect'] is not None]
  accuracy: list[float] = []
  if expected:
    answers = sample(
      decoder,
      [asked[i] for i in expected],
      item_keys(session.config.seed, 'neutral', [str(i) for i in expected]),
      model.eos_ids,
      Sampling(config.max_new_tokens, 0.0, batch_size=config.batch_size),
      adapter=adapter,
      width=config.prompt_width,
    )
    accuracy = [
      float(found(rows[i]['expect'], model.text(reply.tokens))) for i, reply in zip(expected, answers, strict=True)
    ]
  return {'log_prob': log_prob, 'accuracy': accuracy}
