"""evaluation: what training changed, beside what showing the trait would have changed.

Reads the character, messages/, replies/, preference/, baseline/ and policy/; writes evaluation/replies.jsonl (those of
baseline/ among them), evaluation/margins.jsonl (of each kept pair, so that runs can be compared pair by pair) and
evaluation/summary.json, by condition (conditions.py). Every figure is {mean, low, high, n}; delta is trained minus
base, paired by message.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from charjax.character import Trait
from charjax.engine.rows import Rows
from charjax.engine.score import hidden_states, map_rows, mean_over_tokens
from charjax.files import Row, read_jsonl, write_jsonl, write_text
from charjax.model.decoder import Prefix
from charjax.progress import Progress
from charjax.stages import conditions, over_optimisation, policy, preference
from charjax.stages.conditions import CONDITIONS
from charjax.stages.habits import praises
from charjax.stages.statistics import combine, comparisons, interval, ratio, share
from charjax.training.heads import bind
from charjax.training.policy_loss import token_kl
from charjax.workdir import Session, fingerprint

_WINS = {'win_rate': 'base', 'win_rate_vs_prompted': 'prompted'}  # whose replies are to be beaten
Values = dict[str, np.ndarray | None]  # by condition


def run(session: Session) -> Row:
  """Draws and judges the policy's replies, scores written pairs, and writes the summary; returns counts."""
  folder, baseline = session.folder('evaluation'), session.folder('baseline')
  trained = policy.load(session)
  conditions.tell_other_probes(session)
  drawn = read_jsonl(baseline / 'replies.jsonl') + conditions.draw(session, 'evaluation', ('trained',), trained)
  write_jsonl(folder / 'replies.jsonl', drawn)
  measures = json.loads((baseline / 'measures.json').read_text())
  with Progress('evaluation', conditions.parts_of_measure(session) + 1, 'parts') as bar:
    measures['trained'] = conditions.measure(session, 'trained', trained, bar)
    pairs, summary = _summary(session, drawn, measures)
    neutral = [row for row in drawn if row['trait'] is None and row['condition'] == 'base']
    summary['neutral']['kl'] = {'trained': interval(_kl(session, neutral, trained, False))} if neutral else None
    # The first reply to each message: two models read them, and say of every token the whole distribution.
    said = [row for row in drawn if row['trait'] and row['condition'] == 'trained' and not row['sample']]
    summary['distance'] = {'kl': {'trained': interval(_kl(session, said, trained, True))}}
    summary['over_optimisation'] = over_optimisation.measure(session, preference.load(session, 'judge'))
    bar.advance()
  write_jsonl(folder / 'margins.jsonl', pairs)
  write_text(folder / 'summary.json', json.dumps(summary, indent=2))
  probes = sum(map(len, measures['trained']['probes'].values()))
  return {'replies': len(drawn), 'probes': probes, 'neutral': len(measures['trained']['log_prob'])}


def _summary(session: Session, drawn: Sequence[Row], measures: Mapping[str, Row]) -> tuple[list[Row], Row]:
  """A row a kept pair, and the figures of all that was drawn and measured."""
  samples = {'base': session.config.evaluation.samples, 'trained': session.config.evaluation.samples}
  tries = {
    name: {c: comparisons(samples.get(c, 1), samples.get(against, 1)) for c in CONDITIONS}
    for name, against in _WINS.items()
  }

  def measured(*path: str) -> Values:
    """Of each condition; None where it was not."""
    found = {c: functools.reduce(lambda row, key: row.get(key, {}), path, measures[c]) for c in CONDITIONS}
    return {c: np.array(values, np.float64) if values else None for c, values in found.items()}

  pairs: list[Row] = []
  summary: Row = {'traits': {}, 'probes': {}, 'internalisation': {}}
  for trait in session.character.traits:
    values = {'margin': measured('pairs', trait.id)} | _judged(drawn, trait.id)
    pairs += _by_pair(trait, values['margin'])
    summary['traits'][trait.id] = {
      name: summarise_wins(v, tries[name]) if name in tries else summarise(v) for name, v in values.items()
    }
    summary['internalisation'][trait.id] = {name: internalisation(v) for name, v in values.items() if name not in tries}
  for name in measures['trained']['probes']:
    margins = measured('probes', name)
    accuracy = {c: (v > 0).astype(float) if v is not None else None for c, v in margins.items()}
    summary['probes'][name] = {'margin': summarise(margins), 'accuracy': summarise_shares(accuracy)}
  summary['neutral'] = _neutral(measured('log_prob'), measured('accuracy'))
  summary['side_effects'] = _side_effects(drawn)
  return pairs, summary


# ---- figures ----


def summarise(values: Values) -> Row:
  """Each condition's figure, and delta = trained - base paired by message; null where not measured."""
  found = {c: values.get(c) for c in CONDITIONS}
  out: Row = {c: interval(v) if v is not None else None for c, v in found.items()}
  return out | {'delta': _delta(values)}


def _delta(values: Values) -> Row | None:
  base, trained = values.get('base'), values.get('trained')
  return interval(trained - base) if base is not None and trained is not None else None


def summarise_wins(values: Values, tries: Mapping[str, float]) -> Row:
  """Win rates, each the share of all comparisons of a message, which count as `tries` single ones.

  Against itself a condition wins half, so that trained - base is a share too, and never certain.
  """
  out, base = _shares(values, tries), values['base']
  if out['trained'] is not None and base is not None and (base == 0.5).all():
    return out | {'delta': out['trained'] | {end: out['trained'][end] - 0.5 for end in ('mean', 'low', 'high')}}
  return out | {'delta': _delta(values)}


def summarise_shares(values: Values, tries: Mapping[str, float] | None = None) -> Row:
  """Of shares of hits, each of so many `tries` (1 by default), by condition; delta is paired by message."""
  out, base, trained = _shares(values, tries or {}), values.get('base'), values.get('trained')
  if base is not None and trained is not None and len(base) and not np.ptp(trained - base):
    # However few, resampled they would be certain: told as of two models that are asked apart, which is wider.
    return out | {'delta': combine([(1.0, out['trained']), (-1.0, out['base'])])}
  return out | {'delta': _delta(values)}


def _shares(values: Values, tries: Mapping[str, float]) -> Row:
  found = {c: values.get(c) for c in CONDITIONS}
  return {c: share(v, tries.get(c, 1)) if v is not None else None for c, v in found.items()}


def internalisation(values: Values) -> Row | None:
  """(trained - base) / (prompted with examples - base), by message; null unless the prompted effect is clear of 0."""
  base, shown, trained = values['base'], values['prompted_examples'], values['trained']
  if base is None or shown is None or trained is None:
    return None
  effect = interval(shown - base)
  if effect is None or effect['low'] is None or effect['low'] <= 0 <= effect['high']:
    return None
  return ratio(trained - base, shown - base, paired=True)


def _judged(rows: Sequence[Row], trait: str) -> dict[str, Values]:
  """Judge's scores, and win rates of each condition over base and over prompted, by message.

  Of several replies to a message the mean counts, and every reply of one condition meets every reply of the other: a
  win rate is of the two models' replies to the same message, those drawn with the same key among them.
  """
  mine = [row for row in rows if row['trait'] == trait]
  scores = {
    c: _by_message([row for row in mine if row['condition'] == c], lambda row: row['score']) for c in CONDITIONS
  }

  def wins(against: str) -> Values:
    found: Values = {}
    for c in CONDITIONS:
      one, other = scores[c][:, :, None], scores[against][:, None, :]
      found[c] = ((one > other) + 0.5 * (one == other)).mean((1, 2))
    return found

  judged: Values = {c: values.mean(1) for c, values in scores.items()}
  return {'judge': judged} | {name: wins(against) for name, against in _WINS.items()}


def _by_message(rows: Sequence[Row], value: Callable[[Row], float]) -> np.ndarray:
  """Values [messages, samples] of the replies of one condition, message by message, equally many to each."""
  count = len({row['message'] for row in rows})
  return np.array([float(value(row)) for row in rows]).reshape(count, -1 if rows else 1)


def _by_pair(trait: Trait, margins: Mapping[str, np.ndarray | None]) -> list[Row]:
  """A row a kept pair, named by what stands in it."""
  names = [fingerprint([p.message, p.in_character, p.out_of_character])[:16] for p in trait.pairs_for('kept')]
  columns = {c: values.tolist() for c, values in margins.items() if values is not None}
  return [
    {'trait': trait.id, 'pair': name} | {c: round(values[i], 6) for c, values in columns.items()}
    for i, name in enumerate(names)
  ]


# ---- what should not change ----


def _neutral(log_prob: Values, accuracy: Values) -> Row:
  """Log-prob of reference answers, how much of it was lost, and accuracy of greedy answers."""
  out: Row = {
    'log_prob': summarise(log_prob),
    'accuracy': summarise_shares(accuracy) if accuracy['base'] is not None else None,
  }
  base, delta = out['log_prob']['base'], out['log_prob']['delta']
  out['log_prob_lost'] = -delta['mean'] / abs(base['mean']) if base and delta and base['mean'] else None
  return out


@functools.partial(jax.jit, static_argnames='turned')
def _kl_rows(decoder: Any, trained: Any, before: Sequence[Prefix], rows: Rows, turned: bool) -> jax.Array:
  """Mean exact KL(starting || trained) a token, [N], or KL(trained || starting); without a shared prefix, since two
  models read the rows."""
  del before
  used, adapter = bind(decoder, trained)
  start, end = (decoder, hidden_states(decoder, rows)), (used, hidden_states(used, rows, adapter=adapter))
  reference, model = (end, start) if turned else (start, end)
  return mean_over_tokens(token_kl(reference, model, rows), rows)


def _kl(session: Session, rows: Sequence[Row], trained: Any, turned: bool) -> np.ndarray:
  """Of each reply, the mean over its tokens of a KL of whole distributions at temperature 1."""
  decoder = session.model.decoder
  run = functools.partial(_kl_rows, decoder, trained, turned=turned)
  return np.array(map_rows(run, decoder, *conditions.exchanges(session.model, rows), models=2, heads=2), np.float64)


_SIDE_EFFECTS: dict[str, Callable[[Row], float]] = {
  'length': lambda row: row['tokens'],
  'cut_off': lambda row: row['finish'] == 'length',
  'exclamation_marks': lambda row: row['text'].count('!'),
  'praise': lambda row: praises(row['text']),
  'closing_questions': lambda row: row['text'].rstrip().endswith('?'),
  'distinct_2': lambda row: _distinct(row['text'], 2),
}


_SHARES = ('cut_off', 'praise', 'closing_questions')  # of replies


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
    values = {c: _by_message(some, measure) for c, some in by_condition.items()}
    means: Values = {c: each.mean(1) for c, each in values.items()}
    tries = {c: each.shape[1] for c, each in values.items()}
    out[name] = summarise_shares(means, tries) if name in _SHARES else summarise(means)
  return out
