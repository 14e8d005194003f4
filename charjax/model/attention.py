"""Attention of grouped query heads over a row's own keys and over those that stand before several rows.

Letters: B rows, T query tokens, S keys, A groups of B / A rows, P tokens before a group, K key/value heads, G query
heads a key/value head, H head size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that a row with nothing to attend to (padding) stays finite


class SharedKV(NamedTuple):
  """Keys and values [A, K, P, H] of what stands before each group of rows, and which are real [A, P]."""

  k: jax.Array
  v: jax.Array
  mask: jax.Array


def attention(
  q_btkgh: jax.Array,
  k_bksh: jax.Array,
  v_bksh: jax.Array,
  mask_bts: jax.Array,
  shared: Sequence[SharedKV] = (),
) -> jax.Array:
  """softmax(q k / sqrt(H)) v in float32, over the row's own keys where `mask_bts` and the shared ones.

  Shared keys are read once for all rows of their group: a few large matrix products instead of B small ones.

  Returns:
    [B, T, K, G, H] float32.
  """
  b, t, k, g, h = q_btkgh.shape
  scale, f32 = h**-0.5, jnp.float32
  own = jnp.einsum('btkgh,bksh->bkgts', q_btkgh, k_bksh, preferred_element_type=f32) * scale
  own = jnp.where(mask_bts[:, None, None], own, _MASKED)
  top = own.max(-1)
  scores = []
  for part in shared:
    groups = part.k.shape[0]
    grouped = q_btkgh.reshape(groups, b // groups, t, k, g, h)
    before = jnp.einsum('abtkgh,akph->abkgtp', grouped, part.k, preferred_element_type=f32) * scale
    before = jnp.where(part.mask[:, None, None, None, None], before, _MASKED)
    scores.append(before)
    top = jnp.maximum(top, before.max(-1).reshape(top.shape))
  # The maximum only guards against overflow: the result does not depend on it.
  top = jax.lax.stop_gradient(top)[..., None]
  own = jnp.exp(own - top)
  total = own.sum(-1)
  out = jnp.einsum('bkgts,bksh->bkgth', own.astype(v_bksh.dtype), v_bksh, preferred_element_type=f32)
  for part, before in zip(shared, scores, strict=True):
    weight = jnp.exp(before - top.reshape(*before.shape[:-1], 1))
    total += weight.sum(-1).reshape(total.shape)
    mixed = jnp.einsum('abkgtp,akph->abkgth', weight.astype(part.v.dtype), part.v, preferred_element_type=f32)
    out += mixed.reshape(out.shape)
  return jnp.moveaxis(out / total[..., None], 3, 1)
