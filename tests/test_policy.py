"""What the policy learns from: what a reply earns, which ranked replies it learns to prefer, what a token earns."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from llama_reference import numpy_log_probs, random_tensors, tiny_config
from ml_collections import ConfigDict

from charjax import defaults
from charjax.character import Character, Trait
from charjax.engine.rows import FixedShapes, Group, reply_mask
from charjax.engine.score import hidden_states, token_log_probs
from charjax.files import write_jsonl
from charjax.model.decoder import Runtime, forward
from charjax.model.weights import make_decoder
from charjax.stages import policy, rollouts
from charjax.training.heads import make_trainable
from charjax.training.policy_loss import policy_loss


class Words:
  """A language model's two lines of tokenizer: a token a word, 0 at the end."""

  def reply(self, text, ended=True):
    return [int(word) for word in text.split()] + [0] * ended


class Run:
  def __init__(self, folder, **policy):
    self.config = ConfigDict({'policy': {'max_new_tokens': 3, 'traits': ()} | policy})
    self.model, self._folder = Words(), folder
    traits = [Trait(name, 'I am.', {}, (), (), weight) for name, weight in (('a', 1.0), ('b', 2.0), ('c', 1.0))]
    self.character = Character('', '', tuple(traits))

  def folder(self, name):
    return self._folder / name


def test_tokens_that_are_learned_from_are_counted():
  ranked = rollouts.Ranked([[1, 2, 3], [4, 5]], None)
  asked = [{'ranked': ranked, 'best': 1, 'shown': [[6] * 7]}, {'ranked': rollouts.Ranked([], None), 'shown': []}]
  config = ConfigDict({'ranked_weight': 1.0, 'ranked_likelihood': 0.0})
  assert policy._tokens(config, asked, None) == {'tokens_read': 12.0}
  config.update(ranked_weight=0.0, ranked_likelihood=1.0)  # the best alone
  assert policy._tokens(config, asked, None) == {'tokens_read': 9.0}
  config.ranked_likelihood = 0.0
  drawn = [rollouts.Reply([1] * 4, np.zeros(4), 'stop')] * 2
  rollout = rollouts.Rollout(drawn, *np.zeros((4, 2)))
  assert policy._tokens(config, asked, rollout) == {'tokens_read': 15.0, 'tokens_drawn': 8.0}


def test_ranked_replies_take_turns_in_and_out_of_character(tmp_path):
  rows = [
    ('a', 'plain', 0, '1', 'stop'),
    ('a', 'shown', 0, '2', 'stop'),
    ('a', 'shown', 1, '3 3 3 3 3', 'length'),
    ('a', 'opposed', 0, '4', 'stop'),
    ('b', 'opposed', 1, '5', 'stop'),  # its others were dropped
    ('b', 'plain', 2, '6', 'stop'),
  ]
  for name in ('messages', 'replies', 'rankings'):
    (tmp_path / name).mkdir()
  asked = [
    {'id': m, 'trait': trait, 'split': 'train', 'text': 'Hi'} for m, trait in (('a', 'a'), ('b', 'a'), ('n', None))
  ]
  write_jsonl(tmp_path / 'messages' / 'messages.jsonl', asked)
  write_jsonl(
    tmp_path / 'replies' / 'replies.jsonl',
    [
      {
        'id': f'{m}/{condition}/{k}',
        'message': m,
        'condition': condition,
        'text': text,
        'finish': finish,
        'tokens': len(text.split()),
        'log_prob': 0.0,
      }
      for m, condition, k, text, finish in rows
    ],
  )
  # In another order than the replies come in, and without the last of them.
  table = [[0.5, 0.2, 0.9], [0.8, 0.5, 0.7], [0.1, 0.3, 0.5]]
  ranking = {'message': 'a', 'replies': ['a/plain/0', 'a/opposed/0', 'a/shown/0'], 'probabilities': table}
  # Of two ranked messages the second is the held-out judge's.
  other = {'message': 'b', 'replies': ['b/opposed/1', 'b/plain/2'], 'probabilities': [[0.5, 0.9], [0.1, 0.5]]}
  write_jsonl(tmp_path / 'rankings' / 'rankings.jsonl', [ranking, other])
  everything = rollouts.ranked_replies(Run(tmp_path, ranked_replies=9))
  assert {name: ranked.replies for name, ranked in everything.items()} == {
    'a': [[2, 0], [4, 0], [1, 0], [3, 3, 3]],
    'b': [[5, 0], [6, 0]],
  }
  expected = [[0.5, 0.3, 0.1, 0.5], [0.7, 0.5, 0.8, 0.5], [0.9, 0.2, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]
  np.testing.assert_allclose(everything['a'].preferred, expected)
  assert everything['b'].preferred is None
  first = rollouts.ranked_replies(Run(tmp_path, ranked_replies=2))
  assert first['a'].replies == [[2, 0], [4, 0]] and first['b'].replies == [[5, 0], [6, 0]]
  np.testing.assert_allclose(first['a'].preferred, np.array(expected)[:2, :2])
  assert everything['no such message'].replies == []


def test_labels_of_rankings_and_of_the_preference_model_are_mixed_by_share():
  judged = np.array([[[0.5, 0.9, 0.5], [0.1, 0.5, 0.5], [0.5, 0.5, 0.5]]] * 2, np.float32)
  real = np.array([[True, True, False], [True, True, False]])
  ranked = [np.array([[0.5, 0.2], [0.8, 0.5]]), None]  # of the second message no ranking may be known
  labels, best = rollouts.mix_labels(judged, ranked, real, 0.75)
  np.testing.assert_allclose(labels[0, :2, :2], [[0.5, 0.375], [0.625, 0.5]])
  np.testing.assert_array_equal(labels[1], judged[1])
  assert best.tolist() == [1, 0]
  assert rollouts.mix_labels(judged, ranked, real, 0.0)[1].tolist() == [0, 0]


def test_a_reply_earns_by_its_own_trait_and_by_a_share_of_the_rest(tmp_path):
  (tmp_path / 'preference').mkdir()
  report = {'left_out': ['c'], 'train': {'reward_std': {'a': 0.5, 'b': 4.0, 'c': 1.0}}}
  (tmp_path / 'preference' / 'report.json').write_text(json.dumps(report))
  found = rollouts.earnings(Run(tmp_path, other_traits=0.5, keep_unproven_traits=False))
  assert {name: earns.tolist() for name, earns in found.items()} == {'a': [2.0, 0.125, 0.0], 'b': [1.0, 0.25, 0.0]}
  everything = rollouts.earnings(Run(tmp_path, other_traits=0.6, keep_unproven_traits=True))
  # Of weights 1, 2, 1: the rest of trait a is two parts b and one part c.
  np.testing.assert_allclose(everything['a'], [2.0, 0.4 / 4, 0.2], rtol=1e-6)
  assert rollouts.earnings(Run(tmp_path, other_traits=0.0, keep_unproven_traits=True))['c'].tolist() == [0, 0, 1]
  # Where some traits alone are rewarded, nothing is earned by the others.
  some = rollouts.earnings(Run(tmp_path, other_traits=0.5, keep_unproven_traits=True, traits=('a', 'c')))
  assert {name: earns.tolist() for name, earns in some.items()} == {'a': [2.0, 0.0, 0.5], 'c': [1.0, 0.0, 1.0]}


SHARE = np.array([0.75, 0.5, 0.25, 0], np.float32)


def test_advantages_are_among_the_replies_to_one_prompt():
  rng = np.random.default_rng(0)
  scores, values = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
  mask = np.ones((2, 3, 4), bool)
  mask[1, 1, 2:] = False
  found = np.asarray(rollouts._grpo(scores, values, np.zeros_like(scores), mask, SHARE, 0.9, 0.1))
  np.testing.assert_allclose(found.sum(1), 0, atol=1e-4)
  assert not found[~mask].any()
  # Another prompt's replies, however good, change nothing.
  scores[1] += 100
  again = np.asarray(rollouts._grpo(scores, values, np.zeros_like(scores), mask, SHARE, 0.9, 0.1))
  np.testing.assert_allclose(again[0], found[0], atol=1e-5)


@pytest.mark.parametrize('trace', [0.5, 1.0])
def test_of_replies_that_are_as_good_a_token_none_is_better_for_its_length(trace):
  scores, mask = np.full((1, 2, 4), 3.0, np.float32), np.arange(4) < np.array([2, 4])[:, None]
  values = 3.0 * SHARE * np.ones_like(scores)  # a critic that expects just that
  found = np.asarray(rollouts._grpo(scores, values, np.zeros_like(scores), mask[None], SHARE, trace, 0.1))
  np.testing.assert_allclose(found, 0, atol=1e-3)


END = 7


def two_models():
  """A config, the tensors and decoders of a starting and a trained model, and two prompts that begin alike."""
  config = tiny_config(vocab_size=60)
  tensors = [random_tensors(config, seed=seed) for seed in (0, 1)]
  decoders = [make_decoder(config, some, jnp.float32, Runtime(scan_layers=True)) for some in tensors]
  rng = np.random.default_rng(0)
  prompts = [[1, 2, *rng.integers(8, 60, n).tolist()] for n in (3, 5)]
  return config, tensors, decoders, prompts, rng


def test_ranked_replies_are_preferred_by_how_much_likelier_they_became():
  config, (start, now), decoders, prompts, rng = two_models()
  # To each message one drawn reply, then three ranked ones, of which the second message lacks one.
  replies = [[rng.integers(8, 60, n).tolist() for n in lengths] for lengths in ((4, 5, 3, 6), (3, 6, 4))]
  shapes = FixedShapes(prompts, 6)
  rows = shapes.rows([Group(prompt, some) for prompt, some in zip(prompts, replies, strict=True)], 4)

  def going_on(tensors, prompt, reply):
    total = 0.0
    for place, token in enumerate(reply):
      scaled = numpy_log_probs(config, tensors, [*prompt, *reply[:place]])[-1] / 2.0
      scaled[END] = -np.inf
      total += scaled[token] - np.log(np.exp(scaled - scaled.max()).sum()) - scaled.max()
    return total

  gained = np.array([
    [going_on(now, prompt, r) - going_on(start, prompt, r) for r in some[1:]] + [0.0] * (4 - len(some))
    for prompt, some in zip(prompts, replies, strict=True)
  ])  # fmt: skip
  preferred, weight = rng.uniform(0.1, 0.9, (2, 3, 3)).astype(np.float32), np.array([1.0, 3.0], np.float32)
  expected = []
  for m, pairs in enumerate(([(0, 1), (0, 2), (1, 2)], [(0, 1)])):
    chance = [1 / (1 + np.exp(-0.3 * (gained[m, i] - gained[m, j]))) for i, j in pairs]
    labels = [preferred[m, i, j] for i, j in pairs]
    expected.append(-np.mean([p * np.log(c) + (1 - p) * np.log(1 - c) for p, c in zip(labels, chance, strict=True)]))

  hidden = hidden_states(decoders[0], rows, opening=shapes.opening)
  before = np.asarray(token_log_probs(decoders[0], hidden, rows, 2.0, END)).reshape(2, 4, -1)
  drawn = np.asarray(token_log_probs(decoders[0], hidden, rows, 0.7)).reshape(2, 4, -1)[:, 0]
  neutral = shapes.rows([Group(prompts[0], [[9, 10]])], 1)
  batch = {
    'opening': shapes.opening,
    'rows': rows, 'neutral': neutral, 'drawn': {'before': drawn, 'advantages': np.zeros(drawn.shape, np.float32)},
    'weight': weight, 'ends': np.array([END]),
    'temperature': np.array([0.7, 2.0, 2.0, 2.0] * 2), 'going_on': np.array([False, True, True, True] * 2),
    'clip': 0.2, 'ranked_weight': 2.0, 'ranked_beta': 0.3, 'ranked_likelihood': 0.0,
    'neutral_weight': 0.0, 'prompts': 2, 'drawn_tokens': 7, 'neutral_tokens': 2, 'ranked_pairs': 4,
    'ranked': {
      'before': before[:, 1:], 'real': np.array([[True] * 3, [True, True, False]]), 'preferred': preferred,
      'best': np.array([2, 0]),
    },
  }  # fmt: skip
  trained = {'decoder': decoders[1]}
  loss, metrics = policy_loss(trained, decoders[0], batch)
  assert float(metrics['ranked_loss']) == pytest.approx(np.mean(weight * expected), rel=1e-3)
  assert float(loss) == pytest.approx(2 * float(metrics['ranked_loss']), rel=1e-5)
  # The likelihood of the best one, a token.
  best = [
    weight[m] * going_on(now, prompts[m], replies[m][1 + k]) / len(replies[m][1 + k]) for m, k in ((0, 2), (1, 0))
  ]
  more, _ = policy_loss(trained, decoders[0], batch | {'ranked_likelihood': 0.5})
  assert float(more - loss) == pytest.approx(-0.5 * np.mean(best), rel=1e-3)
  # Neutral replies are held by the KL a token of the starting model's distribution to the policy's.
  text = [*prompts[0], 9, 10]
  told = [numpy_log_probs(config, tensors, text)[-3:-1] for tensors in (start, now)]
  kl = np.mean([(np.exp(p) * (p - q)).sum() for p, q in zip(*told, strict=True)])
  more, metrics = policy_loss(trained, decoders[0], batch | {'neutral_weight': 3.0})
  assert float(metrics['neutral_kl']) == pytest.approx(kl, rel=1e-3)
  assert float(more - loss) == pytest.approx(3 * kl, rel=1e-3)
  # With nothing drawn, it is all there is.
  alone = {key: value for key, value in batch.items() if key != 'drawn'}
  alone['rows'] = shapes.rows([Group(prompt, some[1:]) for prompt, some in zip(prompts, replies, strict=True)], 3)
  alone |= {'temperature': np.full(6, 2.0), 'going_on': np.full(6, True)}
  offline, metrics = policy_loss(trained, decoders[0], alone)
  assert float(offline) == pytest.approx(float(loss), rel=1e-5) and 'clip_fraction' not in metrics
  # Without ranked replies there is nothing of it.
  del batch['ranked']
  batch['rows'] = shapes.rows([Group(prompt, some[:1]) for prompt, some in zip(prompts, replies, strict=True)], 1)
  batch |= {'temperature': np.array([0.7, 0.7]), 'going_on': np.array([False, False])}
  loss, metrics = policy_loss(trained, decoders[0], batch)
  assert float(loss) == 0 and 'ranked_loss' not in metrics


def test_what_was_shown_is_distilled_by_the_exact_divergence_of_the_model_that_saw_it():
  config, (start, now), decoders, prompts, rng = two_models()
  shown = [[1, *rng.integers(8, 60, n).tolist(), *prompt] for n, prompt in zip((9, 14), prompts, strict=True)]
  # One of them was dropped.
  replies = [[rng.integers(8, 60, n).tolist() for n in lengths] for lengths in ((4, 6), (3,))]
  said = [reply for some in replies for reply in some]
  shapes, shapes_shown = (FixedShapes(some, 12, said) for some in (prompts, shown))
  rows, teacher = (
    some.rows([Group(prompt, few) for prompt, few in zip(asked, replies, strict=True)], 2)
    for some, asked in ((shapes, prompts), (shapes_shown, shown))
  )
  batch = {'opening': shapes.opening, 'shown_opening': shapes_shown.opening}
  batch |= {
    'shown': rows, 'teacher': teacher, 'shown_tokens': np.float32(sum(map(len, said))), 'shown_weight': 2.0,
    'neutral': shapes.rows([Group(prompts[0], [[9, 10]])], 1), 'neutral_tokens': 2.0, 'neutral_weight': 0.0,
  }  # fmt: skip
  loss, metrics = policy_loss({'decoder': decoders[1]}, decoders[0], batch)
  total = 0.0
  for prompt, before, some in zip(prompts, shown, replies, strict=True):
    for reply in some:
      p = numpy_log_probs(config, start, [*before, *reply])[len(before) - 1 : -1]
      q = numpy_log_probs(config, now, [*prompt, *reply])[len(prompt) - 1 : -1]
      total += (np.exp(p) * (p - q)).sum()
  assert float(metrics['shown_kl']) == pytest.approx(total / sum(map(len, said)), rel=1e-3)
  assert float(loss) == pytest.approx(2 * float(metrics['shown_kl']), rel=1e-5)


def test_a_value_head_learns_from_states_that_it_leaves_as_they_are():
  config = tiny_config(vocab_size=60)
  decoder = make_decoder(config, random_tensors(config), jnp.float32, Runtime(scan_layers=True))
  rng = np.random.default_rng(0)
  prompts, replies = [[1, 2, 9, 8], [1, 2, 11]], [[[20, 21, 22], [30]], [[31, 32], [33, 34, 35, 36]]]
  shapes = FixedShapes(prompts, 6)
  rows = shapes.rows([Group(prompt, some) for prompt, some in zip(prompts, replies, strict=True)], 2)
  trainable = make_trainable(decoder, 0, 0, traits=1)
  head = rng.normal(size=(1, config.embed_dim)).astype(np.float32)
  trainable['head'].w[...] = jnp.asarray(head)
  mask = np.asarray(reply_mask(rows))
  drawn = {'before': np.zeros(mask.shape, np.float32), 'advantages': np.zeros(mask.shape, np.float32)}
  drawn['returns'] = rng.normal(size=mask.shape).astype(np.float32)
  batch = {
    'opening': shapes.opening,
    'rows': rows, 'drawn': drawn, 'temperature': np.ones(4, np.float32), 'going_on': np.zeros(4, bool),
    'ends': np.array([END]), 'clip': 0.2, 'drawn_tokens': 10.0, 'neutral_weight': 0.0, 'neutral_tokens': 2.0,
    'neutral': shapes.rows([Group(prompts[0], [[9, 10]])], 1),
  }  # fmt: skip
  (_, metrics), gradient = jax.value_and_grad(policy_loss, has_aux=True)(trainable, decoder, batch)
  expected, slope = 0.0, 0.0
  for number, (prompt, reply) in enumerate((p, r) for p, some in zip(prompts, replies, strict=True) for r in some):
    text = np.array([[*prompt, *reply]])
    states = np.asarray(forward(decoder, text, np.arange(text.shape[1])[None])[0][0], np.float64)
    for place in range(len(reply)):
      # Of the state that the token is predicted from.
      error = states[len(prompt) - 1 + place] @ head[0] - drawn['returns'][number, place]
      expected, slope = expected + error**2 / 2, slope + error * states[len(prompt) - 1 + place]
  assert float(metrics['value_loss']) == pytest.approx(expected / 10, rel=1e-3)
  np.testing.assert_allclose(gradient['head'].w[...][0], slope / 10, rtol=1e-3, atol=1e-4)
  assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient['decoder'])) == 0


def test_the_penalty_s_weight_follows_the_divergence_and_a_run_that_goes_on_finds_it_again(tmp_path):
  config = ConfigDict({'kl': 0.1, 'kl_target': 0.5})
  told = [0.5, 5.0, 0.0, 0.55, None]  # that of the last step was not finite
  weights, found = policy._KLWeights(config, tmp_path), []
  for step, kl in enumerate(told, 1):
    found.append(weights.at(step))
    weights.after(step, kl)
  # At the target it stays; far from it, it moves by a fiftieth at most; near it, by a tenth of the gap.
  np.testing.assert_allclose(found, [0.1, 0.1, 0.102, 0.102 * 0.98, 0.102 * 0.98 * 1.01])
  write_jsonl(tmp_path / 'metrics.jsonl', [{'step': step, 'kl': kl} for step, kl in enumerate(told, 1)])
  assert policy._KLWeights(config, tmp_path).at(4) == pytest.approx(found[3])
  assert policy._KLWeights(config, tmp_path).at(6) == pytest.approx(found[4]) == pytest.approx(weights.at(6))
  assert policy._KLWeights(ConfigDict({'kl': 0.1, 'kl_target': 0.0}), tmp_path).at(4) == 0.1


def test_how_far_the_policy_moves_hangs_on_no_error_of_its_value_head():
  """With a value head, whatever its gradient is, the rest is updated alike; without one all is clipped together."""
  trainable = {'adapter': {'a': jnp.ones(4), 'b': jnp.ones((2, 3))}, 'head': {'w': jnp.ones(3)}}
  rng = np.random.default_rng(0)
  gradients = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), trainable) for _ in range(5)]

  def moved(advantages, scales):
    config = defaults.get_config().policy
    config.update(advantages=advantages, learning_rate=0.01)
    _, optimizer = policy.learning(config)
    now, state = trainable, optimizer.init(trainable)
    for gradient, scale in zip(gradients, scales, strict=True):
      updates, state = optimizer.update(gradient | {'head': {'w': scale * gradient['head']['w']}}, state, now)
      now = optax.apply_updates(now, updates)
    return now['adapter']['a']

  wild = (100.0, 0.1, 7.0, 1.0, 30.0)
  np.testing.assert_array_equal(moved('ppo', [1.0] * 5), moved('ppo', wild))
  assert np.abs(moved('grpo', [1.0] * 5) - moved('grpo', wild)).max() > 1e-4
