"""Attention of grouped query heads over a row's own keys and over those that stand before several rows.

Letters: B rows, T query tokens, S keys, A groups of B / A rows, P tokens before a group, K key/value heads, G query
heads a key/value head, H head size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that a row with nothing to attend to (padding) stays finite


class SharedKV(NamedTuple):
  """Keys [A, K, H, P] and values [A, K, P, H] of what stands before each group of rows.

  The mask tells which are attended to: [A, P], or [A, B/A, T, P] where that differs by query.
  """

  k: jax.Array
  v: jax.Array
  mask: jax.Array


class Places(NamedTuple):
  """Where tokens stand: each belongs to a text, and has a position in it.

  Attributes:
    positions: [..., T] counted from whatever stands before the text.
    texts: [..., T] numbers of the texts; 0 is padding.
  """

  positions: jax.Array
  texts: jax.Array


def sees(queries: Places, keys: Places, window: Any = None) -> jax.Array:
  """Which keys each query attends to, [..., T, S]: those of its text that are not after it, the last `window` of them.

  Several texts may so lie in one row, and a cache may hold its keys in any order.
  """
  back = queries.positions[..., :, None] - keys.positions[..., None, :]
  seen = (queries.texts[..., :, None] == keys.texts[..., None, :]) & (keys.texts[..., None, :] > 0) & (back >= 0)
  return seen if window is None else seen & (back < window)


def softcap(x: jax.Array, bound: float) -> jax.Array:
  """bound tanh(x / bound), between -bound and bound (Gemma Team 2024, section 2); x itself where the bound is 0."""
  return jnp.tanh(x / bound) * bound if bound else x


def attention(
  q_btkgh: jax.Array,
  k_bkhs: jax.Array,
  v_bksh: jax.Array,
  mask_bts: jax.Array,
  shared: Sequence[SharedKV] = (),
  *,
  scale: float = 0.0,
  cap: float = 0.0,
) -> jax.Array:
  """softmax(q k / sqrt(H)) v in float32, over the row's own keys where `mask_bts` and the shared ones.

  Shared keys are read once for all rows of their group: a few large matrix products instead of B small ones. Keys lie
  with their tokens last: products with them as they otherwise come take a CPU three times as long.
  With `scale`, scores are q k times it; with `cap`, they are bounded by it.

  Returns:
    [B, T, K, G, H] float32.
  """
  b, t, k, g, h = q_btkgh.shape
  scale, f32 = scale or h**-0.5, jnp.float32
  # Scores are kept in the order in which the products come out: transposing them would cost as much as the products.
  own = jnp.einsum('btkgh,bkhs->bktgs', q_btkgh, k_bkhs, preferred_element_type=f32) * scale
  own = jnp.where(mask_bts[:, None, :, None], softcap(own, cap), _MASKED)
  top = own.max(-1)
  scores = []
  for part in shared:
    groups = part.k.shape[0]
    grouped = q_btkgh.reshape(groups, b // groups, t, k, g, h)
    before = jnp.einsum('abtkgh,akhp->akbtgp', grouped, part.k, preferred_element_type=f32) * scale
    # As [A, K, B / A, T, G, P].
    mask = part.mask[:, None, None, None, None] if part.mask.ndim == 2 else part.mask[:, None, :, :, None]
    before = jnp.where(mask, softcap(before, cap), _MASKED)
    scores.append(before)
    top = jnp.maximum(top, _by_row(before.max(-1)))
  # The maximum only guards against overflow: the result does not depend on it.
  top = jax.lax.stop_gradient(top)
  own = jnp.exp(own - top[..., None])
  total = own.sum(-1)
  out = jnp.einsum('bktgs,bksh->bktgh', own.astype(v_bksh.dtype), v_bksh, preferred_element_type=f32)
  for part, before in zip(shared, scores, strict=True):
    weight = jnp.exp(before - _by_group(top, len(part.k))[..., None])
    total += _by_row(weight.sum(-1))
    mixed = jnp.einsum('akbtgp,akph->akbtgh', weight.astype(part.v.dtype), part.v, preferred_element_type=f32)
    out += _by_row(mixed)
  return jnp.moveaxis(out / total[..., None], 1, 2)


def _by_row(array: jax.Array) -> jax.Array:
  """[A, K, B / A, ...] as [B, K, ...]."""
  return jnp.moveaxis(array, 1, 2).reshape(-1, array.shape[1], *array.shape[3:])


def _by_group(array: jax.Array, groups: int) -> jax.Array:
  """[B, K, ...] as [A, K, B / A, ...]."""
  return jnp.moveaxis(array.reshape(groups, -1, *array.shape[1:]), 1, 2)
