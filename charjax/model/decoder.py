"""The one decoder: a llama-family transformer as an NNX module, called as a pure function.

Letters: B rows, T tokens, S cache slots, A groups of rows, P prefix tokens, L layers, D width, N query heads,
K key/value heads, G = N // K, H head size, F MLP width, V vocabulary, R adapter rank.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from charjax.mesh import constrain
from charjax.model.attention import SharedKV, attention
from charjax.model.config import ModelConfig

# Shapes (as letters of ModelConfig fields) and logical axes of the parameters of all blocks, stacked over L.
_BLOCK_AXES: dict[str, tuple[str | None, ...]] = {
  'attn_norm': (None, None),
  'q': (None, 'embed', 'heads', None),
  'k': (None, 'embed', 'kv_heads', None),
  'v': (None, 'embed', 'kv_heads', None),
  'o': (None, 'heads', None, 'embed'),
  'mlp_norm': (None, None),
  'gate': (None, 'embed', 'mlp'),
  'up': (None, 'embed', 'mlp'),
  'down': (None, 'mlp', 'embed'),
}


@dataclasses.dataclass(frozen=True)
class Runtime:
  """How the decoder computes, as against what it computes.

  Attributes:
    compute_dtype: operands of matrix products; they always accumulate in float32.
    attention_dtype: operands of attention and the cache. XLA's CPU backend has no batched bfloat16 product
      that accumulates in float32, so there it is float32.
    scan_layers: one compiled layer, scanned (compiles several times faster), or all unrolled. Decoding with a cache
      is always unrolled: a scan would copy the cache at every token.
    remat: recompute each layer in the backward pass instead of keeping its activations.
  """

  compute_dtype: Any = jnp.float32
  attention_dtype: Any = jnp.float32
  scan_layers: bool = False
  remat: bool = False


def block_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shapes of the stacked block parameters."""
  c = config
  return {
    'attn_norm': (c.num_layers, c.embed_dim),
    'q': (c.num_layers, c.embed_dim, c.num_heads, c.head_dim),
    'k': (c.num_layers, c.embed_dim, c.num_kv_heads, c.head_dim),
    'v': (c.num_layers, c.embed_dim, c.num_kv_heads, c.head_dim),
    'o': (c.num_layers, c.num_heads, c.head_dim, c.embed_dim),
    'mlp_norm': (c.num_layers, c.embed_dim),
    'gate': (c.num_layers, c.embed_dim, c.mlp_dim),
    'up': (c.num_layers, c.embed_dim, c.mlp_dim),
    'down': (c.num_layers, c.mlp_dim, c.embed_dim),
  }


class Blocks(nnx.Module):
  """The parameters of all L blocks, each stacked along a first axis."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any):
    for name, shape in block_shapes(config).items():
      if name.endswith('norm'):
        value = jnp.ones(shape, dtype)
      else:
        fan_in = shape[1] if name not in ('o',) else shape[1] * shape[2]
        value = (jax.random.normal(rngs.params(), shape) * fan_in**-0.5).astype(dtype)
      setattr(self, name, nnx.Param(value, axes=_BLOCK_AXES[name]))

  def arrays(self) -> dict[str, jax.Array]:
    return {name: getattr(self, name)[...] for name in _BLOCK_AXES}


class Decoder(nnx.Module):
  """Token embedding, L pre-norm blocks, final norm, output head (the embedding itself when tied)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, runtime: Runtime | None = None):
    self.config = config
    self.runtime = runtime or Runtime()
    c = config
    embed = jax.random.normal(rngs.params(), (c.vocab_size, c.embed_dim)) * c.embed_dim**-0.5
    self.embed = nnx.Param(embed.astype(dtype), axes=('vocab', 'embed'))
    self.blocks = Blocks(c, rngs=rngs, dtype=dtype)
    self.final_norm = nnx.Param(jnp.ones((c.embed_dim,), dtype), axes=(None,))
    if not c.tied_embeddings:
      head = jax.random.normal(rngs.params(), (c.embed_dim, c.vocab_size)) * c.embed_dim**-0.5
      self.head = nnx.Param(head.astype(dtype), axes=('embed', 'vocab'))


class KV(NamedTuple):
  """Keys and values of all layers, each [B, K, S, H]: a tuple of L arrays, or one stacked [L, ...] when scanned."""

  k: Any
  v: Any


class Prefix(NamedTuple):
  """What stands before rows: A texts, each before B / A rows that follow one another (A = 1: before all).

  Attributes:
    kv: keys and values, each [A, K, P, H] a layer.
    length: [A] how many of P are real.
  """

  kv: KV
  length: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, weight: jax.Array, dtype: Any, axis: int = 0) -> jax.Array:
  """x [..., I] @ weight [I, O] (or [O, I] with axis 1), operands in `dtype`, accumulated and returned in float32.

  The backward pass rounds the cotangent to `dtype` too: JAX's own would multiply it in float32, at half the
  speed on hardware that has bfloat16 products. A weight is contracted where it lies: transposing the embedding
  first would cost four times the product.
  """
  return _dot(x.astype(dtype), weight.astype(dtype), (x.ndim - 1,), (axis,))


def _dot(a: jax.Array, b: jax.Array, a_axes: tuple[int, ...], b_axes: tuple[int, ...]) -> jax.Array:
  return jax.lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=jnp.float32)


def _matmul_forward(x: jax.Array, weight: jax.Array, dtype: Any, axis: int) -> tuple[jax.Array, Any]:
  return matmul(x, weight, dtype, axis), (x.astype(dtype), weight, jnp.zeros((), x.dtype))


def _matmul_backward(dtype: Any, axis: int, saved: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, weight, like = saved
  grad = grad.astype(dtype)
  leading = tuple(range(x.ndim - 1))
  grad_x = _dot(grad, weight.astype(dtype), (x.ndim - 1,), (1 - axis,)).astype(like.dtype)
  first, second = (x, grad) if axis == 0 else (grad, x)
  return grad_x, _dot(first, second, leading, leading).astype(weight.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def rms_norm(x: jax.Array, scale_d: jax.Array, eps: float) -> jax.Array:
  """x / sqrt(mean(x^2) + eps) * scale, in float32 (Zhang and Sennrich 2019, eq. 4)."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps) * scale_d.astype(jnp.float32)


def rotary(positions_bt: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine [B, T, H/2] of the rotary angles (Su et al. 2021, eq. 15)."""
  frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angle = positions_bt[..., None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_btnh: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the pairs (i, i + H/2) of each head."""
  first, second = jnp.split(x_btnh, 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def forward(
  decoder: Decoder,
  tokens_bt: jax.Array,
  positions_bt: jax.Array,
  mask_bts: jax.Array,
  *,
  adapter: Any = None,
  before: Sequence[Prefix] = (),
  cache: KV | None = None,
  cache_index: jax.Array | int = 0,
  layers: Any = None,
  tap: int | None = None,
) -> tuple[Any, KV]:
  """Hidden states after the final norm, and keys and values.

  Args:
    decoder: the weights.
    tokens_bt: token ids.
    positions_bt: positions in the whole text, what stands before the rows included.
    mask_bts: which keys each token attends to: S = T without a cache, else the cache's slots.
    adapter: a LoRA adapter (charjax.model.lora), or None.
    before: what stands before the rows.
    cache: where to write this call's keys and values (from slot `cache_index` on) and what to attend to.
    layers: `layer_weights(decoder, adapter)`, when the caller has it already: a decoding loop cuts the weights
      into layers once, not at each token.
    tap: a number of layers, for the states that `lower_layers` of so many would end in; without a cache.

  Returns:
    hidden states [B, T, D] float32 (with `tap`, a pair: those after so many layers, and the last), and the updated
    cache (or, without one, the keys and values of these tokens).
  """
  c, runtime = decoder.config, decoder.runtime
  dtype = runtime.compute_dtype
  groups = c.num_heads // c.num_kv_heads
  cos, sin = rotary(positions_bt, c.head_dim, c.rope_theta)
  masks = [jnp.arange(prefix.kv.k[0].shape[2]) < prefix.length[:, None] for prefix in before]

  def linear(x: jax.Array, name: str, layer: Any, lora: Any, in_axes: int = 1) -> jax.Array:
    weight = layer[name]
    in_dim = 1
    for size in weight.shape[:in_axes]:
      in_dim *= size
    out = matmul(x, weight.reshape(in_dim, -1), dtype)
    if lora is not None and name in lora:
      out += matmul(matmul(x, lora[name]['a'], dtype), lora[name]['b'], dtype)
    return out

  def block(x: jax.Array, scanned: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    layer, lora, kv, shared = scanned
    b, t, _ = x.shape
    normed = rms_norm(x, layer['attn_norm'], c.norm_eps)
    q = linear(normed, 'q', layer, lora).reshape(b, t, c.num_heads, c.head_dim)
    k = linear(normed, 'k', layer, lora).reshape(b, t, c.num_kv_heads, c.head_dim)
    v = linear(normed, 'v', layer, lora).reshape(b, t, c.num_kv_heads, c.head_dim)
    q = constrain(rotate(q, cos, sin), 'batch', None, 'heads', None)
    q = q.reshape(b, t, c.num_kv_heads, groups, c.head_dim).astype(runtime.attention_dtype)
    k = jnp.swapaxes(rotate(k, cos, sin), 1, 2).astype(runtime.attention_dtype)
    v = jnp.swapaxes(v, 1, 2).astype(runtime.attention_dtype)
    if kv is not None:
      k = jax.lax.dynamic_update_slice_in_dim(kv[0], k, cache_index, 2)
      v = jax.lax.dynamic_update_slice_in_dim(kv[1], v, cache_index, 2)
    k, v = (constrain(array, 'batch', 'kv_heads', None, None) for array in (k, v))
    parts = [SharedKV(prefix[0], prefix[1], real) for prefix, real in zip(shared, masks, strict=True)]
    mixed = attention(q, k, v, mask_bts, parts).reshape(b, t, c.num_heads, c.head_dim)
    mixed = constrain(mixed, 'batch', None, 'heads', None)
    x = x + linear(mixed.reshape(b, t, -1), 'o', layer, lora, in_axes=2)
    normed = rms_norm(x, layer['mlp_norm'], c.norm_eps)
    gated = jax.nn.silu(linear(normed, 'gate', layer, lora)) * linear(normed, 'up', layer, lora)
    x = x + linear(constrain(gated, 'batch', None, 'mlp'), 'down', layer, lora)
    return constrain(x, 'batch', None, None), (k, v)

  # Looked up in a table that is split along its width, rows would come out so, for all the batch on every device.
  table = constrain(decoder.embed[...], 'vocab', None)
  x = constrain(table[tokens_bt].astype(jnp.float32), 'batch', None, None)
  step = jax.checkpoint(block) if runtime.remat else block
  tapped = []
  if runtime.scan_layers and cache is None:
    scanned = (*stacked_weights(decoder, adapter), None, [prefix.kv for prefix in before])
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
      kv = (cache.k[i], cache.v[i]) if cache is not None else None
      shared = [(prefix.kv.k[i], prefix.kv.v[i]) for prefix in before]
      x, kv = step(x, (layer, lora, kv, shared))
      written.append(kv)
      if i + 1 == tap:
        tapped.append(x)
    k, v = (tuple(arrays) for arrays in zip(*written, strict=True))
  hidden = rms_norm(x, decoder.final_norm[...], c.norm_eps)
  if tap is None:
    return hidden, KV(k, v)
  return (rms_norm(tapped[0], decoder.final_norm[...], c.norm_eps), hidden), KV(k, v)


def lower_layers(decoder: Decoder, count: int) -> Decoder:
  """The first `count` layers as a decoder of their own, which ends in the same norm."""
  graph, state = nnx.split(decoder)

  def cut(path: Any, leaf: Any) -> Any:
    return leaf.replace(leaf[...][:count]) if path[0] == 'blocks' else leaf

  lower = nnx.merge(graph, nnx.map_state(cut, state), copy=True)
  lower.config = dataclasses.replace(decoder.config, num_layers=count)
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
  return constrain(out, 'batch', *(None,) * (out.ndim - 2), 'vocab')


def make_cache(decoder: Decoder, rows: int, slots: int) -> KV:
  """An empty cache of `slots` tokens a row, one array a layer."""
  c = decoder.config
  empty = tuple(
    jnp.zeros((rows, c.num_kv_heads, slots, c.head_dim), decoder.runtime.attention_dtype) for _ in range(c.num_layers)
  )
  return KV(empty, empty)
