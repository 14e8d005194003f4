"""preference: two preference models are trained on the rankings; neither ever sees the text of a trait.

A preference model is a trunk (the lower layers of the starting weights, trained on or left as they are) and a head
with a direction for each trait. The head is fitted to the trunk as it is; then both are trained, for as many epochs as
the config says.

Reads the character's pairs (the choosing ones to name the traits that are not told from chance, all to measure),
messages/, replies/ and rankings/; writes Orbax checkpoints of the model that rewards the policy (`train`) and of the
held-out judge (`judge`), which see disjoint messages, and report.json. The judge shares ranker and starting weights
with the other, so it guards against over-optimisation and not against a ranker that is wrong: the kept contrast pairs
do that.
"""

import functools
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from charjax import hosts
from charjax.engine import work
from charjax.engine.batch import Tokens
from charjax.engine.rows import FixedShapes, Group, Rows
from charjax.engine.score import hidden_states, mean_states
from charjax.errors import UserError
from charjax.files import Row, read_jsonl, write_jsonl, write_text
from charjax.mesh import fetch, held_here, put, replicate
from charjax.model.decoder import Decoder, lower_layers
from charjax.progress import Metrics, Progress
from charjax.stages import messages, prompts, rankings, replies
from charjax.stages.statistics import correlation, interval, share
from charjax.training.checkpoint import Checkpoints, fingerprint
from charjax.training.data import as_long, batches
from charjax.training.heads import bind, control_length, fit_head, make_trainable, read_rewards, reply_states
from charjax.training.loop import microbatches, tell_division, train
from charjax.training.losses import count_pairs, preference_loss, right_pairs
from charjax.training.step import Batch, make_batch, make_optimizer
from charjax.workdir import Session

MODELS = ('train', 'judge')
T = TypeVar('T')
_REPLIES_AT_ONCE = 48  # whose states are read together
_SEEN_AHEAD = 1000  # batches, from whose lengths it follows how batches are packed
_KINDS = ('shown-shown', 'plain-plain', 'opposed-opposed', 'mixed')  # the last: of two conditions


def run(session: Session) -> Row:
  """Trains both preference models, measures them, and names the traits that stay out of the reward."""
  folder, config = session.folder('preference'), session.config.preference
  traits = session.character.traits
  examples = _examples(session)
  if len(examples) < 2:
    raise UserError(
      'preference: two models need a ranked message each, and there are not; raise config.messages.train_per_trait'
    )
  halves = split(examples)
  steps = {name: math.ceil(len(half) * config.epochs / config.messages_per_batch) for name, half in halves.items()}
  if any(steps.values()):
    each = max(len(example['replies']) for example in examples)
    tell_division(session.log, 'preference', config, 'messages_per_batch', each)
  written, lower = _written_pairs(session), trunk(session)
  with Progress('reply states', len(examples), 'messages') as bar:
    _add_states(lower, {}, examples, bar)
  trained = {}
  with Progress('preference', config.head_steps * 2 + sum(steps.values()), 'steps') as bar:
    for name in MODELS:
      trained[name] = _train(session, lower, name, halves[name], steps[name], bar)
  hosts.first(lambda: _merge_metrics(session))
  unseen = {'train': halves['judge'], 'judge': halves['train']}
  report: Row = {}
  for name in MODELS:
    some = spread(unseen[name], config.measured_messages)
    if steps[name]:
      _add_states(lower, trained[name], some)
    if steps[name] or name == MODELS[0]:
      _add_states(lower, trained[name], written)
    report[name] = _measure(session, name, trained[name], some, written)
  learned = split([row['message'] for row in rankings.load(session)])
  report['learned_from'] = {name: list(some) for name, some in learned.items()}
  # By pairs that have chosen the ranker already: those that are kept decide nothing, and measure what comes of it.
  found = report['train']['choosing']
  report['left_out'] = [trait.id for trait in traits if not _better_than_chance(found[trait.id])]
  write_text(folder / 'report.json', json.dumps(report, indent=2))
  digests = {name: fingerprint(trained[name]) for name in MODELS}
  write_text(folder / 'fingerprint.json', json.dumps(digests, indent=2))
  for name in report['left_out']:
    then = (
      'is rewarded all the same (config.policy.keep_unproven_traits)'
      if session.config.policy.keep_unproven_traits
      else 'stays out of the reward unless config.policy.keep_unproven_traits is set'
    )
    session.log(f'preference: {name} is not told from chance on its choosing pairs, and {then}')
  return {'messages': {name: len(half) for name, half in halves.items()}, 'steps': steps}


def spread(items: Sequence[T], most: int) -> Sequence[T]:
  """Up to `most` items, from all over: they stand in the order of their traits."""
  return items[:: max(1, math.ceil(len(items) / most))]


def split(ranked: Sequence[T]) -> dict[str, Sequence[T]]:
  """Of the ranked messages, in their order, those that each of the two models is fitted to."""
  return {'train': ranked[0::2], 'judge': ranked[1::2]}


def _better_than_chance(accuracy: Row | None) -> bool:
  """Whether pairs say so, 95% sure; a trait without any has the benefit of the doubt."""
  return accuracy is None or accuracy['low'] > 0.5


def _examples(session: Session) -> list[Row]:
  """One example a message: prompt and reply tokens, soft labels, index and weight of its trait, conditions."""
  model = session.model
  texts = {row['id']: row for row in messages.load(session)}
  by_id = {row['id']: row for row in replies.load(session)}
  places = {trait.id: place for place, trait in enumerate(session.character.traits)}
  examples = []
  for row in rankings.load(session):
    message = texts[row['message']]
    rows = [by_id[name] for name in row['replies']]
    place = places[message['trait']]
    examples.append(
      {
        'trait': place,
        'prompt': model.prompt(prompts.alone(message['text'])),
        'replies': [model.reply(r['text'], r['finish'] == 'stop') for r in rows],
        'conditions': [r['condition'] for r in rows],
        'probabilities': np.array(row['probabilities'], np.float32),
        'weight': session.character.traits[place].weight,
      }
    )
  return examples


def _add_states(lower: Decoder, trainable: Any, examples: Sequence[Row], bar: Progress | None = None) -> None:
  """Gives each example the `states` [K, D] of its replies."""
  each = max((len(example['replies']) for example in examples), default=1)
  size = max(1, _REPLIES_AT_ONCE // each)
  for begin in range(0, len(examples), size):
    some = examples[begin : begin + size]
    asked = [example['prompt'] for example in some for _ in example['replies']]
    said = [reply for example in some for reply in example['replies']]
    found = iter(reply_states(lower, trainable, asked, said, batch_size=size * each))
    for example in some:
      example['states'] = np.stack([next(found) for _ in example['replies']])
    if bar:
      bar.advance(len(some))


# ---- training ----


def _loss(
  trainable: Any, decoder: Any, batch: Row, *, labels: str, loss: str
) -> tuple[jax.Array, dict[str, jax.Array]]:
  used, adapter = bind(decoder, trainable)
  rows = batch['rows']
  states = mean_states(hidden_states(used, rows, adapter=adapter, opening=batch['opening']), rows)
  real = batch['real']
  every = read_rewards(trainable, states).reshape(*real.shape, -1)
  scores = jnp.take_along_axis(every, batch['trait'][:, None, None], 2)[..., 0]
  total, _ = preference_loss(scores, batch['probabilities'], real, batch['weight'], labels, loss)
  right, _ = right_pairs(scores, batch['probabilities'], real)
  return total / batch['weights'], {'accuracy': right / batch['pairs']}


def _labels(examples: Sequence[Row], messages: int, k: int) -> Row:
  """Of M messages: soft labels [M, K, K], which replies are real [M, K], index and weight of the trait [M]."""
  out = {
    'probabilities': np.full((messages, k, k), 0.5, np.float32),
    'real': np.zeros((messages, k), bool),
    'trait': np.zeros(messages, np.int32),
    'weight': np.zeros(messages, np.float32),
  }
  for m, example in enumerate(examples):
    count = len(example['replies'])
    out['real'][m, :count] = True
    out['probabilities'][m, :count, :count] = example['probabilities']
    out['trait'][m], out['weight'][m] = example['trait'], example['weight']
  return out


def _stacked_states(examples: Sequence[Row], k: int) -> np.ndarray:
  """The states of M messages' replies, [M, K, D]; 0 where there is none."""
  states = np.zeros((len(examples), k, examples[0]['states'].shape[1]), np.float32)
  for m, example in enumerate(examples):
    states[m, : len(example['states'])] = example['states']
  return states


def _fit_head(session: Session, examples: Sequence[Row], k: int, metrics: Metrics, bar: Progress) -> np.ndarray:
  """The head's first directions: the best there are while the starting weights stay as they are."""
  config = session.config.preference
  labels, states = _labels(examples, len(examples), k), _stacked_states(examples, k)

  def record(step: int, values: dict[str, float]) -> None:
    metrics.write(step, values)
    bar.advance(1, f'head loss {float(values["loss"]):.3f}')

  return fit_head(
    states, labels['probabilities'], labels['real'], labels['trait'], _plain_states(examples),
    len(session.character.traits), config.head_decay, config.head_plain, config.head_steps, config.labels, config.loss,
    record,
  )  # fmt: skip


def _control_length(session: Session, folder: Any, trainable: Any, examples: Sequence[Row]) -> None:
  """Takes the length of replies out of the head where it follows it too closely, and writes down what was done."""
  k, traits, head = max(len(e['replies']) for e in examples), session.character.traits, trainable['head'].w
  labels, states = _labels(examples, len(examples), k), _stacked_states(examples, k)
  tokens = np.zeros(states.shape[:2])
  for m, example in enumerate(examples):
    tokens[m, : len(example['replies'])] = [len(reply) for reply in example['replies']]
  found = control_length(
    fetch(head[...]), states, tokens, labels['real'], labels['trait'], session.config.preference.length_limit
  )
  if found.effect_n.any():
    head[...] = put(found.w_nd, head[...].sharding)
  names = 'effect', 'before', 'after'
  by_trait = zip(traits, found.effect_n, found.before_n, found.after_n, strict=True)
  record = {trait.id: dict(zip(names, map(float, values), strict=True)) for trait, *values in by_trait}
  write_text(folder / 'length.json', json.dumps({'traits': record, 'guess': found.guess_d.tolist()}))


def _plain_states(examples: Sequence[Row]) -> np.ndarray:
  """The states [P, D] of plain replies, less the mean of those to their trait's messages."""
  by_trait: dict[int, list[np.ndarray]] = defaultdict(list)
  for example in examples:
    by_trait[example['trait']].append(example['states'][np.array(example['conditions']) == 'plain'])
  found = [np.concatenate(states) for states in by_trait.values()]
  return np.concatenate([states - states.mean(0) for states in found if len(states)] or [found[0]])


def _train(session: Session, lower: Decoder, name: str, examples: Sequence[Row], steps: int, bar: Progress) -> Any:
  config, seed = session.config.preference, _seed(session, name)
  folder = session.folder('preference') / name
  k = max(len(example['replies']) for example in examples)
  said = [reply for example in examples for reply in example['replies']]
  some = [dict(example) for example in spread(examples, config.measured_messages)]
  shapes = FixedShapes([example['prompt'] for example in examples], max(map(len, said)), said)
  expect(config, shapes, examples, k, seed, steps)

  def fit(trainable: Any, metrics: Metrics) -> None:
    head = trainable['head'].w
    head[...] = put(_fit_head(session, examples, k, metrics, bar), head[...].sharding)
    if not steps:
      _control_length(session, folder, trainable, examples)

  def finish(trainable: Any) -> None:
    _add_states(lower, trainable, some)
    _control_length(session, folder, trainable, some)

  def next_batch(_: int, some: Sequence[Row], __: Any) -> tuple[Batch, Row]:
    return make_examples_batch(config, lower, shapes, some, k), {}

  with Checkpoints(folder, seed) as checkpoints:
    return train(
      folder,
      checkpoints,
      *learning(config, steps),
      untrained(session, lower, name),
      lower,
      read(config, examples, k, seed),
      next_batch,
      steps=steps,
      save_every=config.save_every,
      skipped_steps=config.skipped_steps,
      bar=bar,
      note=lambda values: f'{name} loss {float(values["loss"]):.3f}',
      prepare=fit,
      prepared=config.head_steps,
      finish=finish,
    )


def learning(config: Any, steps: int) -> tuple[Any, Any]:
  """The loss of a train step and its optimizer."""
  loss = functools.partial(_loss, labels=config.labels, loss=config.loss)
  return loss, make_optimizer(config.learning_rate, config.warmup, steps, config.weight_decay, config.max_gradient)


def read(config: Any, examples: Sequence[Row], k: int, seed: int) -> Any:
  """The batches of a training on examples of up to k replies."""

  def outline(example: Row) -> Row:
    return example | {'prompt': as_long(example['prompt']), 'replies': [as_long(reply) for reply in example['replies']]}

  size = config.messages_per_batch
  return batches(examples, size, seed, held_here(size, _parts(config, k), (k,)), outline)


def expect(config: Any, shapes: FixedShapes, examples: Sequence[Row], k: int, seed: int, steps: int) -> None:
  """Shows the shapes of a training its first batches."""
  known = itertools.islice(read(config, examples, k, seed), min(steps, _SEEN_AHEAD))
  shapes.expect(map(_groups, known), k, config.messages_per_batch, _parts(config, k))


def _groups(some: Sequence[Row]) -> list[Group]:
  return [Group(example['prompt'], example['replies']) for example in some]


def _parts(config: Any, k: int) -> int:
  return microbatches(config.microbatches, config.messages_per_batch, k)


def make_examples_batch(config: Any, lower: Decoder, shapes: FixedShapes, some: Sequence[Row], k: int) -> Batch:
  """What the loss of one step takes, of examples of up to k replies."""
  rows = make_rows(config, shapes, some, k)
  work.count_rows(lower.config, rows, shapes.cut, times=2 if config.lora_rank else 3)
  labels = _labels(some, config.messages_per_batch, k)
  weights, pairs = count_pairs(labels['real'], labels['weight'])
  whole = {'opening': shapes.opening, 'weights': weights, 'pairs': pairs}
  return make_batch(whole, {'rows': rows} | labels, _parts(config, k))


def make_rows(config: Any, shapes: FixedShapes, some: Sequence[Row], k: int) -> Rows:
  """The prompts and replies of a step's examples."""
  return shapes.rows(_groups(some), k, config.messages_per_batch, _parts(config, k))


def _seed(session: Session, name: str) -> int:
  return session.config.seed + MODELS.index(name)


def untrained(session: Session, lower: Decoder, name: str) -> Any:
  config, traits = session.config.preference, len(session.character.traits)
  return make_trainable(
    lower,
    config.lora_rank,
    _seed(session, name),
    lora_targets=config.lora_targets,
    traits=traits,
    frozen=config.epochs == 0,
  )


def _merge_metrics(session: Session) -> None:
  """One metrics.jsonl of both models."""
  folder = session.folder('preference')
  rows = [{'model': name} | row for name in MODELS for row in read_jsonl(folder / name / 'metrics.jsonl')]
  write_jsonl(folder / 'metrics.jsonl', rows)


def trunk(session: Session) -> Decoder:
  """The starting weights up to the layer that the heads read."""
  return lower_layers(session.model.decoder, layers_read(session))


def layers_read(session: Session) -> int:
  """How many layers the heads read through."""
  return max(1, round(session.config.preference.depth * session.model.decoder.config.num_layers))


def load(session: Session, name: str) -> Any:
  """A trained preference model ('train' or 'judge'), whose head reads `training.heads.reply_states` of `trunk`."""
  with Checkpoints(session.folder('preference') / name, _seed(session, name)) as checkpoints:
    return checkpoints.load(untrained(session, trunk(session), name))


def rewards(session: Session, trainable: Any, asked: Sequence[Tokens], said: Sequence[Tokens]) -> np.ndarray:
  """A trained preference model's rewards of replies after their prompts, [replies, traits]."""
  return fetch(read_rewards(trainable, replicate(reply_states(trunk(session), trainable, asked, said))))


# ---- measuring ----


def _written_pairs(session: Session) -> list[Row]:
  """An example for each pair that is not shown: the reply in character, then the other."""
  model = session.model
  return [
    {
      'trait': place,
      'use': pair.use,
      'prompt': model.prompt(prompts.alone(pair.message)),
      'replies': [model.reply(pair.in_character), model.reply(pair.out_of_character)],
    }
    for place, trait in enumerate(session.character.traits)
    for pair in trait.pairs
    if pair.use != 'shown'
  ]


def _measure(session: Session, name: str, trainable: Any, unseen: Sequence[Row], written: Sequence[Row]) -> Row:
  """Figures on messages the model was not trained on, and on written pairs."""
  file = session.folder('preference') / name / 'length.json'
  length = hosts.first(lambda: json.loads(file.read_text()))
  right, probability, label, by_trait = defaultdict(list), [], [], defaultdict(list)
  message: list[int] = []
  scored: list[float] = []
  uncontrolled: list[float] = []
  tokens: list[int] = []
  by_place: dict[int, list[float]] = defaultdict(list)
  traits = session.character.traits
  for number, example in enumerate(unseen):
    scores = fetch(read_rewards(trainable, replicate(example['states'])))[:, example['trait']]
    scored += scores.tolist()
    effect = length['traits'][traits[example['trait']].id]['effect']
    uncontrolled += (scores + effect * (example['states'] @ np.array(length['guess']))).tolist()
    by_place[example['trait']] += scores.tolist()
    tokens += [len(reply) for reply in example['replies']]
    for i, j in itertools.combinations(range(len(scores)), 2):
      wanted = float(example['probabilities'][i, j])
      first, second = example['conditions'][i], example['conditions'][j]
      kind = 'mixed' if first != second else f'{first}-{first}'
      hit = (scores[i] > scores[j]) == (wanted > 0.5)
      right[kind].append(hit)
      by_trait[traits[example['trait']].id].append(hit)
      # Hard labels of few messages may be told apart without an error, and then by any distance.
      probability.append(1 / (1 + math.exp(min(float(scores[j] - scores[i]), 700.0))))
      label.append(wanted)
      message.append(number)
  p, q = np.clip(np.array(probability), 1e-6, 1 - 1e-6), np.array(label)
  pairs: dict[str, dict[str, list[bool]]] = {use: {trait.id: [] for trait in traits} for use in ('kept', 'choosing')}
  for example in written:
    inside, outside = fetch(read_rewards(trainable, replicate(example['states'])))[:, example['trait']]
    pairs[example['use']][traits[example['trait']].id].append(bool(inside > outside))
  # What one unit of reward is worth differs by trait; the policy divides by this. A trait that these messages are too
  # few for has the spread of all.
  reward_std = {t.id: float(np.std(by_place[i] or scored or [0.0])) or 1.0 for i, t in enumerate(traits)}
  return {
    'accuracy': {kind: float(np.mean(right[kind])) if right[kind] else None for kind in _KINDS},
    'accuracy_by_trait': {trait: float(np.mean(hits)) for trait, hits in by_trait.items()},
    'kept': {trait: share(some) for trait, some in pairs['kept'].items()},
    'kept_overall': share([hit for some in pairs['kept'].values() for hit in some]),
    'choosing': {trait: share(some) for trait, some in pairs['choosing'].items()},
    'log_loss': float(-(q * np.log(p) + (1 - q) * np.log1p(-p)).mean()) if len(p) else None,
    'calibration_error': calibration_error(p, q) if len(p) else None,
    'calibration': calibration(p, q, message),
    'length_correlation': correlation(scored, tokens),
    'length_correlation_before': correlation(uncontrolled, tokens),
    'length_control': {
      trait: {k: round(v, 6) for k, v in of.items() if k != 'effect'} for trait, of in length['traits'].items()
    },
    'reward_std': reward_std,
  }


_BINS = 10


def _bins(probability: np.ndarray) -> list[np.ndarray]:
  """Places of predictions in bins of equal count, from the lowest on."""
  return [part for part in np.array_split(np.argsort(probability, kind='stable'), _BINS) if len(part)]


def calibration_error(probability: np.ndarray, label: np.ndarray) -> float:
  """Expected calibration error (Guo et al. 2017, eq. 3) against soft labels, in bins of equal count."""
  gaps = [len(part) * abs(probability[part].mean() - label[part].mean()) for part in _bins(probability)]
  return float(sum(gaps) / len(probability))


def calibration(probability: np.ndarray, label: np.ndarray, message: Sequence[int]) -> list[Row]:
  """By bin, the mean of what was predicted and an interval of the labels; in both the pairs of a message count as one,
  since they are not independent of each other."""
  rows = []
  for part in _bins(probability):
    by_message: dict[int, list[int]] = defaultdict(list)
    for place in part:
      by_message[message[place]].append(place)
    means = {name: [float(values[some].mean()) for some in by_message.values()]
             for name, values in (('predicted', probability), ('label', label))}  # fmt: skip
    rows.append({'predicted': float(np.mean(means['predicted'])), 'label': interval(means['label'])})
  return rows
