"""evaluation: what training changed, beside what showing the trait would have changed.

Reads the character, messages/, replies/, preference/ and policy/; writes evaluation/replies.jsonl,
evaluation/margins.jsonl (of each kept pair, so that runs can be compared pair by pair) and evaluation/summary.json.
Conditions: `base`, `prompted` (the trait's statement shown), `prompted_examples` (statement and examples), `trained`
(nothing shown). The base and the trained model answer each message `samples` times. Every figure is
{mean, low, high, n}; delta is trained minus base, paired by message.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from charjax import bounded
from charjax.character import Trait
from charjax.engine.batch import item_keys
from charjax.engine.rows import Rows
from charjax.engine.sample import Sampling, sample
from charjax.engine.score import hidden_states, map_rows, mean_over_tokens, over_tokens, score
from charjax.errors import UserError
from charjax.files import Row, chunks, numbered_rows, write_jsonl, write_text
from charjax.mesh import fetch, replicate
from charjax.model.decoder import Prefix, logits
from charjax.progress import Progress
from charjax.stages import messages, over_optimisation, policy, preference, prompts
from charjax.stages.habits import praises
from charjax.stages.statistics import comparisons, interval, ratio, share
from charjax.training.heads import bind, read_rewards, reply_states
from charjax.training.losses import kl_from_logits
from charjax.workdir import Session, fingerprint

CONDITIONS = ('base', 'prompted', 'prompted_examples', 'trained')
_WINS = {'win_rate': 'base', 'win_rate_vs_prompted': 'prompted'}  # whose replies are to be beaten


def run(session: Session) -> Row:
  """Draws and judges replies, scores written pairs, and writes the summary; returns counts."""
  folder = session.folder('evaluation')
  trained = policy.load(session)
  judge = preference.load(session, 'judge')
  traits = session.character.traits
  held = [row for row in messages.load(session) if row['split'] == 'heldout']
  probes = read_probes(session.config.evaluation.probes) if session.config.evaluation.probes else []
  neutral = read_neutral(session.config.evaluation.neutral or str(messages.NEUTRAL_FILE))
  others = sorted({probe.trait for probe in probes} - {trait.id for trait in traits})
  if others:
    session.log(
      f'evaluation: probes of {", ".join(others)}, which this run does not train (it trains '
      f'{", ".join(trait.id for trait in traits)}), are measured without a prompt'
    )

  drawn = _draw_replies(session, held, trained)
  _judge_replies(session, drawn, judge)
  write_jsonl(folder / 'replies.jsonl', drawn)

  samples = {'base': session.config.evaluation.samples, 'trained': session.config.evaluation.samples}
  tries = {
    name: {c: comparisons(samples.get(c, 1), samples.get(against, 1)) for c in CONDITIONS}
    for name, against in _WINS.items()
  }
  summary: Row = {'traits': {}, 'probes': {}, 'internalisation': {}}
  pairs: list[Row] = []
  with Progress('evaluation', len(traits) + len(probes) + 1, 'parts') as bar:
    for trait in traits:
      values = {'margin': _pair_margins(session, trait, trained)} | _judged(drawn, trait.id)
      pairs += _by_pair(trait, values['margin'])
      summary['traits'][trait.id] = {
        name: summarise_wins(v, tries[name]) if name in tries else summarise(v) for name, v in values.items()
      }
      summary['internalisation'][trait.id] = {
        name: internalisation(v) for name, v in values.items() if name not in tries
      }
      bar.advance()
    for name, rows in _by_trait(probes).items():
      margins = _probe_margins(session, name, rows, trained)
      accuracy = {c: (v > 0).astype(float) if v is not None else None for c, v in margins.items()}
      summary['probes'][name] = {'margin': summarise(margins), 'accuracy': summarise(accuracy, share)}
      bar.advance(len(rows))
    summary['neutral'] = _neutral(session, neutral, drawn, trained)
    summary['side_effects'] = _side_effects(drawn)
    summary['over_optimisation'] = over_optimisation.measure(session, judge)
    bar.advance()
  write_jsonl(folder / 'margins.jsonl', pairs)
  write_text(folder / 'summary.json', json.dumps(summary, indent=2))
  return {'replies': len(drawn), 'probes': len(probes), 'neutral': len(neutral)}


# ---- figures ----


def summarise(values: dict[str, np.ndarray | None], figure: Callable[[np.ndarray], Row | None] = interval) -> Row:
  """Each condition's figure, and delta = trained - base paired by message; null where not measured."""
  found = {c: values.get(c) for c in CONDITIONS}
  out: Row = {c: figure(v) if v is not None else None for c, v in found.items()}
  return out | {'delta': _delta(values)}


def _delta(values: dict[str, np.ndarray | None]) -> Row | None:
  base, trained = values.get('base'), values.get('trained')
  return interval(trained - base) if base is not None and trained is not None else None


def summarise_wins(values: dict[str, np.ndarray | None], tries: Mapping[str, float]) -> Row:
  """Win rates, each the share of all comparisons of a message, which count as `tries` single ones.

  Against itself a condition wins half, so that trained - base is a share too, and never certain.
  """
  found = {c: values.get(c) for c in CONDITIONS}
  out: Row = {c: share(v, tries.get(c, 1)) if v is not None else None for c, v in found.items()}
  base = values['base']
  if out['trained'] is not None and base is not None and (base == 0.5).all():
    return out | {'delta': out['trained'] | {end: out['trained'][end] - 0.5 for end in ('mean', 'low', 'high')}}
  return out | {'delta': _delta(values)}


def internalisation(values: dict[str, np.ndarray | None]) -> Row | None:
  """(trained - base) / (prompted with examples - base), by message; null unless the prompted effect is clear of 0."""
  base, shown, trained = values['base'], values['prompted_examples'], values['trained']
  if base is None or shown is None or trained is None:
    return None
  effect = interval(shown - base)
  if effect is None or effect['low'] is None or effect['low'] <= 0 <= effect['high']:
    return None
  return ratio(trained - base, shown - base, paired=True)


# ---- replies ----


def _before(session: Session, trait: Trait | None, condition: str) -> prompts.Messages:
  if trait is None or condition in ('base', 'trained'):
    return prompts.plain()
  return prompts.shown(trait, session.config.evaluation.examples if condition == 'prompted_examples' else 0)


def _draw_replies(session: Session, held: Sequence[Row], trained: Any) -> list[Row]:
  """Replies to the held-out messages in each condition: `samples` by the starting and the trained model, which are
  shown nothing, and one where something is shown. Neutral messages have one each, and nothing to show."""
  config, model, folder = session.config.evaluation, session.model, session.folder('evaluation')
  settings = Sampling(config.max_new_tokens, config.temperature, config.top_p, config.batch_size, config.top_k)
  rows: list[Row] = []

  def make(condition: str, trait: Trait | None, items: Sequence[Row], index: int) -> list[Row]:
    del index
    decoder, adapter = bind(model.decoder, trained if condition == 'trained' else None)
    before = _before(session, trait, condition)
    drawn = sample(
      decoder,
      [model.prompt([*before, prompts.user(item['text'])]) for item in items],
      # The same key in every condition: what differs is the model, not the luck of the draw.
      item_keys(session.config.seed, 'evaluation', [f'{item["id"]}/{item["sample"]}' for item in items]),
      model.eos_ids,
      settings,
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

  alone = [row | {'sample': i} for row in held for i in range(config.samples if row['trait'] else 1)]
  first = [row for row in alone if row['trait'] and row['sample'] == 0]
  with Progress('evaluation replies', 2 * len(alone) + 2 * len(first), 'replies') as bar:
    # Messages of all traits fill batches together where nothing is shown; else a batch shares what is shown.
    for condition in ('base', 'trained'):
      work = functools.partial(make, condition, None)
      rows += chunks(folder, condition, alone, config.batch_size, work, bar)
    for condition in ('prompted', 'prompted_examples'):
      for trait in session.character.traits:
        items = [row for row in first if row['trait'] == trait.id]
        work = functools.partial(make, condition, trait)
        rows += chunks(folder, f'{condition}-{trait.id}', items, config.batch_size, work, bar)
  return rows


def _judge_replies(session: Session, rows: Sequence[Row], judge: Any) -> None:
  """Adds the held-out judge's score to every reply to a trait's message: the judge has no opinion of others."""
  model = session.model
  places = {trait.id: place for place, trait in enumerate(session.character.traits)}
  judged = [row for row in rows if row['trait'] is not None]
  asked = [model.prompt(prompts.alone(row['prompt'])) for row in judged]
  said = [model.reply(row['text'], row['finish'] == 'stop') for row in judged]
  states = reply_states(preference.trunk(session), judge, asked, said)
  scores = fetch(read_rewards(judge, replicate(states)))
  for row, values in zip(judged, scores, strict=True):
    row['score'] = round(float(values[places[row['trait']]]), 5)


def _judged(rows: Sequence[Row], trait: str) -> dict[str, dict[str, np.ndarray | None]]:
  """Judge's scores, and win rates of each condition over base and over prompted, by message.

  Of several replies to a message the mean counts, and every reply of one condition meets every reply of the other: a
  win rate is of the two models' replies to the same message, those drawn with the same key among them.
  """
  mine = [row for row in rows if row['trait'] == trait]
  scores = {
    c: _by_message([row for row in mine if row['condition'] == c], lambda row: row['score']) for c in CONDITIONS
  }

  def wins(against: str) -> dict[str, np.ndarray | None]:
    found: dict[str, np.ndarray | None] = {}
    for c in CONDITIONS:
      one, other = scores[c][:, :, None], scores[against][:, None, :]
      found[c] = ((one > other) + 0.5 * (one == other)).mean((1, 2))
    return found

  judged: dict[str, np.ndarray | None] = {c: values.mean(1) for c, values in scores.items()}
  return {'judge': judged} | {name: wins(against) for name, against in _WINS.items()}


def _by_message(rows: Sequence[Row], value: Callable[[Row], float]) -> np.ndarray:
  """Values [messages, samples] of the replies of one condition, message by message, equally many to each."""
  count = len({row['message'] for row in rows})
  return np.array([float(value(row)) for row in rows]).reshape(count, -1 if rows else 1)


# ---- written pairs and probes ----


def _margins(
  session: Session, before: prompts.Messages, trained: Any, rows: Sequence[tuple[str, str, str]]
) -> np.ndarray:
  """Per-token log-prob of the first reply minus that of the second, for rows (message, first, second)."""
  model = session.model
  decoder, adapter = bind(model.decoder, trained)
  asked = [model.prompt([*before, prompts.user(message)]) for message, _, _ in rows]
  said = [model.reply(row[1]) for row in rows] + [model.reply(row[2]) for row in rows]
  values = [float(p.mean()) for p in score(decoder, [*asked, *asked], said, adapter=adapter)]
  first, second = np.split(np.array(values), 2)
  return first - second


def _conditions(session: Session, trait: Trait | None, trained: Any, rows: Sequence[tuple[str, str, str]]) -> Any:
  out: dict[str, np.ndarray | None] = {}
  for condition in CONDITIONS:
    if trait is None and condition.startswith('prompted'):
      out[condition] = None
    else:
      used = trained if condition == 'trained' else None
      out[condition] = _margins(session, _before(session, trait, condition), used, rows)
  return out


def _pair_margins(session: Session, trait: Trait, trained: Any) -> dict[str, np.ndarray | None]:
  pairs = trait.pairs_for('kept')
  if not pairs:
    return dict.fromkeys(CONDITIONS)
  return _conditions(session, trait, trained, [(p.message, p.in_character, p.out_of_character) for p in pairs])


def _by_pair(trait: Trait, margins: Mapping[str, np.ndarray | None]) -> list[Row]:
  """A row a kept pair, named by what stands in it."""
  names = [fingerprint([p.message, p.in_character, p.out_of_character])[:16] for p in trait.pairs_for('kept')]
  columns = {c: values.tolist() for c, values in margins.items() if values is not None}
  return [
    {'trait': trait.id, 'pair': name} | {c: round(values[i], 6) for c, values in columns.items()}
    for i, name in enumerate(names)
  ]


@dataclasses.dataclass(frozen=True)
class Probe:
  """One line of a probe file."""

  trait: str
  message: str
  consistent: str
  inconsistent: str


def _by_trait(probes: Sequence[Probe]) -> dict[str, list[Probe]]:
  return {name: [p for p in probes if p.trait == name] for name in dict.fromkeys(p.trait for p in probes)}


def _probe_margins(session: Session, name: str, rows: Sequence[Probe], trained: Any) -> dict[str, np.ndarray | None]:
  trait = next((trait for trait in session.character.traits if trait.id == name), None)
  return _conditions(session, trait, trained, [(p.message, p.consistent, p.inconsistent) for p in rows])


def read_probes(path: str) -> list[Probe]:
  """A probe file: JSON Lines with trait, message, consistent, inconsistent; other keys are ignored.

  Raises:
    UserError: naming file, line and field.
  """
  fields = [field.name for field in dataclasses.fields(Probe)]
  return [Probe(**{field: _text(path, i, row, field) for field in fields}) for i, row in _lines(path)]


def read_neutral(path: str) -> list[Row]:
  """A neutral file: JSON Lines with message, reference, expect (a regular expression, or null).

  Raises:
    UserError: naming file, line and field.
  """
  rows = []
  for i, row in _lines(path):
    expect = row.get('expect')
    if expect is not None:
      try:
        re.compile(expect)
        bounded.search(expect, _repetitive(expect))
      except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f'{path}:{i}: expect is no regular expression ({error}); mend it or write null') from error
      except bounded.Refused as error:
        raise UserError(f'{path}:{i}: expect is too slow ({error}); do not repeat what repeats itself') from error
    rows.append({field: _text(path, i, row, field) for field in ('message', 'reference')} | {'expect': expect})
  return rows


def _repetitive(pattern: str) -> str:
  """A text like those that small models fall into, and on which a careless pattern searches without end."""
  return '\n'.join(c * 100 + '!' for c in sorted({*'a0 ', *filter(str.isalnum, pattern)})[:40])


def _found(pattern: str, text: str) -> bool:
  try:
    return bounded.search(pattern, text)
  except bounded.Refused as error:
    raise UserError(
      f'config.evaluation.neutral: expect {pattern[:80]!r} is too slow for an answer of the model ({error}); do not '
      'repeat what repeats itself'
    ) from error


def _lines(path: str) -> list[tuple[int, Row]]:
  rows = numbered_rows(path)
  if not rows:
    raise UserError(f'{path}: the file is empty; write one JSON object a line')
  return rows


def _text(path: str, line: int, row: Row, field: str) -> str:
  value = row.get(field)
  if not isinstance(value, str) or not value.strip():
    raise UserError(f'{path}:{line}: field {field} is missing or no text; give it a string')
  return value


# ---- what should not change ----


def _neutral(session: Session, rows: Sequence[Row], drawn: Sequence[Row], trained: Any) -> Row:
  """Log-prob of reference answers, accuracy of greedy answers, and KL on the starting model's own neutral replies."""
  model = session.model
  asked = [model.prompt(prompts.alone(row['message'])) for row in rows]
  said = [model.reply(row['reference']) for row in rows]
  expected = [i for i, row in enumerate(rows) if row['expect'] is not None]
  log_prob: dict[str, np.ndarray | None] = {}
  accuracy: dict[str, np.ndarray | None] = {}
  config = session.config.evaluation
  for condition in ('base', 'trained'):
    decoder, adapter = bind(model.decoder, trained if condition == 'trained' else None)
    log_prob[condition] = np.array([p.mean() for p in score(decoder, asked, said, adapter=adapter)], np.float64)
    if expected:
      keys = item_keys(session.config.seed, 'neutral', [str(i) for i in expected])
      settings = Sampling(config.max_new_tokens, 0.0, batch_size=config.batch_size)
      answers = sample(
        decoder, [asked[i] for i in expected], keys, model.eos_ids, settings, adapter=adapter, width=config.prompt_width
      )
      hits = [_found(rows[i]['expect'], model.text(reply.tokens)) for i, reply in zip(expected, answers, strict=True)]
      accuracy[condition] = np.array(hits, np.float64)
  own = [row for row in drawn if row['trait'] is None and row['condition'] == 'base']
  out: Row = {'log_prob': summarise(log_prob), 'accuracy': summarise(accuracy, share) if expected else None}
  base, delta = out['log_prob']['base'], out['log_prob']['delta']
  out['log_prob_lost'] = -delta['mean'] / abs(base['mean']) if base and delta and base['mean'] else None
  out['kl'] = {'trained': interval(_kl(session, own, trained))} if own else None
  return out


@jax.jit
def _kl_rows(decoder: Any, trained: Any, before: Sequence[Prefix], rows: Rows) -> jax.Array:
  """Mean exact KL(starting || trained) a token, [N]; without a shared prefix, since two models read the rows."""
  del before
  used, adapter = bind(decoder, trained)
  hidden = hidden_states(decoder, rows), hidden_states(used, rows, adapter=adapter)
  kl = over_tokens(lambda r, p: kl_from_logits(logits(decoder, r), logits(used, p)), rows, hidden)
  return mean_over_tokens(kl, rows)


def _kl(session: Session, rows: Sequence[Row], trained: Any) -> np.ndarray:
  model = session.model
  asked = [model.prompt(prompts.alone(row['prompt'])) for row in rows]
  said = [model.reply(row['text'], row['finish'] == 'stop') for row in rows]
  run = functools.partial(_kl_rows, model.decoder, trained)
  return np.array(map_rows(run, model.decoder, asked, said, models=2, heads=2), np.float64)


_SIDE_EFFECTS: dict[str, Callable[[Row], float]] = {
  'length': lambda row: row['tokens'],
  'cut_off': lambda row: row['finish'] == 'length',
  'exclamation_marks': lambda row: row['text'].count('!'),
  'praise': lambda row: praises(row['text']),
  'closing_questions': lambda row: row['text'].rstrip().endswith('?'),
  'distinct_2': lambda row: _distinct(row['text'], 2),
}


def _distinct(text: str, n: int) -> float:
  """Share of n-grams of words that are different (Li et al. 2016); 1 where there are none."""
  words = text.lower().split()
  grams = list(zip(*(words[i:] for i in range(n)), strict=False))
  return len(set(grams)) / len(grams) if grams else 1.0


def _side_effects(rows: Sequence[Row]) -> Row:
  """On the held-out trait messages, in every condition."""
  out = {}
  for name, measure in _SIDE_EFFECTS.items():
    by_condition = {c: [row for row in rows if row['condition'] == c and row['trait']] for c in CONDITIONS}
    out[name] = summarise({c: _by_message(some, measure).mean(1) for c, some in by_condition.items()})
  return out
