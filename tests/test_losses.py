"""Losses: each against its formula in float64 NumPy, their gradients where a mistake would not show in the value."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from charjax.training import losses
from charjax.training.advantages import token_returns

BAD = (np.nan, np.inf, -np.inf)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def masked(rng, shape):
  """A mask with a full and an empty row, the others ragged."""
  rows, width = shape
  lengths = [width, 0, *rng.integers(1, width, rows - 2)]
  return np.arange(width)[None] < np.array(lengths)[:, None]


@pytest.mark.parametrize('seed', range(3))
def test_soft_labels(seed):
  scores = np.random.default_rng(seed).normal(size=(3, 4)) * 3
  found = losses.soft_labels(jnp.asarray(scores), 0.7, 0.05, 0.9)
  for m, i, j in itertools.product(range(3), range(4), range(4)):
    expected = min(max(sigmoid((scores[m, i] - scores[m, j]) / 0.7), 0.05), 0.9)
    assert float(found[m, i, j]) == pytest.approx(expected, rel=1e-5)


def test_hard_labels_are_sure_of_all_but_ties():
  assert losses.hard_labels(jnp.array([0.05, 0.4999, 0.5, 0.5001, 1.0])).tolist() == [0, 0, 0.5, 1, 1]


def preference_64(scores, probability, real, weight, labels, loss):
  """The sum over messages and the sum of weights of each loss, a pair or a choice at a time."""
  total = weights = 0.0
  for m in range(len(scores)):
    there = np.flatnonzero(real[m])
    if len(there) < 2:
      continue
    each = []
    if loss == 'plackett_luce':
      # Labels made from scores hold their order; of equals the first comes first.
      left = sorted(there, key=lambda i, m=m: -(probability[m, i, there] > 0.5).sum())
      while len(left) > 1:
        each.append(-scores[m, left[0]] + np.log(np.exp(scores[m, left]).sum()))
        left = left[1:]
    else:
      for i, j in itertools.combinations(there, 2):
        p = probability[m, i, j]
        target = p if labels == 'soft' else (p > 0.5) + 0.5 * (p == 0.5)
        margin = np.tanh(np.log(p / (1 - p)) / 2) if loss == 'margin' else 0.0
        right = sigmoid(scores[m, i] - scores[m, j] - margin)
        each.append(-target * np.log(right) - (1 - target) * np.log(1 - right))
    total += weight[m] * np.mean(each)
    weights += weight[m]
  return total, weights


def labelled(rng, messages, k):
  """Scores of a model, soft labels of a ranker's scores (some of them equal), which replies are real, weights."""
  ranker = rng.integers(-3, 4, (messages, k)).astype(np.float64)
  probability = np.clip(sigmoid(ranker[:, :, None] - ranker[:, None, :]), 0.05, 0.95)
  real = rng.uniform(size=(messages, k)) < 0.7
  real[0], real[1] = True, np.arange(k) == 1  # all pairs, none
  # What labels say of replies that are not there must not matter.
  probability = np.where(real[:, :, None] & real[:, None, :], probability, rng.uniform(size=probability.shape))
  return rng.normal(size=(messages, k)) * 2, probability, real, rng.uniform(0.5, 2, messages)


LOSSES = ('bradley_terry', 'margin', 'plackett_luce')


@pytest.mark.parametrize('labels', ['soft', 'hard'])
@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize(('seed', 'k'), [(0, 2), (1, 4), (2, 8)])
def test_preference_loss(labels, loss, seed, k):
  data = labelled(np.random.default_rng(seed), 9, k)
  found = losses.preference_loss(*map(jnp.asarray, data), labels, loss)
  np.testing.assert_allclose(found, preference_64(*data, labels, loss), rtol=1e-5)


def test_of_two_replies_a_ranking_is_a_hard_label():
  data = labelled(np.random.default_rng(0), 40, 2)
  data[1][:] = np.where(data[1] == 0.5, 0.6, data[1])
  ranking, pairs = (losses.preference_loss(*data, 'hard', loss) for loss in ('plackett_luce', 'bradley_terry'))
  np.testing.assert_allclose(ranking, pairs, rtol=1e-6)


@pytest.mark.parametrize('loss', LOSSES)
def test_preference_losses_stay_finite_for_scores_far_apart(loss):
  labels = jnp.array([[[0.5, 0.25], [0.75, 0.5]]])
  value, _ = losses.preference_loss(jnp.array([[1e4, -1e4]]), labels, jnp.ones((1, 2), bool), jnp.ones(1), 'soft', loss)
  assert float(value) == pytest.approx(2e4 if loss == 'plackett_luce' else 0.75 * 2e4, rel=1e-4)


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('bad', BAD)
def test_replies_that_are_not_real_give_preference_losses_no_gradient(bad, loss):
  real = np.array([[True, True, False], [False, True, False], [False, False, False]])
  scores = np.where(real, np.array([[0.3, -0.4, 0], [0, 0.1, 0], [0, 0, 0]]), bad).astype(np.float32)
  labels = np.full((3, 3, 3), 0.5, np.float32)
  labels[0, :2, :2] = [[0.5, 0.7], [0.3, 0.5]]
  value, gradient = jax.value_and_grad(lambda s: losses.preference_loss(s, labels, real, jnp.ones(3), 'soft', loss)[0])(
    scores
  )
  slope = {'bradley_terry': sigmoid(0.7) - 0.7, 'margin': sigmoid(0.3) - 0.7, 'plackett_luce': sigmoid(0.7) - 1}[loss]
  assert np.isfinite(value)
  np.testing.assert_allclose(gradient, [[slope, -slope, 0], [0, 0, 0], [0, 0, 0]], atol=1e-6)


def policy_gradient_64(log_probs, sampled, advantages, mask, clip):
  total = cut = 0.0
  for b, r in zip(*np.nonzero(mask), strict=True):
    ratio = np.exp(log_probs[b, r] - sampled[b, r])
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    total -= min(ratio * advantages[b, r], clipped * advantages[b, r])
    cut += (advantages[b, r] > 0 and ratio > 1 + clip) or (advantages[b, r] < 0 and ratio < 1 - clip)
  return total, mask.sum(), cut


@pytest.mark.parametrize('seed', range(3))
def test_policy_gradient(seed):
  rng = np.random.default_rng(seed)
  sampled, mask, advantages = rng.normal(size=(8, 6)) - 3, masked(rng, (8, 6)), rng.normal(size=(8, 6))
  log_probs = sampled + rng.normal(size=(8, 6)) * 0.3
  found = losses.policy_gradient(*map(jnp.asarray, (log_probs, sampled, advantages, mask)), 0.2)
  expected = policy_gradient_64(log_probs, sampled, advantages, mask, 0.2)
  assert 0 < expected[2] < expected[1]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_clip_cuts_the_gradient_off_on_one_side_only():
  ratio = np.array([[0.5, 1.0, 1.5]] * 2)
  gradient = jax.grad(
    lambda x: losses.policy_gradient(x, jnp.zeros((2, 3)), jnp.array([[1.0], [-1.0]]), jnp.ones((2, 3), bool), 0.2)[0]
  )(jnp.log(ratio))
  # What is good and became likelier already is not pushed on; what is bad and became rarer neither.
  np.testing.assert_allclose(gradient, [[-0.5, -1, 0], [0, 1, 1.5]], atol=1e-6)


@pytest.mark.parametrize('bad', BAD)
def test_masked_tokens_give_no_gradient_whatever_their_log_probs(bad):
  rng = np.random.default_rng(0)
  mask = masked(rng, (4, 5))
  clean = [rng.normal(size=(4, 5)).astype(np.float32) - 2 for _ in range(2)]
  dirty = [np.where(mask, array, bad) for array in clean]
  advantages = jnp.array([[1.0], [-1.0], [0.5], [2.0]])

  def surrogate(log_probs, sampled):
    return losses.policy_gradient(log_probs, sampled, advantages, mask, 10.0)[0]

  value, gradient = jax.value_and_grad(surrogate)(*dirty)
  expected, expected_gradient = jax.value_and_grad(surrogate)(*clean)
  assert float(value) == pytest.approx(float(expected), rel=1e-5)
  np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5)
  assert not np.asarray(gradient)[~mask].any()


def test_pairs_that_are_in_order():
  rng = np.random.default_rng(0)
  scores, real = rng.normal(size=(3, 4)), np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
  labels = rng.uniform(size=(3, 4, 4))
  pairs = [(m, i, j) for m, k in enumerate((4, 2, 1)) for i, j in itertools.combinations(range(k), 2)]
  right = [(scores[m, i] > scores[m, j]) == (labels[m, i, j] > 0.5) for m, i, j in pairs]
  assert 0 < np.mean(right) < 1
  weight = np.array([1.0, 3.0, 7.0], np.float32)
  found = losses.right_pairs(jnp.asarray(scores), jnp.asarray(labels), jnp.asarray(real))
  assert [int(x) for x in found] == [sum(right), len(pairs)]
  # What is known before the scores are: of the messages with a pair, and of none.
  assert losses.count_pairs(real, weight) == (4, 7)
  assert losses.preference_loss(scores, labels, real, weight, 'soft', 'bradley_terry')[1] == 4
  assert losses.preference_loss(scores, labels, real, weight, 'soft', 'plackett_luce')[1] == 4
  assert [int(x) for x in losses.right_pairs(*map(jnp.asarray, (scores[2:], labels[2:], real[2:])))] == [0, 0]
  assert losses.count_pairs(real[2:], weight[2:]) == (np.float32(1e-8), 1)


def test_kl_from_logits():
  rng = np.random.default_rng(0)
  reference, policy = rng.normal(size=(2, 5, 11)) * 3
  p, q = log_softmax(reference), log_softmax(policy)
  found = losses.kl_from_logits(jnp.asarray(reference), jnp.asarray(policy))
  np.testing.assert_allclose(found, (np.exp(p) * (p - q)).sum(-1), rtol=1e-5)
  gradient = jax.grad(lambda x: losses.kl_from_logits(jnp.asarray(reference), x).sum())(jnp.asarray(policy))
  np.testing.assert_allclose(gradient, np.exp(q) - np.exp(p), atol=1e-6)
  at_equality = jax.grad(lambda x: losses.kl_from_logits(jnp.asarray(reference), x).sum())(jnp.asarray(reference))
  np.testing.assert_allclose(at_equality, 0, atol=1e-6)
  assert np.asarray(losses.kl_from_logits(jnp.asarray(reference), jnp.asarray(reference))).tolist() == [0] * 5
  # Logits alike up to a constant are the same distribution, in whatever precision they come.
  shifted = losses.kl_from_logits(jnp.asarray(reference, jnp.bfloat16), jnp.asarray(reference, jnp.bfloat16) + 8)
  assert np.abs(shifted).max() < 1e-2 and shifted.dtype == jnp.float32


# ---- a policy small enough to enumerate ----

VOCAB, LONGEST, END = 3, 3, 0
TEXTS = [
  text
  for length in range(1, LONGEST + 1)
  for text in itertools.product(range(VOCAB), repeat=length)
  if END not in text[:-1] and (text[-1] == END or length == LONGEST)
]
MASK = np.arange(LONGEST)[None] < np.array([len(text) for text in TEXTS])[:, None]


def table_log_probs(table, xp):
  """Log-probs [texts, LONGEST] under logits table[position, token before, token], anything where MASK is false."""
  ids = np.array([[*text, *[END] * (LONGEST - len(text))] for text in TEXTS])
  before = np.concatenate([np.zeros((len(ids), 1), int), ids[:, :-1]], 1)
  rows = table[np.arange(LONGEST)[None], before]
  rows = rows - xp.log(xp.exp(rows).sum(-1, keepdims=True))
  return xp.take_along_axis(rows, ids[..., None], -1)[..., 0]


@pytest.mark.parametrize('kl', [0.0, 0.04, 2.0])
def test_the_penalised_policy_gradient_is_that_of_reward_less_kl(kl):
  """Over all texts, weighted by their probability, it is the gradient of E[R] - kl * KL(policy || reference)."""
  rng = np.random.default_rng(0)
  table, reference_table = rng.normal(size=(2, LONGEST, VOCAB, VOCAB))
  rewards = rng.normal(size=len(TEXTS))
  reference = np.where(MASK, table_log_probs(reference_table, np), 0)

  def objective(table):
    log_probs = np.where(MASK, table_log_probs(table, np), 0).sum(-1)
    probability = np.exp(log_probs)
    assert probability.sum() == pytest.approx(1)
    return (probability * (rewards - kl * (log_probs - reference.sum(-1)))).sum()

  expected = np.zeros_like(table)
  for index in np.ndindex(table.shape):
    step = np.zeros_like(table)
    step[index] = 1e-5
    expected[index] = (objective(table + step) - objective(table - step)) / 2e-5

  log_probs = np.asarray(table_log_probs(table, np), np.float32)
  probability = np.exp(np.where(MASK, log_probs, 0).sum(-1))
  # A reply earns its reward with its last token; what the critic expects depends on what was said up to there.
  last = MASK & ~np.pad(MASK[:, 1:], ((0, 0), (0, 1)))
  earned, ids = np.where(last, rewards[:, None], 0), np.array([[*t, *[END] * (LONGEST - len(t))] for t in TEXTS])
  said = np.cumsum((ids + 1) * 4 ** np.arange(LONGEST), -1)
  expected_later = np.sin(said)
  returns = token_returns(*map(jnp.asarray, (earned, expected_later, log_probs - reference, MASK)), 1.0, kl)

  def surrogate(table, baseline):
    # The surrogate is linear in the advantage, so that a text's probability can weigh it there.
    weighted = probability[:, None] * (returns - baseline)
    return losses.policy_gradient(table_log_probs(table, jnp), log_probs, weighted, MASK, 0.2)[0]

  # What all replies have in common must not matter: that is why a group's mean may be taken off.
  for baseline in (0.0, 5.0):
    found = -jax.grad(surrogate)(jnp.asarray(table, jnp.float32), baseline)
    np.testing.assert_allclose(found, expected, atol=1e-5)
