"""Means with 95% intervals: resampled for figures, Wilson's for shares."""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

Interval = dict[str, Any]

_RESAMPLES = 10_000
_AT_ONCE = 2**22  # numbers of items that are drawn together
_FEW = 8  # items, of fewer of which resampling says little
_Z = NormalDist().inv_cdf(0.975)


def interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> Interval | None:
  """Mean and 95% interval over items that are independent of each other (messages, pairs); None without any.

  The percentile bootstrap is too narrow for few items; its percentiles are widened as Hesterberg (2015,
  arXiv:1411.5279, section 5.2) does: Phi(-sqrt(n / (n - 1)) t). Of fewer than eight items it would end at the least and
  the greatest of them, and theirs is Student's own. One item has a mean and no interval. Items that are
  all equal have one of no width, which is right for a length that never varies and wrong for a share: see `share`.
  """
  array = np.asarray(values, np.float64)
  n = len(array)
  if n == 0:
    return None
  mean = float(array.mean())
  if n == 1:
    return {'mean': mean, 'low': None, 'high': None, 'n': n}
  if np.ptp(array) == 0:
    return {'mean': mean, 'low': mean, 'high': mean, 'n': n}
  if n < _FEW:
    half = _t_quantile(n - 1) * float(array.std(ddof=1)) / math.sqrt(n)
    return {'mean': mean, 'low': mean - half, 'high': mean + half, 'n': n}
  tail = _tail(n)
  means = np.concatenate([array[index].mean(1) for index in _resamples(np.random.default_rng(seed), n)])
  low, high = np.quantile(means, [tail, 1 - tail])
  return {'mean': mean, 'low': float(low), 'high': float(high), 'n': n}


def ratio(above: np.ndarray, below: np.ndarray, paired: bool, seed: int = 0) -> Interval:
  """Mean of one over mean of the other, with percentiles of a bootstrap, widened as in `interval`; of fewer than eight
  items without.

  Args:
    above: values of items that are independent of each other.
    below: the same; its mean should be clear of zero, or the ratio may be anything.
    paired: both are of the same items in the same order, which are resampled together; else each by itself, and n is
      the lesser of their numbers.
    seed: of the resampling.
  """
  rng, n = np.random.default_rng(seed), min(len(above), len(below))
  found: Interval = {'mean': float(above.mean() / below.mean()), 'low': None, 'high': None, 'n': n}
  if n < _FEW:
    return found
  if paired:
    ratios = [above[index].mean(1) / below[index].mean(1) for index in _resamples(rng, n)]
  else:
    over, under = (np.concatenate([x[index].mean(1) for index in _resamples(rng, len(x))]) for x in (above, below))
    ratios = [over / under]
  low, high = np.quantile(np.concatenate(ratios), [_tail(n), 1 - _tail(n)])
  return found | {'low': float(low), 'high': float(high)}


def _resamples(rng: np.random.Generator, n: int) -> Iterator[np.ndarray]:
  """Which of n items each resample has, [some, n]: a few at a time, since of many items all would fill the memory."""
  some = max(1, _AT_ONCE // n)
  for start in range(0, _RESAMPLES, some):
    yield rng.integers(0, n, (min(some, _RESAMPLES - start), n))


def _tail(n: int) -> float:
  """Which percentiles of n resampled items make a 95% interval: see `interval`."""
  return NormalDist().cdf(-math.sqrt(n / (n - 1)) * _t_quantile(n - 1))


def _t_quantile(freedom: int) -> float:
  """The 97.5% point of Student's t: in closed form at freedom 1 and 2, then by Cornish-Fisher expansion (Abramowitz and
  Stegun 26.7.5); 1% off at freedom 3."""
  if freedom == 1:
    return math.tan(0.475 * math.pi)
  if freedom == 2:
    return 0.95 / math.sqrt(2 * 0.975 * 0.025)
  z, v = _Z, freedom
  terms = (
    (z**3 + z) / 4,
    (5 * z**5 + 16 * z**3 + 3 * z) / 96,
    (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
  )
  return z + sum(term / v ** (i + 1) for i, term in enumerate(terms))


def share(hits: Sequence[float] | np.ndarray, tries: float = 1) -> Interval | None:
  """Share of hits, each from 0 to 1, with Wilson's (1927) 95% interval, right for few items and near 0 or 1.

  Where a hit is itself the share of several `tries`, hits vary less than single ones would: the interval is that of as
  many single ones as would vary so, between n and n * tries (an effective sample size, as Korn and Graubard 1998 take
  it for surveys, with Student's t for the freedom of the variance). With one try it is Wilson's, whatever the hits.
  """
  array = np.asarray(hits, np.float64)
  n = len(array)
  if n == 0:
    return None
  p = float(array.mean())
  variance = float(array.var(ddof=1)) if n > 1 else 0.0
  effective = float(n)
  if tries > 1 and variance > 1e-12:
    effective = min(max(n, n * p * (1 - p) / variance * (_Z / _t_quantile(n - 1)) ** 2), n * tries)
  centre = (p + _Z**2 / (2 * effective)) / (1 + _Z**2 / effective)
  half = _Z / (1 + _Z**2 / effective) * math.sqrt(p * (1 - p) / effective + _Z**2 / (4 * effective**2))
  return {'mean': p, 'low': max(0.0, centre - half), 'high': min(1.0, centre + half), 'n': n}


def combine(parts: Sequence[tuple[float, Interval]]) -> Interval:
  """A weighted sum of independent figures: (1, a), (-1, b) is how much a is above b.

  The interval is that of Zou, Huang and Zhang (2009, Computational Statistics and Data Analysis 53:1080): the distances
  from mean to end on the side in question, added as squares. It keeps what is lopsided in those of shares. `n` is the
  least of theirs.
  """
  total, below, above = 0.0, 0.0, 0.0
  for weight, figure in parts:
    total += weight * figure['mean']
    if any(figure[end] is None for end in ('low', 'high')):
      below = above = math.nan
      continue
    down, up = sorted((weight * (figure['low'] - figure['mean']), weight * (figure['high'] - figure['mean'])))
    below, above = below + down**2, above + up**2
  return _ends(total, math.sqrt(below), math.sqrt(above), min(figure['n'] or 0 for _, figure in parts))


def pool(figures: Sequence[Interval], same_items: bool) -> Interval:
  """The same figure of several runs that differ by their seed alone: the mean of their means, and how sure it is.

  Each run counts as one: Student's t over their means covers the luck of training and of what was drawn for each. Where
  all of them were measured on the same items (`same_items`), the luck in choosing those is not seen in that spread and
  does not shrink with more seeds: the mean square of their own half-widths is added. `n` is the number of runs.
  """
  means, n = np.array([figure['mean'] for figure in figures]), len(figures)
  if n == 1:
    return dict(figures[0])
  spread = (_t_quantile(n - 1) * float(means.std(ddof=1))) ** 2 / n
  below = above = spread
  if same_items:
    ends = [(figure['low'], figure['high']) for figure in figures]
    known = all(low is not None and high is not None for low, high in ends)
    lows, highs = (np.array([end if known else math.nan for end in some]) for some in zip(*ends, strict=True))
    below, above = below + float(((lows - means) ** 2).mean()), above + float(((highs - means) ** 2).mean())
  return _ends(float(means.mean()), math.sqrt(below), math.sqrt(above), n)


def _ends(mean: float, below: float, above: float, n: int) -> Interval:
  """A figure whose ends are so far from its mean; without ends where that is not known."""
  known = math.isfinite(below) and math.isfinite(above)
  return {'mean': mean, 'low': mean - below if known else None, 'high': mean + above if known else None, 'n': n}


def comparisons(one: int, other: int) -> float:
  """As how many single comparisons all those of `one` reply or more with `other` count.

  By the variance of their share between replies that are as good, (m + n + 1) / 12 m n (Mann and Whitney 1947), against
  the 1/4 of a single one.
  """
  return 3 * one * other / (one + other + 1)


def kappa(first: Sequence[str], second: Sequence[str], groups: Sequence[str], seed: int = 0) -> Interval | None:
  """Cohen's (1960) kappa of two raters: agreement beyond what their own habits would bring about by chance.

  Args:
    first: one rater's label of each item.
    second: the other's.
    groups: the message of each item; its items are resampled together, as they are not independent.
    seed: of the resampling.

  Returns:
    {mean, low, high, n} with n the number of groups, and low and high those of a percentile bootstrap widened as in
    `interval`; None where there is no chance to compare with: no items, or one label alone. Low and high are None
    where resampling says nothing: of a single group, or where one rater never varies and kappa is 0 by its form.
    Where it never disagrees the low end is that of Wilson's share of agreements.
  """
  labels, names = sorted({*first, *second}), sorted(set(groups))
  tables = np.zeros((len(names), len(labels), len(labels)))
  index = ([names.index(g) for g in groups], [labels.index(a) for a in first], [labels.index(b) for b in second])
  np.add.at(tables, index, 1)
  whole, n = tables.sum(0), len(names)
  if len(labels) < 2:
    return None
  agreed, chance = (float(value) for value in _agreement(whole))
  found: Interval = {'mean': (agreed - chance) / (1 - chance), 'low': None, 'high': None, 'n': n}
  if n == 1 or 1 in ((whole.sum(0) > 0).sum(), (whole.sum(1) > 0).sum()):
    return found
  if agreed == 1:
    wilson = share([1.0] * n)
    return found | {'low': (wilson['low'] - chance) / (1 - chance) if wilson else None, 'high': 1.0}
  drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), _RESAMPLES)
  agreed_by, chance_by = _agreement(np.tensordot(drawn, tables, 1))
  usable = chance_by < 1  # A resample of one label alone has no kappa.
  low, high = np.quantile((agreed_by - chance_by)[usable] / (1 - chance_by)[usable], [_tail(n), 1 - _tail(n)])
  return found | {'low': float(low), 'high': float(high)}


def _agreement(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Share of agreements, and that expected by chance, of contingency tables [..., label, label]."""
  shares = tables / tables.sum((-2, -1), keepdims=True)
  return np.trace(shares, axis1=-2, axis2=-1), (shares.sum(-1) * shares.sum(-2)).sum(-1)


def correlation(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float | None:
  """Pearson's r; None when one of the two does not vary."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
    return None
  return float(np.corrcoef(a, b)[0, 1])


# ---- preferences ----

_FITS = 1000  # resamples: each takes a fit


def bradley_terry(wins: np.ndarray, spread: float = 3.0) -> np.ndarray:
  """Strengths s [..., K] of K items, such that i beats j with probability sigmoid(s_i - s_j) (Bradley and Terry 1952).

  The most probable ones under a normal prior around zero with standard deviation `spread`, in logits, which keeps what
  won always, or what was never compared, at a finite strength; their mean is zero. By Newton's method: the problem is
  strictly convex.

  Args:
    wins: [..., K, K], how often i beat j.
    spread: of the prior; large leaves the fit to the wins alone.
  """
  games, size = wins + np.swapaxes(wins, -1, -2), wins.shape[-1]
  s, eye = np.zeros(wins.shape[:-1]), np.eye(size)
  for _ in range(100):
    p = 0.5 * (1 + np.tanh(0.5 * (s[..., :, None] - s[..., None, :])))  # the sigmoid, with no overflow
    gradient = (wins - games * p).sum(-1) - s / spread**2
    curve = games * p * (1 - p)
    hessian = eye * (curve.sum(-1)[..., None] + spread**-2) - curve
    # The likelihood knows no common level; this leaves the solution as it is and the system well conditioned.
    step = np.linalg.solve(hessian + 1 / size, gradient[..., None])[..., 0]
    step = step - step.mean(-1, keepdims=True)
    s = s + np.clip(step, -2, 2)
    if np.abs(step).max(initial=0.0) < 1e-10:
      break
  return s


def strengths(wins_qkk: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Bradley-Terry strengths [K] over Q questions that are independent of each other, and those of resamples [R, K]."""
  count, size = len(wins_qkk), wins_qkk.shape[-1]
  drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), _FITS)
  resampled = (drawn @ wins_qkk.reshape(count, -1)).reshape(_FITS, size, size)
  return bradley_terry(wins_qkk.sum(0)), bradley_terry(resampled)


def strength_intervals(point: np.ndarray, resampled: np.ndarray, n: int) -> list[Interval]:
  """Of what `strengths` gave, or a difference of two such over the same questions, percentiles as in `interval`.

  Without ends where no resample differs, as of one who always chooses the first: that is no certainty.
  """
  if n < 2:
    return [{'mean': float(mean), 'low': None, 'high': None, 'n': n} for mean in point]
  ends = np.quantile(resampled, [_tail(n), 1 - _tail(n)], 0)
  return [
    {'mean': float(mean), 'low': float(low) if varies else None, 'high': float(high) if varies else None, 'n': n}
    for mean, low, high, varies in zip(point, *ends, np.ptp(resampled, 0) > 1e-9, strict=True)
  ]
