"""policy: GRPO, and DPO among ranked replies, on the trait messages, with no trait shown, against the preference model.

Reads messages/, replies/ and preference/; writes Orbax checkpoints, metrics.jsonl and samples.jsonl (replies drawn as
training went on). Replies are drawn by temperature alone, so that their log-probs are those of the distribution
sampled from; rollouts.py tells what else a step learns from, and what each token earns. The KL penalty to the
starting model stands in the reward, where its gradient is right; neutral messages are held by an exact KL on replies
that the starting model gave once.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from charjax.engine.batch import compute_prefix, item_keys
from charjax.engine.sample import Sampling, sample
from charjax.engine.score import FixedShapes, Group, hidden_states, over_chunks, reply_mask, token_log_probs
from charjax.errors import UserError
from charjax.mesh import shard_batch
from charjax.model.decoder import logits
from charjax.progress import Metrics, Progress
from charjax.stages import messages, prompts
from charjax.stages.rollouts import Rollout, earnings, make_judge, ranked_replies, roll_out
from charjax.training.checkpoint import Checkpoints, fingerprint
from charjax.training.data import batches
from charjax.training.heads import bind, make_trainable
from charjax.training.losses import bradley_terry, kl_from_logits, pair_accuracy, policy_gradient
from charjax.training.step import init_optimizer, make_optimizer, make_step
from charjax.workdir import Row, Session, chunks, read_jsonl, write_jsonl, write_text


def run(session: Session) -> Row:
  """Trains the policy; returns counts."""
  config, folder, model = session.config.policy, session.folder('policy'), session.model
  asked = _trait_prompts(session)
  neutral = _neutral_replies(session)
  shapes = FixedShapes([item['prompt'] for item in (*asked, *neutral)], config.max_new_tokens)

  trainable = _untrained(session)
  optimizer = make_optimizer(
    config.learning_rate, config.warmup, config.steps, config.weight_decay, config.max_gradient
  )
  state, layout = init_optimizer(optimizer, trainable)
  step_function = make_step(_loss, optimizer, trainable, layout)
  judge = make_judge(session, shapes, asked)
  asked_data = batches(asked, config.prompts_per_step, session.config.seed)
  # At least as many neutral messages as trait messages, so that the rest of the model is held as firmly.
  neutral_data = batches(neutral, config.prompts_per_step, session.config.seed + 1)
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
      asked_now = next(asked_data)
      rollout = roll_out(session, shapes, judge, trainable, asked_now, step)
      neutral_rows = shapes.rows([Group(row['prompt'], [row['reply']]) for row in next(neutral_data)], 1)
      batch = shapes.shared() | {
        'rows': shard_batch(rollout.rows),
        'temperature': shard_batch(rollout.temperature),
        'barred': shard_batch(rollout.barred),
        'mask': shard_batch(rollout.mask),
        'fresh': shard_batch(rollout.fresh),
        'before': shard_batch(rollout.before),
        'advantages': shard_batch(rollout.advantages),
        'ranked': shard_batch(rollout.ranked),
        'preferred': shard_batch(rollout.preferred),
        'weight': shard_batch(np.array([item['weight'] for item in asked_now], np.float32)),
        'neutral': shard_batch(neutral_rows),
        'clip': np.float32(config.clip),
        'ranked_weight': np.float32(config.ranked_weight),
        'ranked_beta': np.float32(config.ranked_beta),
        'neutral_weight': np.float32(config.neutral_weight),
      }
      trainable, state, values = step_function(trainable, state, model.decoder, batch)
      values = jax.device_get(values) | _figures(rollout, config.kl)
      metrics.write(step, values)
      bar.advance(1, f'reward {values["reward"]:.3f}, KL {values["kl"]:.3f} a token')
      if step % config.samples_every == 0 or step in (1, config.steps):
        _save_samples(session, step, rollout)
      if step == config.steps or step % config.save_every == 0:
        position = {'asked': asked_data.get_state(), 'neutral': neutral_data.get_state()}
        checkpoints.save(step, trainable, state, position)
  _merge_samples(session)
  write_text(folder / 'fingerprint.json', json.dumps({'policy': fingerprint(trainable)}))
  rewarded = sorted({item['trait'] for item in asked})
  return {'steps': config.steps, 'messages': len(asked), 'neutral': len(neutral), 'traits_rewarded': rewarded}


def _figures(rollout: Rollout, kl: float) -> dict[str, float]:
  """Of the replies that were drawn for this step."""
  rewards, log_ratio = rollout.rewards[rollout.fresh], rollout.log_ratio[rollout.fresh]
  tokens = sum(len(reply.tokens) for reply in rollout.drawn)
  return {
    'reward': float(rewards.mean()),
    'penalised_reward': float((rewards - kl * log_ratio.sum(-1)).mean()),
    'kl': float(log_ratio.sum() / tokens),
    'length': tokens / len(rollout.drawn),
    'ended': float(np.mean([reply.finish == 'stop' for reply in rollout.drawn])),
    'entropy': float(-rollout.before[rollout.fresh].sum() / tokens),
  }


def _untrained(session: Session) -> Any:
  config = session.config.policy
  return make_trainable(session.model.decoder, config.lora_rank, session.config.seed + 10)


def load(session: Session) -> Any:
  """The trained policy: what training.heads.bind takes."""
  trainable = _untrained(session)
  with Checkpoints(session.folder('policy') / 'checkpoints', session.config.seed) as checkpoints:
    return checkpoints.load(trainable)


# ---- what is asked ----


def _trait_prompts(session: Session) -> list[Row]:
  """Training messages of the traits whose preference model is better than chance, with what rewards their replies."""
  earns = earnings(session)
  if not earns:
    raise UserError(
      'policy: no trait has a preference model better than chance, so there is nothing to reward; see '
      'preference/report.json, or set config.policy.keep_unproven_traits=True'
    )
  ranked = ranked_replies(session)
  weight = {trait.id: trait.weight for trait in session.character.traits}
  return [
    {
      'id': row['id'],
      'trait': row['trait'],
      'text': row['text'],
      'prompt': session.model.prompt(prompts.alone(row['text'])),
      'weight': weight[row['trait']],
      'earns': earns[row['trait']],
      'ranked': ranked[row['id']],
    }
    for row in messages.load(session)
    if row['split'] == 'train' and row['trait'] in earns
  ]


def _neutral_replies(session: Session) -> list[Row]:
  """The starting model's own replies to the neutral training messages, drawn once."""
  config, model = session.config.policy, session.model
  rows = [row for row in messages.load(session) if row['split'] == 'train' and row['trait'] is None]

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


def _loss(trainable: Any, decoder: Any, batch: Row) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Clipped policy gradient a token, preference among ranked replies, and the exact KL a token on neutral replies."""
  used, adapter = bind(decoder, trainable)
  prefix = (compute_prefix(used, batch['prefix'], batch['prefix_length'], adapter),)
  rows, neutral, before = batch['rows'], batch['neutral'], batch['before']
  mask, drawn, neutral_mask = batch['mask'], batch['mask'] & batch['fresh'][:, None], reply_mask(neutral)

  hidden = hidden_states(used, rows, adapter=adapter, before=prefix)
  log_probs = token_log_probs(used, hidden, rows, batch['temperature'], batch['barred'])
  gradient, tokens, clipped = policy_gradient(log_probs, before, batch['advantages'], drawn, batch['clip'])
  tokens = jnp.maximum(tokens, 1)

  # DPO (Rafailov et al. 2023, eq. 7) with soft labels, over all pairs, of log-probs at a temperature of their own and
  # conditional on going on. Ranked replies stand behind the drawn ones.
  ranked, preferred = batch['ranked'], batch['preferred']
  gained = jnp.where(mask, log_probs - before, 0.0).sum(1).reshape(len(ranked), -1)
  gained = gained[:, gained.shape[1] - ranked.shape[1] :]
  preference, _ = bradley_terry(batch['ranked_beta'] * gained, preferred, ranked, batch['weight'])
  preference = preference / len(ranked)

  start = (compute_prefix(decoder, batch['prefix'], batch['prefix_length']),)
  reference = jax.lax.stop_gradient(hidden_states(decoder, neutral, before=start))[:, :-1]
  hidden = hidden_states(used, neutral, adapter=adapter, before=prefix)[:, :-1]
  kl = over_chunks(lambda r, p: kl_from_logits(logits(decoder, r), logits(used, p)), reference, hidden)
  neutral_kl = jnp.where(neutral_mask, kl, 0.0).sum() / jnp.maximum(neutral_mask.sum(), 1)

  gap = jnp.where(drawn, jnp.abs(log_probs - before), 0.0).sum() / tokens
  metrics = {'neutral_kl': neutral_kl, 'clip_fraction': clipped / tokens, 'logprob_gap': gap}
  if ranked.shape[1]:
    metrics |= {'ranked_loss': preference, 'ranked_accuracy': pair_accuracy(gained, preferred, ranked)}
  loss = gradient / tokens + batch['ranked_weight'] * preference + batch['neutral_weight'] * neutral_kl
  return loss, metrics


# ---- samples ----


def _save_samples(session: Session, step: int, rollout: Rollout) -> None:
  """The first reply to each message of this step."""
  config = session.config.policy
  first = slice(None, None, config.replies_per_prompt + config.ranked_replies)
  rows = [
    {
      'step': step,
      'message': item['id'],
      'trait': item['trait'],
      'prompt': item['text'],
      'text': session.model.text(reply.tokens),
      'reward': round(float(reward), 4),
    }
    for item, reply, reward in zip(
      rollout.asked[first], rollout.drawn[:: config.replies_per_prompt], rollout.rewards[first], strict=True
    )
  ]
  write_jsonl(session.folder('policy') / 'samples' / f'{step:06d}.jsonl', rows)


def _merge_samples(session: Session) -> None:
  folder = session.folder('policy')
  files = sorted((folder / 'samples').glob('*.jsonl'))
  write_jsonl(folder / 'samples.jsonl', [row for file in files for row in read_jsonl(file)])
