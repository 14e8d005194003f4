"""A batch in parts: loss, metrics and gradient of the whole, in one program; on one device and on eight."""

import contextlib
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from llama_reference import random_tensors, tiny_config

from charjax import defaults
from charjax.engine.rows import FixedShapes, Group
from charjax.mesh import lay_out, make_mesh
from charjax.model.decoder import Runtime
from charjax.model.weights import make_decoder
from charjax.stages import policy, preference, rollouts
from charjax.training import loop
from charjax.training.heads import make_trainable
from charjax.training.losses import count_pairs
from charjax.training.policy_loss import policy_loss
from charjax.training.step import init_optimizer, make_batch, make_step

CONFIG = tiny_config(vocab_size=60)
MESSAGES, EACH, DRAWN = 8, 5, 2  # replies to each, of which so many were drawn
RNG = np.random.default_rng(0)


def tokens(low, high):
  return RNG.integers(8, 60, RNG.integers(low, high)).tolist()


PROMPTS = [[1, 2, *tokens(2, 9)] for _ in range(MESSAGES)]
# Of ranked replies some messages have fewer: one has none, and one has one, which is no pair.
GROUPS = [
  Group(prompt, [tokens(2, 7) for _ in range(DRAWN + count)])
  for prompt, count in zip(PROMPTS, (3, 0, 1, 2, 3, 3, 2, 3), strict=True)
]
SHAPES = FixedShapes(PROMPTS, 14, [[1] * 6])  # with room to pack all batches
WEIGHT = RNG.uniform(0.5, 2, MESSAGES).astype(np.float32)


def labels(each, skipped):
  real = np.array([[skipped + i < len(group.replies) for i in range(each)] for group in GROUPS])
  return {'real': real, 'weight': WEIGHT}, RNG.uniform(0.1, 0.9, (MESSAGES, each, each)).astype(np.float32)


def preferences(loss):
  more, probabilities = labels(EACH, 0)
  weights, pairs = count_pairs(more['real'], WEIGHT)
  whole = {'opening': SHAPES.opening, 'weights': weights, 'pairs': pairs}
  rows = {
    'rows': partial(SHAPES.rows, GROUPS, EACH, 0),
    'probabilities': probabilities,
    'trait': np.arange(MESSAGES) % 3,
  }
  return lambda *args: preference._loss(*args, labels='soft', loss=loss), whole, rows | more


def policies():
  more, preferred = labels(EACH - DRAWN, DRAWN)
  neutral = [Group(prompt, [tokens(1, 7)]) for prompt in PROMPTS]
  width = SHAPES.rows(GROUPS, EACH).tokens.shape[1] - 1
  ranked = {
    'before': RNG.normal(-4, 1, (MESSAGES, EACH - DRAWN, width)), 'real': more['real'], 'preferred': preferred,
    'best': np.zeros(MESSAGES, np.int32),
  }  # fmt: skip
  drawn = (MESSAGES * DRAWN, width)
  arrays = {
    'rows': partial(SHAPES.rows, GROUPS, EACH, 0), 'neutral': partial(SHAPES.rows, neutral, 1, 0),
    'drawn': {'before': RNG.normal(-4, 0.1, drawn), 'advantages': RNG.normal(size=drawn)}, 'weight': WEIGHT,
    'ranked': ranked,
    'temperature': np.array([0.9, 0.9, 1.5, 1.5, 1.5] * MESSAGES, np.float32),
    'going_on': np.array([False, False, True, True, True] * MESSAGES),
  }  # fmt: skip
  whole = {
    'clip': 0.2,
    'neutral_weight': 2.0,
    'ranked_weight': 1.0,
    'ranked_beta': 0.2,
    'ranked_likelihood': 0.3,
    'prompts': MESSAGES,
    'drawn_tokens': sum(len(reply) for group in GROUPS for reply in group.replies[:DRAWN]),
    'neutral_tokens': sum(len(group.replies[0]) for group in neutral),
    'ranked_pairs': count_pairs(more['real'], WEIGHT)[1],
  }
  whole = {name: np.float32(value) for name, value in whole.items()}
  return policy_loss, {'opening': SHAPES.opening} | whole | {'ends': np.array([7, 9])}, arrays


TASKS = {
  'bradley_terry': preferences('bradley_terry'),
  'plackett_luce': preferences('plackett_luce'),
  'policy': policies(),
}


def steps(task, microbatches):
  """Three steps of plain gradient descent: metrics of each, what was trained, and how often the step was compiled."""
  loss, whole, rows = TASKS[task]
  # Packed, as the parts of a batch are.
  rows = {name: value(microbatches) if callable(value) else value for name, value in rows.items()}
  assert rows['rows'].packing is not None
  decoder = make_decoder(CONFIG, random_tensors(CONFIG), jnp.float32, Runtime(scan_layers=True))
  trainable = make_trainable(decoder, 0, 0, traits=0 if task == 'policy' else 3)
  if task != 'policy':
    w = trainable['head'].w
    w[...] = np.random.default_rng(1).normal(size=w.shape).astype(np.float32)
    trainable = lay_out(trainable)
  optimizer = optax.sgd(0.01)
  state, layout = init_optimizer(optimizer, trainable)
  step = make_step(loss, optimizer, trainable, layout)
  history = []
  for _ in range(3):
    trainable, state, metrics = step(trainable, state, decoder, make_batch(whole, rows, microbatches))
    history.append(jax.device_get(metrics))
  return history, jax.device_get(trainable), step.__wrapped__._cache_size()


@pytest.fixture(scope='module')
def expected():
  return {task: steps(task, 1) for task in TASKS}


def test_a_part_is_divided_among_the_devices():
  """As many parts as wanted, or fewer, so that eight devices have as many rows; and as wanted where none would do."""
  assert [loop.microbatches(wanted, 16, 2) for wanted in (1, 4, 16)] == [1, 4, 16]
  with jax.set_mesh(make_mesh((1, 8, 1))):
    assert [loop.microbatches(wanted, 16, 2) for wanted in (1, 2, 4, 16)] == [1, 2, 4, 4]
    assert loop.microbatches(8, 16, 6) == 4  # eight parts would have twelve rows
    assert loop.microbatches(2, 2, 2) == 2
  with jax.set_mesh(make_mesh((2, 1, 4))):  # Tensor parallel devices have the same rows.
    assert loop.microbatches(16, 16, 2) == 16


@pytest.fixture
def many():
  """A config that wants more parts than eight devices have rows for, and on these what a batch of it is made from."""
  config = defaults.get_config()
  config.preference.update(messages_per_batch=16, microbatches=16)
  config.policy.update(prompts_per_step=16, microbatches=16, replies_per_prompt=0, ranked_replies=2, max_new_tokens=6)
  model = SimpleNamespace(decoder=SimpleNamespace(config=CONFIG), eos_ids=(7,))
  with jax.set_mesh(make_mesh((1, 8, 1))):
    yield config, model, FixedShapes(PROMPTS, 6)


def split(rows):
  """Parts, rows in each, and how many of these a device has."""
  return *rows.tokens.shape[:2], rows.tokens.sharding.shard_shape(rows.tokens.shape)[1]


def test_what_the_preference_model_learns_from_is_divided(many):
  config, model, shapes = many
  example = {'replies': [[9], [10, 11]], 'probabilities': np.full((2, 2), 0.5), 'trait': 0, 'weight': 1.0}
  some = [example | {'prompt': prompt} for prompt in [*PROMPTS, *PROMPTS]]
  batch = preference.make_examples_batch(config.preference, model.decoder, shapes, some, 2)
  assert split(batch.parts['rows']) == (4, 8, 1)


def test_what_the_policy_learns_from_is_divided_and_so_is_what_holds_it(many):
  config, model, shapes = many
  width = shapes.rows([], 1, 8).tokens.shape[1] - 1
  item = {
    'ranked': rollouts.Ranked([[9], [10, 11]], None), 'shown': [], 'weight': 1.0, 'real': np.ones(2, bool),
    'before': np.zeros((2, width), np.float32), 'preferred': np.eye(2, dtype=np.float32), 'best': np.int64(0),
  }  # fmt: skip
  asked = [item | {'prompt': prompt} for prompt in [*PROMPTS, *PROMPTS]]
  neutral = [{'prompt': prompt, 'reply': [9, 12]} for prompt in [*PROMPTS, *PROMPTS]]
  session = SimpleNamespace(config=config, model=model)
  batch = policy.make_policy_batch(session, shapes, None, asked, neutral, None)
  assert split(batch.parts['rows']) == split(batch.parts['neutral']) == (4, 8, 1)
  assert np.asarray(batch.parts['neutral'].lengths).sum() == 16 * 3 and batch.whole['neutral_tokens'] == 32


# On the second mesh each of two parts has a message for every device that batches are split over.
@pytest.mark.parametrize(('microbatches', 'shape'), [(4, None), (2, (2, 2, 2))], ids=str)
@pytest.mark.parametrize('task', TASKS)
def test_the_parts_of_a_batch_add_up_to_it(expected, task, microbatches, shape):
  with jax.set_mesh(make_mesh(shape)) if shape else contextlib.nullcontext():
    history, trained, compiled = steps(task, microbatches)
  before, whole, _ = expected[task]
  assert compiled == 1 and before[2]['loss'] < before[0]['loss'] and not before[2]['skipped']
  for found, wanted in zip(history, before, strict=True):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
      np.testing.assert_allclose(found[name], value, atol=1e-5, rtol=1e-5, err_msg=name)
  for found, wanted in zip(jax.tree.leaves(trained), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(found, wanted, atol=1e-5)
