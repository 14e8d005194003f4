"""A Pallas kernel for TPUs: one query token a row over that row's cache.

Decoding reads the cache anew for every token and computes little with it, so that what counts is what is read: blocks
without a key that is seen are left where they lie.

Letters: B rows, S cache slots, K key/value heads, G query heads a key/value head, H head size.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # of a TPU's vectors
_ROWS = 16  # queries of a key/value head are padded to a multiple of it: the rows of a tile of bfloat16
_BLOCK_BYTES = 2**19  # of keys, as of values, read at a time: two of each fit on the chip beside what is computed
_MASKED = -1e30  # finite, so that rows that see nothing stay finite


def attend_cache(
  q_bkgh: jax.Array, k_bkhs: jax.Array, v_bksh: jax.Array, seen_bs: jax.Array, *, scale: float, cap: float = 0.0
) -> tuple[jax.Array, jax.Array]:
  """softmax(q k scale) v over the slots that are seen, and the logarithm of the sum of exponentials in it.

  Args:
    q_bkgh: one query token a row.
    k_bkhs: keys of the cache, its slots last.
    v_bksh: values of the cache.
    seen_bs: which slots hold a key that the row's token sees, in any order.
    scale: of the scores.
    cap: cap tanh(score / cap) bounds them; 0: nothing does.

  Returns:
    [B, K, G, H] and [B, K, G] float32; 0 and -1e30 of a row that sees nothing.
  """
  b, kv_heads, groups, head_dim = q_bkgh.shape
  slots = k_bkhs.shape[3]
  block = _block(slots, kv_heads * head_dim * k_bkhs.dtype.itemsize)
  blocks, rows = pl.cdiv(slots, block), pl.cdiv(groups, _ROWS) * _ROWS
  seen = jnp.pad(seen_bs, ((0, 0), (0, blocks * block - slots)))
  order, count = _order(seen.reshape(b, blocks, block).any(-1))

  def of_row(*sizes: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, *sizes), lambda b, j, order, count: (b, *(0,) * len(sizes)))

  out, log_sum = pl.pallas_call(
    partial(_kernel, scale=scale, cap=cap, slots=slots, whole=slots == blocks * block),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(b, blocks),
      in_specs=[
        of_row(kv_heads, rows, head_dim),
        pl.BlockSpec((1, kv_heads, head_dim, block), lambda b, j, order, count: (b, 0, 0, order[b, j])),
        pl.BlockSpec((1, kv_heads, block, head_dim), lambda b, j, order, count: (b, 0, order[b, j], 0)),
        pl.BlockSpec((1, 1, block), lambda b, j, order, count: (b, 0, order[b, j])),
      ],
      out_specs=[of_row(kv_heads, rows, head_dim), of_row(kv_heads, rows, LANES)],
      scratch_shapes=[
        pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
        pltpu.VMEM((kv_heads, rows, LANES), jnp.float32),
        pltpu.VMEM((kv_heads, rows, head_dim), jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((b, kv_heads, rows, head_dim), jnp.float32),
      jax.ShapeDtypeStruct((b, kv_heads, rows, LANES), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
    name='attend_cache',
  )(
    order, count, jnp.pad(q_bkgh, ((0, 0), (0, 0), (0, rows - groups), (0, 0))), k_bkhs, v_bksh,
    seen[:, None].astype(jnp.int32),
  )  # fmt: skip
  return out[:, :, :groups], log_sum[:, :, :groups, 0]


def _block(slots: int, slot_bytes: int) -> int:
  """How many slots are read at a time: all, or a multiple of LANES, which may reach past the last."""
  most = max(_BLOCK_BYTES // slot_bytes // LANES, 1) * LANES
  blocks = pl.cdiv(slots, most)
  return slots if blocks == 1 else pl.cdiv(pl.cdiv(slots, blocks), LANES) * LANES


def _order(needed: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The numbers of each row's blocks [B, blocks], those that are needed first, and how many these are [B].

  After them the last is repeated: what is on the chip already is not read again.
  """
  count = needed.sum(-1, dtype=jnp.int32)
  order = jnp.argsort(~needed, axis=-1, stable=True).astype(jnp.int32)
  last = jnp.maximum(count - 1, 0)[:, None]
  return jnp.take_along_axis(order, jnp.minimum(jnp.arange(needed.shape[1]), last), 1), count


def _kernel(
  order: Any, count: Any, q: Any, k: Any, v: Any, seen: Any, out: Any, log_sum: Any, top: Any, total: Any, mixed: Any,
  *, scale: float, cap: float, slots: int, whole: bool,
) -> None:  # fmt: skip
  """One block of one row; `top`, `total` and `mixed` go from block to block (Milakov and Gimelshein 2018, alg. 3)."""
  row, step = pl.program_id(0), pl.program_id(1)

  @pl.when(step == 0)
  def _() -> None:
    top[...] = jnp.full_like(top, _MASKED)
    total[...] = jnp.zeros_like(total)
    mixed[...] = jnp.zeros_like(mixed)

  @pl.when(step < count[row])
  def _() -> None:
    score = jnp.einsum('kgh,khs->kgs', q[0], k[0], preferred_element_type=jnp.float32) * scale
    if cap:
      score = jnp.tanh(score / cap) * cap
    score = jnp.where(seen[0][None] > 0, score, _MASKED)
    before = top[:, :, :1]
    now = jnp.maximum(before, score.max(-1, keepdims=True))
    weight, shrunk = jnp.exp(score - now), jnp.exp(before - now)
    top[...] = jnp.broadcast_to(now, top.shape)
    total[...] = total[...] * shrunk + weight.sum(-1, keepdims=True)
    values = v[0]
    if not whole:
      # What is read past the last slot may be NaN, which no weight of 0 takes away.
      slot = order[row, step] * values.shape[1] + jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
      values = jnp.where(slot < slots, values, 0)
    part = jnp.einsum('kgs,ksh->kgh', weight.astype(values.dtype), values, preferred_element_type=jnp.float32)
    mixed[...] = mixed[...] * shrunk + part

  @pl.when(step == pl.num_programs(1) - 1)
  def _() -> None:
    some = jnp.maximum(total[...], 1e-30)  # 0 only where nothing is seen
    out[0] = mixed[...] / some[:, :, :1]
    log_sum[0] = jnp.where(total[...] > 0, top[...] + jnp.log(some), _MASKED)
