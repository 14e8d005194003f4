"""What each token of a reply is worth, as GRPO, RLOO and PPO tell it, and the linear critic that GRPO may lean on.

Letters: N replies, K replies to one prompt, R reply tokens, C traits, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_RIDGE = 1.0  # of a critic's weights, in units of what the states vary by


def token_returns(
  rewards_kr: jax.Array,
  values_kr: jax.Array,
  log_ratio_kr: jax.Array,
  mask_kr: jax.Array,
  trace: float,
  kl: float,
) -> jax.Array:
  """What each token of K replies to one prompt answers for, up to what its place has in common, [K, R].

  Generalised advantages (Schulman et al. 2016, eq. 16) without discount: sum over u >= t of trace^(u - t) d_u, with
  d_u = r_u + v_u - v_(u-1). At trace 1 a token answers for all rewards that follow it, as in GRPO with process
  rewards (Shao et al. 2024, section 4.1.3), less what the critic expected before it; below 1 the critic stands in
  for what is far off: less noise, and a bias where it is wrong.

  The penalty kl * log(policy / reference) stands in the reward (Ouyang et al. 2022, eq. 2), where the policy gradient
  of it is the gradient of the KL divergence; a token answers for all of it that follows, whatever the trace. The
  usual estimators of KL (k1, k3) put in the loss have another gradient.

  Args:
    rewards_kr: what each token adds to the reply's reward.
    values_kr: what the critic expects to follow each token; it is taken as 0 after a reply's last.
    log_ratio_kr: log(policy / reference) of each token.
    mask_kr: real reply tokens.
    trace: from 0 (the next step alone) to 1.
    kl: the weight of the penalty.
  """
  followed = jnp.pad(mask_kr[:, 1:], ((0, 0), (0, 1)))
  values = jnp.where(followed, values_kr, 0.0)
  surprise = jnp.where(mask_kr, rewards_kr, 0.0) + values - jnp.pad(values[:, :-1], ((0, 0), (1, 0)))

  penalty = jnp.where(mask_kr, kl * log_ratio_kr, 0.0)
  return jnp.where(mask_kr, _traced(surprise, trace) - jnp.cumsum(penalty[:, ::-1], -1)[:, ::-1], 0.0)


def _traced(surprise_nr: jax.Array, trace: Any) -> jax.Array:
  """The sum over u >= t of trace^(u - t) d_u at each token t, [N, R]."""

  def back(later: jax.Array, now: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = now + trace * later
    return total, total

  _, total_rn = jax.lax.scan(back, jnp.zeros(len(surprise_nr)), surprise_nr.T, reverse=True)
  return total_rn.T


def token_advantages(returns_kr: jax.Array, mask_kr: jax.Array, epsilon: float = 1e-4) -> jax.Array:
  """Returns beside those of the same place in the group's other replies, over the group's standard deviation, [K, R].

  GRPO (Shao et al. 2024, section 4.1.2), with a mean for each place, since what is still to come differs by place.
  """
  there = jnp.where(mask_kr, returns_kr, 0.0).sum(0) / jnp.maximum(mask_kr.sum(0), 1)
  centred = jnp.where(mask_kr, returns_kr - there, 0.0)
  deviation = jnp.sqrt(jnp.square(centred).sum() / jnp.maximum(mask_kr.sum(), 1))
  return centred / (deviation + epsilon)


def leave_one_out(rewards_k: jax.Array) -> jax.Array:
  """Each reward less the mean of the others in its group, [K]: RLOO (Kool et al. 2019; Ahmadian et al. 2024, eq. 8)."""
  others = (rewards_k.sum() - rewards_k) / jnp.maximum(len(rewards_k) - 1, 1)
  return rewards_k - others


def generalised_advantages(
  rewards_nr: jax.Array, values_nr: jax.Array, mask_nr: jax.Array, trace: Any
) -> tuple[jax.Array, jax.Array]:
  """Advantages of tokens, and what a critic should have expected before each of them, both [N, R].

  Schulman et al. 2016, eq. 16, without discount: sum over u >= t of trace^(u - t) d_u, with d_u = r_u + v_(u+1) - v_u.
  What should have been expected is the advantage and what was expected together, as PPO takes it (Schulman et al. 2017,
  section 5).

  Args:
    rewards_nr: of each token, a penalty included.
    values_nr: what the critic expected before each token to follow, its own reward included.
    mask_nr: real reply tokens.
    trace: from 0 to 1.
  """
  values = jnp.where(mask_nr, values_nr, 0.0)
  ahead = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
  surprise = jnp.where(mask_nr, rewards_nr + ahead - values, 0.0)

  advantages = jnp.where(mask_nr, _traced(surprise, trace), 0.0)
  return advantages, advantages + values


def whiten(advantages_nr: jax.Array, mask_nr: jax.Array, epsilon: float = 1e-4) -> jax.Array:
  """Advantages of a batch with mean 0 and standard deviation 1 over its tokens, [N, R]."""
  tokens = jnp.maximum(mask_nr.sum(), 1)
  centred = jnp.where(mask_nr, advantages_nr - jnp.where(mask_nr, advantages_nr, 0.0).sum() / tokens, 0.0)
  return centred / (jnp.sqrt(jnp.square(centred).sum() / tokens) + epsilon)


# ---- the critic ----


def to_come(tokens: int, longest: int) -> np.ndarray:
  """The share of a reply of `longest` tokens that may still follow each of its first `tokens` tokens, [R]."""
  return np.maximum(1 - np.arange(1, tokens + 1) / longest, 0).astype(np.float32)


def value_moments(states_nrd: jax.Array, scores_nrc: jax.Array, mask_nr: jax.Array, share_r: Any) -> Any:
  """Sums over replies from which `fit_values` finds a critic; a reply's reward is the mean of its tokens' scores.

  Returns:
    X'X [D + 1, D + 1] and X'Y [D + 1, C + 1] over all tokens, with X a token's state and a constant, times the share
    of the reply that may follow, and Y what does follow: of the rewards, and of the reply itself. Then the sum of
    the rewards [C] and the number of replies.
  """
  states = jnp.concatenate([states_nrd, jnp.ones((*states_nrd.shape[:2], 1))], -1)
  x = jnp.where(mask_nr[..., None], states * share_r[:, None], 0.0).reshape(-1, states.shape[-1])
  tokens_n = jnp.maximum(mask_nr.sum(1), 1)[:, None, None]
  added = jnp.concatenate([scores_nrc, jnp.ones((*mask_nr.shape, 1))], -1)
  added = jnp.where(mask_nr[..., None], added / tokens_n, 0.0)
  follow = jnp.cumsum(added[:, ::-1], 1)[:, ::-1] - added
  gram, moment = (jnp.matmul(x.T, y, precision='highest') for y in (x, follow.reshape(len(x), -1)))
  return gram, moment, added[..., :-1].sum((0, 1)), mask_nr.any(1).sum()


def fit_values(
  gram: np.ndarray, moment: np.ndarray, rewards: np.ndarray, replies: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The critic's weights [D + 1, C] and the mean reward [C] that scores are to be counted from.

  Ridge regression that leaves the constant free, of scores less their mean: counted from elsewhere, a reply that
  ends would seem to give up, or to be spared, what the critic expected to follow.
  """
  gram, moment = gram.astype(np.float64), moment.astype(np.float64)
  mean = np.asarray(rewards, np.float64) / max(float(replies), 1.0)
  diagonal = np.diag(gram)
  # The floor keeps a state that never varies, and no replies at all, solvable.
  around_mean = np.maximum(diagonal - gram[-1] ** 2 / max(gram[-1, -1], 1e-12), 1e-6 * diagonal + 1e-12)
  around_mean[-1] = 0 if gram[-1, -1] > 0 else 1
  centred = moment[:, :-1] - moment[:, -1:] * mean
  weights = np.linalg.solve(gram + _RIDGE * np.diag(around_mean), centred)
  return weights.astype(np.float32), mean.astype(np.float32)


def read_values(weights: Any, states_nrd: jax.Array, share_r: Any) -> jax.Array:
  """The rewards that the critic expects to follow each token, [N, R, C]."""
  return (states_nrd @ weights[:-1] + weights[-1]) * share_r[:, None]
