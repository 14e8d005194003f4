"""Sampling: what turns prompts into replies, with the log-probs of what was drawn.

A prompt goes through the model once for all replies to it, as what all prompts begin with does for all prompts.

Letters: A prompts, P tokens of one, B rows (B / A to each prompt), N new tokens, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from charjax.engine import work
from charjax.engine.batch import (
  EACH,
  PROMPT_STEP,
  Tokens,
  bucket,
  by_prompt,
  common_prefix,
  compute_prefix,
  in_groups,
  length_before,
  pad,
  prefill,
)
from charjax.mesh import batch_parts, fetch, no_silent_transfers, replicate, shard_batch
from charjax.model.decoder import KV, Decoder, Prefix, forward, layer_weights, logits, make_cache

_BLOCK = 256  # the vocabulary is searched in blocks of this many tokens
_TOP_P_STEPS = 16


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn.

  Attributes:
    max_new_tokens: a reply that has not ended by then is cut off.
    temperature: logits are divided by it; 0 takes the most probable token.
    top_p: keep the smallest set of tokens whose probability reaches this (Holtzman et al. 2020); 1 keeps all.
    batch_size: rows decoded together.
  """

  max_new_tokens: int
  temperature: float = 1.0
  top_p: float = 1.0
  batch_size: int = 64


class Reply(NamedTuple):
  """One drawn reply.

  Attributes:
    tokens: ids, the end-of-turn id included when it was drawn.
    log_probs: of each token under the distribution it was drawn from (after temperature and top-p).
    finish: 'stop' when the model ended its turn, 'length' when it was cut off.
  """

  tokens: list[int]
  log_probs: np.ndarray
  finish: str


def draw(
  logits_bv: jax.Array, uniform_b: jax.Array, temperature: jax.Array | float, top_p: float
) -> tuple[jax.Array, jax.Array]:
  """Draws a token a row by inverting the distribution function at `uniform_b`, in two levels.

  Two partial sums over V replace a Gumbel draw for each of V tokens, which costs as much as the model on a CPU.
  At temperature 0 it takes the most probable token: in the same program, since a decoding loop takes long to compile.

  Returns:
    token ids [B], and their log-probs [B] under the distribution drawn from.
  """
  greedy = jnp.asarray(temperature) == 0
  scaled = logits_bv.astype(jnp.float32) / jnp.where(greedy, 1.0, temperature)
  rows, vocab = scaled.shape
  weight = jnp.exp(scaled - scaled.max(-1, keepdims=True))
  if top_p < 1:
    weight = jnp.where(weight >= _top_p_threshold(weight, top_p), weight, 0)
  weight = jnp.pad(weight, ((0, 0), (0, -vocab % _BLOCK))).reshape(rows, -1, _BLOCK)
  per_block = weight.sum(-1)
  block, rest = _invert(per_block, uniform_b * per_block.sum(-1))
  within = jnp.take_along_axis(weight, block[:, None, None], 1)[:, 0]
  offset, _ = _invert(within, rest)
  chosen = jnp.take_along_axis(within, offset[:, None], 1)[:, 0]
  log_prob = jnp.log(chosen) - jnp.log(per_block.sum(-1))
  return jnp.where(greedy, jnp.argmax(logits_bv, -1), block * _BLOCK + offset), jnp.where(greedy, 0.0, log_prob)


def _invert(weight_bn: jax.Array, target_b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The first index whose running sum exceeds the target, and the target less the sum before it."""
  running = jnp.cumsum(weight_bn, -1)
  # A running sum in parallel need not be monotone, and rounding may put the target past the total: never take an
  # index without weight, and take the last one with weight where none exceeds the target.
  reached = (running > target_b[:, None]) & (weight_bn > 0)
  last = weight_bn.shape[-1] - 1 - jnp.argmax(weight_bn[:, ::-1] > 0, -1)
  index = jnp.where(reached.any(-1), jnp.argmax(reached, -1), last)
  before = jnp.take_along_axis(running - weight_bn, index[:, None], 1)[:, 0]
  return index, jnp.maximum(target_b - before, 0)


def _top_p_threshold(weight_bv: jax.Array, top_p: float) -> jax.Array:
  """The largest weight at or above which the tokens hold `top_p` of the mass, by bisection of its logarithm.

  16 halvings of (e^-20, 1] end within a factor of 1.0003, where sorting V weights would cost more than the model.
  """
  wanted = top_p * weight_bv.sum(-1, keepdims=True)

  def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    low, high = bounds
    middle = (low + high) / 2
    enough = jnp.sum(jnp.where(weight_bv >= jnp.exp(middle), weight_bv, 0), -1, keepdims=True) >= wanted
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

  low, _ = jax.lax.fori_loop(0, _TOP_P_STEPS, halve, (jnp.full_like(wanted, -20.0), jnp.zeros_like(wanted)))
  return jnp.exp(low)


class _State(NamedTuple):
  step: jax.Array
  token: jax.Array  # [B] to be fed next
  done: jax.Array  # [B]
  cache: KV
  tokens: jax.Array  # [B, N]
  log_probs: jax.Array  # [B, N]


@partial(jax.jit, static_argnames=('max_new_tokens', 'top_p'))
def _sample(
  decoder: Decoder,
  adapter: Any,
  shared: tuple[Prefix, ...],
  prompts_ap: jax.Array,
  lengths_a: jax.Array,
  token_b: jax.Array,
  real_b: jax.Array,
  key_data_b2: jax.Array,
  eos: jax.Array,
  temperature: jax.Array,
  *,
  max_new_tokens: int,
  top_p: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Replies [B, N] to A prompts, B / A to each, with their log-probs, and which ended; `token_b` ends the prompts."""
  rows = len(token_b)
  before = (*shared, compute_prefix(decoder, prompts_ap, lengths_a, adapter, shared))
  # Cut into layers once, not at each token.
  before = tuple(Prefix(KV(tuple(kv.k), tuple(kv.v)), length) for kv, length in before)
  layers = layer_weights(decoder, adapter)
  first = length_before(before, rows)
  slots = jnp.arange(max_new_tokens)
  keys_b = jax.random.wrap_key_data(key_data_b2, impl='threefry2x32')

  def decode(state: _State) -> _State:
    seen = jnp.broadcast_to(slots <= state.step, (rows, 1, max_new_tokens))
    hidden, cache = forward(
      decoder, state.token[:, None], first + state.step, seen, layers=layers, before=before,
      cache=state.cache, cache_index=state.step,
    )  # fmt: skip
    uniform_b = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, state.step)))(keys_b)
    token, log_prob = draw(logits(decoder, hidden[:, 0]), uniform_b, temperature, top_p)
    live = ~state.done
    return _State(
      state.step + 1,
      token,
      state.done | jnp.isin(token, eos),
      cache,
      state.tokens.at[:, state.step].set(jnp.where(live, token, -1)),
      state.log_probs.at[:, state.step].set(jnp.where(live, log_prob, 0)),
    )

  start = _State(
    jnp.int32(0),
    token_b,
    ~real_b,  # rows that only fill up the batch
    make_cache(decoder, rows, max_new_tokens),
    jnp.full((rows, max_new_tokens), -1, jnp.int32),
    jnp.zeros((rows, max_new_tokens), jnp.float32),
  )
  state = jax.lax.while_loop(lambda s: (s.step < max_new_tokens) & ~s.done.all(), decode, start)
  return state.tokens, state.log_probs, state.done


@no_silent_transfers
def sample(
  decoder: Decoder,
  prompts: Sequence[Tokens],
  keys: np.ndarray,
  eos_ids: Sequence[int],
  settings: Sampling,
  *,
  adapter: Any = None,
  width: int = 0,
) -> list[Reply]:
  """Draws one reply to each prompt; a prompt that is to have several stands there several times.

  Args:
    decoder: the weights.
    prompts: token ids; none may be empty.
    keys: one random key a prompt (engine.batch.item_keys): a reply depends on its key, not on its neighbours.
    eos_ids: ids that end a reply.
    settings: how to draw.
    adapter: a LoRA adapter, or None.
    width: the least width that prompts are padded to, so that calls with other prompts need no new program.
  """
  if not prompts:
    return []
  cut = common_prefix(prompts)
  shared = prefill(decoder, prompts[0][:cut], adapter)
  places = by_prompt(prompts, cut)
  # As many replies to each prompt at a time as leave no row empty.
  common = math.gcd(*map(len, places.values()))
  each = max(n for n in range(1, min(EACH, settings.batch_size) + 1) if common % n == 0)
  groups = in_groups(places, each)
  count = settings.batch_size // each
  # A batch that the devices do not divide evenly would be decoded whole by each of them.
  count += -count % batch_parts()
  width = bucket(max(width, *map(len, places)) - 1, PROMPT_STEP)
  ends, temperature = replicate((end_ids(eos_ids), np.float32(settings.temperature)))
  replies: list[Any] = [None] * len(prompts)
  for begin in range(0, len(groups), count):
    some = groups[begin : begin + count]
    index = np.array([i for _, part in some for i in part])
    filler = count - len(some)
    asked, said = pad([*(prompt[:-1] for prompt, _ in some), *[[]] * filler], width)
    last = np.repeat([prompt[-1] for prompt, _ in some] + [0] * filler, each).astype(np.int32)
    rows = np.pad(index, (0, filler * each), constant_values=-1)
    drawn = _sample(
      decoder, adapter, shared, *shard_batch((asked, said.sum(-1).astype(np.int32), last, rows >= 0, keys[rows])),
      ends, temperature, max_new_tokens=settings.max_new_tokens, top_p=settings.top_p,
    )  # fmt: skip
    ids, log_probs, done = (np.asarray(x) for x in fetch(drawn))
    work.count(decoder.config, cut, said.sum(-1))
    lengths = (ids[: len(index)] >= 0).sum(-1)
    before = cut + np.repeat(said[: len(some)].sum(-1), each)
    work.count(decoder.config, before, lengths, predicted=lengths.sum())
    for row, i in enumerate(index):
      length = int(lengths[row])
      finish = 'stop' if done[row] else 'length'
      replies[i] = Reply(ids[row, :length].tolist(), log_probs[row, :length], finish)
  return replies


def end_ids(eos_ids: Sequence[int]) -> np.ndarray:
  """The ids that end a reply, repeated to a usual number of them: one length, one program."""
  return np.resize(np.asarray(eos_ids, np.int32), max(4, len(eos_ids)))


def compilations() -> int:
  """How many times the sampler has been compiled in this process."""
  return _sample._cache_size()  # type: ignore[attr-defined]
