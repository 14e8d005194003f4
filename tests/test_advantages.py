"""What each token answers for, against loops in float64; and the critic, against a least-squares solver."""

import jax.numpy as jnp
import numpy as np
import pytest

from charjax.training import advantages


def replies_of_five(seed):
  rng = np.random.default_rng(seed)
  rewards, values, log_ratio = rng.normal(size=(3, 5, 6))
  mask = np.arange(6) < np.array([6, 3, 1, 0, 6])[:, None]  # one reply is not there
  return rewards, values, log_ratio, mask


def token_returns_64(rewards, values, log_ratio, mask, trace, kl):
  out = np.zeros_like(rewards)
  for i, length in enumerate(mask.sum(1)):
    expected = [0.0, *values[i, : max(length - 1, 0)], 0.0]  # before the first token, after each, after the last
    surprise = [rewards[i, u] + expected[u + 1] - expected[u] for u in range(length)]
    for t in range(length):
      out[i, t] = sum(trace ** (u - t) * surprise[u] - kl * log_ratio[i, u] for u in range(t, length))
  return out


@pytest.mark.parametrize('trace', [0.0, 0.7, 1.0])
def test_token_returns(trace):
  *arrays, mask = replies_of_five(0)
  dirty = [np.where(mask, array, np.nan) for array in arrays]  # what stands in the padding must not matter
  found = advantages.token_returns(*map(jnp.asarray, (*dirty, mask)), trace, 0.3)
  np.testing.assert_allclose(found, token_returns_64(*arrays, mask, trace, 0.3), rtol=1e-4, atol=1e-5)


def test_at_trace_1_a_token_answers_for_the_rewards_that_follow_it():
  rewards, values, log_ratio, mask = replies_of_five(1)
  found = advantages.token_returns(*map(jnp.asarray, (rewards, 0 * values, 0 * log_ratio, mask)), 1.0, 0.0)
  np.testing.assert_allclose(found[0], np.cumsum(rewards[0][::-1])[::-1], rtol=1e-5)


def test_token_advantages():
  returns, _, _, mask = replies_of_five(2)
  expected = np.zeros_like(returns)
  for t in range(6):
    alive = [i for i in range(5) if mask[i, t]]
    for i in alive:
      expected[i, t] = returns[i, t] - sum(returns[j, t] for j in alive) / len(alive)
  deviation = (sum(expected[mask] ** 2) / mask.sum()) ** 0.5
  found = advantages.token_advantages(jnp.asarray(np.where(mask, returns, np.nan)), jnp.asarray(mask))
  np.testing.assert_allclose(found, expected / (deviation + 1e-4), rtol=1e-4, atol=1e-5)
  # Replies that are all as good teach nothing.
  alike = jnp.full((4, 3), 0.7)
  np.testing.assert_allclose(advantages.token_advantages(alike, jnp.ones((4, 3), bool)), 0, atol=2e-3)


def test_a_reply_is_worth_what_it_earns_beyond_the_others():
  rewards = np.array([1.0, 4.0, -2.0, 0.5])
  expected = [reward - np.delete(rewards, i).mean() for i, reward in enumerate(rewards)]
  np.testing.assert_allclose(advantages.leave_one_out(jnp.asarray(rewards)), expected, rtol=1e-5)


@pytest.mark.parametrize('trace', [0.0, 0.7, 1.0])
def test_generalised_advantages_of_a_value_head(trace):
  rewards, values, _, mask = replies_of_five(4)
  expected, returns = np.zeros_like(rewards), np.zeros_like(rewards)
  for i, length in enumerate(mask.sum(1)):
    ahead = [*values[i, :length], 0.0]
    for t in range(length):
      expected[i, t] = sum(trace ** (u - t) * (rewards[i, u] + ahead[u + 1] - ahead[u]) for u in range(t, length))
      returns[i, t] = expected[i, t] + values[i, t]
  dirty = [jnp.asarray(np.where(mask, array, np.nan)) for array in (rewards, values)]
  found = advantages.generalised_advantages(*dirty, jnp.asarray(mask), trace)
  np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found[1], returns, rtol=1e-4, atol=1e-5)
  if trace == 1.0:  # a critic is to expect all that followed
    np.testing.assert_allclose(found[1][0], np.cumsum(rewards[0][::-1])[::-1], rtol=1e-4)
  white = np.asarray(advantages.whiten(jnp.asarray(np.where(mask, expected, np.nan)), jnp.asarray(mask)))
  assert not white[~mask].any()
  np.testing.assert_allclose([white[mask].mean(), white[mask].std()], [0, 1], atol=1e-3)


def test_the_critic_is_the_ridge_regression_of_what_follows():
  rng = np.random.default_rng(3)
  replies, tokens, dim, traits = 7, 5, 3, 2
  states, scores = rng.normal(size=(replies, tokens, dim)) * [1, 5, 0.2] + 2, rng.normal(size=(replies, tokens, traits))
  mask = np.arange(tokens) < rng.integers(1, tokens + 1, replies)[:, None]
  share = advantages.to_come(tokens, 6)
  np.testing.assert_allclose(share, [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], rtol=1e-6)

  mean = np.mean([scores[i][mask[i]].mean(0) for i in range(replies)], 0)
  x, y, weight = [], [], []
  for i, t in zip(*np.nonzero(mask), strict=True):
    x.append([*states[i, t] * share[t], share[t]])
    y.append((scores[i, t + 1 :][mask[i, t + 1 :]] - mean).sum(0) / mask[i].sum())
    weight.append(share[t] ** 2)
  x, y, weight = map(np.array, (x, y, weight))
  # Ridge as more rows of a least-squares problem; each weight's in units of its state's deviation.
  plain = x[:, :dim] / np.sqrt(weight)[:, None]
  centre = (weight[:, None] * plain).sum(0) / weight.sum()
  penalty = np.sqrt((weight[:, None] * (plain - centre) ** 2).sum(0))
  more = np.concatenate([np.diag(penalty), np.zeros((dim, 1))], 1)
  expected = np.linalg.lstsq(np.concatenate([x, more]), np.concatenate([y, np.zeros((dim, traits))]))[0]

  dirty = [np.where(mask[..., None], array, np.nan) for array in (states, scores)]
  weights, found_mean = advantages.fit_values(*map(np.asarray, advantages.value_moments(*dirty, mask, share)))
  np.testing.assert_allclose(found_mean, mean, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(weights, expected, rtol=1e-3, atol=1e-4)
  values = np.asarray(advantages.read_values(jnp.asarray(weights), jnp.asarray(states), share))
  np.testing.assert_allclose(values[mask], x @ expected, rtol=1e-3, atol=1e-3)


def test_a_reply_that_ends_gives_nothing_up_by_ending():
  # Scores of one kind all along: whatever the length, the critic expects no surprise.
  rng = np.random.default_rng(4)
  states, mask, share = (
    rng.normal(size=(6, 5, 3)),
    np.arange(5) < np.array([5, 2, 4, 1, 5, 3])[:, None],
    np.full(5, 0.5),
  )
  moments = advantages.value_moments(states, np.full((6, 5, 1), 8.0), mask, share)
  weights, mean = advantages.fit_values(*map(np.asarray, moments))
  assert mean == pytest.approx(8) and np.abs(weights).max() < 1e-5


def test_a_critic_of_no_replies_expects_nothing():
  moments = advantages.value_moments(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 1)), np.zeros((2, 3), bool), np.ones(3))
  weights, mean = advantages.fit_values(*map(np.asarray, moments))
  assert not weights.any() and not mean.any()
