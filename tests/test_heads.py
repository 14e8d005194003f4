"""The reward head: its fit against an independent solver, and what it learns that a shared direction cannot."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from test_losses import preference_64

from charjax.training.heads import fit_head, read_rewards


def ranked(rng, messages, k, dim, directions, traits, noise=0.0):
  """States [M, K, D] on unequal scales, soft labels of each message's own direction, and which replies are there."""
  states = rng.normal(size=(messages, k, dim)) * np.geomspace(0.1, 10, dim) + 3
  trait = np.arange(messages) % traits
  scores = np.einsum('mkd,md->mk', (states - 3) / np.geomspace(0.1, 10, dim), directions[trait])
  scores += noise * rng.normal(size=scores.shape)
  labels = 1 / (1 + np.exp(scores[:, None] - scores[:, :, None]))
  real = np.arange(k) < rng.integers(2, k + 1, messages)[:, None]
  return states.astype(np.float32), labels.astype(np.float32), real, trait


def objective(w, states, labels, real, trait, plain, traits, decay, share, kind='soft', name='bradley_terry'):
  """What fit_head minimises, pair by pair in float64, of directions in units of the scaled states."""
  flat = states[real].astype(np.float64)
  scale = 1 / flat.std(0) / np.sqrt(states.shape[-1])
  scaled = (states - flat.mean(0)) * scale
  w = w.reshape(traits, -1)
  varying = plain * scale
  of_plain = states.shape[-1] / (varying**2).sum()
  total = decay * ((1 - share) * (w**2).sum() + share * of_plain * ((varying @ w.T) ** 2).sum())
  for m in range(len(states)):
    scores = (scaled[m] @ w[trait[m]])[None]
    loss, _ = preference_64(scores, labels[m : m + 1].astype(np.float64), real[m : m + 1], [1.0], kind, name)
    total += loss / (trait == trait[m]).sum()
  return total


@pytest.mark.parametrize(
  ('seed', 'share', 'kind', 'name'),
  [
    (0, 0.0, 'soft', 'bradley_terry'),
    (1, 0.3, 'hard', 'bradley_terry'),
    (2, 0.9, 'soft', 'margin'),
    (5, 0.3, 'hard', 'margin'),
    (4, 0.3, 'soft', 'plackett_luce'),
  ],
)
def test_the_fit_is_the_minimum_that_scipy_finds_at_its_best_length(seed, share, kind, name):
  rng = np.random.default_rng(seed)
  dim, traits, decay = 5, 2, 0.05
  # With noise, since hard labels that a direction tells apart without an error have no best length.
  data = ranked(rng, 12, 4, dim, rng.normal(size=(traits, dim)), traits, noise=2.0)
  plain = rng.normal(size=(9, dim)).astype(np.float32) @ rng.normal(size=(dim, dim)).astype(np.float32)
  losses = []
  w = fit_head(*data, plain, traits, decay, share, 60, kind, name, lambda step, values: losses.append(values['loss']))
  arguments = (*data, plain, traits)
  found = scipy.optimize.minimize(objective, np.zeros(traits * dim), (*arguments, decay, share, kind, name), 'BFGS').x

  def at_lengths(lengths):
    return objective(found.reshape(traits, dim) * lengths[:, None], *arguments, 0.0, share, kind, name)

  lengths = scipy.optimize.minimize(at_lengths, np.ones(traits), method='Nelder-Mead').x
  states, real = data[0], data[2]
  scale = 1 / states[real].std(0) / np.sqrt(dim)
  expected = found.reshape(traits, dim) * lengths[:, None] * scale
  np.testing.assert_allclose(w, expected, rtol=5e-2, atol=np.abs(expected).max() * 2e-2)
  assert losses[-1] < losses[0] and len(losses) == 60 and (lengths > 1).all()


def test_hard_labels_told_apart_without_an_error_leave_finite_directions():
  rng = np.random.default_rng(0)
  data = ranked(rng, 4, 3, 8, rng.normal(size=(1, 8)), 1)
  w = fit_head(*data, data[0][:, 0], 1, 0.1, 0.05, 30, 'hard', 'bradley_terry')
  assert np.isfinite(w).all() and w.any()


def test_traits_that_want_the_opposite_do_not_cancel():
  rng = np.random.default_rng(0)
  direction = rng.normal(size=8)
  states, labels, real, trait = ranked(rng, 60, 4, 8, np.stack([direction, -direction]), 2)
  w = fit_head(states, labels, real, trait, states[:0, 0], 3, 1e-3, 0.1, 60)
  unseen, wanted, _, kind = ranked(rng, 40, 4, 8, np.stack([direction, -direction]), 2)
  rewards = np.asarray(read_rewards({'head': FakeHead(w)}, unseen))
  assert rewards.shape == (40, 4, 3)
  for m in range(40):
    order = rewards[m, :, kind[m]][:, None] > rewards[m, :, kind[m]]
    assert (order == (wanted[m] > 0.5)).mean() > 0.85
  # A trait without a message has no opinion.
  assert not w[2].any()


class FakeHead:
  def __init__(self, w):
    self.w = jnp.asarray(w)


def test_states_that_never_vary_are_left_alone():
  rng = np.random.default_rng(0)
  states, labels, real, trait = ranked(rng, 8, 3, 4, rng.normal(size=(1, 4)), 1)
  states[..., 2] = 7.0
  w = fit_head(states, labels, real, trait, states[:, 0], 1, 0.01, 0.1, 20)
  assert np.isfinite(w).all() and w[0, 2] == 0


def test_what_varies_among_plain_replies_is_read_less():
  rng = np.random.default_rng(0)
  # The labels follow two states alike; plain replies differ in one of them.
  states, labels, real, trait = ranked(rng, 40, 4, 4, np.array([[1.0, 1.0, 0, 0]]), 1)
  plain = rng.normal(size=(30, 4)).astype(np.float32) * [1, 0, 0, 0]
  spread = states[real].std(0)
  even, uneven = (fit_head(states, labels, real, trait, plain, 1, 0.3, share, 60)[0] * spread for share in (0, 0.9))
  assert abs(even[0] / even[1] - 1) < 0.3 and uneven[0] / uneven[1] < 0.6
