"""Streaming: one reply, a few tokens at a time, for someone who waits for it.

`sample` draws many replies to their end in one program; here the loop is outside, so that text can be shown and the
reply stopped. The draws are the same ones: the same key gives the same reply.

Letters: T prompt tokens, S cache slots, N tokens drawn by one call.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from charjax.engine.batch import Tokens, bucket, pad
from charjax.engine.draw import draw
from charjax.engine.sample import Sampling, end_ids
from charjax.mesh import no_silent_transfers, replicate
from charjax.model.attention import Places
from charjax.model.decoder import KV, Cache, Decoder, forward, layer_weights, logits, make_cache

_AT_ONCE = 4  # tokens drawn by one call: its weights are cut into layers once, which costs about as much as a token
# A conversation grows at every turn, and a new shape is a program to compile: of the reply's tokens, which are slow
# to compile, few; of the prompt's, more.
_PROMPT_STEP, _SLOT_STEP = 64, 512


def shapes(prompt_length: int, max_new_tokens: int) -> tuple[int, int]:
  """(T, S) that `stream` pads to: a pair that was not met before is compiled first, which takes a while."""
  width = bucket(prompt_length, _PROMPT_STEP)
  return width, bucket(max(width, prompt_length + max_new_tokens), _SLOT_STEP)


@partial(jax.jit, static_argnames='slots')
def _read(decoder: Decoder, adapter: Any, tokens_1t: jax.Array, real_1t: jax.Array, *, slots: int) -> Cache:
  """The cache of a prompt padded on the right."""
  positions, texts = jnp.arange(tokens_1t.shape[1])[None], real_1t.astype(jnp.int32)
  _, kv = forward(decoder, tokens_1t, positions, texts, adapter=adapter)
  empty = make_cache(decoder, 1, slots)
  kept = (
    tuple(jax.lax.dynamic_update_slice(array, new, (0,) * 4) for array, new in zip(*pair, strict=True))
    for pair in zip(empty.kv, kv, strict=True)
  )
  places = jax.tree.map(
    lambda array, new: jax.lax.dynamic_update_slice_in_dim(array, new, 0, 1), empty.places, Places(positions, texts)
  )
  return Cache(KV(*kept), places)


@partial(jax.jit, static_argnames=('top_p', 'top_k'), donate_argnames='cache')
def _draw(
  decoder: Decoder,
  adapter: Any,
  cache: Cache,
  token_1: jax.Array,
  length: jax.Array,
  step: jax.Array,
  last: jax.Array,
  key_data: jax.Array,
  eos: jax.Array,
  temperature: jax.Array,
  *,
  top_p: float,
  top_k: int,
) -> tuple[Cache, jax.Array]:
  """Draws the reply's tokens `step`, `step` + 1 ... before `last`, the first from `token_1` at position `length` - 1.

  Returns:
    the cache, and tokens [N], -1 after an id of `eos` or from `last` on.
  """
  layers = layer_weights(decoder, adapter)
  key = jax.random.wrap_key_data(key_data, impl='threefry2x32')

  def one(state: tuple[Any, ...]) -> tuple[Any, ...]:
    cache, tokens, token_1, i, _ = state
    index = length - 1 + i
    hidden, cache = forward(
      decoder, token_1[None], index[None, None], layers=layers, cache=cache, cache_index=index,
    )  # fmt: skip
    uniform = jax.random.uniform(jax.random.fold_in(key, step + i))
    token_1, _ = draw(logits(decoder, hidden[:, 0]), uniform[None], temperature, top_p, top_k)
    return cache, tokens.at[i].set(token_1[0]), token_1, i + 1, jnp.isin(token_1[0], eos)

  def more(state: tuple[Any, ...]) -> jax.Array:
    _, _, _, i, ended = state
    return (i < _AT_ONCE) & (step + i < last) & ~ended

  start = (cache, jnp.full(_AT_ONCE, -1, jnp.int32), token_1, jnp.int32(0), jnp.bool_(False))
  cache, tokens, *_ = jax.lax.while_loop(more, one, start)
  return cache, tokens


def stream(
  decoder: Decoder,
  prompt: Tokens,
  key_data: np.ndarray,
  eos_ids: Sequence[int],
  settings: Sampling,
  *,
  adapter: Any = None,
) -> Iterator[list[int]]:
  """Draws a reply to one prompt, and yields its tokens as they come, a few at a time.

  It ends after an end-of-turn id, which is yielded too, or after `settings.max_new_tokens`. What is not asked for is
  not computed.

  Args:
    decoder: the weights.
    prompt: token ids, at least one.
    key_data: [2], a row of engine.batch.item_keys.
    eos_ids: ids that end a reply.
    settings: how to draw; the batch size has no part in it.
    adapter: a LoRA adapter, or None.
  """
  width, slots = shapes(len(prompt), settings.max_new_tokens)
  given = pad([prompt], width)
  # The last token of the prompt is read once more by the call that draws from it.
  last = np.array(prompt[-1:], np.int32)
  state = _begin(decoder, adapter, given, slots, (last, key_data, end_ids(eos_ids), np.float32(settings.temperature)))
  length, step = len(prompt), 0
  while step < settings.max_new_tokens:
    state, drawn = _go_on(decoder, adapter, state, (length + step, step, settings.max_new_tokens), settings)
    yield drawn
    step += len(drawn)
    if drawn[-1] in eos_ids:
      return


@no_silent_transfers
def _begin(
  decoder: Decoder, adapter: Any, prompt: tuple[Any, ...], slots: int, given: tuple[Any, ...]
) -> tuple[Any, ...]:
  # A generator would leave the guard against silent transfers open between its steps: each step has its own.
  cache = _read(decoder, adapter, *replicate(prompt), slots=slots)
  return cache, *replicate(given)


@no_silent_transfers
def _go_on(
  decoder: Decoder, adapter: Any, state: tuple[Any, ...], counts: tuple[int, int, int], settings: Sampling
) -> tuple[tuple[Any, ...], list[int]]:
  cache, token, key_data, ends, temperature = state
  length, step, last = replicate(tuple(np.int32(count) for count in counts))
  cache, drawn = _draw(
    decoder, adapter, cache, token, length, step, last, key_data, ends, temperature,
    top_p=settings.top_p, top_k=settings.top_k,
  )  # fmt: skip
  tokens = [int(i) for i in jax.device_get(drawn) if i >= 0]
  return (cache, replicate(np.array(tokens[-1:], np.int32)), key_data, ends, temperature), tokens
