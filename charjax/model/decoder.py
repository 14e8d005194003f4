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

from charjax.mesh import constrain, split_into
from charjax.model.attention import Attend, Before, Places, Seats, make_attention, softcap
from charjax.model.blocks import Blocks
from charjax.model.config import LayerKind, ModelConfig
from charjax.model.experts import mixture
from charjax.model.packing import Packing, pack, unpack
from charjax.model.products import Widened, frozen_matmul, matmul, rms_norm
from charjax.model.rope import rotary, rotate

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'silu': jax.nn.silu,
  'gelu_tanh': partial(jax.nn.gelu, approximate=True),
}


_WHOLE = 2**30  # a window that no text fills


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


class Decoder(nnx.Module):
  """Token embedding, L blocks, final norm, output head (the embedding itself when tied)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, runtime: Runtime | None = None):
    self.config = config
    self.runtime = runtime or Runtime()
    c = config
    embed = jax.random.normal(rngs.params(), (c.vocab_size, c.embed_dim)) * c.embed_dim**-0.5
    self.embed = nnx.Param(embed.astype(dtype), axes=(None, 'spread'))
    self.blocks = Blocks(c, rngs=rngs, dtype=dtype, quantize=self.runtime.quantize)
    self.final_norm = nnx.Param(jnp.full((c.embed_dim,), 1 - c.norm_offset, dtype), axes=(None,))
    if not c.tied_embeddings:
      head = jax.random.normal(rngs.params(), (c.embed_dim, c.vocab_size)) * c.embed_dim**-0.5
      self.head = nnx.Param(head.astype(dtype), axes=('embed', 'spread'))


class KV(NamedTuple):
  """Keys [B, K, H, S] and values [B, K, S, H] of all layers, each a tuple of L arrays, or one stacked when scanned."""

  k: Any
  v: Any


class Prefix(NamedTuple):
  """What stands before rows: A times P tokens, each P before B / A rows that follow one another (A = 1: before all).

  Attributes:
    kv: keys [A, K, H, P] and values [A, K, P, H] of each layer.
    places: of the tokens, [A, P].
    seats: of the rows that read them, of one token each, where they do not follow one another.
  """

  kv: KV
  places: Places
  seats: Seats | None = None


class Cache(NamedTuple):
  """The tokens that rows read before, S slots each, in any order.

  Attributes:
    kv: keys [B, K, H, S] and values [B, K, S, H] of each layer.
    places: of the tokens, [B, S].
  """

  kv: KV
  places: Places


class Part(NamedTuple):
  """Rows that go through the layers together with others, and may read them.

  Attributes:
    tokens: [B, T] ids.
    positions: [B, T], as `forward` takes them.
    texts: [B, T], as `forward` takes them.
    reads: which parts before this one stand before its rows: A texts, each before B / A rows that follow one another.
    packing: of the rows, outside attention.
  """

  tokens: jax.Array
  positions: jax.Array
  texts: jax.Array | None = None
  reads: Sequence[int] = ()
  packing: Packing | None = None

  def copies(self, devices: int) -> int:
    """How often each row is computed, so that devices divide them: of a prompt, say, whose replies lie on several."""
    return 1 if self.packing else devices // math.gcd(len(self.tokens), devices)

  def repeated(self, copies: int) -> 'Part':
    rows = self.tokens, self.positions, self.texts
    tokens, positions, texts = jax.tree.map(lambda array: jnp.repeat(array, copies, 0), rows)
    return self._replace(tokens=tokens, positions=positions, texts=texts)

  @property
  def shape(self) -> tuple[int, ...]:
    """Of its tokens outside attention."""
    return (self.packing.slots if self.packing else self.tokens).shape

  def pack(self, rows: jax.Array) -> jax.Array:
    return pack(rows, self.packing) if self.packing else rows

  def unpack(self, tokens: jax.Array) -> jax.Array:
    return unpack(tokens, self.packing) if self.packing else tokens


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

  Returns:
    hidden states [B, T, D] float32 (with `tap`, a pair: those after so many layers, and the last), and the updated
    cache (without one: the KV of these tokens).
  """
  queries = _places(positions_bt, texts_bt)
  cached = None
  if cache is not None:
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=cache_index, axis=1)
    cached = jax.tree.map(put, cache.places, queries)
  attend = _attention(decoder, queries, cached, [Before(prefix.places, prefix.seats) for prefix in before])

  def mix(q: jax.Array, k: jax.Array, v: jax.Array, beside: Any, window: Any) -> tuple[jax.Array, Any]:
    kv, shared = beside
    q, k, v = _by_head(q, k, v)
    if kv is not None:
      k = jax.lax.dynamic_update_slice_in_dim(kv[0], k, cache_index, 3)
      v = jax.lax.dynamic_update_slice_in_dim(kv[1], v, cache_index, 2)
    k, v = _split_kv(k, v)
    return _all_heads(attend(q, k, v, shared, window)), (k, v)

  def beside(layer: Any) -> Any:
    kv = None if cache is None else (cache.kv.k[layer], cache.kv.v[layer])
    return kv, _of_layer(before, layer)

  hidden, kv = _through_layers(
    decoder, tokens_bt, positions_bt, mix, beside, adapter=adapter, layers=layers, tap=tap, decoding=cache is not None
  )
  return hidden, KV(*kv) if cached is None else Cache(KV(*kv), cached)


def forward_parts(
  decoder: Decoder,
  parts: Sequence[Part],
  *,
  adapter: Any = None,
  before: Sequence[Prefix] = (),
  tap: int | None = None,
) -> list[Any]:
  """Hidden states of several parts, which go through each layer together: its weights are read, and their gradients
  are summed, once for all of them.

  All tokens are laid end to end, in one row for each of the devices that a batch is split over; in attention alone they
  lie in the rows of their part.

  Args:
    decoder: the weights.
    parts: the tokens; where they are packed, by the device.
    adapter: a LoRA adapter, or None.
    before: what stands before the rows of all parts: one text each.
    tap: as `forward` takes it.

  Returns:
    of each part the hidden states as `forward` gives them, packed where its rows are.
  """
  devices = split_into()
  copies = [part.copies(devices) for part in parts]
  parts = [part.repeated(count) if count > 1 else part for part, count in zip(parts, copies, strict=True)]
  ends = np.cumsum([math.prod(part.shape) // devices for part in parts])[:-1]

  def join(arrays: Sequence[jax.Array]) -> jax.Array:
    flat = [part.pack(array) for part, array in zip(parts, arrays, strict=True)]
    return jnp.concatenate([array.reshape(devices, -1, *array.shape[2:]) for array in flat], 1)

  def cut(stream: jax.Array) -> list[jax.Array]:
    found = zip(parts, jnp.split(stream, ends, axis=1), strict=True)
    return [one.reshape(*part.shape, *one.shape[2:]) for part, one in found]

  def in_rows(stream: jax.Array) -> list[jax.Array]:
    return [part.unpack(one) for part, one in zip(parts, cut(stream), strict=True)]

  places = [_places(part.positions, part.texts) for part in parts]
  external = [Before(prefix.places, prefix.seats) for prefix in before]
  attends = [
    _attention(decoder, where, None, [*external, *(Before(places[other]) for other in part.reads)])
    for part, where in zip(parts, places, strict=True)
  ]

  def mix(q: jax.Array, k: jax.Array, v: jax.Array, shared: Any, window: Any) -> tuple[jax.Array, None]:
    read: list[tuple[jax.Array, jax.Array]] = []
    mixed = []
    for part, attend, *heads in zip(parts, attends, *map(in_rows, (q, k, v)), strict=True):
      own_q, *own = _by_head(*heads)
      own_k, own_v = _split_kv(*own)
      mixed.append(_all_heads(attend(own_q, own_k, own_v, [*shared, *(read[i] for i in part.reads)], window)))
      read.append((own_k, own_v))
    return join(mixed), None

  tokens, positions = (join([getattr(part, name) for part in parts]) for name in ('tokens', 'positions'))
  hidden, _ = _through_layers(decoder, tokens, positions, mix, partial(_of_layer, before), adapter=adapter, tap=tap)
  found = [
    [one[::count] for count, one in zip(copies, cut(states), strict=True)]
    for states in (hidden if tap is not None else [hidden])
  ]
  return found[0] if tap is None else list(zip(*found, strict=True))


def _places(positions_bt: jax.Array, texts_bt: jax.Array | None) -> Places:
  return Places(positions_bt, jnp.ones_like(positions_bt) if texts_bt is None else texts_bt)


def _attention(decoder: Decoder, queries: Places, cached: Places | None, before: Sequence[Before]) -> Attend:
  c = decoder.config
  return make_attention(
    decoder.runtime.attention, queries, cached, before, scale=c.query_scale, cap=c.attention_softcap, windows=c.windows
  )


def _of_layer(before: Sequence[Prefix], layer: Any) -> list[tuple[Any, Any]]:
  return [(prefix.kv.k[layer], prefix.kv.v[layer]) for prefix in before]


def _by_head(q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """As attention takes them: [B, T, K, G, H], [B, K, H, T], [B, K, T, H]."""
  b, t, _, h = q_btnh.shape
  return q_btnh.reshape(b, t, k_btkh.shape[2], -1, h), jnp.moveaxis(k_btkh, 1, 3), jnp.swapaxes(v_btkh, 1, 2)


def _split_kv(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  return tuple(constrain(array, 'batch', 'kv_heads', None, None) for array in arrays)


def _all_heads(mixed_btkgh: jax.Array) -> jax.Array:
  b, t, k, g, h = mixed_btkgh.shape
  return constrain(mixed_btkgh.reshape(b, t, k * g, h), 'batch', None, 'heads', None)


def _through_layers(
  decoder: Decoder,
  tokens_bt: jax.Array,
  positions_bt: jax.Array,
  mix: Callable[..., tuple[jax.Array, Any]],
  beside: Callable[[Any], Any],
  *,
  adapter: Any,
  tap: int | None,
  layers: Any = None,
  decoding: bool = False,
) -> tuple[Any, Any]:
  """Tokens through all layers; rows are told apart by attention alone.

  Args:
    decoder: the weights.
    tokens_bt: ids, in whichever rows `mix` knows.
    positions_bt: as `forward` takes them.
    mix: attention, of queries [B, T, N, H], keys and values [B, T, K, H], what is `beside` a layer, and its window; as
      [B, T, N, H], and what is to be kept of the layer.
    beside: of the number of a layer, or the slice of all.
    adapter, tap, layers: as `forward` takes them.
    decoding: one token a row with a cache.

  Returns:
    hidden states as `forward` gives them, and what `mix` kept, stacked over L or in tuples.
  """
  c, runtime = decoder.config, decoder.runtime
  dtype = Widened(runtime.compute_dtype) if runtime.widen and not decoding else runtime.compute_dtype
  activation = _ACTIVATIONS[c.activation]
  norm = partial(rms_norm, eps=c.norm_eps, offset=c.norm_offset)
  tables = [rotary(positions_bt, c.rotated, c.rope_theta, c.rope_factors, c.rope_gain)]
  if c.local_rope_theta:
    tables.append(rotary(positions_bt, c.rotated, c.local_rope_theta))
  if c.rope_layers:
    tables.append((jnp.ones_like(tables[0][0]), jnp.zeros_like(tables[0][1])))

  def meet(x: jax.Array) -> jax.Array:
    # While decoding, a token of each row is little beside the weights: it goes to them, and not they to it.
    return constrain(x.astype(runtime.compute_dtype), 'rows', None, None) if decoding else x

  def linear(x: jax.Array, name: str, layer: Any, lora: Any) -> jax.Array:
    weight = layer[name]
    if f'{name}_scale' in layer:
      out = frozen_matmul(x, weight, layer[f'{name}_scale'], dtype)
    else:
      out = matmul(x, weight.reshape(x.shape[-1], -1), dtype)
    if lora is not None and name in lora:
      out += matmul(matmul(x, lora[name]['a'], dtype), lora[name]['b'], dtype)
    if f'{name}_bias' in layer:
      out += layer[f'{name}_bias'].astype(jnp.float32).reshape(-1)
    return out

  def heads(normed: jax.Array, name: str, layer: Any, lora: Any) -> jax.Array:
    out, scale = linear(normed, name, layer, lora), layer.get(f'{name}_norm')
    axis, count = ('heads', c.num_heads) if name == 'q' else ('kv_heads', c.num_kv_heads)
    if decoding:
      out = constrain(out, 'rows', None, 'spread')
    if c.qk_norm == 'all' and scale is not None:
      out = norm(out, scale)
    out = out.reshape(*out.shape[:2], count, c.head_dim)
    if decoding:
      out = constrain(out, 'batch', None, axis, None)
    return norm(out, scale) if c.qk_norm == 'head' and scale is not None else out

  def mlp(normed: jax.Array, layer: Any, lora: Any) -> jax.Array:
    if not c.num_experts:
      gated = activation(linear(normed, 'gate', layer, lora)) * linear(normed, 'up', layer, lora)
      return linear(constrain(gated, 'batch', None, 'spread' if decoding else 'mlp'), 'down', layer, lora)
    flat = normed.reshape(-1, c.embed_dim)
    said = mixture(flat, linear(flat, 'router', layer, None), layer, c, activation, runtime.compute_dtype)
    return said.reshape(normed.shape)

  def block(x: jax.Array, scanned: Any, kind: LayerKind) -> tuple[jax.Array, Any]:
    layer, lora, there = scanned
    cos, sin = _choose(tables, kind.rotation)
    normed = meet(norm(x, layer['attn_norm']) if c.pre_norms else x)
    q, k, v = (heads(normed, name, layer, lora) for name in 'qkv')
    q = constrain(rotate(q, cos, sin), 'batch', None, 'heads', None)
    q, k, v = (array.astype(runtime.attention_dtype) for array in (q, rotate(k, cos, sin), v))
    mixed, kept = mix(q, k, v, there, kind.window)
    mixed = mixed.reshape(*x.shape[:2], -1)
    if decoding:
      mixed = constrain(mixed, 'batch', None, 'spread')
    said = linear(mixed, 'o', layer, lora)
    x = x + (norm(said, layer['attn_post_norm']) if c.post_norms else said)
    normed = norm(x, layer['mlp_norm']) if c.pre_norms else x
    # Experts choose among their own rows.
    said = mlp(normed if c.num_experts else meet(normed), layer, lora)
    x = x + (norm(said, layer['mlp_post_norm']) if c.post_norms else said)
    return constrain(x, 'batch', None, None), kept

  # The table is split along its width: every device looks its part of all rows up, and then they change places.
  x = constrain(decoder.embed[...][tokens_bt], 'rows', None, 'spread').astype(jnp.float32)
  x = constrain(x * c.embed_scale if c.embed_scale != 1 else x, 'batch', None, None)
  kinds = c.layer_kinds()
  recompute = jax.checkpoint if runtime.remat else lambda function: function
  steps = {kind: recompute(partial(block, kind=kind)) for kind in dict.fromkeys(kinds)}
  tapped, kept = [], []
  if runtime.scan_layers and not decoding:
    step: Any = steps[kinds[0]]
    scanned: Any = (*stacked_weights(decoder, adapter), beside(slice(None)))
    if len(steps) > 1:
      step = recompute(lambda x, scanned: block(x, scanned[:-1], scanned[-1]))
      scanned = (*scanned, _stack_kinds(kinds))
    pieces = [scanned]
    if tap is not None:
      pieces = [jax.tree.map(lambda a, part=part: a[part], scanned) for part in (slice(tap), slice(tap, None))]
    for piece in pieces:
      x, some = jax.lax.scan(step, x, piece)
      tapped.append(x)
      kept.append(some)
    every = kept[0] if tap is None else jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *kept)
  else:
    for i, (layer, lora) in enumerate(layers or layer_weights(decoder, adapter)):
      x, some = steps[kinds[i]](x, (layer, lora, beside(i)))
      kept.append(some)
      if i + 1 == tap:
        tapped.append(x)
    every = None if kept[0] is None else tuple(zip(*kept, strict=True))
  hidden: Any = norm(x, decoder.final_norm[...])
  if tap is not None:
    hidden = norm(tapped[0], decoder.final_norm[...]), hidden
  return hidden, every


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


def output_head(decoder: Decoder) -> jax.Array:
  """What `logits` multiplies by, laid out for it: [D, V], or a tied embedding [V, D]."""
  if decoder.config.tied_embeddings:
    return constrain(decoder.embed[...], 'spread', 'embed')
  return constrain(decoder.head[...], 'embed', 'spread')


def logits(decoder: Decoder, hidden: jax.Array, head: jax.Array | None = None) -> jax.Array:
  """Output logits [..., V] float32 of final hidden states [..., D].

  An output head is too large for one device: the vocabulary is split over those that share the rows, and each gets all
  of these rows. Inside a loop `head` is that of `output_head`, made before it.
  """
  head = output_head(decoder) if head is None else head
  between = (None,) * (hidden.ndim - 2)
  out = matmul(
    constrain(hidden, 'rows', *between, None), head, decoder.runtime.compute_dtype, int(decoder.config.tied_embeddings)
  )
  return softcap(constrain(out, 'batch', *between, 'spread'), decoder.config.logit_softcap)


def make_cache(decoder: Decoder, rows: int, slots: int) -> Cache:
  """An empty cache of `slots` tokens a row, one array a layer."""
  c = decoder.config
  dtype, each = decoder.runtime.attention_dtype, range(c.num_layers)
  k = tuple(jnp.zeros((rows, c.num_kv_heads, c.head_dim, slots), dtype) for _ in each)
  v = tuple(jnp.zeros((rows, c.num_kv_heads, slots, c.head_dim), dtype) for _ in each)
  nowhere = jnp.zeros((rows, slots), jnp.int32)
  return Cache(KV(k, v), Places(nowhere, nowhere))
