"""The one decoder, of all families: a transformer as an NNX module, called as a pure function.

What sets families apart is told by fields of ModelConfig.

Letters: B rows, T tokens, S cache slots, A groups of rows, P prefix tokens, L layers, D width, N query heads,
K key/value heads, G = N // K, H head size, F MLP width, E experts, V vocabulary, R adapter rank.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from charjax.mesh import constrain
from charjax.model import quantized
from charjax.model.attention import Before, Places, make_attention, softcap
from charjax.model.config import LayerKind, ModelConfig
from charjax.model.experts import mixture
from charjax.model.packing import Packing, pack, unpack
from charjax.model.rope import rotary, rotate

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'silu': jax.nn.silu,
  'gelu_tanh': partial(jax.nn.gelu, approximate=True),
}


_WHOLE = 2**30  # a window that no text fills


class BlockParameter(NamedTuple):
  """A parameter of all blocks, stacked over L.

  Attributes:
    shape: with L first; of experts' matrices E second.
    axes: the logical axis of each dimension (see charjax.mesh).
    inputs: of a matrix, how many of the dimensions after those are its inputs; 0: it is a vector.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  inputs: int


@dataclasses.dataclass(frozen=True)
class Runtime:
  """How the decoder computes, as against what it computes.

  Attributes:
    compute_dtype: operands of matrix products; they always accumulate in float32.
    attention_dtype: operands of attention and the cache. XLA's CPU backend has no batched bfloat16 product
      that accumulates in float32, so there it is float32.
    attention: how attention is computed, see charjax.model.attention.make_attention.
    scan_layers: one compiled layer, scanned (compiles several times faster), or all unrolled. Decoding with a cache
      is always unrolled: a scan would copy the cache at every token.
    remat: recompute each layer in the backward pass instead of keeping its activations.
    quantize: how the projections that adapters can stand beside are kept: '' as they are, or 'int8' or 'int4' (see
      charjax.model.quantized), frozen.
    widen: operands are multiplied in float32 once they are rounded: 1.5 times as fast on CPUs without products of
      bfloat16. Decoding with a cache does without, since it would widen all weights for every token.
  """

  compute_dtype: Any = jnp.float32
  attention_dtype: Any = jnp.float32
  attention: str = 'xla'
  scan_layers: bool = False
  remat: bool = False
  quantize: str = ''
  widen: bool = False


def block_parameters(config: ModelConfig) -> dict[str, BlockParameter]:
  """The parameters that the blocks of such a decoder have, by name."""
  c = config
  out: dict[str, BlockParameter] = {}

  def add(name: str, *dims: tuple[int, str | None], inputs: int = 0) -> None:
    sizes, axes = zip((c.num_layers, None), *dims, strict=True)
    out[name] = BlockParameter(sizes, axes, inputs)

  embed, head = (c.embed_dim, 'embed'), (c.head_dim, None)
  mlp: tuple[int, str | None] = (c.mlp_dim, 'mlp')
  heads, kv_heads = (c.num_heads, 'heads'), (c.num_kv_heads, 'kv_heads')
  if c.pre_norms:
    add('attn_norm', (c.embed_dim, None))
  for name, some in (('q', heads), ('k', kv_heads), ('v', kv_heads)):
    add(name, embed, some, head, inputs=1)
    if c.qkv_bias:
      add(f'{name}_bias', some, head)
    if c.qk_norm and name != 'v':
      add(f'{name}_norm', head if c.qk_norm == 'head' else (some[0] * c.head_dim, None))
  add('o', heads, head, embed, inputs=2)
  if c.o_bias:
    add('o_bias', (c.embed_dim, None))
  if c.post_norms:
    add('attn_post_norm', (c.embed_dim, None))
  if c.pre_norms:
    add('mlp_norm', (c.embed_dim, None))
  expert: list[tuple[int, str | None]] = []
  if c.num_experts:
    # Experts are split among devices, not their widths: the two would share a mesh axis.
    expert, mlp = [(c.num_experts, 'experts')], (c.mlp_dim, None)
    add('router', embed, (c.num_experts, None), inputs=1)
  for name, dims in (('gate', (embed, mlp)), ('up', (embed, mlp)), ('down', (mlp, embed))):
    add(name, *expert, *dims, inputs=1)
    if c.mlp_bias:
      add(f'{name}_bias', (dims[1][0], None))
  if c.post_norms:
    add('mlp_post_norm', (c.embed_dim, None))
  return out


def block_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shapes of the stacked block parameters."""
  return {name: parameter.shape for name, parameter in block_parameters(config).items()}


class Blocks(nnx.Module):
  """The parameters of all L blocks, each stacked along a first axis."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any, quantize: str = ''):
    parameters, names = block_parameters(config), []
    for name, (shape, axes, inputs) in parameters.items():
      if name.endswith('norm'):
        value = jnp.full(shape, 1 - config.norm_offset, dtype)
      elif not inputs:
        value = jnp.zeros(shape, dtype)
      else:
        first = 2 if axes[1] == 'experts' else 1
        fan_in = math.prod(shape[first : first + inputs])
        value = (jax.random.normal(rngs.params(), shape) * fan_in**-0.5).astype(dtype)
      if quantize and name in config.dense_projections:
        value, scale = quantized.quantize(value, inputs, quantize)
        setattr(self, f'{name}_scale', nnx.Param(scale, axes=axes))
        names.append(f'{name}_scale')
      setattr(self, name, nnx.Param(value, axes=axes))
      names.append(name)
    self.names = tuple(names)

  def arrays(self) -> dict[str, jax.Array]:
    return {name: getattr(self, name)[...] for name in self.names}


class Decoder(nnx.Module):
  """Token embedding, L blocks, final norm, output head (the embedding itself when tied)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, runtime: Runtime | None = None):
    self.config = config
    self.runtime = runtime or Runtime()
    c = config
    embed = jax.random.normal(rngs.params(), (c.vocab_size, c.embed_dim)) * c.embed_dim**-0.5
    self.embed = nnx.Param(embed.astype(dtype), axes=('vocab', 'embed'))
    self.blocks = Blocks(c, rngs=rngs, dtype=dtype, quantize=self.runtime.quantize)
    self.final_norm = nnx.Param(jnp.full((c.embed_dim,), 1 - c.norm_offset, dtype), axes=(None,))
    if not c.tied_embeddings:
      head = jax.random.normal(rngs.params(), (c.embed_dim, c.vocab_size)) * c.embed_dim**-0.5
      self.head = nnx.Param(head.astype(dtype), axes=('embed', 'vocab'))


class KV(NamedTuple):
  """Keys [B, K, H, S] and values [B, K, S, H] of all layers, each a tuple of L arrays, or one stacked when scanned."""

  k: Any
  v: Any


class Prefix(NamedTuple):
  """What stands before rows: A times P tokens, each P before B / A rows that follow one another (A = 1: before all).

  Attributes:
    kv: keys [A, K, H, P] and values [A, K, P, H] of each layer.
    places: of the tokens, [A, P].
    read: [B, T] which of its texts each token of the rows reads; None: all.
  """

  kv: KV
  places: Places
  read: jax.Array | None = None


class Cache(NamedTuple):
  """The tokens that rows read before, S slots each, in any order.

  Attributes:
    kv: keys [B, K, H, S] and values [B, K, S, H] of each layer.
    places: of the tokens, [B, S].
  """

  kv: KV
  places: Places


class Widened(NamedTuple):
  """Operands of products that are rounded to `narrow` and multiplied in float32: the same numbers, since each is one in
  float32, too, and the sums are kept there anyhow."""

  narrow: Any


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
  """An operand of a product: in `dtype`, or with a `Widened` in float32 and rounded."""
  if not isinstance(dtype, Widened):
    return x.astype(dtype)
  if x.dtype == dtype.narrow:
    return x.astype(jnp.float32)
  # Not by way of the narrow type: XLA may take two conversions that lead back for none.
  kind = jnp.finfo(dtype.narrow)
  return jax.lax.reduce_precision(x.astype(jnp.float32), kind.nexp, kind.nmant)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, weight: jax.Array, dtype: Any, axis: int = 0) -> jax.Array:
  """x [..., I] @ weight [I, O] (or [O, I] with axis 1), operands `rounded`, accumulated and returned in float32.

  The backward pass rounds the cotangent too: JAX's own would multiply it in float32, at half the
  speed on hardware that has bfloat16 products. A weight is contracted where it lies: transposing the embedding
  first would cost four times the product.
  """
  return _dot(rounded(x, dtype), rounded(weight, dtype), (x.ndim - 1,), (axis,))


def _dot(a: jax.Array, b: jax.Array, a_axes: tuple[int, ...], b_axes: tuple[int, ...]) -> jax.Array:
  return jax.lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=jnp.float32)


def _matmul_forward(x: jax.Array, weight: jax.Array, dtype: Any, axis: int) -> tuple[jax.Array, Any]:
  kept = rounded(x, dtype).astype(dtype.narrow if isinstance(dtype, Widened) else dtype)
  return matmul(x, weight, dtype, axis), (kept, weight, jnp.zeros((), x.dtype))


def _matmul_backward(dtype: Any, axis: int, saved: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, weight, like = saved
  x, grad = rounded(x, dtype), rounded(grad, dtype)
  leading = tuple(range(x.ndim - 1))
  grad_x = _dot(grad, rounded(weight, dtype), (x.ndim - 1,), (1 - axis,)).astype(like.dtype)
  first, second = (x, grad) if axis == 0 else (grad, x)
  return grad_x, _dot(first, second, leading, leading).astype(weight.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def frozen_matmul(x: jax.Array, q: jax.Array, s: jax.Array, dtype: Any) -> jax.Array:
  """x [..., I] @ a quantised weight, as `matmul`; the weight has no gradient.

  The backward pass makes the weight anew from its few bits: else it would keep every one of them in full.
  """
  return matmul(x, quantized.dequantize(q, s).reshape(x.shape[-1], -1), dtype)


def _frozen_forward(x: jax.Array, q: jax.Array, s: jax.Array, dtype: Any) -> tuple[jax.Array, Any]:
  return frozen_matmul(x, q, s, dtype), (q, s, jnp.zeros((0, x.shape[-1]), x.dtype))


def _frozen_backward(dtype: Any, saved: Any, grad: jax.Array) -> tuple[jax.Array, None, None]:
  q, s, like = saved
  weight = quantized.dequantize(q, s).reshape(like.shape[-1], -1)
  return _dot(rounded(grad, dtype), rounded(weight, dtype), (grad.ndim - 1,), (1,)).astype(like.dtype), None, None


frozen_matmul.defvjp(_frozen_forward, _frozen_backward)


def rms_norm(x: jax.Array, scale_d: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
  """x / sqrt(mean(x^2) + eps) * (offset + scale), in float32 (Zhang and Sennrich 2019, eq. 4)."""
  x = x.astype(jnp.float32)
  normed, scale_d = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps), scale_d.astype(jnp.float32)
  return normed * (scale_d + offset if offset else scale_d)


def forward(
  decoder: Decoder,
  tokens_bt: jax.Array,
  positions_bt: jax.Array,
  texts_bt: jax.Array | None = None,
  *,
  adapter: Any = None,
  before: Sequence[Prefix] = (),
  cache: Cache | None = None,
  cache_index: jax.Array | int = 0,
  layers: Any = None,
  tap: int | None = None,
  packing: Packing | None = None,
) -> tuple[Any, Any]:
  """Hidden states after the final norm, and keys and values.

  Args:
    decoder: the weights.
    tokens_bt: token ids.
    positions_bt: positions in the whole text, what stands before the rows included.
    texts_bt: numbers of the texts that the tokens belong to, 0 for padding; None: each row is one text. A token attends
      to those of its text up to itself; in layers with a window, to the last of them.
    adapter: a LoRA adapter (charjax.model.lora), or None.
    before: what stands before the rows.
    cache: where to write this call's keys and values (from slot `cache_index` on) and what to attend to.
    layers: `layer_weights(decoder, adapter)`, when the caller has it already: a decoding loop cuts the weights
      into layers once, not at each token.
    tap: a number of layers, for the states that `lower_layers` of so many would end in; without a cache.
    packing: of the rows, outside attention; without a cache.

  Returns:
    hidden states [B, T, D] float32, packed where the rows were (with `tap`, a pair: those after so many layers, and the
    last), and the updated cache (without one: the KV of these tokens).
  """
  c, runtime = decoder.config, decoder.runtime
  dtype = Widened(runtime.compute_dtype) if runtime.widen and cache is None else runtime.compute_dtype
  groups = c.num_heads // c.num_kv_heads
  activation = _ACTIVATIONS[c.activation]
  norm = partial(rms_norm, eps=c.norm_eps, offset=c.norm_offset)
  queries = Places(positions_bt, jnp.ones_like(positions_bt) if texts_bt is None else texts_bt)
  if packing is not None:  # all but attention takes each token by itself
    tokens_bt, positions_bt = (pack(array, packing) for array in (tokens_bt, positions_bt))
  tables = [rotary(positions_bt, c.rotated, c.rope_theta, c.rope_factors, c.rope_gain)]
  if c.local_rope_theta:
    tables.append(rotary(positions_bt, c.rotated, c.local_rope_theta))
  if c.rope_layers:
    tables.append((jnp.ones_like(tables[0][0]), jnp.zeros_like(tables[0][1])))
  cached = None
  if cache is not None:
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=cache_index, axis=1)
    cached = jax.tree.map(put, cache.places, queries)
  places = [Before(prefix.places, prefix.read) for prefix in before]
  attend = make_attention(
    runtime.attention, queries, cached, places, scale=c.query_scale, cap=c.attention_softcap, windows=c.windows
  )

  def in_rows(x: jax.Array) -> jax.Array:
    return x if packing is None else unpack(x, packing)

  def linear(x: jax.Array, name: str, layer: Any, lora: Any, in_axes: int = 1) -> jax.Array:
    weight = layer[name]
    if f'{name}_scale' in layer:
      out = frozen_matmul(x, weight, layer[f'{name}_scale'], dtype)
    else:
      in_dim = 1
      for size in weight.shape[:in_axes]:
        in_dim *= size
      out = matmul(x, weight.reshape(in_dim, -1), dtype)
    if lora is not None and name in lora:
      out += matmul(matmul(x, lora[name]['a'], dtype), lora[name]['b'], dtype)
    if f'{name}_bias' in layer:
      out += layer[f'{name}_bias'].astype(jnp.float32).reshape(-1)
    return out

  def heads(normed: jax.Array, name: str, layer: Any, lora: Any) -> jax.Array:
    out, count = linear(normed, name, layer, lora), c.num_heads if name == 'q' else c.num_kv_heads
    scale = layer.get(f'{name}_norm')
    if c.qk_norm == 'all' and scale is not None:
      out = norm(out, scale)
    out = out.reshape(*out.shape[:2], count, c.head_dim)
    return norm(out, scale) if c.qk_norm == 'head' and scale is not None else out

  def mlp(normed: jax.Array, layer: Any, lora: Any) -> jax.Array:
    if not c.num_experts:
      gated = activation(linear(normed, 'gate', layer, lora)) * linear(normed, 'up', layer, lora)
      return linear(constrain(gated, 'batch', None, 'mlp'), 'down', layer, lora)
    flat = normed.reshape(-1, c.embed_dim)
    said = mixture(flat, linear(flat, 'router', layer, None), layer, c, activation, runtime.compute_dtype)
    return said.reshape(normed.shape)

  def block(x: jax.Array, scanned: Any, kind: LayerKind) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    layer, lora, kv, shared = scanned
    cos, sin = _choose(tables, kind.rotation)
    normed = norm(x, layer['attn_norm']) if c.pre_norms else x
    q, k, v = (heads(normed, name, layer, lora) for name in 'qkv')
    q = constrain(rotate(q, cos, sin), 'batch', None, 'heads', None)
    q, k, v = (in_rows(array.astype(runtime.attention_dtype)) for array in (q, rotate(k, cos, sin), v))
    b, t = q.shape[:2]
    q = q.reshape(b, t, c.num_kv_heads, groups, c.head_dim)
    k, v = jnp.moveaxis(k, 1, 3), jnp.swapaxes(v, 1, 2)
    if kv is not None:
      k = jax.lax.dynamic_update_slice_in_dim(kv[0], k, cache_index, 3)
      v = jax.lax.dynamic_update_slice_in_dim(kv[1], v, cache_index, 2)
    k, v = (constrain(array, 'batch', 'kv_heads', None, None) for array in (k, v))
    mixed = attend(q, k, v, shared, kind.window)
    mixed = constrain(mixed.reshape(b, t, c.num_heads, c.head_dim), 'batch', None, 'heads', None)
    mixed = mixed if packing is None else pack(mixed, packing)
    said = linear(mixed.reshape(*x.shape[:2], -1), 'o', layer, lora, in_axes=2)
    x = x + (norm(said, layer['attn_post_norm']) if c.post_norms else said)
    said = mlp(norm(x, layer['mlp_norm']) if c.pre_norms else x, layer, lora)
    x = x + (norm(said, layer['mlp_post_norm']) if c.post_norms else said)
    return constrain(x, 'batch', None, None), (k, v)

  # Looked up in a table that is split along its width, rows would come out so, for all the batch on every device.
  table = constrain(decoder.embed[...], 'vocab', None)
  x = table[tokens_bt].astype(jnp.float32)
  x = constrain(x * c.embed_scale if c.embed_scale != 1 else x, 'batch', None, None)
  kinds = c.layer_kinds()
  recompute = jax.checkpoint if runtime.remat else lambda function: function
  steps = {kind: recompute(partial(block, kind=kind)) for kind in dict.fromkeys(kinds)}
  tapped = []
  if runtime.scan_layers and cache is None:
    step: Any = steps[kinds[0]]
    scanned: Any = (*stacked_weights(decoder, adapter), None, [prefix.kv for prefix in before])
    if len(steps) > 1:
      step = recompute(lambda x, scanned: block(x, scanned[:-1], scanned[-1]))
      scanned = (*scanned, _stack_kinds(kinds))
    pieces = [scanned]
    if tap is not None:
      pieces = [jax.tree.map(lambda a, part=part: a[part], scanned) for part in (slice(tap), slice(tap, None))]
    written = []
    for piece in pieces:
      x, kv = jax.lax.scan(step, x, piece)
      tapped.append(x)
      written.append(kv)
    k, v = written[0] if tap is None else jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *written)
  else:
    written = []
    for i, (layer, lora) in enumerate(layers or layer_weights(decoder, adapter)):
      kv = (cache.kv.k[i], cache.kv.v[i]) if cache is not None else None
      shared = [(prefix.kv.k[i], prefix.kv.v[i]) for prefix in before]
      x, kv = steps[kinds[i]](x, (layer, lora, kv, shared))
      written.append(kv)
      if i + 1 == tap:
        tapped.append(x)
    k, v = (tuple(arrays) for arrays in zip(*written, strict=True))
  hidden: Any = norm(x, decoder.final_norm[...])
  if tap is not None:
    hidden = norm(tapped[0], decoder.final_norm[...]), hidden
  return hidden, KV(k, v) if cached is None else Cache(KV(k, v), cached)


def _stack_kinds(kinds: Sequence[LayerKind]) -> LayerKind:
  """What a scan over layers of several kinds reads beside their weights: arrays over L."""
  window = np.array([_WHOLE if kind.window is None else kind.window for kind in kinds], np.int32)
  return LayerKind(jnp.asarray(window), jnp.asarray(np.array([kind.rotation for kind in kinds], np.int32)))


def _choose(tables: Sequence[Any], index: Any) -> Any:
  """One of several pairs of arrays alike, by an index that inside a scan is an array."""
  if isinstance(index, int) or len(tables) == 1:
    return tables[index if isinstance(index, int) else 0]
  return jax.tree.map(lambda *arrays: jnp.stack(arrays)[index], *tables)


def lower_layers(decoder: Decoder, count: int) -> Decoder:
  """The first `count` layers as a decoder of their own, which ends in the same norm."""
  if count == decoder.config.num_layers:
    return decoder
  graph, state = nnx.split(decoder)

  def cut(path: Any, leaf: Any) -> Any:
    return leaf.replace(leaf[...][:count]) if path[0] == 'blocks' else leaf

  lower = nnx.merge(graph, nnx.map_state(cut, state), copy=True)
  lower.config = decoder.config.lower(count)
  return lower


def stacked_weights(decoder: Decoder, adapter: Any = None) -> tuple[Any, Any]:
  """The (weights, adapter) of all layers, each array stacked over L."""
  return decoder.blocks.arrays(), adapter.arrays() if adapter is not None else None


def layer_weights(decoder: Decoder, adapter: Any = None) -> list[tuple[Any, Any]]:
  """The (weights, adapter) of each layer.

  They are cut by one `lax.split`: its transpose is one concatenation, where slicing layer by layer would add
  L arrays of the full size in the backward pass.
  """
  count = decoder.config.num_layers
  leaves, structure = jax.tree.flatten(stacked_weights(decoder, adapter))
  pieces = [jax.lax.split(leaf, [1] * count, 0) for leaf in leaves]
  return [jax.tree.unflatten(structure, [piece[i][0] for piece in pieces]) for i in range(count)]


def logits(decoder: Decoder, hidden: jax.Array) -> jax.Array:
  """Output logits [..., V] float32 of final hidden states [..., D]."""
  dtype = decoder.runtime.compute_dtype
  tied = decoder.config.tied_embeddings
  out = matmul(hidden, decoder.embed[...], dtype, 1) if tied else matmul(hidden, decoder.head[...], dtype)
  out = constrain(out, 'batch', *(None,) * (out.ndim - 2), 'vocab')
  return softcap(out, decoder.config.logit_softcap)


def make_cache(decoder: Decoder, rows: int, slots: int) -> Cache:
  """An empty cache of `slots` tokens a row, one array a layer."""
  c = decoder.config
  dtype, each = decoder.runtime.attention_dtype, range(c.num_layers)
  k = tuple(jnp.zeros((rows, c.num_kv_heads, c.head_dim, slots), dtype) for _ in each)
  v = tuple(jnp.zeros((rows, c.num_kv_heads, slots, c.head_dim), dtype) for _ in each)
  nowhere = jnp.zeros((rows, slots), jnp.int32)
  return Cache(KV(k, v), Places(nowhere, nowhere))
