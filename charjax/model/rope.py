"""Rotary positions: which angle each pair of a head's dimensions is turned by, and the turning.

Letters: B rows, T tokens, N heads, H head size, R how many of a head's dimensions are rotated.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from charjax.errors import UserError

_MOST_ROTATED = 65_536  # of a head's dimensions: a file that says more is damaged, and their factors might fill memory


def rotary(
  positions_bt: jax.Array, rotated: int, theta: float, factors: tuple[float, ...] = (), gain: float = 1.0
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine [B, T, R/2] of the rotary angles (Su et al. 2021, eq. 15).

  Args:
    positions_bt: positions.
    rotated: R.
    theta: base of the frequencies.
    factors: [R/2] what frequencies are multiplied by; () is all 1.
    gain: what cosine and sine are multiplied by.
  """
  frequency = theta ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
  if factors:
    frequency *= np.asarray(factors, np.float32)
  angle = positions_bt[..., None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return (cos, sin) if gain == 1 else (cos * gain, sin * gain)


def rotate(x_btnh: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the pairs (i, i + R/2) of each head's first R dimensions, R being twice the width of `cos`."""
  rotated = 2 * cos.shape[-1]
  if rotated < x_btnh.shape[-1]:
    return jnp.concatenate([rotate(x_btnh[..., :rotated], cos, sin), x_btnh[..., rotated:]], -1)
  first, second = jnp.split(x_btnh, 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def scaling(
  kind: str, said: Mapping[str, Any], rotated: int, theta: float, where: str
) -> tuple[tuple[float, ...], float]:
  """What a rope scaling of config.json multiplies each frequency by, and cosines and sines.

  All of these blend frequency f and f / factor: 'linear' takes the latter for every pair (Chen et al. 2023);
  'llama3' keeps pairs that turn often within the original length (Llama 3.1's release, no paper); 'yarn' does so by
  a ramp over the pairs' indices (Peng et al. 2023, eq. 19-22).

  Args:
    kind: 'default', 'linear', 'llama3' or 'yarn'.
    said: the parameters of the scaling, with original_max_position_embeddings where it is not linear.
    rotated: how many dimensions are rotated.
    theta: base of the frequencies.
    where: the file, for error messages.

  Returns:
    factors, one a pair, () where all are 1; and the gain.

  Raises:
    UserError: the kind is not supported, or a parameter is missing or not a number above 0.
  """

  def number(name: str, default: float | None = None) -> float:
    value = said.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**63:
      raise UserError(f'{where}: rope scaling {kind!r}: {name} is {str(value)[:40]}; it must be a number above 0')
    return float(value)

  if kind == 'default':
    return (), 1.0
  if kind not in ('linear', 'llama3', 'yarn'):
    raise UserError(
      f'{where}: rope scaling {str(kind)[:40]!r} is not supported; only default, linear, llama3 and yarn are'
    )
  if rotated > _MOST_ROTATED:
    raise UserError(f'{where}: {rotated} dimensions of a head are rotated; it must be at most {_MOST_ROTATED}')
  factor = number('factor')
  pairs = np.arange(rotated // 2)
  gain, kept = 1.0, np.zeros(len(pairs))
  if kind == 'llama3':
    original = number('original_max_position_embeddings')
    turns = original / (2 * math.pi) * theta ** (-2 * pairs / rotated)
    low, high = number('low_freq_factor'), number('high_freq_factor')
    if high <= low:
      raise UserError(f'{where}: rope scaling {kind!r}: high_freq_factor must be above low_freq_factor')
    kept = np.clip((turns - low) / (high - low), 0, 1)
  elif kind == 'yarn':
    original = number('original_max_position_embeddings')
    if theta <= 1:
      raise UserError(f'{where}: rope scaling {kind!r}: rope_theta is {theta}; it must be above 1')
    low, high = (
      rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
      for turns in (number('beta_fast', 32), number('beta_slow', 1))
    )
    if said.get('truncate', True):
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    kept = 1 - np.clip((pairs - low) / (high - low if high != low else 1e-3), 0, 1)
    gain = number('attention_factor', _yarn_gain(factor, said, number))
  return tuple((kept + (1 - kept) / factor).tolist()), gain


def llama3_scaling(factors: tuple[float, ...], rotated: int, theta: float) -> dict[str, Any]:
  """The parameters of 'llama3' that give these factors (see `scaling`), or {} where none do within 1e-6.

  Factors do not tell all of them: of those that give the same, the ones with low_freq_factor nearest to 1 are taken
  whose original length is a whole number.
  """
  factor = 1 / min(factors)
  if factor <= 1:
    return {}
  frequency = theta ** (-2 * np.arange(rotated // 2) / rotated)
  kept = (np.array(factors) - 1 / factor) / (1 - 1 / factor)
  # Between 1 and 0 a straight line: through its points or, where it has fewer than two, so steep that the points
  # before and after it are beyond its ends.
  inside = [i for i, k in enumerate(kept) if 1e-5 < k < 1 - 1e-5]
  first = inside[0] if inside else int((kept > 0.5).sum())
  last = inside[-1] if inside else first - 1
  points = [*inside, *([first - 1] if first else []), *([last + 1] if last + 1 < len(kept) else [])]
  pairs = [inside] if len(inside) > 1 else [sorted({i, j}) for i in points for j in points if abs(i - j) == 1]
  slopes = [(kept[pair[0]] - kept[pair[-1]]) / (frequency[pair[0]] - frequency[pair[-1]]) for pair in pairs]
  if not slopes or max(slopes) <= 0:
    return {}
  slope, through = max(slopes), inside[0] if inside else last
  below = slope * frequency[through] - kept[through]  # kept = slope * frequency - below
  if below <= 0:
    return {}
  original = max(1, round(2 * math.pi * slope / below))
  low = original * below / (2 * math.pi * slope)
  for digits in (3, 12):
    found = {
      'rope_type': 'llama3',
      'factor': round(factor, digits),
      'low_freq_factor': round(float(low), digits),
      'high_freq_factor': round(float(low + low / below), digits),
      'original_max_position_embeddings': original,
    }
    again, _ = scaling('llama3', found, rotated, theta, '')
    if np.allclose(again, factors, rtol=1e-6, atol=0):
      return found
  return {}


def _yarn_gain(factor: float, said: Mapping[str, Any], number: Any) -> float:
  """0.1 ln(factor) + 1 (Peng et al. 2023, eq. 22), or where both are given the ratio of two such with other weights."""

  def one(weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

  if said.get('mscale') and said.get('mscale_all_dim'):
    return one(number('mscale')) / one(number('mscale_all_dim'))
  return one(1.0)
