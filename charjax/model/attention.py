"""Attention of grouped query heads over a row's own keys and over those that stand before several rows.

`make_attention` is what the decoder calls: who may see whom is the same in all layers, and worked out once.

Letters: B rows, T query tokens, S keys, A groups of B / A or of up to E rows, P tokens before a group, K key/value
heads, G query heads a key/value head, H head size.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from platform import machine
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from charjax.errors import UserError
from charjax.mesh import spec, take

_MASKED = -1e30  # finite, so that a row with nothing to attend to (padding) stays finite
_IN_CACHE = 2**20  # scores that a CPU keeps in its caches, beside what they are made of
# Queries of a key/value head up to which a CPU reads keys faster in sums of products than as matrices, of those for
# which XLA has kernels of such sums: elsewhere they would take three times as long.
_FEW = 16 if machine() in ('x86_64', 'AMD64') else 0


# attend(q [B, T, K, G, H], k [B, K, H, S], v [B, K, S, H], pairs [A, K, H, P], [A, K, P, H] of what stands before,
# window), as [B, T, K, G, H] float32: each query attends to the last `window` tokens of its text, itself included;
# None: to all.
Attend = Callable[[jax.Array, jax.Array, jax.Array, Sequence[tuple[jax.Array, jax.Array]], Any], jax.Array]


class Places(NamedTuple):
  """Where tokens stand: each belongs to a text, and has a position in it.

  Attributes:
    positions: [..., T] counted from whatever stands before the text.
    texts: [..., T] numbers of the texts; 0 is padding.
  """

  positions: jax.Array
  texts: jax.Array


class Seats(NamedTuple):
  """Which rows each of A texts stands before, where it is not B / A that follow one another.

  All numbers are counted within what one device has of a batch (charjax.mesh.split_into): a text and its rows are on
  the same one.

  Attributes:
    rows: [A, E] of each text; any row where it has fewer.
    seat: [B] where a row stands among those of all texts, e.g. E + 1 for the second of the second text.
  """

  rows: Any
  seat: Any


class Before(NamedTuple):
  """Where the tokens stand that are before rows.

  Attributes:
    places: [A, P].
    seats: of the rows that read them, one token each; None: B / A rows that follow one another read each.
  """

  places: Places
  seats: Seats | None = None


class Seen(NamedTuple):
  """What is seen of the tokens before rows: `mask` [A, P] or, by query, [A, E, T, P]."""

  mask: jax.Array
  seats: Seats | None


# What queries see: of their row's own keys [B, T, S], and of each part before it.
Masks = tuple[jax.Array, list[Seen]]


def choose(asked: str, platform: str) -> str:
  """What `make_attention` calls that which config.model.attention asks for, on devices of a platform.

  'auto' is 'cpu' on CPUs and 'xla' elsewhere. The kernels have not run on a TPU yet. What cuDNN has takes masks as
  biases alone, which are not sound yet (https://github.com/jax-ml/jax/issues/28974,
  https://github.com/pytorch/pytorch/issues/196678), and tokamax's kernels for GPUs can be neither run nor compiled
  where there is none.

  Raises:
    UserError: kernels for another platform.
  """
  if asked == 'tpu' and platform != 'tpu':
    raise UserError(f"config.model.attention is 'tpu', and the devices are of platform {platform}; leave it 'auto'")
  if asked == 'auto':
    return 'cpu' if platform == 'cpu' else 'xla'
  return asked


def make_attention(
  kind: str,
  queries: Places,
  cached: Places | None,
  before: Sequence[Before],
  *,
  scale: float = 0.0,
  cap: float = 0.0,
  windows: Sequence[int] = (),
) -> Attend:
  """softmax(q k / sqrt(H)) v, over the keys that each query sees of its row's own and of those before it together.

  Args:
    kind: how it is computed: 'xla', by matrix products with masks, anywhere; 'cpu', by those a few rows at a time, so
      that scores stay in a CPU's caches; or 'tpu', by kernels for that.
    queries: [B, T].
    cached: [B, S] the row's own keys where they are those of a cache; None: the queries' tokens are the keys.
    before: what stands before the rows.
    scale: scores are q k times it; 0: 1 / sqrt(H).
    cap: scores are bounded by it; 0: not at all.
    windows: those that will be asked for; 0 stands for none.
  """
  keys = queries if cached is None else cached

  def make_masks(window: Any = None) -> Masks:
    return sees(queries, keys, window), [_sees_before(queries, some, window) for some in before]

  whole = make_masks()

  def masks(window: Any) -> Masks:
    return whole if window is None else make_masks(window)

  def attend(q_btkgh: jax.Array, k_bkhs: jax.Array, v_bksh: jax.Array, shared: Any, window: Any) -> jax.Array:
    own, seen = masks(window)
    factor = scale or q_btkgh.shape[-1] ** -0.5
    if q_btkgh.shape[1] < q_btkgh.shape[-1]:
      few = _FEW if kind == 'cpu' else 0
      return _over_all(q_btkgh, k_bkhs, v_bksh, own, list(zip(shared, seen, strict=True)), factor, cap, few)
    # Of many queries a row, the scores take more memory than keys that are laid before its own once for each row would.
    k_bkhs, v_bksh, own = _laid_before(k_bkhs, v_bksh, own, shared, seen)
    mix = _mix_by_device if kind == 'cpu' else _mix
    return jnp.moveaxis(mix(jnp.moveaxis(q_btkgh, 1, 2), k_bkhs, v_bksh, own, factor, cap), 2, 1)

  if kind in ('xla', 'cpu'):
    return attend
  from charjax.model import attention_tpu  # Pallas takes a while to import.

  return attention_tpu.with_kernels(attend, masks, queries, cached, before, scale=scale, cap=cap, windows=windows)


def sees(queries: Places, keys: Places, window: Any = None) -> jax.Array:
  """Which keys each query attends to, [..., T, S]: those of its text that are not after it, the last `window` of them.

  Several texts may so lie in one row, and a cache may hold its keys in any order.
  """
  back = queries.positions[..., :, None] - keys.positions[..., None, :]
  seen = (queries.texts[..., :, None] == keys.texts[..., None, :]) & (keys.texts[..., None, :] > 0) & (back >= 0)
  return seen if window is None else seen & (back < window)


def _sees_before(queries: Places, before: Before, window: Any) -> Seen:
  """What each query sees of the tokens before the rows, which differs by query where there is a window."""
  texts = jnp.sign(before.places.texts)
  if window is None:
    return Seen(texts > 0, before.seats)
  positions = _by_group(queries.positions, len(texts), before.seats)
  keys = Places(before.places.positions[:, None], texts[:, None])
  return Seen(sees(Places(positions, jnp.ones_like(positions)), keys, window), before.seats)


def softcap(x: jax.Array, bound: float) -> jax.Array:
  """bound tanh(x / bound), between -bound and bound (Gemma Team 2024, section 2); x itself where the bound is 0."""
  return jnp.tanh(x / bound) * bound if bound else x


def _laid_before(
  k_bkhs: jax.Array, v_bksh: jax.Array, mask_bts: jax.Array, shared: Any, seen: Sequence[Seen]
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Keys, values and masks of rows with those of what stands before them."""
  b, t, _ = mask_bts.shape

  def each_row(array: jax.Array) -> jax.Array:
    return jnp.repeat(array, b // len(array), 0)

  masks = [each_row(m)[:, None].repeat(t, 1) if m.ndim == 2 else m.reshape(b, t, -1) for m, _ in seen]
  return (
    jnp.concatenate([*(each_row(k) for k, _ in shared), k_bkhs], 3),
    jnp.concatenate([*(each_row(v) for _, v in shared), v_bksh], 2),
    jnp.concatenate([*masks, mask_bts], 2),
  )


def _over_all(
  q_btkgh: jax.Array,
  k_bkhs: jax.Array,
  v_bksh: jax.Array,
  mask_bts: jax.Array,
  shared: Sequence[tuple[tuple[jax.Array, jax.Array], Seen]],
  scale: float,
  cap: float,
  few: int,
) -> jax.Array:
  """The form for XLA: over the row's own keys where `mask_bts`, and over what is shared."""
  q_bktgh = jnp.moveaxis(q_btkgh, 1, 2)
  if not shared:
    return jnp.moveaxis(_mix(q_bktgh, k_bkhs, v_bksh, mask_bts, scale, cap), 2, 1)
  score, _ = _scores(q_bktgh, k_bkhs, mask_bts, scale, cap, few)

  def own(top_bktg: jax.Array) -> tuple[jax.Array, jax.Array]:
    weight = jnp.exp(score - top_bktg[..., None])
    return weight.sum(-1), _product(weight.astype(v_bksh.dtype), v_bksh, few)

  return with_shared(q_btkgh, score.max(-1), own, shared, scale, cap, few)


def _scores(
  q_bktgh: jax.Array, k_bkhs: jax.Array, mask_bts: jax.Array, scale: float, cap: float, few: int = 0
) -> tuple[jax.Array, jax.Array]:
  """Scores [B, K, T, G, S] where they are seen, and everywhere.

  They are kept in the order in which the products come out: transposing them would cost as much as the products.
  """
  every = softcap(_product(q_bktgh, k_bkhs, few) * scale, cap)
  return jnp.where(mask_bts[:, None, :, None], every, _MASKED), every


def _product(x: jax.Array, y: jax.Array, few: int = 0) -> jax.Array:
  """[B, K, ..., H] times [B, K, H, S], as [B, K, ..., S] float32; of up to `few` x as sums of products."""
  if math.prod(x.shape[2:-1]) <= few:
    for_each = y.reshape(*y.shape[:2], *(1,) * (x.ndim - 3), *y.shape[2:])
    return (x[..., None].astype(jnp.float32) * for_each.astype(jnp.float32)).sum(-2)
  return jnp.einsum('bk...h,bkhs->bk...s', x, y, preferred_element_type=jnp.float32)


def _mix_by_device(
  q_bktgh: jax.Array, k_bkhs: jax.Array, v_bksh: jax.Array, mask_bts: jax.Array, scale: float, cap: float
) -> jax.Array:
  """`_mix` of a few rows at a time, of those that a device has."""

  def one(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    rows, row = len(q), math.prod(q.shape[1:4]) * k.shape[3]
    at_once = max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * row <= _IN_CACHE))
    return _mix(q, k, v, mask, scale, cap, at_once)

  heads = head_axes(q_bktgh.shape[1], q_bktgh.shape[3])
  keys = ('batch', heads[0], None, None)
  axes = (('batch', heads[0], None, heads[1], None), keys, keys, ('batch', None, None))
  return on_shards(one, (q_bktgh, k_bkhs, v_bksh, mask_bts), axes, split=4)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _mix(
  q_bktgh: jax.Array,
  k_bkhs: jax.Array,
  v_bksh: jax.Array,
  mask_bts: jax.Array,
  scale: float,
  cap: float,
  at_once: int = 0,
) -> jax.Array:
  """softmax(q k) v over one set of keys, [B, K, T, G, H] float32; of `at_once` rows after the others, 0: of all.

  For the way back, beside what it was given, only what it gave and the logarithm of each sum are kept, and scores are
  computed again (Dao et al. 2022, arXiv 2205.14135, appendix B.2): kept, those of all layers would take more memory
  than all else. A query that sees no key gives anything, and must have no gradient.
  """
  return _mix_forward(q_bktgh, k_bkhs, v_bksh, mask_bts, scale, cap, at_once)[0]


def _mix_forward(
  q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float, cap: float, at_once: int
) -> tuple[jax.Array, Any]:
  def rows(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    score, _ = _scores(q, k, mask, scale, cap)
    top = score.max(-1)
    weight = jnp.exp(score - top[..., None])
    total = weight.sum(-1)
    return _product(weight.astype(v.dtype), v) / total[..., None], top + jnp.log(total)

  given = q, k, v, mask
  out, log_sum = _in_turn(rows, at_once, given)
  return out, (*given, out, log_sum)


def _mix_backward(scale: float, cap: float, at_once: int, saved: Any, grad: jax.Array) -> tuple[Any, Any, Any, None]:
  return *_in_turn(partial(_gradients, scale, cap), at_once, (*saved, grad)), None


def _gradients(
  scale: float,
  cap: float,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array,
  out: jax.Array,
  log_sum: jax.Array,
  grad: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Those of queries, keys and values, from the gradient of what `_mix` gave, which is `out`."""
  score, every = _scores(q, k, mask, scale, cap)
  weight = jnp.exp(score - log_sum[..., None])
  inner = (grad * out).sum(-1)
  # Of each product the operand with the axis H is the one to be transposed: the others are far larger.
  narrow = grad.astype(v.dtype)
  grad_weight = _product(narrow, jnp.swapaxes(v, 2, 3))
  grad_score = weight * (grad_weight - inner[..., None])
  if cap:
    grad_score *= 1 - jnp.square(every / cap)
  grad_score = (grad_score * scale).astype(k.dtype)
  grad_q = _product(grad_score, jnp.swapaxes(k, 2, 3))

  def over_queries(x_bktgh: jax.Array, y_bktgs: jax.Array) -> jax.Array:
    x_bkht, y_bkts = (array.reshape(*array.shape[:2], -1, array.shape[-1]) for array in (x_bktgh, y_bktgs))
    return jnp.einsum('bkht,bkts->bkhs', jnp.swapaxes(x_bkht, 2, 3), y_bkts, preferred_element_type=jnp.float32)

  grad_k, grad_v = over_queries(q, grad_score), jnp.swapaxes(over_queries(narrow, weight.astype(v.dtype)), 2, 3)
  return grad_q.astype(q.dtype), grad_k.astype(k.dtype), grad_v.astype(v.dtype)


_mix.defvjp(_mix_forward, _mix_backward)


def _in_turn(function: Callable[..., Any], at_once: int, arrays: Sequence[jax.Array]) -> Any:
  """A function of rows, of `at_once` of them after the others; 0: of all."""
  rows = len(arrays[0])
  if at_once in (0, rows):
    return function(*arrays)
  out = jax.lax.map(
    lambda some: function(*some), tuple(array.reshape(-1, at_once, *array.shape[1:]) for array in arrays)
  )
  return jax.tree.map(lambda array: array.reshape(rows, *array.shape[2:]), out)


# ---- devices ----


def head_axes(kv_heads: int, groups: int) -> tuple[str | None, str | None]:
  """The logical axes of K and G: one of them is split over devices, since a mesh axis splits one."""
  mesh = jax.sharding.get_abstract_mesh()
  return ('kv_heads', None) if mesh.empty or spec((kv_heads,), ('kv_heads',), mesh)[0] else (None, 'heads')


def on_shards(
  function: Callable[..., Any], arrays: Sequence[jax.Array], axes: Sequence[Sequence[str | None]], split: int = 3
) -> Any:
  """What a function gives that computes on each device's part of arrays; split as the first of them is in the first
  `split` of its axes.

  A kernel, or a loop, runs on what one device holds: left to XLA, all devices would gather all rows.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return function(*arrays)
  specs = tuple(spec(array.shape, some, mesh) for array, some in zip(arrays, axes, strict=True))
  out = PartitionSpec(*specs[0][:split])
  return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=False)(*arrays)


def with_shared(
  q_btkgh: jax.Array,
  top_bktg: jax.Array,
  own: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  shared: Sequence[tuple[tuple[jax.Array, jax.Array], Seen]],
  scale: float,
  cap: float,
  few: int = 0,
) -> jax.Array:
  """One softmax over a row's own keys and over shared ones, which are read once for all rows of their group: a few
  large matrix products instead of B small ones. Keys lie with their tokens last: products with them as they otherwise
  come take a CPU three times as long.

  Args:
    q_btkgh: queries.
    top_bktg: about the largest score of the row's own keys.
    own: of a number [B, K, T, G] that is taken from each score: the sum of their exponentials over the row's own keys,
      and of the values by them [B, K, T, G, H].
    shared: keys and values, and what is seen of them.
    scale, cap: of the scores.
    few: as `_product` takes it.
  """
  top = top_bktg
  scores = []
  for (k_akhp, _), (mask, seats) in shared:
    q_aketgh = jnp.moveaxis(_by_group(q_btkgh, len(k_akhp), seats), 3, 1)
    score = _product(q_aketgh, k_akhp, few) * scale
    seen = mask[:, None, None, None, None] if mask.ndim == 2 else mask[:, None, :, :, None]
    score = jnp.where(seen, softcap(score, cap), _MASKED)
    scores.append(score)
    top = jnp.maximum(top, _by_row(score.max(-1), seats))
  # The maximum only guards against overflow: the result does not depend on it.
  top = jax.lax.stop_gradient(top)
  total, out = own(top)
  for ((_, v_akph), (_, seats)), score in zip(shared, scores, strict=True):
    top_aketg = jnp.moveaxis(_by_group(top, len(v_akph), seats), 1, 2)
    weight = jnp.exp(score - top_aketg[..., None])
    total += _by_row(weight.sum(-1), seats)
    mixed = _product(weight.astype(v_akph.dtype), v_akph, few)
    out += _by_row(mixed, seats)
  return jnp.moveaxis(out / total[..., None], 1, 2)


def _by_group(array: jax.Array, groups: int, seats: Seats | None) -> jax.Array:
  """[B, ...] as [A, E, ...]."""
  if seats is not None:
    array = take(array, seats.rows)
  return array.reshape(groups, -1, *array.shape[1:])


def _by_row(array: jax.Array, seats: Seats | None) -> jax.Array:
  """[A, K, E, ...] as [B, K, ...]."""
  array = jnp.moveaxis(array, 1, 2)
  array = array.reshape(-1, *array.shape[2:])
  return array if seats is None else take(array, seats.seat)
