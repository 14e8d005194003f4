"""The compiled programs of sampling: prompts are read into rooms, and all rows draw token by token.

Rows begin and end at different times, and yet all write the keys and values of a token into the same slot of their
caches: the slots are a ring, and a token is found by the place that it says it has (see model.attention.sees).

Letters: A rooms, E seats in one, B rows, M rows of packed prompts, T tokens of one, R prompts, P tokens of one, S
slots, L layers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from charjax.engine.draw import draw
from charjax.mesh import constrain, take
from charjax.model.attention import Places
from charjax.model.blocks import matrices
from charjax.model.decoder import KV, Cache, Decoder, Prefix, forward, layer_weights, logits, output_head
from charjax.model.decoder import make_cache as decoder_cache

_HEADS = ('q', 'k', 'v', 'o')  # weights of which heads are two dimensions


class RowState(NamedTuple):
  """Where each of B rows is.

  Attributes:
    token: to be fed next.
    position: of that token.
    drawn: tokens of the reply that have been drawn.
    live: whether a reply is under way.
    fresh: whether it begins: what another reply left in the row's cache is forgotten.
    key_data: [B, 2] of a threefry key.
  """

  token: Any
  position: Any
  drawn: Any
  live: Any
  fresh: Any
  key_data: Any


class Move(NamedTuple):
  """Where R prompts lie in M packed rows, and where they go; each [parts, R], of a part's own rows and rooms.

  What is not `real` moves nothing.
  """

  row: Any
  column: Any
  room: Any
  real: Any


@jax.jit
def prepare(decoder: Decoder, adapter: Any, shared: Sequence[Prefix]) -> tuple[Any, Sequence[Prefix]]:
  """Weights and shared keys, cut into layers and in the dtype of products, once for all tokens."""
  dtype = decoder.runtime.compute_dtype
  # Quantised ones stay in their few bits.
  wide = {name for name in matrices(decoder.config) if f'{name}_scale' not in decoder.blocks.names}

  def cast(layer: Any) -> Any:
    return {n: as_matrix(n, a) if n in wide else a for n, a in layer.items()}

  def as_matrix(name: str, array: jax.Array) -> jax.Array:
    # All heads as one dimension, which more devices can split.
    if name in _HEADS:
      array = array.reshape(array.shape[0], -1) if name != 'o' else array.reshape(-1, array.shape[-1])
    return array.astype(dtype)

  layers = [(cast(layer), lora) for layer, lora in layer_weights(decoder, adapter)]
  layers = map_layers(lambda array, axes: constrain(array, *axes), decoder, adapter, layers)
  return layers, [prefix._replace(kv=KV(tuple(prefix.kv.k), tuple(prefix.kv.v))) for prefix in shared]


def map_layers(function: Callable[[Any, Any], Any], decoder: Decoder, adapter: Any, layers: Any) -> Any:
  """Calls function(array, its logical axes) on each array of the layers of `prepare`."""
  # What a dense layer has split over tensor alone is split over all devices.
  wider = {'heads': 'spread', 'kv_heads': 'spread', 'mlp': 'spread'}

  def axes(parameter: Any, rank: int) -> Any:
    own = [wider.get(axis, axis) for axis in parameter.get_metadata()['axes'][1:]]
    return own if rank == len(own) else [axis for axis in own if axis]

  def one(layer: Any, lora: Any) -> Any:
    pairs = {
      n: {k: function(a, axes(getattr(adapter, n)[k], a.ndim)) for k, a in pair.items()}
      for n, pair in (lora or {}).items()
    }
    return {n: function(a, axes(getattr(decoder.blocks, n), a.ndim)) for n, a in layer.items()}, pairs or None

  return [one(*layer) for layer in layers]


@partial(jax.jit, static_argnames=('rows', 'slots'))
def make_cache(decoder: Decoder, *, rows: int, slots: int) -> Cache:
  """An empty cache, of rows or of the prompts before them."""
  empty = decoder_cache(decoder, rows, slots)
  kv = jax.tree.map(lambda array: constrain(array, 'batch', 'kv_heads', None, None), empty.kv)
  return Cache(kv, jax.tree.map(lambda array: constrain(array, 'batch', None), empty.places))


@partial(jax.jit, static_argnames='width', donate_argnames='rooms')
def read_prompts(
  decoder: Decoder,
  adapter: Any,
  shared: Sequence[Prefix],
  rooms: KV,
  tokens_mt: jax.Array,
  places_mt: Places,
  move: Move,
  *,
  width: int,
) -> KV:
  """Reads packed prompts, and puts the keys and values of each, `width` tokens, into its room."""
  _, read = forward(decoder, tokens_mt, places_mt.positions, places_mt.texts, adapter=adapter, before=shared)
  parts, count = move.row.shape

  def put(rooms: jax.Array, read: jax.Array, axis: int) -> jax.Array:
    """Of one layer; tokens lie along `axis` of both."""
    # A slice that would reach past the end would be moved back.
    read = jnp.pad(read, [(0, width if i == axis else 0) for i in range(4)])

    def part(rooms: jax.Array, read: jax.Array, move: Move) -> jax.Array:
      size = tuple(1 if i == 0 else width if i == axis else n for i, n in enumerate(read.shape))

      def one(r: Any, rooms: jax.Array) -> jax.Array:
        here = [move.row[r] if i == 0 else move.column[r] if i == axis else 0 for i in range(4)]
        there = [move.room[r], 0, 0, 0]
        piece = jax.lax.dynamic_slice(read, here, size)
        piece = jnp.where(move.real[r], piece, jax.lax.dynamic_slice(rooms, there, size))
        return jax.lax.dynamic_update_slice(rooms, piece, there)

      return jax.lax.fori_loop(0, count, one, rooms)

    if parts == 1:
      return part(rooms, read, jax.tree.map(lambda x: x[0], move))
    # Each device moves what is its own.
    own, reads = (x.reshape(parts, -1, *x.shape[1:]) for x in (rooms, read))
    return jax.vmap(part)(own, reads, move).reshape(rooms.shape)

  def all_layers(rooms: Sequence[jax.Array], read: jax.Array, axis: int) -> tuple[jax.Array, ...]:
    return tuple(
      constrain(put(old, new, axis), 'batch', 'kv_heads', None, None) for old, new in zip(rooms, read, strict=True)
    )

  return KV(all_layers(rooms.k, read.k, 3), all_layers(rooms.v, read.v, 2))


@partial(jax.jit, static_argnames='slots')
def grow(cache: Cache, first: jax.Array, *, slots: int) -> Cache:
  """The cache with more slots: the ring is cut open before slot `first`, and the new ones come last."""

  def one(array: jax.Array, axis: int) -> jax.Array:
    opened = jnp.roll(array, -first, axis)
    return jnp.pad(opened, [(0, slots - n if i == axis else 0) for i, n in enumerate(array.shape)])

  kv = KV(tuple(one(k, 3) for k in cache.kv.k), tuple(one(v, 2) for v in cache.kv.v))
  return Cache(kv, Places(*(one(array, 1) for array in cache.places)))


@jax.jit
def keep(cache: Cache, rooms: KV, row: jax.Array, room: jax.Array) -> tuple[Cache, KV]:
  """The caches of these rows and these rooms alone, counted within each device's own."""

  def some(array: jax.Array, places: jax.Array) -> jax.Array:
    axes = ('kv_heads', None, None) if array.ndim == 4 else (None,)
    return constrain(take(array, places), 'batch', *axes)

  return jax.tree.map(lambda x: some(x, row), cache), jax.tree.map(lambda x: some(x, room), rooms)


class _Loop(NamedTuple):
  step: jax.Array
  token: jax.Array
  position: jax.Array
  drawn: jax.Array
  live: jax.Array
  cache: Cache
  tokens: jax.Array
  log_probs: jax.Array


@partial(jax.jit, static_argnames=('top_p', 'top_k'), donate_argnames='cache')
def decode(
  decoder: Decoder,
  layers: Any,
  shared: Sequence[Prefix],
  rooms: Prefix,
  cache: Cache,
  rows: RowState,
  first: jax.Array,
  most: jax.Array,
  idle: jax.Array,
  longest: jax.Array,
  eos: jax.Array,
  temperature: jax.Array,
  *,
  top_p: float,
  top_k: int,
) -> tuple[Cache, jax.Array, jax.Array, jax.Array]:
  """Draws tokens in all live rows, until so many are idle that it is worth to refill them.

  Args:
    decoder: for the embedding and the head.
    layers: of `prepare`.
    shared: what stands before all prompts, of `prepare`.
    rooms: the prompts, and who reads which.
    cache: of S slots, given up.
    rows: the rows.
    first: the slot that is written first.
    most: steps, at most S.
    idle: so many rows without a reply end it.
    longest: a reply of so many tokens ends.
    eos: ids that end a reply.
    temperature: as in engine.draw.draw.
    top_p: as there.
    top_k: as there.

  Returns:
    the cache, how many steps were made, and tokens [S, B] (-1 where a row had no reply) and their log-probs.
  """
  slots, count = cache.places.texts.shape[1], len(rows.token)
  before = (*shared, rooms)
  keys_b = jax.random.wrap_key_data(rows.key_data, impl='threefry2x32')
  kept = jnp.where(rows.fresh[:, None], 0, cache.places.texts)
  head = output_head(decoder).astype(decoder.runtime.compute_dtype)

  def one(state: _Loop) -> _Loop:
    hidden, cache = forward(
      decoder, state.token[:, None], state.position[:, None], layers=layers, before=before,
      cache=state.cache, cache_index=(first + state.step) % slots,
    )  # fmt: skip
    uniform_b = jax.vmap(lambda key, n: jax.random.uniform(jax.random.fold_in(key, n)))(keys_b, state.drawn)
    said = constrain(logits(decoder, hidden[:, 0], head), 'batch', None)
    token, log_prob = draw(said, uniform_b, temperature, top_p, top_k)
    drawn = state.drawn + 1
    return _Loop(
      state.step + 1,
      token,
      state.position + 1,
      drawn,
      state.live & ~jnp.isin(token, eos) & (drawn < longest),
      cache,
      state.tokens.at[state.step].set(jnp.where(state.live, token, -1)),
      state.log_probs.at[state.step].set(jnp.where(state.live, log_prob, 0)),
    )

  def more(state: _Loop) -> jax.Array:
    return (state.step < most) & state.live.any() & ((~state.live).sum() < idle)

  nothing = jnp.full((slots, count), -1, jnp.int32), jnp.zeros((slots, count), jnp.float32)
  cache = cache._replace(places=cache.places._replace(texts=kept))
  state = jax.lax.while_loop(
    more, one, _Loop(jnp.int32(0), rows.token, rows.position, rows.drawn, rows.live, cache, *nothing)
  )
  return state.cache, state.step, state.tokens, state.log_probs
