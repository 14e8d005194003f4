"""Losses, as pure functions of arrays. Each returns an unreduced sum and its denominator where it averages.

Letters: M messages, K replies to one message, B replies, R reply tokens, N tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp


def soft_labels(scores_mk: jax.Array, temperature: float, low: float, high: float) -> jax.Array:
  """Probability [M, K, K] that reply i is better than reply j: sigmoid((s_i - s_j) / temperature), clamped.

  Constitutional AI (Bai et al. 2022, section 4.1) keeps preference labels soft; its labels with chain of thought
  are clamped too.
  """
  difference = scores_mk[..., :, None] - scores_mk[..., None, :]
  return jnp.clip(jax.nn.sigmoid(difference / temperature), low, high)


def pairs_of_replies(real_mk: jax.Array) -> jax.Array:
  """Which (i, j) with i < j are two real replies to the same message, [M, K, K] bool."""
  k = real_mk.shape[1]
  return real_mk[:, :, None] & real_mk[:, None, :] & jnp.triu(jnp.ones((k, k), bool), 1)


def pair_accuracy(scores_mk: jax.Array, probability_mkk: jax.Array, real_mk: jax.Array) -> jax.Array:
  """The share of all pairs that the scores order as the labels do."""
  pair = pairs_of_replies(real_mk)
  right = (scores_mk[:, :, None] > scores_mk[:, None, :]) == (probability_mkk > 0.5)
  return (right & pair).sum() / jnp.maximum(pair.sum(), 1)


def bradley_terry(
  scores_mk: jax.Array, probability_mkk: jax.Array, real_mk: jax.Array, weight_m: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of sigmoid(s_i - s_j) to soft labels, over all pairs i < j of each message.

  Bradley and Terry 1952; all pairs of one message in one batch element as in InstructGPT (Ouyang et al. 2022,
  eq. 1). Each message counts the same (times its weight), however many of its replies are real.

  Returns:
    weighted sum over messages of the mean over pairs, and the sum of the weights of messages with a pair.
  """
  difference = scores_mk[:, :, None] - scores_mk[:, None, :]
  pair = pairs_of_replies(real_mk)
  # Where there is no pair the difference may be anything: select before the logarithm, not after.
  difference = jnp.where(pair, difference, 0.0)
  loss = -(probability_mkk * jax.nn.log_sigmoid(difference) + (1 - probability_mkk) * jax.nn.log_sigmoid(-difference))
  pairs = pair.sum((1, 2))
  mean = jnp.where(pair, loss, 0.0).sum((1, 2)) / jnp.maximum(pairs, 1)
  weight_m = jnp.where(pairs > 0, weight_m, 0.0)
  return (mean * weight_m).sum(), weight_m.sum()


def policy_gradient(
  log_probs_br: jax.Array, sampled_br: jax.Array, advantages_br: jax.Array, mask_br: jax.Array, clip: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The clipped surrogate (Schulman et al. 2017, eq. 7), negated, summed over tokens.

  Args:
    log_probs_br: of the policy that is trained.
    sampled_br: of the distribution the replies were drawn from.
    advantages_br: of each token.
    mask_br: real reply tokens.
    clip: the ratio's permitted distance from 1.

  Returns:
    sum over tokens, number of tokens, number of tokens whose gradient the clip cuts off.
  """
  ratio = jnp.exp(jnp.where(mask_br, log_probs_br - sampled_br, 0.0))
  free, clipped = ratio * advantages_br, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages_br
  loss = jnp.where(mask_br, -jnp.minimum(free, clipped), 0.0)
  return loss.sum(), mask_br.sum(), (mask_br & (clipped < free)).sum()


def kl_from_logits(reference_nv: jax.Array, policy_nv: jax.Array) -> jax.Array:
  """KL(reference || policy) of each token [N], in nats, summed exactly over the vocabulary."""
  reference = jax.nn.log_softmax(reference_nv.astype(jnp.float32), -1)
  policy = jax.nn.log_softmax(policy_nv.astype(jnp.float32), -1)
  return (jnp.exp(reference) * (reference - policy)).sum(-1)
