"""The tasks of bench.py as charjax's stages do them, from functions of its engine and its training."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from protocol import serve
from tasks import EACH

from charjax import defaults, start
from charjax.engine import work
from charjax.engine.batch import Tokens, item_keys
from charjax.engine.rows import FixedShapes, Group, Opening, Rows, pad_values, parts_of, reply_mask
from charjax.engine.sample import Reply, Sampling, sample
from charjax.engine.score import hidden_states, score, token_log_probs
from charjax.mesh import shard_batch
from charjax.model import checkpoint_source, language_model
from charjax.model.decoder import Decoder, lower_layers
from charjax.model.language_model import LanguageModel
from charjax.stages import preference
from charjax.training.advantages import token_advantages, token_returns
from charjax.training.heads import bind, fit_head, make_trainable, read_rewards, reply_states
from charjax.training.losses import policy_gradient
from charjax.training.step import init_optimizer, make_batch, make_optimizer, make_step

_NO_EOS = ()
_ROUNDS = 4  # one to warm up, and those of bench.py's --rounds
_STEPS = 10**6  # of the schedule, which so stays where it begins


def _load(job: dict[str, Any]) -> LanguageModel:
  config, setting = defaults.get_config().model, job['setting']
  config.dtype = config.compute_dtype = setting['dtype']
  config.scan_layers, config.remat = setting.get('scan_layers', True), setting.get('remat', False)
  return language_model.build(checkpoint_source.load(job['model']), config)


def _part(rows: list[Any], number: int, size: int) -> list[Any]:
  """The rows of a step, which after the last come anew."""
  begin = number * size % len(rows)
  return rows[begin : begin + size]


class Sample:
  """sample and sample_eos."""

  def __init__(self, job: dict[str, Any]):
    self._model, self._data, self._rows, self._round = _load(job), job['data'], job['setting']['rows'], 0
    self._eos = self._model.eos_ids if self._data['eos'] else _NO_EOS

  def _draw(self, asked: Sequence[Tokens], temperature: float) -> list[Reply]:
    prompts = [prompt for prompt in asked for _ in range(self._data['each'])]
    keys = item_keys(self._round, 'bench', [str(i) for i in range(len(prompts))])
    settings = Sampling(self._data['max_new_tokens'], temperature, batch_size=self._rows)
    return sample(self._model.decoder, prompts, keys, self._eos, settings)

  def warm_up(self) -> dict[str, Any]:
    # As many as are drawn together; the program is that of any temperature.
    asked = self._data['prompts'][: self._rows // self._data['each']]
    greedy = self._draw(asked, 0.0)[:: self._data['each']]
    return {'greedy': [reply.tokens for reply in greedy]}

  def go(self) -> dict[str, Any]:
    self._round += 1
    lengths = [len(reply.tokens) for reply in self._draw(self._data['prompts'], 1.0)]
    return {'done': sum(lengths), 'mean_length': sum(lengths) / len(lengths)}


class Score:
  """score and score_4."""

  def __init__(self, job: dict[str, Any]):
    self._model, self._data, self._rows = _load(job), job['data'], job['setting']['rows']

  def warm_up(self) -> None:
    # A quarter: from all over, and all replies to a prompt.
    some = [i for i in range(len(self._data['prompts'])) if i // EACH % 4 == 0]
    prompts, replies = ([self._data[name][i] for i in some] for name in ('prompts', 'replies'))
    score(self._model.decoder, prompts, replies, batch_size=self._rows)

  def go(self) -> dict[str, Any]:
    prompts, replies = self._data['prompts'], self._data['replies']
    found = score(self._model.decoder, prompts, replies, batch_size=self._rows)
    done = sum(map(len, prompts)) + sum(map(len, replies))
    return {'done': done, 'log_probs': [float(one.mean()) for one in found]}


class Reward:
  """Steps of a preference model, all of whose parameters are trained."""

  def __init__(self, job: dict[str, Any]):
    model, self._data, self._step = _load(job), job['data'], 0
    rows = self._data['train']
    self._each = max(len(row['replies']) for row in rows)
    self._config = defaults.get_config().preference
    self._config.messages_per_batch = self._data['prompts_a_step']
    self._config.microbatches = job['setting'].get('microbatches', 1)
    self._config.learning_rate, self._config.warmup = self._data['learning_rate'], 0
    self._config.labels, self._config.weight_decay = 'hard', 0.0
    self._lower = lower_layers(model.decoder, model.decoder.config.num_layers)
    replies = [reply for row in rows for reply in row['replies']]
    size = self._data['prompts_a_step']
    self._shapes = FixedShapes([row['prompt'] for row in rows], max(map(len, replies)), replies)
    known = (_part(rows, step, size) for step in range(len(rows) // size))
    batches = ([Group(row['prompt'], row['replies']) for row in some] for some in known)
    self._shapes.expect(batches, self._each, size, self._config.microbatches)
    self._trainable = make_trainable(self._lower, 0, 0, traits=1)
    # It begins as the stage has it begin, on all that is learned from in a few rounds.
    head, first = self._trainable['head'].w, rows[: _ROUNDS * size]
    head[...] = jax.device_put(self._fitted(first), head[...].sharding)
    loss, optimizer = preference.learning(self._config, _STEPS)
    self._state, layout = init_optimizer(optimizer, self._trainable)
    self._learn = make_step(loss, optimizer, self._trainable, layout)

  def _states(self, rows: Sequence[Any], trainable: Any = None) -> np.ndarray:
    """The states [M, K, D] of replies in the starting model, or in what is trained."""
    asked = [row['prompt'] for row in rows for _ in row['replies']]
    said = [reply for row in rows for reply in row['replies']]
    return reply_states(self._lower, trainable, asked, said).reshape(len(rows), self._each, -1)

  def _order(self) -> np.ndarray:
    """The first of two replies is the better one."""
    return np.triu(np.ones((self._each, self._each), np.float32), 1) + np.eye(self._each, dtype=np.float32) / 2

  def _fitted(self, rows: Sequence[Any]) -> np.ndarray:
    config, states = self._config, self._states(rows)
    order = np.broadcast_to(self._order(), (len(rows), self._each, self._each))
    return fit_head(
      states, order, np.ones(order.shape[:2], bool), np.zeros(len(rows), np.int32), states[:0, 0], 1,
      config.head_decay, 0.0, config.head_steps, config.labels, config.loss,
    )  # fmt: skip

  def warm_up(self) -> dict[str, Any]:
    """The first step, from which both sides learn alike."""
    return self.go()

  def go(self) -> dict[str, Any]:
    size, each = self._data['prompts_a_step'], self._each
    some = _part(self._data['train'], self._step, size)
    self._step += 1
    # For the head's first values each message was read once, which is paid for here.
    self._states(some)
    order = self._order()
    examples = [row | {'probabilities': order, 'trait': 0, 'weight': 1.0} for row in some]
    batch = preference.make_examples_batch(self._config, self._lower, self._shapes, examples, each)
    self._trainable, self._state, values = self._learn(self._trainable, self._state, self._lower, batch)
    jax.block_until_ready((self._trainable, values))
    return {'done': size, 'loss': float(jax.device_get(values['loss']))}

  def measure(self) -> dict[str, Any]:
    """How many pairs of held-out replies the rewards order rightly."""
    states = self._states(self._data['heldout'], self._trainable)
    rewards = np.asarray(jax.device_get(read_rewards(self._trainable, states)))[..., 0]
    right = [rewards[:, i] > rewards[:, j] for j in range(self._each) for i in range(j)]
    return {'accuracy': float(np.mean(right))}


def _policy_loss(trainable: Any, decoder: Decoder, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The clipped policy gradient a token, as in stages.policy."""
  used, adapter = bind(decoder, trainable)
  hidden = hidden_states(used, batch['rows'], adapter=adapter, opening=batch['opening'])
  log_probs = token_log_probs(used, hidden, batch['rows'], 1.0)
  mask = reply_mask(batch['rows'])
  gradient, _, _ = policy_gradient(log_probs, batch['before'], batch['advantages'], mask, 0.2)
  return gradient / batch['drawn_tokens'], {}


@jax.jit
def _reference(decoder: Decoder, opening: Opening, rows: Rows) -> jax.Array:
  """Log-probs [N, R] of replies in the starting model, in the batches that the policy learns from."""
  return token_log_probs(decoder, hidden_states(decoder, rows, opening=opening), rows, 1.0)


@jax.jit
@jax.vmap
def _advantages(rewards: jax.Array, log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
  """Of each token of K replies to a prompt [M, K, R], from rewards [M, K] and the KL penalty."""
  rewards = jnp.where(mask, (rewards / mask.sum(1))[:, None], 0.0)
  return token_advantages(token_returns(rewards, jnp.zeros_like(rewards), log_ratio, mask, 1.0, 0.04), mask)


class Policy:
  """rl: replies are drawn, the starting model reads them, and all parameters are trained on them once."""

  def __init__(self, job: dict[str, Any]):
    model, self._data, self._step = _load(job), job['data'], 0
    self._microbatches = job['setting'].get('microbatches', 1)
    self._decoder = model.decoder
    self._shapes = FixedShapes(self._data['prompts'], self._data['max_new_tokens'])
    optimizer = make_optimizer(self._data['learning_rate'], 0, _STEPS, 0.0, 1.0)
    self._trainable = make_trainable(model.decoder, 0, 0)
    self._state, layout = init_optimizer(optimizer, self._trainable)
    self._learn = make_step(_policy_loss, optimizer, self._trainable, layout)

  def warm_up(self) -> dict[str, Any]:
    return self.go()

  def go(self) -> dict[str, Any]:
    each, size = self._data['each'], self._data['prompts_a_step']
    asked: list[Tokens] = _part(self._data['prompts'], self._step, size)
    self._step += 1
    prompts = [prompt for prompt in asked for _ in range(each)]
    keys = item_keys(self._step, 'bench', [str(i) for i in range(len(prompts))])
    settings = Sampling(self._data['max_new_tokens'], batch_size=len(prompts))
    drawn = sample(bind(self._decoder, self._trainable)[0], prompts, keys, _NO_EOS, settings)
    tokens = [reply.tokens for reply in drawn]
    groups = [Group(prompt, tokens[m * each : (m + 1) * each]) for m, prompt in enumerate(asked)]
    rows = self._shapes.rows(groups, each, microbatches=self._microbatches)
    mask = reply_mask(rows)
    parts = map(shard_batch, parts_of(rows, self._microbatches))
    reference = [jax.device_get(_reference(self._decoder, self._shapes.opening, part)) for part in parts]
    before = pad_values([reply.log_probs for reply in drawn], mask.shape[1])
    log_ratio = before - np.concatenate(reference)
    rewards = np.array([np.mean(np.array(one) % 2 == 0) for one in tokens], np.float32)
    grouped = shard_batch(tuple(array.reshape(size, each, *array.shape[1:]) for array in (rewards, log_ratio, mask)))
    advantages = jax.device_get(_advantages(*grouped)).reshape(mask.shape)
    count = sum(map(len, tokens))
    whole = {'opening': self._shapes.opening, 'drawn_tokens': np.float32(count)}
    arrays = {'rows': rows, 'before': before, 'advantages': advantages}
    batch = make_batch(whole, arrays, self._microbatches)
    self._trainable, self._state, values = self._learn(self._trainable, self._state, self._decoder, batch)
    jax.block_until_ready((self._trainable, values))
    return {'done': 1, 'tokens': count, 'entropy': float(-before.sum() / count), 'kl': float(log_ratio.sum() / count)}


_TASKS = {'sample': Sample, 'sample_eos': Sample, 'score': Score, 'score_4': Score, 'reward': Reward, 'rl': Policy}

if __name__ == '__main__':
  with start.devices(defaults.get_config()):
    serve(lambda job: _TASKS[job['task']](job), lambda: work.done().compile_seconds)
