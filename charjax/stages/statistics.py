"""Means with 95% intervals: resampled for figures, Wilson's for shares."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

Interval = dict[str, Any]

_RESAMPLES = 10_000
_Z = NormalDist().inv_cdf(0.975)


def interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> Interval | None:
  """Mean and 95% interval over items that are independent of each other (messages, pairs); None without any.

  The percentile bootstrap is too narrow for few items; its percentiles are widened as Hesterberg (2015,
  arXiv:1411.5279, section 5.2) does: Phi(-sqrt(n / (n - 1)) t). One item has a mean and no interval. Items that are
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
  tail = _tail(n)
  index = np.random.default_rng(seed).integers(0, n, (_RESAMPLES, n))
  low, high = np.quantile(array[index].mean(1), [tail, 1 - tail])
  return {'mean': mean, 'low': float(low), 'high': float(high), 'n': n}


def _tail(n: int) -> float:
  """Which percentiles of n resampled items make a 95% interval: see `interval`."""
  return NormalDist().cdf(-math.sqrt(n / (n - 1)) * _t_quantile(n - 1))


def _t_quantile(freedom: int) -> float:
  """The 97.5% point of Student's t by Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5); 1% off at freedom 3."""
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
