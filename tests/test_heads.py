"""The reward head: its fit against an independent solver, and what it learns that a shared direction cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from flax import nnx
from llama_reference import tiny_config
from test_losses import preference_64

from charjax.model.decoder import Decoder, Runtime
from charjax.training.heads import control_length, fit_head, make_trainable, read_only, read_rewards, reply_states


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


# Length


def long_winded(rng, messages, k, dim, traits, follows):
  """States of which one direction knows the length of a reply, rewards that follow it so closely, and the lengths."""
  tokens = rng.integers(5, 80, (messages, k)).astype(np.float64)
  real = np.arange(k) < rng.integers(2, k + 1, messages)[:, None]
  states = rng.normal(size=(messages, k, dim)) @ rng.normal(size=(dim, dim)) + 7 * rng.normal(size=(messages, 1, dim))
  states += (tokens[..., None] / 20) * rng.normal(size=dim)
  w = rng.normal(size=(traits, dim)) / dim
  w += follows[:, None] * np.linalg.lstsq(states[real], tokens[real] / 20, rcond=None)[0]
  return w.astype(np.float32), states.astype(np.float32), tokens, real, np.arange(messages) % traits


def within(values, real):
  """Less their mean in each message, in float64, message by message."""
  return np.concatenate([values[m, real[m]] - values[m, real[m]].mean(0) for m in range(len(values))]).astype(
    np.float64
  )


def test_length_is_taken_out_as_least_squares_do():
  w, states, tokens, real, trait = long_winded(np.random.default_rng(0), 60, 5, 6, 2, np.array([0.8, 0.05]))
  found = control_length(w, states, tokens, real, trait, 0.4)
  x, length = within(states.astype(np.float64), real), within(tokens, real)
  own = np.concatenate([np.full(real[m].sum(), trait[m]) for m in range(len(trait))])
  spread = np.sqrt((x**2).mean(0))
  scaled = x / spread
  # Ledoit and Wolf, row by row; its trace is D, so that what it is drawn to is the identity.
  covariance = np.mean([np.outer(row, row) for row in scaled], 0)
  chance = np.mean([np.square(np.outer(row, row) - covariance).sum() for row in scaled]) / len(scaled)
  share = chance / np.square(covariance - np.eye(6)).sum()
  assert 0.001 < share < 1
  # Ridge regression, as ordinary least squares on rows that are added.
  rows = np.concatenate([np.sqrt(1 - share) * scaled, np.sqrt(share * len(x)) * np.eye(6)])
  guess = np.linalg.lstsq(rows, np.concatenate([length / np.sqrt(1 - share), np.zeros(6)]), rcond=None)[0] / spread
  np.testing.assert_allclose(found.guess_d, guess, rtol=1e-5, atol=1e-6 * np.abs(guess).max())
  first = own == 0
  rewards, guesses = x[first] @ w[0].astype(np.float64), x[first] @ guess
  # Two-stage least squares: the reward on the length, by way of the guess.
  effect = np.linalg.lstsq((guesses @ length[first]).reshape(1, 1), np.array([rewards @ length[first]]), rcond=None)[0]
  np.testing.assert_allclose(x[first] @ found.w_nd[0], rewards - effect * guesses, atol=1e-4 * np.abs(rewards).max())
  r = [np.corrcoef(x[own == n] @ w[n], length[own == n])[0, 1] for n in range(2)]
  np.testing.assert_allclose(found.before_n, r, atol=1e-5)
  assert r[0] > 0.4 > r[1]
  assert abs(np.corrcoef(x[first] @ found.w_nd[0], length[first])[0, 1]) < 1e-4 and abs(found.after_n[0]) < 1e-9
  # What is below the limit stays as it is.
  np.testing.assert_array_equal(found.w_nd[1], w[1])
  assert found.effect_n[1] == 0 and found.after_n[1] == found.before_n[1]


def test_length_control_carries_over_and_keeps_the_rest():
  # Fewer replies than states, as in a small run.
  rng = np.random.default_rng(2)
  direction, wanted = rng.normal(size=(2, 200)) / 14
  spread = 4 / np.sqrt(np.arange(1, 201))  # as of principal components

  def draw(messages):
    tokens, real = rng.integers(5, 80, (messages, 6)).astype(np.float64), np.ones((messages, 6), bool)
    states = rng.normal(size=(messages, 6, 200)) * spread + (tokens[..., None] - 42) / 10 * direction
    return states.astype(np.float32), tokens, real, np.zeros(messages, int)

  w = (wanted + 0.7 * direction)[None].astype(np.float32)
  found = control_length(w, *draw(30), 0.2)
  states, tokens, real, _ = draw(200)
  x, length = within(states.astype(np.float64), real), within(tokens, real)
  before, after = (abs(np.corrcoef(x @ each[0], length)[0, 1]) for each in (w, found.w_nd))
  assert before > 0.5 and after < 0.15
  assert np.corrcoef(x @ found.w_nd[0], x @ wanted)[0, 1] > 0.8


def test_equal_lengths_and_states_that_never_vary_are_left_alone():
  w, states, tokens, real, trait = long_winded(np.random.default_rng(3), 8, 3, 4, 3, np.array([0.5, 0.5, 0.5]))
  for changed in ((states, 0 * tokens), (0 * states, tokens)):
    found = control_length(w, *changed, real, 0 * trait, 0.2)
    np.testing.assert_array_equal(found.w_nd, w)
    assert not found.before_n.any() and not found.after_n.any()


def test_two_replies_to_one_message_are_enough_to_go_on():
  w, states, tokens, real, trait = long_winded(np.random.default_rng(3), 1, 2, 4, 1, np.array([0.5]))
  found = control_length(w, states, tokens, real, trait, 0.2)
  assert abs(found.before_n[0]) == pytest.approx(1) and np.isfinite(found.w_nd).all()
  x = within(states.astype(np.float64), real)
  np.testing.assert_allclose(x @ found.w_nd[0], 0, atol=1e-4 * np.abs(x @ w[0]).max())


def test_a_model_that_is_only_read_says_the_same_from_fewer_bytes():
  runtime = Runtime(compute_dtype=jnp.bfloat16)
  decoder = Decoder(
    tiny_config(tied_embeddings=False, qkv_bias=True), rngs=nnx.Rngs(0), dtype=jnp.bfloat16, runtime=runtime
  )
  trainable = make_trainable(decoder, 0, 0, traits=2)
  rng = np.random.default_rng(0)
  # As training leaves them: no weight is one of bfloat16.
  trainable['decoder'] = jax.tree.map(lambda x: x + 1e-3 * rng.normal(size=x.shape), trainable['decoder'])
  narrow = read_only(trainable)
  texts = [rng.integers(3, 90, size=n).tolist() for n in (5, 9, 7, 4)]
  found, expected = (reply_states(decoder, model, texts[:2], texts[2:]) for model in (narrow, trainable))
  np.testing.assert_array_equal(found, expected)
  kinds = {array.dtype for array in jax.tree.leaves(narrow['decoder'].embed)}
  assert kinds == {jnp.dtype('float32')} and narrow['decoder'].head.dtype == jnp.bfloat16
  sizes = [sum(array.nbytes for array in jax.tree.leaves(model['decoder'].blocks)) for model in (narrow, trainable)]
  assert sizes[0] < 0.6 * sizes[1]
