"""policy: GRPO on the trait messages, with no trait shown, against the preference model.

Reads messages/ and preference/; writes Orbax checkpoints, metrics.jsonl and samples.jsonl (replies drawn as training
went on). Replies are drawn by temperature alone, so that their log-probs are those of the distribution sampled
from. The KL penalty to the starting model stands in the reward, where its gradient is right; neutral messages are
held by an exact KL on replies that the starting model gave once.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from charjax.engine.batch import compute_prefix, item_keys
from charjax.engine.sample import Reply, Sampling, sample
from charjax.engine.score import (
  FixedShapes,
  Group,
  Rows,
  hidden_states,
  mean_states,
  over_chunks,
  pad_values,
  reply_mask,
  token_log_probs,
)
from charjax.errors import UserError
from charjax.mesh import shard_batch
from charjax.model.decoder import logits
from charjax.progress import Metrics, Progress
from charjax.stages import messages, preference, prompts
from charjax.training.checkpoint import Checkpoints, fingerprint
from charjax.training.data import batches
from charjax.training.heads import bind, make_trainable, read_rewards
from charjax.training.losses import group_advantages, kl_from_logits, penalised_rewards, policy_gradient
from charjax.training.step import init_optimizer, make_optimizer, make_step
from charjax.workdir import Row, Session, chunks, read_jsonl, write_jsonl, write_text


def run(session: Session) -> Row:
  """Trains the policy; returns counts."""
  config, folder, model = session.config.policy, session.folder('policy'), session.model
  asked, rewarded = _trait_prompts(session)
  neutral = _neutral_replies(session)
  every = [item['prompt'] for item in (*asked, *neutral)]
  shapes = FixedShapes(every, config.max_new_tokens)

  trainable = _untrained(session)
  optimizer = make_optimizer(
    config.learning_rate, config.warmup, config.steps, config.weight_decay, config.max_gradient
  )
  state, layout = init_optimizer(optimizer, trainable)
  step_function = make_step(_loss, optimizer, trainable, layout)
  reward_model = preference.load(session, 'train')
  scale = _preference_report(session)['train']['reward_std']
  places = {trait.id: place for place, trait in enumerate(session.character.traits)}
  asked_data = batches(asked, config.prompts_per_step, session.config.seed)
  # At least as many neutral messages as trait messages, so that the rest of the model is held as firmly.
  neutral_data = batches(neutral, config.prompts_per_step, session.config.seed + 1)
  settings = Sampling(
    config.max_new_tokens, config.temperature, batch_size=config.prompts_per_step * config.replies_per_prompt
  )
  with (
    Checkpoints(folder / 'checkpoints', session.config.seed) as checkpoints,
    Metrics(folder) as metrics,
    Progress('policy', config.steps, 'steps') as bar,
  ):
    start, trainable, state, position = checkpoints.restore(trainable, state)
    if position:
      asked_data.set_state(position['asked'])
      neutral_data.set_state(position['neutral'])
    metrics.truncate_after(start)
    bar.skip(start)
    for step in range(start + 1, config.steps + 1):
      asked_batch, neutral_batch = next(asked_data), next(neutral_data)
      group = [item for item in asked_batch for _ in range(config.replies_per_prompt)]
      names = [f'{step}/{item["id"]}/{i}' for i, item in enumerate(group)]
      used, adapter = bind(model.decoder, trainable)
      drawn = sample(
        used, [item['prompt'] for item in group], item_keys(session.config.seed, 'policy', names), model.eos_ids[:1],
        settings, adapter=adapter, width=config.prompt_width,
      )  # fmt: skip
      said = iter(drawn)
      groups = [Group(i['prompt'], [next(said).tokens for _ in range(config.replies_per_prompt)]) for i in asked_batch]
      host_rows = shapes.rows(groups, config.replies_per_prompt)
      rows = shard_batch(host_rows)
      every, reference = jax.device_get(
        _judge(model.decoder, reward_model, shapes.prefix, shapes.length, rows, config.temperature)
      )
      rewards = np.array(
        [row[places[i['trait']]] / scale[i['trait']] for row, i in zip(every, group, strict=True)], np.float32
      )
      sampled, mask = pad_values([reply.log_probs for reply in drawn], host_rows), reply_mask(host_rows)
      weight = np.array([item['weight'] for item in group], np.float32)
      advantages, penalised = _advantages(rewards, sampled - reference, weight, config)
      neutral_rows = shapes.rows([Group(row['prompt'], [row['reply']]) for row in neutral_batch], 1)
      batch = shapes.shared() | {
        'rows': rows,
        'sampled': shard_batch(sampled),
        'advantages': shard_batch(advantages),
        'neutral': shard_batch(neutral_rows),
        'temperature': np.float32(config.temperature),
        'clip': np.float32(config.clip),
        'neutral_weight': np.float32(config.neutral_weight),
      }
      trainable, state, values = step_function(trainable, state, model.decoder, batch)
      tokens = mask.sum()
      values = jax.device_get(values) | {
        'reward': float(rewards.mean()),
        'penalised_reward': float(penalised.mean()),
        'kl': float((sampled - reference).sum() / tokens),
        'length': float(tokens / len(drawn)),
        'ended': float(np.mean([reply.finish == 'stop' for reply in drawn])),
        'entropy': float(-sampled.sum() / tokens),
      }
      metrics.write(step, values)
      bar.advance(1, f'reward {values["reward"]:.3f}, KL {values["kl"]:.3f} a token')
      if step % config.samples_every == 0 or step in (1, config.steps):
        _save_samples(session, step, group, drawn, rewards)
      if step == config.steps or step % config.save_every == 0:
        position = {'asked': asked_data.get_state(), 'neutral': neutral_data.get_state()}
        checkpoints.save(step, trainable, state, position)
  _merge_samples(session)
  write_text(folder / 'fingerprint.json', json.dumps({'policy': fingerprint(trainable)}))
  return {'steps': config.steps, 'messages': len(asked), 'neutral': len(neutral), 'traits_rewarded': rewarded}


def _untrained(session: Session) -> Any:
  config = session.config.policy
  return make_trainable(session.model.decoder, config.lora_rank, session.config.seed + 10)


def load(session: Session) -> Any:
  """The trained policy: what training.heads.bind takes."""
  trainable = _untrained(session)
  with Checkpoints(session.folder('policy') / 'checkpoints', session.config.seed) as checkpoints:
    return checkpoints.load(trainable)


# ---- what is asked ----


def _trait_prompts(session: Session) -> tuple[list[Row], list[str]]:
  """Training messages of the traits whose preference model is better than chance, and those traits."""
  left_out = set() if session.config.policy.keep_unproven_traits else set(_preference_report(session)['left_out'])
  weights = {trait.id: trait.weight for trait in session.character.traits if trait.id not in left_out}
  if not weights:
    raise UserError(
      'policy: no trait has a preference model better than chance, so there is nothing to reward; see '
      'preference/report.json, or set config.policy.keep_unproven_traits=True'
    )
  rows = [row for row in messages.load(session) if row['split'] == 'train' and row['trait'] in weights]
  asked = [
    {
      'id': row['id'],
      'trait': row['trait'],
      'text': row['text'],
      'prompt': session.model.prompt(prompts.alone(row['text'])),
      'weight': weights[row['trait']],
    }
    for row in rows
  ]
  return asked, sorted(weights)


def _preference_report(session: Session) -> Row:
  return json.loads((session.folder('preference') / 'report.json').read_text())


def _neutral_replies(session: Session) -> list[Row]:
  """The starting model's own replies to the neutral training messages, drawn once."""
  config, model = session.config.policy, session.model
  rows = [row for row in messages.load(session) if row['split'] == 'train' and row['trait'] is None]
  if not rows:
    raise UserError('policy: there are no neutral training messages; set config.messages.train_neutral above 0')

  def make(items: Sequence[Row], _: int) -> list[Row]:
    asked = [model.prompt(prompts.alone(item['text'])) for item in items]
    keys = item_keys(session.config.seed, 'policy/neutral', [item['id'] for item in items])
    settings = Sampling(
      config.max_new_tokens, config.temperature, batch_size=config.prompts_per_step * config.replies_per_prompt
    )
    drawn = sample(model.decoder, asked, keys, model.eos_ids, settings, width=config.prompt_width)
    return [{'prompt': p, 'reply': reply.tokens} for p, reply in zip(asked, drawn, strict=True)]

  return chunks(session.folder('policy'), 'neutral', rows, 256, make)


# ---- the step ----


@jax.jit
def _judge(
  decoder: Any, reward_model: Any, prefix_tokens: jax.Array, length: jax.Array, rows: Rows, temperature: float
) -> tuple[jax.Array, jax.Array]:
  """Rewards by every trait's direction, [N, traits], and log-probs [N, R] under the starting model."""
  hidden = hidden_states(decoder, rows, before=(compute_prefix(decoder, prefix_tokens, length),))
  used, adapter = bind(decoder, reward_model)
  trunk = hidden
  if used is not decoder or adapter is not None:
    before = (compute_prefix(used, prefix_tokens, length, adapter),)
    trunk = hidden_states(used, rows, adapter=adapter, before=before)
  return read_rewards(reward_model, mean_states(trunk, rows)), token_log_probs(decoder, hidden, rows, temperature)


def _advantages(
  rewards: np.ndarray, log_ratio: np.ndarray, weight: np.ndarray, config: Any
) -> tuple[np.ndarray, np.ndarray]:
  """Advantages [N] among the replies to one prompt, weighted by trait, and the rewards less the KL penalty [N]."""
  penalised = penalised_rewards(rewards, log_ratio.sum(-1), config.kl)
  grouped = group_advantages(jnp.asarray(penalised.reshape(-1, config.replies_per_prompt)))
  return np.asarray(grouped).reshape(-1) * weight, penalised


def _loss(trainable: Any, decoder: Any, batch: Row) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Clipped policy gradient a token, and the exact KL a token on neutral replies."""
  used, adapter = bind(decoder, trainable)
  before = (compute_prefix(used, batch['prefix'], batch['prefix_length'], adapter),)
  rows, neutral = batch['rows'], batch['neutral']
  mask, neutral_mask = reply_mask(rows), reply_mask(neutral)

  hidden = hidden_states(used, rows, adapter=adapter, before=before)
  log_probs = token_log_probs(used, hidden, rows, batch['temperature'])
  gradient, tokens, clipped = policy_gradient(log_probs, batch['sampled'], batch['advantages'], mask, batch['clip'])
  tokens = jnp.maximum(tokens, 1)

  start = (compute_prefix(decoder, batch['prefix'], batch['prefix_length']),)
  reference = jax.lax.stop_gradient(hidden_states(decoder, neutral, before=start))[:, :-1]
  hidden = hidden_states(used, neutral, adapter=adapter, before=before)[:, :-1]
  kl = over_chunks(lambda r, p: kl_from_logits(logits(decoder, r), logits(used, p)), reference, hidden)
  neutral_kl = jnp.where(neutral_mask, kl, 0.0).sum() / jnp.maximum(neutral_mask.sum(), 1)

  gap = jnp.where(mask, jnp.abs(log_probs - batch['sampled']), 0.0).sum() / tokens
  metrics = {'neutral_kl': neutral_kl, 'clip_fraction': clipped / tokens, 'logprob_gap': gap}
  return gradient / tokens + batch['neutral_weight'] * neutral_kl, metrics


# ---- samples ----


def _save_samples(
  session: Session, step: int, group: Sequence[Row], drawn: Sequence[Reply], rewards: np.ndarray
) -> None:
  """The first reply to each message of this step."""
  rows = [
    {
      'step': step,
      'message': item['id'],
      'trait': item['trait'],
      'prompt': item['text'],
      'text': session.model.text(reply.tokens),
      'reward': round(float(reward), 4),
    }
    for i, (item, reply, reward) in enumerate(zip(group, drawn, rewards, strict=True))
    if i % session.config.policy.replies_per_prompt == 0
  ]
  write_jsonl(session.folder('policy') / 'samples' / f'{step:06d}.jsonl', rows)


def _merge_samples(session: Session) -> None:
  folder = session.folder('policy')
  files = sorted((folder / 'samples').glob('*.jsonl'))
  write_jsonl(folder / 'samples.jsonl', [row for file in files for row in read_jsonl(file)])
