"""preference: two preference models are trained on the rankings; neither ever sees the text of a trait.

Reads the character's pairs (to measure only), messages/, replies/ and rankings/; writes Orbax checkpoints of the
model that rewards the policy (`train`) and of the held-out judge (`judge`), which see disjoint messages, and
report.json. The judge shares ranker and starting weights with the other, so it guards against over-optimisation
and not against a ranker that is wrong: the kept contrast pairs do that.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from charjax.engine.batch import REPLY_STEP, bucket, compute_prefix
from charjax.engine.score import FixedShapes
from charjax.mesh import shard_batch
from charjax.progress import Metrics, Progress
from charjax.stages import messages, prompts, replies
from charjax.stages.statistics import correlation, share
from charjax.training.checkpoint import Checkpoints, fingerprint
from charjax.training.data import batches
from charjax.training.heads import bind, last_token_rewards, make_trainable, rewards
from charjax.training.losses import bradley_terry, pairs_of_replies
from charjax.training.step import init_optimizer, make_optimizer, make_step
from charjax.workdir import Row, Session, read_jsonl, write_jsonl, write_text

MODELS = ('train', 'judge')
_KINDS = ('shown-shown', 'plain-plain', 'mixed')


def run(session: Session) -> Row:
  """Trains both preference models, measures them, and names the traits that stay out of the reward."""
  folder, config = session.folder('preference'), session.config.preference
  examples = _examples(session)
  halves = {'train': examples[0::2], 'judge': examples[1::2]}
  steps = {
    name: max(1, math.ceil(len(half) * config.epochs / config.messages_per_batch)) for name, half in halves.items()
  }
  trained, digests = {}, {}
  with Progress('preference', sum(steps.values()), 'steps') as bar:
    for name in MODELS:
      trained[name] = _train(session, name, halves[name], steps[name], bar)
      digests[name] = fingerprint(trained[name])
  _merge_metrics(session)
  unseen = {'train': halves['judge'], 'judge': halves['train']}
  report: Row = {name: _measure(session, trained[name], unseen[name][: config.measured_messages]) for name in MODELS}
  report['left_out'] = [
    trait.id for trait in session.character.traits if not _better_than_chance(report['train']['kept'][trait.id])
  ]
  report['not_told_from_chance'] = [
    trait.id for trait in session.character.traits if (report['train']['kept'][trait.id] or {'low': 0})['low'] <= 0.5
  ]
  write_text(folder / 'report.json', json.dumps(report, indent=2))
  write_text(folder / 'fingerprint.json', json.dumps(digests, indent=2))
  for name in report['not_told_from_chance']:
    out = ', and stays out of the reward unless the config keeps it' if name in report['left_out'] else ''
    session.log(f'preference: {name} is not told from chance on its kept pairs{out}')
  return {'messages': {name: len(half) for name, half in halves.items()}, 'steps': steps}


def _better_than_chance(accuracy: Row | None) -> bool:
  # The lower bound would ask 13 of 16 pairs of a model that has seen no such pair: traits that are learned in part
  # would be thrown out. Those not told from chance are named in the report instead.
  return accuracy is None or accuracy['mean'] > 0.5


def _examples(session: Session) -> list[Row]:
  """One example a message: prompt and reply tokens, soft labels, weight of its trait, conditions."""
  model = session.model
  texts = {row['id']: row for row in messages.load(session)}
  by_id = {row['id']: row for row in replies.load(session)}
  weights = {trait.id: trait.weight for trait in session.character.traits}
  examples = []
  for row in read_jsonl(session.folder('rankings') / 'rankings.jsonl'):
    message = texts[row['message']]
    rows = [by_id[name] for name in row['replies']]
    examples.append(
      {
        'trait': message['trait'],
        'prompt': model.prompt(prompts.alone(message['text'])),
        'replies': [model.reply(r['text'], r['finish'] == 'stop') for r in rows],
        'conditions': [r['condition'] for r in rows],
        'probabilities': np.array(row['probabilities'], np.float32),
        'weight': weights[message['trait']],
      }
    )
  return examples


# ---- training ----


def _loss(trainable: Any, decoder: Any, batch: Row) -> tuple[jax.Array, dict[str, jax.Array]]:
  used, adapter = bind(decoder, trainable)
  prefix = compute_prefix(used, batch['prefix'], batch['prefix_length'], adapter)
  shape = batch['real'].shape
  scores = last_token_rewards(decoder, trainable, batch['rows'], prefix).reshape(shape)
  total, weight = bradley_terry(scores, batch['probabilities'], batch['real'], batch['weight'])
  pair = pairs_of_replies(batch['real'])
  right = ((scores[:, :, None] > scores[:, None, :]) == (batch['probabilities'] > 0.5)) & pair
  return total / jnp.maximum(weight, 1e-8), {'accuracy': right.sum() / jnp.maximum(pair.sum(), 1)}


def _batch(examples: Sequence[Row], shapes: FixedShapes, messages_per_batch: int, k: int) -> Row:
  """Arrays of a batch: K rows a message, soft labels [M, K, K], which replies are real [M, K], weights [M]."""
  asked, said = [], []
  real = np.zeros((messages_per_batch, k), bool)
  probabilities = np.full((messages_per_batch, k, k), 0.5, np.float32)
  weight = np.zeros(messages_per_batch, np.float32)
  for m, example in enumerate(examples):
    count = len(example['replies'])
    real[m, :count] = True
    probabilities[m, :count, :count] = example['probabilities']
    weight[m] = example['weight']
    # A message with fewer replies is filled up with its last one, which no pair of labels reads.
    asked += [example['prompt']] * k
    said += [*example['replies'], *[example['replies'][-1]] * (k - count)]
  rows = shapes.rows(asked, said, messages_per_batch * k)
  return shapes.shared() | shard_batch({'rows': rows, 'real': real, 'probabilities': probabilities, 'weight': weight})


def _train(session: Session, name: str, examples: Sequence[Row], steps: int, bar: Progress) -> Any:
  config, decoder = session.config.preference, session.model.decoder
  folder = session.folder('preference') / name
  seed = session.config.seed + MODELS.index(name)
  trainable = make_trainable(decoder, config.lora_rank, seed, with_head=True)
  optimizer = make_optimizer(
    config.learning_rate, min(config.warmup, steps // 4), steps, config.weight_decay, config.max_gradient
  )
  state, layout = init_optimizer(optimizer, trainable)
  k = max(len(example['replies']) for example in examples)
  shapes = FixedShapes(
    [example['prompt'] for example in examples],
    longest=max(len(e['prompt']) + max(map(len, e['replies'])) for e in examples),
    reply_width=bucket(max(len(reply) for e in examples for reply in e['replies']), REPLY_STEP),
  )
  data = batches(examples, config.messages_per_batch, seed)
  with Checkpoints(folder, seed) as checkpoints, Metrics(folder) as metrics:
    start, trainable, state, position = checkpoints.restore(trainable, state)
    if position:
      data.set_state(position)
    metrics.truncate_after(start)
    bar.skip(start)
    step_function = make_step(_loss, optimizer, trainable, layout)
    for step in range(start + 1, steps + 1):
      batch = _batch(next(data), shapes, config.messages_per_batch, k)
      trainable, state, values = step_function(trainable, state, decoder, batch)
      metrics.write(step, jax.device_get(values))
      bar.advance(1, f'{name} loss {float(values["loss"]):.3f}')
      if step == steps or step % config.save_every == 0:
        checkpoints.save(step, trainable, state, data.get_state())
  return trainable


def _merge_metrics(session: Session) -> None:
  """One metrics.jsonl of both models."""
  folder = session.folder('preference')
  rows = [{'model': name} | row for name in MODELS for row in read_jsonl(folder / name / 'metrics.jsonl')]
  write_jsonl(folder / 'metrics.jsonl', rows)


def load(session: Session, name: str) -> Any:
  """A trained preference model ('train' or 'judge'), to be given to training.heads.rewards."""
  config, seed = session.config.preference, session.config.seed + MODELS.index(name)
  trainable = make_trainable(session.model.decoder, config.lora_rank, seed, with_head=True)
  with Checkpoints(session.folder('preference') / name, seed) as checkpoints:
    return checkpoints.load(trainable)


# ---- measuring ----


def reward_pairs(session: Session, trainable: Any, trait: Any, use: str) -> np.ndarray:
  """Reward of the reply in character minus that of the other, for the written pairs of one use; no trait is shown."""
  model = session.model
  pairs = trait.pairs_for(use)
  if not pairs:
    return np.zeros(0)
  asked = [model.prompt(prompts.alone(pair.message)) for pair in pairs]
  inside = [model.reply(pair.in_character) for pair in pairs]
  outside = [model.reply(pair.out_of_character) for pair in pairs]
  values = rewards(model.decoder, trainable, [*asked, *asked], [*inside, *outside])
  return values[: len(pairs)] - values[len(pairs) :]


def _measure(session: Session, trainable: Any, unseen: Sequence[Row]) -> Row:
  """Figures on messages the model was not trained on, and on the kept pairs."""
  asked = [example['prompt'] for example in unseen for _ in example['replies']]
  said = [reply for example in unseen for reply in example['replies']]
  values = rewards(session.model.decoder, trainable, asked, said) if said else np.zeros(0)
  right, probability, label, by_trait = defaultdict(list), [], [], defaultdict(list)
  begin = 0
  for example in unseen:
    count = len(example['replies'])
    scores = values[begin : begin + count]
    begin += count
    for i in range(count):
      for j in range(i + 1, count):
        wanted = float(example['probabilities'][i, j])
        first, second = example['conditions'][i], example['conditions'][j]
        kind = 'mixed' if first != second else f'{first}-{first}'
        hit = (scores[i] > scores[j]) == (wanted > 0.5)
        right[kind].append(hit)
        by_trait[example['trait']].append(hit)
        probability.append(1 / (1 + math.exp(-float(scores[i] - scores[j]))))
        label.append(wanted)
  p, q = np.clip(np.array(probability), 1e-6, 1 - 1e-6), np.array(label)
  kept = {trait.id: reward_pairs(session, trainable, trait, 'kept') for trait in session.character.traits}
  pooled = np.concatenate([*kept.values(), np.zeros(0)])
  return {
    'accuracy': {kind: float(np.mean(right[kind])) if right[kind] else None for kind in _KINDS},
    'accuracy_by_trait': {trait: float(np.mean(hits)) for trait, hits in by_trait.items()},
    'kept': {trait: share(difference > 0) for trait, difference in kept.items()},
    'kept_overall': share(pooled > 0),
    'log_loss': float(-(q * np.log(p) + (1 - q) * np.log1p(-p)).mean()) if len(p) else None,
    'calibration_error': calibration_error(p, q) if len(p) else None,
    'length_correlation': correlation(values, [len(reply) for reply in said]),
    'reward_mean': float(values.mean()) if len(values) else 0.0,
    'reward_std': float(values.std()) if len(values) else 1.0,
  }


def calibration_error(probability: np.ndarray, label: np.ndarray, bins: int = 10) -> float:
  """Expected calibration error (Guo et al. 2017, eq. 3) against soft labels, in bins of equal count."""
  order = np.argsort(probability, kind='stable')
  return float(
    sum(
      len(part) * abs(probability[part].mean() - label[part].mean())
      for part in np.array_split(order, bins)
      if len(part)
    )
    / len(order)
  )
