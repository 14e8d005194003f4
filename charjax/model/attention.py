"""Attention of grouped query heads over a row's own keys and over a prefix that all rows share.

Letters: B rows, T query tokens, S keys, P prefix tokens, K key/value heads, G query heads a key/value head,
H head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_MASKED = -1e30  # finite, so that a row with nothing to attend to (padding) stays finite


class SharedKV(NamedTuple):
  """Keys and values [K, P, H] of a prefix that stands before every row, computed once."""

  k: jax.Array
  v: jax.Array


def attention(
  q_btkgh: jax.Array,
  k_bksh: jax.Array,
  v_bksh: jax.Array,
  mask_bts: jax.Array,
  shared: SharedKV | None = None,
  shared_mask_p: jax.Array | bool = True,
) -> jax.Array:
  """softmax(q k / sqrt(H)) v in float32, over the row's own keys where `mask_bts` and the shared ones.

  The shared keys are read once for all rows: a matrix product over B*T*G queries instead of B small ones.

  Returns:
    [B, T, K, G, H] float32.
  """
  scale = q_btkgh.shape[-1] ** -0.5
  f32 = jnp.float32
  own = jnp.einsum('btkgh,bksh->bkgts', q_btkgh, k_bksh, preferred_element_type=f32) * scale
  own = jnp.where(mask_bts[:, None, None], own, _MASKED)
  top = own.max(-1)
  if shared is not None:
    before = jnp.einsum('btkgh,kph->bkgtp', q_btkgh, shared.k, preferred_element_type=f32) * scale
    before = jnp.where(shared_mask_p, before, _MASKED)
    top = jnp.maximum(top, before.max(-1))
  # The maximum only guards against overflow: the result does not depend on it.
  top = jax.lax.stop_gradient(top)[..., None]
  own = jnp.exp(own - top)
  total = own.sum(-1)
  out = jnp.einsum('bkgts,bksh->bkgth', own.astype(v_bksh.dtype), v_bksh, preferred_element_type=f32)
  if shared is not None:
    before = jnp.exp(before - top)
    total += before.sum(-1)
    out += jnp.einsum('bkgtp,kph->bkgth', before.astype(shared.v.dtype), shared.v, preferred_element_type=f32)
  return jnp.moveaxis(out / total[..., None], 3, 1)
