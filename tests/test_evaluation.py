"""The figures of the summary: paired, with intervals, null where nothing was measured."""

import types

import numpy as np
import pytest

from charjax.stages.evaluation import (
  CONDITIONS,
  _judged,
  _kl,
  internalisation,
  summarise,
  summarise_shares,
  summarise_wins,
)
from charjax.stages.over_optimisation import curve
from charjax.stages.statistics import comparisons, interval, share


def four(rng, n=20):
  return {name: rng.normal(size=n) for name in ('base', 'prompted', 'prompted_examples', 'trained')}


def test_delta_is_paired_by_message():
  values = four(np.random.default_rng(0))
  values['trained'] = values['base'] + 0.1 + 0.01 * np.random.default_rng(1).normal(size=20)
  found = summarise(values)
  assert found['base'] == interval(values['base']) and found['prompted'] == interval(values['prompted'])
  # The messages differ much more than the two models do on one message.
  assert 0.09 < found['delta']['low'] < found['delta']['high'] < 0.11
  assert found['trained']['high'] - found['trained']['low'] > 0.5


def test_what_was_not_measured_is_null():
  values = {'base': np.ones(4), 'trained': np.zeros(4), 'prompted': None}
  found = summarise(values)
  assert found['prompted'] is None and found['prompted_examples'] is None and found['delta']['mean'] == -1
  assert summarise({'base': None, 'trained': None})['delta'] is None
  assert summarise({'base': np.zeros(0), 'trained': np.zeros(0)})['delta'] is None


def test_without_held_out_messages_no_distance_is_told():
  session = types.SimpleNamespace(model=types.SimpleNamespace(decoder=None))
  assert interval(_kl(session, [], None, True)) is None


def test_to_win_always_is_not_certainty():
  wins = {'base': np.full(8, 0.5), 'prompted': np.ones(8), 'prompted_examples': np.zeros(8), 'trained': np.ones(8)}
  found = summarise_wins(wins, {})
  assert found['trained'] == share([1.0] * 8) and found['trained']['low'] < 0.7
  assert found['delta']['mean'] == 0.5 and found['delta']['low'] == pytest.approx(found['trained']['low'] - 0.5)
  # Against another condition base has a rate of its own, and the difference is one of pairs.
  against = wins | {'base': np.array([0, 1, 0, 1, 0, 1, 0, 1.0])}
  assert summarise_wins(against, {})['delta'] == interval(against['trained'] - against['base'])


@pytest.mark.parametrize(('one', 'other'), [(1, 1), (3, 3), (5, 1), (2, 6)])
def test_comparisons_count_as_the_single_ones_that_vary_as_much(one, other):
  rng = np.random.default_rng(0)
  first, second = rng.normal(size=(40_000, one, 1)), rng.normal(size=(40_000, 1, other))
  shares = (first > second).mean((1, 2))
  assert 0.25 / shares.var() == pytest.approx(comparisons(one, other), rel=0.03)
  found = summarise_wins({'base': None, 'trained': shares[:60]}, {'trained': comparisons(one, other)})
  assert found['trained'] == share(shares[:60], comparisons(one, other))


def test_where_no_answer_changed_no_change_is_not_certain():
  values = {'base': np.zeros(40), 'trained': np.zeros(40)}
  found = summarise_shares(values)
  assert found['trained']['high'] == pytest.approx(0.0876, abs=1e-3)  # Wilson's of none of 40
  assert found['delta']['mean'] == 0 and found['delta']['low'] < -0.05 and found['delta']['high'] > 0.05
  assert summarise_shares(values | {'trained': None})['delta'] is None


def test_internalisation_is_the_share_of_a_prompted_effect_that_is_clear_of_zero():
  rng = np.random.default_rng(0)
  base = rng.normal(size=40)
  values = {'base': base, 'prompted': base, 'prompted_examples': base + 1 + 0.1 * rng.normal(size=40)}
  values['trained'] = base + 0.5 + 0.1 * rng.normal(size=40)
  found = internalisation(values)
  assert found['low'] < 0.5 < found['high'] and found['high'] - found['low'] < 0.2
  assert internalisation(values | {'prompted_examples': base + rng.normal(size=40)}) is None
  assert internalisation(values | {'prompted_examples': None}) is None
  assert internalisation({name: value[:1] for name, value in values.items()}) is None


def test_every_reply_of_one_condition_meets_every_reply_of_the_other():
  scores = {
    'base': [[1, 2], [5, 5]],
    'trained': [[3, 2], [0, 9]],
    'prompted': [[2], [6]],
    'prompted_examples': [[9], [9]],
  }
  rows = [
    {'trait': trait, 'message': m, 'condition': c, 'score': score + (trait == 'b')}
    for trait in 'ab' for c in CONDITIONS for m, some in enumerate(scores[c]) for score in some
  ]  # fmt: skip
  found = _judged(rows, 'a')
  assert found['judge']['trained'].tolist() == [2.5, 4.5] and found['judge']['prompted'].tolist() == [2, 6]
  # 3 beats both, 2 beats one and draws with the other; then 0 loses to both and 9 beats both.
  assert found['win_rate']['trained'].tolist() == [0.875, 0.5]
  assert found['win_rate']['base'].tolist() == [0.5, 0.5]
  assert found['win_rate_vs_prompted']['trained'].tolist() == [0.75, 0.5]


def test_the_gain_of_a_step_is_over_the_plain_replies_to_its_own_messages():
  samples = [
    {'step': 10, 'message': 'a', 'kl': 1.0, 'reward': 3.0, 'judge': 0.0},
    {'step': 10, 'message': 'a', 'kl': 3.0, 'reward': 5.0, 'judge': 2.0},
    {'step': 10, 'message': 'b', 'kl': 0.0, 'reward': 1.0, 'judge': 1.0},
    {'step': 1, 'message': 'b', 'kl': 0.0, 'reward': 0.5, 'judge': 0.5},
    {'step': 1, 'message': 'no plain reply', 'kl': 9.0, 'reward': 9.0, 'judge': 9.0},
  ]
  plain = [{'message': 'a', 'reward': 1.0, 'judge': 1.0}, {'message': 'a', 'reward': 2.0, 'judge': 0.0}]
  plain += [{'message': 'b', 'reward': 0.5, 'judge': 0.5}]
  first, second = curve(samples, plain)
  assert first == {'step': 1} | {key: interval([0.0]) for key in ('kl', 'reward', 'judge', 'gap')}
  assert second == {
    'step': 10,
    'kl': interval([2.0, 0.0]),
    'reward': interval([2.5, 0.5]),
    'judge': interval([0.5, 0.5]),
    'gap': interval([2.0, 0.0]),
  }
