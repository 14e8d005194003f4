"""policy: GRPO on the trait messages, with no trait shown, against the preference model.

Reads messages/, replies/ and preference/; writes Orbax checkpoints, metrics.jsonl and samples.jsonl (replies drawn as
training went on). Replies are drawn by temperature alone, so that their log-probs are those of the distribution
sampled from. The KL penalty to the starting model stands in the reward, where its gradient is right; neutral messages
are held by an exact KL on replies that the starting model gave once.
"""

import functools
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

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
  mean_over_tokens,
  over_chunks,
  pad_values,
  reply_mask,
  token_log_probs,
)
from charjax.errors import UserError
from charjax.mesh import shard_batch
from charjax.model.decoder import logits
from charjax.progress import Metrics, Progress
from charjax.stages import messages, preference, prompts, replies
from charjax.training.checkpoint import Checkpoints, fingerprint
from charjax.training.data import batches
from charjax.training.heads import bind, make_trainable, read_rewards
from charjax.training.losses import kl_from_logits, policy_gradient, token_advantages, token_returns
from charjax.training.step import init_optimizer, make_optimizer, make_step
from charjax.workdir import Row, Session, chunks, read_jsonl, write_jsonl, write_text

_TURNS = ('shown', 'opposed', 'plain')  # the order in which stored replies are taken


class _Rollout(NamedTuple):
  """Replies to the prompts of one step, judged; N = prompts * replies to each, R reply tokens.

  Attributes:
    group: the item that each of N replies answers.
    drawn: what the policy drew for this step.
    rows: prompts and replies, on the host.
    fresh: [N] which replies were drawn for this step.
    sampled: [N, R] log-probs under the distribution a reply is taken to be drawn from.
    log_ratio: [N, R] of policy over starting model.
    scores: [N, R] of each token by its trait's direction, in units of the spread of that trait's rewards.
    rewards: [N] means of the scores.
  """

  group: list[Row]
  drawn: list[Reply]
  rows: Rows
  fresh: np.ndarray
  sampled: np.ndarray
  log_ratio: np.ndarray
  scores: np.ndarray
  rewards: np.ndarray


def run(session: Session) -> Row:
  """Trains the policy; returns counts."""
  config, folder, model = session.config.policy, session.folder('policy'), session.model
  asked, rewarded = _trait_prompts(session)
  neutral = _neutral_replies(session)
  shapes = FixedShapes([item['prompt'] for item in (*asked, *neutral)], config.max_new_tokens)

  trainable = _untrained(session)
  optimizer = make_optimizer(
    config.learning_rate, config.warmup, config.steps, config.weight_decay, config.max_gradient
  )
  state, layout = init_optimizer(optimizer, trainable)
  step_function = make_step(_loss, optimizer, trainable, layout)
  roll_out = functools.partial(_roll_out, session, shapes, preference.load(session, 'train'))
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
      rollout = roll_out(trainable, next(asked_data), step)
      neutral_rows = shapes.rows([Group(row['prompt'], [row['reply']]) for row in next(neutral_data)], 1)
      batch = shapes.shared() | {
        'rows': shard_batch(rollout.rows),
        'sampled': shard_batch(rollout.sampled),
        'advantages': shard_batch(_advantages(rollout, config)),
        'neutral': shard_batch(neutral_rows),
        'temperature': np.float32(config.temperature),
        'clip': np.float32(config.clip),
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
  return {'steps': config.steps, 'messages': len(asked), 'neutral': len(neutral), 'traits_rewarded': rewarded}


def _roll_out(
  session: Session, shapes: FixedShapes, reward_model: Any, trainable: Any, asked: Sequence[Row], step: int
) -> _Rollout:
  """Draws replies to the prompts of a step, puts stored ones beside them, and judges all."""
  config, model = session.config.policy, session.model
  each, eos = config.replies_per_prompt, model.eos_ids[:1]
  used, adapter = bind(model.decoder, trainable)
  asked_of = [item for item in asked for _ in range(each)]
  names = [f'{step}/{item["id"]}/{i}' for i, item in enumerate(asked_of)]
  settings = Sampling(config.max_new_tokens, config.temperature, batch_size=config.prompts_per_step * each)
  drawn = sample(
    used, [item['prompt'] for item in asked_of], item_keys(session.config.seed, 'policy', names), eos, settings,
    adapter=adapter, width=config.prompt_width,
  )  # fmt: skip
  said = iter(drawn)
  groups = [Group(item['prompt'], [*(next(said).tokens for _ in range(each)), *item['stored']]) for item in asked]
  together = each + config.stored_replies
  rows = shapes.rows(groups, together)
  every, reference = jax.device_get(
    _judge(model.decoder, reward_model, shapes.prefix, shapes.length, shard_batch(rows), config.temperature)
  )
  group = [item for item in asked for _ in range(together)]
  fresh = np.tile(np.arange(together) < each, len(asked))
  sampled = np.array(reference)
  sampled[fresh] = pad_values([reply.log_probs for reply in drawn], sampled.shape[1])

  # One unit of reward is worth the same in each trait.
  scores = every[np.arange(len(group)), :, [item['place'] for item in group]]
  scores = scores / np.array([item['scale'] for item in group])[:, None]
  # That a reply ends is not the trait's: its end counts as its other tokens do.
  ends = (rows.tokens[:, 1:] == eos[0]) & reply_mask(rows)
  before_end = rows._replace(lengths=rows.lengths - ends.any(1))
  rewards = np.asarray(mean_over_tokens(scores, before_end), np.float32)
  scores = np.where(ends, rewards[:, None], scores).astype(np.float32)
  return _Rollout(group, drawn, rows, fresh, sampled, sampled - reference, scores, rewards)


def _figures(rollout: _Rollout, kl: float) -> dict[str, float]:
  """Of the replies that were drawn for this step."""
  rewards, log_ratio = rollout.rewards[rollout.fresh], rollout.log_ratio[rollout.fresh]
  tokens = sum(len(reply.tokens) for reply in rollout.drawn)
  return {
    'reward': float(rewards.mean()),
    'penalised_reward': float((rewards - kl * log_ratio.sum(-1)).mean()),
    'kl': float(log_ratio.sum() / tokens),
    'length': tokens / len(rollout.drawn),
    'ended': float(np.mean([reply.finish == 'stop' for reply in rollout.drawn])),
    'entropy': float(-rollout.sampled[rollout.fresh].sum() / tokens),
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


def _trait_prompts(session: Session) -> tuple[list[Row], list[str]]:
  """Training messages of the traits whose preference model is better than chance, and those traits."""
  report = json.loads((session.folder('preference') / 'report.json').read_text())
  left_out = set() if session.config.policy.keep_unproven_traits else set(report['left_out'])
  weights = {trait.id: trait.weight for trait in session.character.traits if trait.id not in left_out}
  if not weights:
    raise UserError(
      'policy: no trait has a preference model better than chance, so there is nothing to reward; see '
      'preference/report.json, or set config.policy.keep_unproven_traits=True'
    )
  stored = _stored_replies(session)
  places = {trait.id: place for place, trait in enumerate(session.character.traits)}
  rows = [row for row in messages.load(session) if row['split'] == 'train' and row['trait'] in weights]
  asked = [
    {
      'id': row['id'],
      'trait': row['trait'],
      'text': row['text'],
      'prompt': session.model.prompt(prompts.alone(row['text'])),
      'weight': weights[row['trait']],
      'place': places[row['trait']],
      'scale': report['train']['reward_std'][row['trait']],
      'stored': stored.get(row['id'], []),
    }
    for row in rows
  ]
  return asked, sorted(weights)


def _stored_replies(session: Session) -> dict[str, list[list[int]]]:
  """Of the replies that were ranked, up to `stored_replies` to each message, as tokens: in character and not in turn.

  Beside what the policy draws they show it what it would seldom draw itself (Yan et al. 2025, arXiv 2504.14945, put
  replies of another model into the groups of GRPO). They are taken as drawn from the starting model with nothing
  shown: once a token is as far from there as the clip allows, it is pushed no further.
  """
  config = session.config.policy
  found: dict[str, list[tuple[int, int, list[int]]]] = defaultdict(list)
  for row in replies.load(session):
    tokens = session.model.reply(row['text'], row['finish'] == 'stop')[: config.max_new_tokens]
    turn = int(row['id'].rsplit('/', 1)[1])
    found[row['message']].append((turn, _TURNS.index(row['condition']), tokens))
  return {name: [tokens for *_, tokens in sorted(some)][: config.stored_replies] for name, some in found.items()}


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
  """Scores of each token by every trait's direction, [N, R, traits], and log-probs [N, R] of the starting model."""
  hidden = hidden_states(decoder, rows, before=(compute_prefix(decoder, prefix_tokens, length),))
  used, adapter = bind(decoder, reward_model)
  trunk = hidden
  if used is not decoder or adapter is not None:
    before = (compute_prefix(used, prefix_tokens, length, adapter),)
    trunk = hidden_states(used, rows, adapter=adapter, before=before)
  return read_rewards(reward_model, trunk[:, 1:]), token_log_probs(decoder, hidden, rows, temperature)


def _advantages(rollout: _Rollout, config: Any) -> np.ndarray:
  """Advantages of each token [N, R], among the replies to one prompt, weighted by trait."""

  def one(scores_kr: jax.Array, log_ratio_kr: jax.Array, mask_kr: jax.Array) -> jax.Array:
    return token_advantages(token_returns(scores_kr, log_ratio_kr, mask_kr, config.kl, config.discount), mask_kr)

  together = config.replies_per_prompt + config.stored_replies
  arrays = (rollout.scores, rollout.log_ratio, reply_mask(rollout.rows))
  grouped = (jnp.asarray(array.reshape(-1, together, array.shape[-1])) for array in arrays)
  weight = np.array([item['weight'] for item in rollout.group], np.float32)
  return np.asarray(jax.vmap(one)(*grouped)).reshape(rollout.scores.shape) * weight[:, None]


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


def _save_samples(session: Session, step: int, rollout: _Rollout) -> None:
  """The first reply to each message of this step."""
  config = session.config.policy
  first = slice(None, None, config.replies_per_prompt + config.stored_replies)
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
      rollout.group[first], rollout.drawn[:: config.replies_per_prompt], rollout.rewards[first], strict=True
    )
  ]
  write_jsonl(session.folder('policy') / 'samples' / f'{step:06d}.jsonl', rows)


def _merge_samples(session: Session) -> None:
  folder = session.folder('policy')
  files = sorted((folder / 'samples').glob('*.jsonl'))
  write_jsonl(folder / 'samples.jsonl', [row for file in files for row in read_jsonl(file)])
