"""Drawing a token from its distribution: temperature, the likeliest tokens alone, and what was drawn how surely.

Letters: B rows, N weights of one, V vocabulary.
"""

import jax
import jax.numpy as jnp

_BLOCK = 256  # the vocabulary is searched in blocks of this many tokens
_TOP_P_STEPS = 16


def draw(
  logits_bv: jax.Array, uniform_b: jax.Array, temperature: jax.Array | float, top_p: float, top_k: int = 0
) -> tuple[jax.Array, jax.Array]:
  """Draws a token a row by inverting the distribution function at `uniform_b`, in two levels.

  Two partial sums over V replace a Gumbel draw for each of V tokens, which costs as much as the model on a CPU.
  At temperature 0 it takes the most probable token: in the same program, since a decoding loop takes long to compile.

  Args:
    logits_bv: of the next token.
    uniform_b: in [0, 1).
    temperature: logits are divided by it.
    top_p: as in `engine.sample.Sampling`.
    top_k: as there.

  Returns:
    token ids [B], and their log-probs [B] under the distribution drawn from.
  """
  greedy = jnp.asarray(temperature) == 0
  scaled = logits_bv.astype(jnp.float32) / jnp.where(greedy, 1.0, temperature)
  rows, vocab = scaled.shape
  weight = jnp.exp(scaled - scaled.max(-1, keepdims=True))
  if 0 < top_k < vocab:
    weight = jnp.where(weight >= jax.lax.top_k(weight, top_k)[0][:, -1:], weight, 0)
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
