"""Intervals: against published values, and right as often as they say."""

import math

import numpy as np
import pytest

from charjax.stages import statistics
from charjax.stages.statistics import combine, correlation, interval, kappa, pool, ratio, share


@pytest.mark.parametrize(
  ('hits', 'n', 'low', 'high'),
  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
  [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_has_the_published_values(hits, n, low, high):
  found = share([True] * hits + [False] * (n - hits))
  assert found == pytest.approx({'mean': hits / n, 'low': low, 'high': high, 'n': n}, abs=6e-5)
  mirrored = share(np.array([False] * hits + [True] * (n - hits)))
  # A draw is half a hit.
  assert share([0.5] * (2 * n)) == pytest.approx(share([1.0] * n + [0.0] * n))
  assert (mirrored['low'], mirrored['high']) == pytest.approx((1 - high, 1 - low), abs=6e-5)


def test_hits_that_are_shares_of_several_tries_make_the_interval_narrower():
  rng = np.random.default_rng(0)
  chances = rng.uniform(0.3, 0.9, 60)  # of each message
  means = [(rng.binomial(9, chances) / 9).mean() for _ in range(2000)]
  found = share(rng.binomial(9, chances) / 9, 9)
  # As wide as a resampling of messages: wider than the luck of the draw alone, narrower than 60 single tries.
  single = share((rng.uniform(size=60) < chances).astype(float))
  half = (found['high'] - found['low']) / 2
  assert 1.96 * np.std(means) < half < 0.7 * (single['high'] - single['low']) / 2
  assert half == pytest.approx(1.96 * np.sqrt(np.var(rng.binomial(9, chances) / 9) / 60), rel=0.15)


@pytest.mark.parametrize(
  ('freedom', 'expected', 'tolerance'),
  [
    (1, 12.7062, 1e-4),
    (2, 4.30265, 1e-5),
    (3, 3.182, 0.03),
    (5, 2.571, 3e-3),
    (10, 2.2281, 3e-4),
    (15, 2.1314, 1e-4),
    (39, 2.0227, 1e-4),
    (120, 1.9799, 1e-4),
  ],
)
def test_students_t_has_the_values_of_the_tables(freedom, expected, tolerance):
  assert statistics._t_quantile(freedom) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize('n', [2, 4, 16, 40])
def test_95_of_100_intervals_hold_the_mean(n, monkeypatch):
  # Fewer resamples move the ends by less than the trials here can tell.
  monkeypatch.setattr(statistics, '_RESAMPLES', 1000)
  rng = np.random.default_rng(n)
  trials = 1500
  found = [interval(rng.normal(3, 2, n), seed=i) for i in range(trials)]
  covered = np.mean([f['low'] <= 3 <= f['high'] for f in found])
  assert 0.93 <= covered <= 0.97
  # As often too low as too high, and as wide as Student's t says.
  missed_low, missed_high = (np.mean([f['high'] < 3 for f in found]), np.mean([f['low'] > 3 for f in found]))
  assert max(missed_low, missed_high) < 0.045
  width = np.mean([f['high'] - f['low'] for f in found])
  smaller = math.sqrt(2 / (n - 1)) * math.gamma(n / 2) / math.gamma((n - 1) / 2)  # that a deviation is of few items
  assert width == pytest.approx(2 * statistics._t_quantile(n - 1) * 2 * smaller / np.sqrt(n), rel=0.05)


@pytest.mark.parametrize('n', [12, 16, 60])
def test_95_of_100_shares_hold_the_truth(n):
  rng = np.random.default_rng(n)
  # Of whole hits, coverage cannot be 95% for every truth: it is in the mean over them.
  truths = rng.uniform(0.05, 0.95, 4000)
  assert 0.93 <= np.mean([holds(share(rng.random(n) < truth), truth) for truth in truths]) <= 0.97


def test_an_interval_is_of_the_mean_and_the_same_each_time():
  values = np.random.default_rng(0).exponential(size=50)
  found = interval(values)
  assert found == interval(list(values)) != interval(values, seed=1)
  assert found['mean'] == pytest.approx(values.mean()) and found['n'] == 50
  shifted = interval(values * 2 + 10)
  assert [shifted[k] for k in ('low', 'high')] == pytest.approx([found[k] * 2 + 10 for k in ('low', 'high')])


def test_many_items_are_resampled_a_few_at_a_time_and_alike(monkeypatch):
  rng = np.random.default_rng(1)
  one, other = rng.exponential(size=(2, 30))
  few = other[:20]

  def intervals():
    return interval(one), ratio(one, other, True), ratio(one, few, False)

  whole = intervals()
  monkeypatch.setattr(statistics, '_AT_ONCE', 100)
  assert intervals() == whole


def test_too_little_to_tell():
  assert interval([]) is None and share([]) is None
  assert interval([3.0]) == {'mean': 3.0, 'low': None, 'high': None, 'n': 1}
  assert interval([2.0] * 5) == {'mean': 2.0, 'low': 2.0, 'high': 2.0, 'n': 5}
  assert correlation([1, 2], [1, 2]) is None and correlation([1, 1, 1], [1, 2, 3]) is None


def figure(values: np.ndarray) -> dict[str, float]:
  """Student's own interval, without resampling."""
  half = statistics._t_quantile(len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
  return {'mean': values.mean(), 'low': values.mean() - half, 'high': values.mean() + half, 'n': len(values)}


def holds(found: dict[str, float], truth: float) -> bool:
  return found['low'] <= truth <= found['high']


def test_a_difference_of_shares_has_the_published_interval():
  # Newcombe 1998, Statistics in Medicine 17:873, table II, method 10, of Wilson's: 56/70 less 48/80, 9/10 less 3/10.
  for (a, m), (b, n), low, high in (((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090)):
    one, other = (share([True] * hits + [False] * (total - hits)) for hits, total in ((a, m), (b, n)))
    found = combine([(1.0, one), (-1.0, other)])
    assert found == pytest.approx({'mean': a / m - b / n, 'low': low, 'high': high, 'n': min(m, n)}, abs=6e-5)
  mean = combine([(0.5, one), (0.5, other)])
  assert mean['mean'] == pytest.approx(0.6) and mean['high'] - mean['low'] < found['high'] - found['low']
  assert combine([(1.0, one), (-1.0, interval([3.0]))])['low'] is None


def test_combined_and_pooled_intervals_hold_the_truth_95_times_of_100():
  rng, trials, items = np.random.default_rng(0), 2000, 16
  gaps = [combine([(1, figure(rng.normal(3, 1, 16))), (-1, figure(rng.normal(1, 0.5, 20)))]) for _ in range(trials)]
  assert 0.93 <= np.mean([holds(gap, 2) for gap in gaps]) <= 0.97
  for seeds in (2, 3, 5):
    drawn, same, fixed = [], [], []
    for _ in range(trials):
      luck, noise = rng.normal(0, 0.05, (seeds, 1)), rng.normal(0, 0.05, (seeds, items))
      drawn.append(pool([figure(run) for run in 1 + luck + noise], False))
      # Of the same items: what they have in common does not go away with more seeds.
      common = rng.normal(0, 0.3, items)
      same.append(pool([figure(run) for run in 1 + luck + noise + common], True))
      fixed.append(pool([figure(run) for run in 1 + luck + noise + common], False))
    assert 0.93 <= np.mean([holds(one, 1) for one in drawn]) <= 0.97
    assert 0.93 <= np.mean([holds(one, 1) for one in same]) <= 0.99  # on the safe side
    assert seeds == 2 or np.mean([holds(one, 1) for one in fixed]) < 0.9
  assert pool([figure(np.arange(3.0))], True) == figure(np.arange(3.0))


def test_correlation():
  a, b = np.random.default_rng(0).normal(size=(2, 30))
  x, y = a - a.mean(), b - b.mean()
  assert correlation(a, b) == pytest.approx((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))
  assert correlation([1, 2, 3], [-1, -2, -3]) == pytest.approx(-1)


@pytest.mark.parametrize('tries', [1, 3])
def test_a_share_of_draws_or_of_near_certainty_is_no_surer_than_its_tries_allow(tries):
  n = 60
  for hits in ([0.5] * 56 + [1.0] * 4, [1.0] * 59 + [8 / 9], [7 / 9] * n):
    found = share(hits, tries)
    p = np.mean(hits)
    plain = share([p] * (n * tries))  # as many single tries
    assert found['low'] <= plain['low'] + 1e-9 and found['high'] >= plain['high'] - 1e-9
    assert found['n'] == n


def one_message_each(labels) -> list[str]:
  return [str(i) for i in range(len(labels))]


@pytest.mark.parametrize(
  ('table', 'expected'),
  [
    ([[20, 5], [10, 15]], 0.4),
    ([[45, 15], [25, 15]], 0.1304),
    ([[25, 35], [5, 35]], 0.2593),  # of equal agreement, the one with the fairer chance has the larger kappa
    ([[88, 14, 18], [10, 40, 10], [2, 6, 12]], 0.492),  # Fleiss, Cohen and Everitt 1969, Psychological Bulletin 72:323
  ],
)
def test_kappa_has_the_values_of_known_tables(table, expected):
  first = [str(a) for a, row in enumerate(table) for count in row for _ in range(count)]
  second = [str(b) for row in table for b, count in enumerate(row) for _ in range(count)]
  found = kappa(first, second, one_message_each(first))
  assert found['mean'] == pytest.approx(expected, abs=6e-4) and found['low'] < expected < found['high']
  swapped = kappa(second, first, one_message_each(first))
  assert swapped['mean'] == pytest.approx(found['mean'])


@pytest.mark.parametrize('seed', range(5))
def test_kappa_against_chance_taken_over_all_pairs(seed):
  rng = np.random.default_rng(seed)
  first = rng.choice(['a', 'b', 'c'], 37, p=[0.6, 0.3, 0.1])
  second = np.where(rng.uniform(size=37) < 0.5, first, rng.choice(['a', 'b', 'd'], 37))
  agreed, chance = np.mean(first == second), np.mean(first[:, None] == second[None, :])
  found = kappa(list(first), list(second), one_message_each(first))
  assert found['mean'] == pytest.approx((agreed - chance) / (1 - chance), abs=1e-12) and found['n'] == 37


def test_kappa_s_interval_holds_it_95_times_of_100(monkeypatch):
  monkeypatch.setattr(statistics, '_RESAMPLES', 500)
  rng, n, trials, true = np.random.default_rng(0), 50, 700, 0.4
  covered = 0
  for _ in range(trials):
    first = rng.uniform(size=n) < 0.6
    # A copy now and then, else an answer of one's own with the same habits: kappa is how often it is a copy.
    second = np.where(rng.uniform(size=n) < true, first, rng.uniform(size=n) < 0.6)
    found = kappa([str(a) for a in first], [str(b) for b in second], one_message_each(first))
    covered += found['low'] <= true <= found['high']
  assert 0.93 <= covered / trials <= 0.97


def test_kappa_resamples_messages_not_verdicts():
  rng = np.random.default_rng(0)
  first, second = ([str(v) for v in rng.integers(0, 2, 30)] for _ in range(2))
  once = kappa(first, second, one_message_each(first))
  # The same reviewer twice tells nothing new.
  assert kappa(first * 2, second * 2, one_message_each(first) * 2) == pytest.approx(once)
  apart = kappa(first * 2, second * 2, one_message_each(first * 2))
  assert apart['high'] - apart['low'] < 0.8 * (once['high'] - once['low'])


def test_kappa_of_too_little():
  assert kappa([], [], []) is None and kappa(['a'] * 5, ['a'] * 5, list('12345')) is None
  alone = kappa(['a', 'b'], ['a', 'b'], ['m', 'm'])
  assert (alone['mean'], alone['low'], alone['n']) == (1.0, None, 1)
  constant = kappa(['a'] * 6, list('aaabbb'), list('123456'))
  assert constant == {'mean': 0.0, 'low': None, 'high': None, 'n': 6}
  complete = kappa(list('aabb') * 3, list('aabb') * 3, one_message_each('x' * 12))
  # Resampling would say that it is certain; of 12 messages Wilson's share does not.
  assert complete['mean'] == complete['high'] == 1 and complete['low'] == pytest.approx(
    2 * share([1.0] * 12)['low'] - 1
  )


@pytest.mark.parametrize('paired', [True, False])
def test_95_of_100_ratios_hold_the_truth(paired, monkeypatch):
  monkeypatch.setattr(statistics, '_RESAMPLES', 1000)
  rng, found = np.random.default_rng(8), []
  for i in range(1000):
    below = rng.normal(1, 0.6, 16)
    # Of the same messages; else of others that are like them.
    above = 0.5 * below + rng.normal(0, 0.2, 16) if paired else rng.normal(0.5, 0.4, 24)
    found.append(ratio(above, below, paired, seed=i))
    assert found[-1]['mean'] == above.mean() / below.mean() and found[-1]['n'] == 16
  assert 0.93 <= np.mean([f['low'] <= 0.5 <= f['high'] for f in found]) <= 0.97
  assert ratio(np.ones(1), np.full(1, 2.0), paired) == {'mean': 0.5, 'low': None, 'high': None, 'n': 1}
