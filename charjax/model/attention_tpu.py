"""Attention on TPUs by kernels: scores never lie in memory, and of a cache only what is seen is read.

Many tokens a row (training, scoring, prompts) go through JAX's splash attention. There a key carries one number, and a
query sees the keys of its own; so what several texts of a row read cannot stand in one call beside what they do not
share. Each part of the keys has a call of its own, and numbers of its own, and the parts are joined.

One token a row goes through a kernel of this project over its cache (charjax.model.decode_kernel), and through XLA's
large products over what stands before several rows.

Letters: as in charjax.model.attention; N = K G query heads, M = T B / A queries of a group.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from charjax.mesh import spec
from charjax.model.attention import Attend, Before, Masks, Places, head_axes, on_shards, with_shared
from charjax.model.decode_kernel import LANES, attend_cache

_BLOCKS = (512, 384, 256)  # tokens of a block where there are more than one

# Keys and values [A, K, P, H], and the numbers by which each query [A, M] sees keys [A, P].
_Part = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def with_kernels(
  reference: Attend,
  make_masks: Callable[[Any], Masks],
  queries: Places,
  cached: Places | None,
  before: Sequence[Before],
  *,
  scale: float,
  cap: float,
  windows: Sequence[int],
) -> Attend:
  """As charjax.model.attention.make_attention; what the kernels cannot do `reference` does, and a word is said of it.

  Without a cache, the tokens of a text must follow one another in their row. The slots of a cache may have any order.
  """
  reach = queries.texts.shape[1] + sum(some.places.texts.shape[1] for some in before)
  narrow = sorted({window for window in windows if 0 < window < reach})  # a wider one hides nothing

  def decode(q_btkgh: jax.Array, k_bkhs: jax.Array, v_bksh: jax.Array, shared: Any, window: Any) -> jax.Array:
    if (width := q_btkgh.shape[1]) > 1:
      _say(f'{width} tokens a row, over a cache')
      return reference(q_btkgh, k_bkhs, v_bksh, shared, window)
    own, seen = make_masks(window)
    factor = scale or q_btkgh.shape[-1] ** -0.5
    heads = head_axes(*q_btkgh.shape[2:4])
    in_cache = ('batch', heads[0], None, None)
    out, log_sum = on_shards(
      functools.partial(attend_cache, scale=factor, cap=cap),
      (q_btkgh[:, 0], k_bkhs, v_bksh, own[:, 0]),
      (('batch', *heads, None), in_cache, in_cache, ('batch', None)),
    )

    def part(top_bktg: jax.Array) -> tuple[jax.Array, jax.Array]:
      total = jnp.exp(log_sum[:, :, None] - top_bktg)
      return total, total[..., None] * out[:, :, None]

    return with_shared(q_btkgh, log_sum[:, :, None], part, list(zip(shared, seen, strict=True)), factor, cap)

  def many(q_btkgh: jax.Array, k_bkhs: jax.Array, v_bksh: jax.Array, shared: Any, window: int | None) -> jax.Array:
    if why := _no_splash(len(q_btkgh), before, window):
      _say(why)
      return reference(q_btkgh, k_bkhs, v_bksh, shared, window)
    factor, heads = scale or q_btkgh.shape[-1] ** -0.5, head_axes(*q_btkgh.shape[2:4])
    q_bkgth = jnp.moveaxis((q_btkgh.astype(jnp.float32) * factor).astype(q_btkgh.dtype), 1, 3)
    parts = [jnp.swapaxes(k_bkhs, 2, 3), v_bksh, queries.texts, queries.texts]
    for (k_akhp, v_akph), some in zip(shared, before, strict=True):
      parts += [jnp.swapaxes(k_akhp, 2, 3), v_akph, *_numbers(queries, some)]
    keys, numbers = ('batch', heads[0], None, None), ('batch', None)
    out = on_shards(
      functools.partial(_local, window, cap),
      (q_bkgth, *parts),
      (('batch', *heads, None, None), *(keys, keys, numbers, numbers) * (1 + len(before))),
    )
    return jnp.moveaxis(out, 3, 1).astype(jnp.float32)

  def attend(q_btkgh: jax.Array, k_bkhs: jax.Array, v_bksh: jax.Array, shared: Any, window: Any) -> jax.Array:
    if not narrow:
      window = None
    if not isinstance(window, jax.Array):
      return many(q_btkgh, k_bkhs, v_bksh, shared, window if window in narrow else None)
    # Layers of several kinds, in a scan: a kernel for each window, and the layer chooses.
    choice = sum(i * (window == some) for i, some in enumerate(narrow, 1))
    branches = [functools.partial(many, window=some) for some in (None, *narrow)]
    return jax.lax.switch(choice, branches, q_btkgh, k_bkhs, v_bksh, shared)

  return attend if cached is None else decode


@functools.cache
def _say(why: str) -> None:
  """Once, by the first process."""
  if jax.process_index() == 0:
    logging.getLogger(__name__).warning('attention goes through XLA in place of a kernel: %s', why)


# ---- many tokens a row ----


def _no_splash(rows: int, before: Sequence[Before], window: int | None) -> str:
  """Why splash attention cannot compute this; '' if it can."""
  if window and before:
    return f'a window of {window} tokens, which may begin in what stands before the rows'
  mesh = jax.sharding.get_abstract_mesh()
  for some in before:
    groups = len(some.places.texts)
    if not mesh.empty and groups > 1 and spec((groups,), ('batch',), mesh) != spec((rows,), ('batch',), mesh):
      return f'{groups} groups of {rows} rows are not split alike over the devices'
  return ''


def _numbers(queries: Places, before: Before) -> tuple[jax.Array, jax.Array]:
  """The numbers by which queries [B, T] see the keys before them [A, P]; 0 is padding."""
  return jnp.ones_like(queries.texts), jnp.sign(before.places.texts)


def _local(window: int | None, cap: float, q_bkgth: jax.Array, *parts: jax.Array) -> jax.Array:
  """One device's share of attention; q is scaled, and of each part come k, v and the numbers of queries and keys."""
  b, k, g, t, h = q_bkgth.shape
  fours = zip(*(parts[i::4] for i in range(4)), strict=True)
  grouped = tuple((k, v, q_ids.reshape(len(k), -1), k_ids) for k, v, q_ids, k_ids in fours)
  return _joined(window, cap, q_bkgth.reshape(b, k * g, t, h), grouped).reshape(q_bkgth.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _joined(window: int | None, cap: float, q_bnth: jax.Array, parts: tuple[_Part, ...]) -> jax.Array:
  """One softmax over several parts of keys, of which the first are the rows' own: [B, N, T, H].

  Of each part a kernel gives the mix by its own softmax, and the logarithm of its sum of exponentials; by those they
  are weighed. The way back needs no more: with the mix and the logarithm of the whole sum in place of its own, each
  kernel's gradient is that of its part (Dao 2023, arXiv 2307.08691, algorithm 2).
  """
  return _forward(window, cap, q_bnth, parts)[0]


def _forward(window: int | None, cap: float, q_bnth: jax.Array, parts: tuple[_Part, ...]) -> tuple[jax.Array, Any]:
  found = [_one_part(window, cap, q_bnth, part, own=i == 0) for i, part in enumerate(parts)]
  log_sums = jnp.stack([log_sum for _, log_sum in found])
  total_bnt = jax.nn.logsumexp(log_sums, 0)
  mixed = sum(mix * jnp.exp(log_sum - total_bnt)[..., None] for mix, log_sum in found)
  out = jnp.asarray(mixed).astype(q_bnth.dtype)
  return out, (q_bnth, parts, out, total_bnt)


def _backward(window: int | None, cap: float, saved: Any, grad_bnth: jax.Array) -> tuple[jax.Array, Any]:
  q_bnth, parts, out, total = saved
  grad_q, grads = jnp.zeros(q_bnth.shape, jnp.float32), []
  for i, (k, v, q_ids, k_ids) in enumerate(parts):
    groups, length = len(k), k.shape[2]
    kernel, (rows, slots) = _kernel(q_ids.shape[1], length, q_bnth.shape[1], i == 0, window, cap)

    def one(q: Any, k: Any, v: Any, ids: Any, out: Any, total: Any, grad: Any, kernel: Any = kernel) -> Any:
      saved = (q, k, v, ids, None, out, total, kernel.dq_mask_info, kernel.dkv_mask_info)
      with _precision(q.dtype):
        return splash._splash_attention_bwd(**kernel.kwargs, res=saved, do=grad)[3:6]

    q, mix, log_sum, grad = (_to(rows, _by_group(x, groups), 2) for x in (q_bnth, out, total, grad_bnth))
    ids = splash.SegmentIds(_to(rows, q_ids, 1, -1), _to(slots, k_ids, 1))
    grad_part, grad_k, grad_v = jax.vmap(one)(q, _to(slots, k, 2), _to(slots, v, 2), ids, mix, log_sum, grad)
    grad_q += _by_row(grad_part[:, :, : q_ids.shape[1]], q_bnth.shape[2])
    grads.append((grad_k[:, :, :length], grad_v[:, :, :length], None, None))
  return grad_q.astype(q_bnth.dtype), tuple(grads)


_joined.defvjp(_forward, _backward)


def _one_part(window: int | None, cap: float, q_bnth: jax.Array, part: _Part, own: bool) -> tuple[jax.Array, jax.Array]:
  """The mix [B, N, T, H] of one part's values by its own softmax, and the logarithm [B, N, T] of its sum."""
  k, v, q_ids, k_ids = part
  kernel, (rows, slots) = _kernel(q_ids.shape[1], k.shape[2], q_bnth.shape[1], own, window, cap)
  ids = splash.SegmentIds(_to(rows, q_ids, 1, -1), _to(slots, k_ids, 1))
  q = _to(rows, _by_group(q_bnth, len(k)), 2)
  with _precision(q.dtype):
    out, (log_sum,) = jax.vmap(kernel)(q, _to(slots, k, 2), _to(slots, v, 2), ids)
  mix, log_sum = (_by_row(x[:, :, : q_ids.shape[1]], q_bnth.shape[2]) for x in (out, log_sum))
  return mix, log_sum


def _precision(dtype: Any) -> Any:
  """Of products in a kernel. What is asked for those of float32 elsewhere, their compiler refuses for bfloat16."""
  return contextlib.nullcontext() if dtype == jnp.float32 else jax.default_matmul_precision('default')


def _kernel(
  queries: int, keys: int, heads: int, own: bool, window: int | None, cap: float
) -> tuple[splash.SplashAttentionKernel, tuple[int, int]]:
  """The kernel for so many queries and keys, and what they are padded to."""
  (rows, block_q), (slots, block_k) = _padded(queries), _padded(keys)
  if not own:
    mask: masks.Mask = masks.FullMask((rows, slots))
  elif window:
    mask = masks.LocalMask((rows, slots), (window - 1, 0), 0)
  else:
    mask = masks.CausalMask((rows, slots))
  blocks = splash.BlockSizes(
    block_q=block_q, block_kv=block_k, block_q_dkv=block_q, block_kv_dkv=block_k, block_q_dq=block_q,
    block_kv_dq=block_k,
  )  # fmt: skip
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([mask] * heads), block_sizes=blocks, attn_logits_soft_cap=cap or None, save_residuals=True,
    head_shards=1, q_seq_shards=1,
  )  # fmt: skip
  return kernel, (rows, slots)


def _padded(length: int) -> tuple[int, int]:
  """A length in whole blocks, and the size of a block: that of the largest that leave the least padding."""
  if length <= _BLOCKS[0]:
    return (-(-length // LANES) * LANES,) * 2
  return min(((-(-length // size) * size, size) for size in _BLOCKS), key=lambda found: (found[0], -found[1]))


def _to(length: int, array: jax.Array, axis: int, value: int = 0) -> jax.Array:
  """Padded along an axis."""
  pads = [(0, length - size if i == axis else 0) for i, size in enumerate(array.shape)]
  return jnp.pad(array, pads, constant_values=value)


def _by_group(array: jax.Array, groups: int) -> jax.Array:
  """[B, N, T, ...] as [A, N, M, ...]."""
  b, n, t, *rest = array.shape
  return jnp.moveaxis(array.reshape(groups, b // groups, n, t, *rest), 1, 2).reshape(groups, n, -1, *rest)


def _by_row(array: jax.Array, width: int) -> jax.Array:
  """[A, N, M, ...] as [B, N, T, ...]."""
  a, n, _, *rest = array.shape
  return jnp.moveaxis(array.reshape(a, n, -1, width, *rest), 2, 1).reshape(-1, n, width, *rest)
