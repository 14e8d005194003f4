"""Losses and labels, as pure functions of arrays. A loss is an unreduced sum, with its denominator where it averages.

A denominator depends on the batch alone and not on the model: of a batch in parts it is known before the first of them.

Letters: M messages, K replies to one message, B replies, R reply tokens, N tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np


def soft_labels(scores_mk: jax.Array, temperature: float, low: float, high: float) -> jax.Array:
  """Probability [M, K, K] that reply i is better than reply j: sigmoid((s_i - s_j) / temperature), clamped.

  Constitutional AI (Bai et al. 2022, section 4.1) keeps preference labels soft; its labels with chain of thought
  are clamped too.
  """
  difference = scores_mk[..., :, None] - scores_mk[..., None, :]
  return jnp.clip(jax.nn.sigmoid(difference / temperature), low, high)


def hard_labels(probability_mkk: jax.Array) -> jax.Array:
  """1 where reply i is more probably the better one, 0 where j is, 0.5 where neither, [M, K, K]."""
  return (jnp.sign(probability_mkk - 0.5) + 1) / 2


def pairs_of_replies(real_mk: jax.Array) -> jax.Array:
  """Which (i, j) with i < j are two real replies to the same message, [M, K, K] bool."""
  k = real_mk.shape[1]
  return real_mk[:, :, None] & real_mk[:, None, :] & jnp.triu(jnp.ones((k, k), bool), 1)


def count_pairs(real_mk: np.ndarray, weight_m: np.ndarray) -> tuple[np.float32, np.float32]:
  """The denominators of `preference_loss` and `right_pairs`, of a batch that is on the host; above 0 in any case."""
  replies_m = real_mk.sum(1)
  weight, pairs = weight_m[replies_m > 1].sum(), (replies_m * (replies_m - 1) // 2).sum()
  return np.float32(max(weight, 1e-8)), np.float32(max(pairs, 1))


def right_pairs(scores_mk: jax.Array, probability_mkk: jax.Array, real_mk: jax.Array) -> tuple[jax.Array, jax.Array]:
  """How many pairs the scores order as the labels do, and how many there are."""
  pair = pairs_of_replies(real_mk)
  right = (scores_mk[:, :, None] > scores_mk[:, None, :]) == (probability_mkk > 0.5)
  return (right & pair).sum(), pair.sum()


def preference_loss(
  scores_mk: jax.Array, probability_mkk: jax.Array, real_mk: jax.Array, weight_m: jax.Array, labels: str, loss: str
) -> tuple[jax.Array, jax.Array]:
  """What a preference model minimises, by `config.preference`; the one place that picks it.

  Args:
    scores_mk: the model's.
    probability_mkk: the ranker's soft labels.
    real_mk: which replies are there.
    weight_m: of each message.
    labels: 'soft', or 'hard' for certainty about each pair; a ranking holds no probabilities and heeds neither.
    loss: 'bradley_terry', 'margin' or 'plackett_luce'.

  Returns:
    as `bradley_terry`.
  """
  if loss == 'plackett_luce':
    return plackett_luce(scores_mk, probability_mkk, real_mk, weight_m)
  target_mkk = hard_labels(probability_mkk) if labels == 'hard' else probability_mkk
  # Hard labels forget by how much a reply is better: the margin is always that of the soft ones.
  margin_mkk = preference_margin(probability_mkk) if loss == 'margin' else 0.0
  return bradley_terry(scores_mk, target_mkk, real_mk, weight_m, margin_mkk)


def preference_margin(probability_mkk: jax.Array) -> jax.Array:
  """How much further apart two scores should be, the surer it is which is better: 2 p - 1, [M, K, K].

  It is tanh of half the log-odds of p: it grows with them and ends at 1, as the smaller of the two scales of margins
  that Llama 2 (Touvron et al. 2023, table 27) tries for its four grades of preference.
  """
  return 2 * probability_mkk - 1


def bradley_terry(
  scores_mk: jax.Array,
  probability_mkk: jax.Array,
  real_mk: jax.Array,
  weight_m: jax.Array,
  margin_mkk: jax.Array | float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of sigmoid(s_i - s_j - m_ij) to labels, over all pairs i < j of each message.

  Bradley and Terry 1952; all pairs of one message in one batch element as in InstructGPT (Ouyang et al. 2022,
  eq. 1). Each message counts the same (times its weight), however many of its replies are real. With a margin m_ij =
  -m_ji and labels of 0 and 1 it is eq. 2 of Llama 2 (Touvron et al. 2023); with soft ones the margin stays that of
  the pair, so that the loss is least at s_i - s_j = m_ij + log-odds of the label.

  Returns:
    weighted sum over messages of the mean over pairs, and the sum of the weights of messages with a pair.
  """
  difference = scores_mk[:, :, None] - scores_mk[:, None, :] - margin_mkk
  pair = pairs_of_replies(real_mk)
  # Where there is no pair the difference may be anything: select before the logarithm, not after.
  difference = jnp.where(pair, difference, 0.0)
  loss = -(probability_mkk * jax.nn.log_sigmoid(difference) + (1 - probability_mkk) * jax.nn.log_sigmoid(-difference))
  pairs = pair.sum((1, 2))
  mean = jnp.where(pair, loss, 0.0).sum((1, 2)) / jnp.maximum(pairs, 1)
  weight_m = jnp.where(pairs > 0, weight_m, 0.0)
  return (mean * weight_m).sum(), weight_m.sum()


def plackett_luce(
  scores_mk: jax.Array, probability_mkk: jax.Array, real_mk: jax.Array, weight_m: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Negative log-likelihood of each message's ranking: the best reply chosen from all, the next from the rest, ...

  Luce 1959, Plackett 1975; the K-wise maximum likelihood of Zhu et al. 2023 (arXiv 2301.11270, section 4), divided by
  the number of choices that are open, so that it stands beside the mean over pairs: of two replies it is Bradley-Terry
  with a hard label. A reply ranks by how many others it is more probably better than, which for labels made from scores
  is the order of the scores; of equals the first comes first.

  Returns:
    as `bradley_terry`.
  """
  wins_mk = jnp.where(real_mk[:, None, :], hard_labels(probability_mkk), 0.0).sum(2)
  ahead, behind = wins_mk[:, :, None], wins_mk[:, None, :]
  k = real_mk.shape[1]
  # Whether j is still there when i is chosen, as i itself is.
  left_mkk = ((ahead > behind) | ((ahead == behind) & jnp.triu(jnp.ones((k, k), bool)))) & real_mk[:, None, :]
  # Where there is no reply the score may be anything.
  scores_mk = jnp.where(real_mk, scores_mk, 0.0)
  rest_mk = jax.nn.logsumexp(scores_mk[:, None, :], 2, where=left_mkk)
  choices = real_mk.sum(1) - 1
  mean = jnp.where(real_mk, rest_mk - scores_mk, 0.0).sum(1) / jnp.maximum(choices, 1)
  weight_m = jnp.where(choices > 0, weight_m, 0.0)
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


def value_loss(values_br: jax.Array, returns_br: jax.Array, mask_br: jax.Array) -> jax.Array:
  """Half the squared error of what a critic expects (Schulman et al. 2017, eq. 9), summed over tokens."""
  return jnp.where(mask_br, jnp.square(values_br - returns_br), 0.0).sum() / 2


def adapt_kl(weight: float, kl: float, target: float) -> float:
  """The weight of a KL penalty after a step on which the KL was `kl`: Ziegler et al. 2019, section 2.2."""
  return weight * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))


def kl_from_logits(reference_nv: jax.Array, policy_nv: jax.Array) -> jax.Array:
  """KL(reference || policy) of each token [N], in nats, summed exactly over the vocabulary."""
  reference = jax.nn.log_softmax(reference_nv.astype(jnp.float32), -1)
  policy = jax.nn.log_softmax(policy_nv.astype(jnp.float32), -1)
  return (jnp.exp(reference) * (reference - policy)).sum(-1)
