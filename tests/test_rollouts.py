"""One step's replies: each drawn by its own key and judged as its own, beside a reference in float64 NumPy."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_reference import numpy_reply, random_tensors, tiny_config
from ml_collections import ConfigDict

from charjax.engine.batch import item_keys
from charjax.engine.rows import FixedShapes, Group, make_rows
from charjax.engine.sample import Sampling, sample
from charjax.engine.score import hidden_states
from charjax.model.decoder import Runtime, lower_layers
from charjax.model.weights import make_decoder
from charjax.stages import rollouts
from charjax.stages.rollouts import Judge
from charjax.training.heads import RewardHead

CONFIG = tiny_config(vocab_size=24)
START, NOW = random_tensors(CONFIG, seed=0), random_tensors(CONFIG, seed=1)
ENDS = (10, 14)
EACH, LONGEST, STEP, TEMPERATURE, KL, TRACE = 4, 6, 5, 0.8, 0.2, 0.7
RNG = np.random.default_rng(0)
# Prompts that begin alike and then differ, of two traits and weights.
ASKED = [
  {'id': 'a-0', 'prompt': [1, 2, 5, 11], 'weight': 1.0, 'earns': np.array([1.0, 0.25])},
  {'id': 'b-0', 'prompt': [1, 2, 12], 'weight': 3.0, 'earns': np.array([0.0, 2.0])},
  {'id': 'a-1', 'prompt': [1, 2, 13, 16, 15], 'weight': 1.0, 'earns': np.array([1.0, 0.25])},
]
HEAD, CRITIC = RNG.normal(size=(2, 32)), RNG.normal(size=(33, 2))
MEAN = np.array([0.4, -0.3])
VALUES = RNG.normal(size=(1, 32)) / 8


def build(tensors):
  return make_decoder(CONFIG, tensors, jnp.float32, Runtime(scan_layers=True))


@pytest.fixture(scope='module')
def start():
  return build(START)


@pytest.fixture(scope='module')
def now():
  return build(NOW)


def roll_out(start, now, advantages, **others):
  policy = {
    'replies_per_prompt': EACH, 'prompts_per_step': 3, 'max_new_tokens': LONGEST, 'temperature': TEMPERATURE,
    'prompt_width': 0, 'trace': TRACE, 'batch_size': 512, 'microbatches': 3, 'advantages': advantages, 'seed': 0,
    'ranked_replies': 0, 'shown_replies': 0,
  }  # fmt: skip
  session = SimpleNamespace(
    config=ConfigDict({'seed': 4, 'policy': policy}), model=SimpleNamespace(decoder=start, eos_ids=ENDS)
  )
  head = RewardHead(*HEAD.shape)
  head.w[...] = jnp.asarray(HEAD, jnp.float32)
  numbers = (jnp.asarray(x, jnp.float32) for x in (CRITIC, MEAN))
  judge = Judge(start, lower_layers(start, 1), {'head': head}, *numbers, jnp.array(ENDS))
  shapes = FixedShapes([item['prompt'] for item in ASKED], LONGEST)
  value_head = RewardHead(1, CONFIG.embed_dim)
  value_head.w[...] = jnp.asarray(VALUES, jnp.float32)
  judge = judge._replace(**others)
  return rollouts.roll_out(session, shapes, judge, {'decoder': now, 'head': value_head}, ASKED, STEP, KL)


@pytest.fixture(scope='module')
def rollout(start, now):
  return roll_out(start, now, 'grpo')


def test_nothing_goes_to_the_devices_unseen(start, now):
  with pytest.raises(jax.errors.JaxRuntimeError, match=r'Disallowed .*transfer'):
    roll_out(start, now, 'grpo', mean=np.zeros(len(MEAN), np.float32))


def groups(values):
  """What stands in a row for each reply, by prompt."""
  return [values[m * EACH : (m + 1) * EACH] for m in range(len(ASKED))]


def expected_advantages(states, replies, gained, item):
  """Rewards [K] and advantages, an array for each of K replies to one prompt, in float64."""
  scores, expects, lengths = [], [], [len(reply) for reply in replies]
  for state, reply in zip(states, replies, strict=True):
    score = state @ HEAD.T
    said = [place for place, token in enumerate(reply) if token not in ENDS]
    # An end counts as the mean of what was said before it.
    score[[place for place in range(len(reply)) if place not in said]] = score[said].mean(0) if said else MEAN
    scores.append((score - MEAN) @ item['earns'])
    left = np.maximum(1 - np.arange(1, len(reply) + 1) / LONGEST, 0)
    expects.append((state @ CRITIC[:-1] + CRITIC[-1]) @ item['earns'] * left)
  rewards = np.array([score.mean() for score in scores])
  level = rewards.mean()
  returns = np.full((EACH, LONGEST), np.nan)
  for k, length in enumerate(lengths):
    left = np.maximum(1 - np.arange(1, length + 1) / LONGEST, 0)
    value = expects[k] - level * left
    value[-1] = 0  # nothing follows the last token
    surprise = (scores[k] - level) / length + value - np.array([0, *value[:-1]])
    for place in range(length):
      later = np.arange(place, length)
      returns[k, place] = (surprise[later] * TRACE ** (later - place)).sum() - KL * gained[k][later].sum()
  there = np.array([np.mean(column[~np.isnan(column)]) if (~np.isnan(column)).any() else 0 for column in returns.T])
  centred = returns - there
  deviation = np.sqrt(np.nanmean(centred**2))
  return rewards, [item['weight'] * centred[k, :length] / (deviation + 1e-4) for k, length in enumerate(lengths)]


def test_each_reply_is_drawn_by_its_own_key_from_the_policy_to_its_own_prompt(rollout, now):
  drawn = iter(rollout.drawn)
  places = [(item, m * EACH + k) for m, item in enumerate(ASKED) for k in range(EACH)]
  for item, place in places:
    keys = item_keys(4, 'policy', [f'{STEP}/{item["id"]}/{place}'])
    (alone,) = sample(now, [item['prompt']], keys, ENDS, Sampling(LONGEST, TEMPERATURE, batch_size=12), width=16)
    assert next(drawn).tokens == alone.tokens
  assert len(rollout.drawn) == len(places)
  # Another reply to each message, and not the same to all.
  assert all(len({tuple(reply.tokens) for reply in some}) > 1 for some in groups(rollout.drawn))


def test_replies_end_with_any_end_of_turn(rollout):
  assert {reply.finish for reply in rollout.drawn} == {'stop', 'length'}
  assert {reply.tokens[-1] for reply in rollout.drawn if reply.finish == 'stop'} == set(ENDS)
  for reply in rollout.drawn:
    assert not set(ENDS) & set(reply.tokens[:-1]) and (reply.tokens[-1] in ENDS) == (reply.finish == 'stop')
    assert reply.finish == 'stop' or len(reply.tokens) == LONGEST


def test_log_probs_are_those_drawn_from_and_ratios_those_to_the_starting_model(rollout):
  before, ratio = groups(rollout.before), groups(rollout.log_ratio)
  for m, item in enumerate(ASKED):
    for k, reply in enumerate(groups(rollout.drawn)[m]):
      length = len(reply.tokens)
      policy, reference = (numpy_reply(CONFIG, w, item['prompt'], reply.tokens, TEMPERATURE) for w in (NOW, START))
      np.testing.assert_allclose(before[m][k][:length], policy, atol=1e-4)
      np.testing.assert_allclose(ratio[m][k][:length], policy - reference, atol=2e-4)
      assert not before[m][k][length:].any() and not ratio[m][k][length:].any()


def test_rewards_and_advantages_stand_at_their_own_reply_s_tokens(rollout, start):
  read = jax.jit(functools.partial(hidden_states, start, tap=1))
  for m, item in enumerate(ASKED):
    said = [reply.tokens for reply in groups(rollout.drawn)[m]]
    gained = [
      np.subtract(*(numpy_reply(CONFIG, w, item['prompt'], reply, TEMPERATURE) for w in (NOW, START))) for reply in said
    ]
    # Each alone, in a row of its own.
    rows = [make_rows([Group(item['prompt'], [reply])], 1, 8, 1 + LONGEST) for reply in said]
    states = [np.asarray(read(row)[0], np.float64)[0, 1:] for row in rows]
    states = [state[: len(reply)] for state, reply in zip(states, said, strict=True)]
    rewards, advantages = expected_advantages(states, said, gained, item)
    np.testing.assert_allclose(groups(rollout.rewards)[m], rewards, atol=1e-3)
    for found, wanted in zip(groups(rollout.advantages)[m], advantages, strict=True):
      np.testing.assert_allclose(found[: len(wanted)], wanted, atol=2e-3)
      assert not found[len(wanted) :].any()


def test_a_reply_as_a_whole_is_worth_what_it_earns_beyond_the_others(rollout, start, now):
  found = roll_out(start, now, 'rloo')
  np.testing.assert_array_equal(found.rewards, rollout.rewards)
  earned = rollout.rewards - KL * rollout.log_ratio.sum(1)
  for m, item in enumerate(ASKED):
    some = groups(earned)[m]
    for k, reply in enumerate(groups(found.drawn)[m]):
      advantages = groups(found.advantages)[m][k]
      wanted = item['weight'] * (some[k] - np.delete(some, k).mean())
      np.testing.assert_allclose(advantages[: len(reply.tokens)], wanted, atol=1e-4)
      assert not advantages[len(reply.tokens) :].any()


def test_a_token_is_worth_what_follows_beyond_what_the_value_head_expected(rollout, start, now):
  found = roll_out(start, now, 'ppo')
  read = jax.jit(functools.partial(hidden_states, now))
  surprises, returns = np.zeros_like(found.advantages), np.zeros_like(found.advantages)
  mask = np.zeros(found.advantages.shape, bool)
  for number, reply in enumerate(found.drawn):
    prompt, length = ASKED[number // EACH]['prompt'], len(reply.tokens)
    states = np.asarray(read(make_rows([Group(prompt, [reply.tokens])], 1, 8, 1 + LONGEST)), np.float64)[0, :length]
    expected = [*(states @ VALUES[0]), 0.0]
    earned = -KL * rollout.log_ratio[number, :length].astype(np.float64)
    earned[-1] += rollout.rewards[number]
    mask[number, :length] = True
    for t in reversed(range(length)):
      later = surprises[number, t + 1] if t + 1 < length else 0.0
      surprises[number, t] = earned[t] + expected[t + 1] - expected[t] + TRACE * later
      returns[number, t] = surprises[number, t] + expected[t]
  np.testing.assert_allclose(found.returns, returns, atol=2e-3)
  white = np.where(mask, (surprises - surprises[mask].mean()) / surprises[mask].std(), 0.0)
  weight = np.repeat([item['weight'] for item in ASKED], EACH)[:, None]
  np.testing.assert_allclose(found.advantages, white * weight, atol=5e-3)
