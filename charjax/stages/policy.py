"""policy: trained on the trait messages, with no trait shown, by what the config weighs: reinforcement learning against
the preference model, preference among ranked replies, distillation of the model that was shown the trait.

Reads messages/, replies/, rankings/ and preference/; writes Orbax checkpoints, metrics.jsonl and samples.jsonl
(replies drawn as training went on). Replies are drawn by temperature alone, so that their log-probs are those of the
distribution sampled from; rollouts.py tells what else a step learns from, and what each token earns, choice.py which
checkpoint stays. The KL penalty to the starting model stands in the reward, where its gradient is right; neutral
messages are held by an exact KL on replies that the starting model gave once.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from charjax import hosts
from charjax.chunks import chunks
from charjax.engine import work
from charjax.engine.batch import item_keys
from charjax.engine.rows import FixedShapes, Group
from charjax.engine.sample import end_ids, sample
from charjax.errors import UserError
from charjax.files import Row, read_jsonl, write_jsonl, write_text
from charjax.mesh import batch_parts, held_here
from charjax.model.decoder import Decoder
from charjax.progress import Progress
from charjax.stages import choice, messages, prompts, replies
from charjax.stages.rollouts import (
  Rollout,
  drawing,
  earnings,
  judge_ranked,
  make_judge,
  parts_of_step,
  ranked_replies,
  roll_out,
  rows_to_prompt,
  seed,
  shown_replies,
)
from charjax.training.checkpoint import Checkpoints, fingerprint
from charjax.training.data import Together, as_long, batches
from charjax.training.heads import make_trainable
from charjax.training.loop import tell_division, train
from charjax.training.losses import adapt_kl, count_pairs
from charjax.training.policy_loss import policy_loss
from charjax.training.step import Batch, make_batch, make_optimizer
from charjax.workdir import Session


def run(session: Session) -> Row:
  """Trains the policy; returns counts."""
  config, folder, model = session.config.policy, session.folder('policy'), session.model
  tell_division(session.log, 'policy', config, 'prompts_per_step', rows_to_prompt(config))
  asked = _trait_prompts(session)
  neutral = _neutral_replies(session)
  # Drawn replies are to become like those that were ranked best, and are about as long.
  said = [row['reply'] for row in neutral]
  said += [reply for item in asked for reply in (*item['ranked'].replies, *item['shown'])]
  shapes = FixedShapes([item['prompt'] for item in (*asked, *neutral)], config.max_new_tokens, said)
  shapes_shown = None
  if config.shown_replies:
    shapes_shown = FixedShapes([item['shown_prompt'] for item in asked], config.max_new_tokens, said)

  judge = make_judge(session, shapes, asked)
  asked = judge_ranked(session, shapes, judge, asked)
  weights = _KLWeights(config, folder)

  def next_batch(step: int, now: Row, trainable: Any) -> tuple[Batch, Row]:
    rollout, figures = None, {}
    if config.replies_per_prompt:
      kl_weight = weights.at(step)
      rollout = roll_out(session, shapes, judge, trainable, now['asked'], step, kl_weight)
      figures = _figures(rollout, kl_weight)
      weights.after(step, figures['kl'])
      if step % config.samples_every == 0 or step in (1, config.steps):
        _save_samples(session, step, now['asked'], rollout)
    figures |= _tokens(config, now['asked'], rollout)
    return make_policy_batch(session, shapes, shapes_shown, now['asked'], now['neutral'], rollout), figures

  steps = choice.candidate_steps(config)
  candidates = steps if len(steps) > 1 else []
  trainable, chosen = untrained(session, model.decoder), choice.read(folder)
  with Checkpoints(folder / 'checkpoints', seed(session), candidates) as checkpoints:
    if chosen is None:
      with Progress('policy', config.steps, 'steps') as bar:
        trainable = train(
          folder,
          checkpoints,
          *learning(config),
          trainable,
          model.decoder,
          read(config, asked, neutral, seed(session)),
          next_batch,
          steps=config.steps,
          save_every=config.save_every,
          skipped_steps=config.skipped_steps,
          bar=bar,
          note=_note,
          save_after=candidates,
        )
      if candidates:
        chosen = choice.choose(session, asked, candidates, lambda step: checkpoints.load(trainable, step))
    if chosen is not None:
      trainable = checkpoints.load(trainable, chosen)
      checkpoints.keep_only(chosen)
  hosts.first(lambda: _merge_samples(session))
  write_text(folder / 'fingerprint.json', json.dumps({'policy': fingerprint(trainable)}))
  rewarded = sorted({item['trait'] for item in asked})
  counts = {'steps': config.steps} | ({'chosen_step': chosen} if candidates else {})
  return counts | {'messages': len(asked), 'neutral': len(neutral), 'traits_rewarded': rewarded}


class _KLWeights:
  """The weight of the KL penalty at each step, as it follows from the KL of the steps before."""

  def __init__(self, config: Any, folder: Any):
    self._config, self._folder, self._next = config, folder, (1, config.kl)

  def at(self, step: int) -> float:
    first, _ = self._next
    if self._config.kl_target and step > first:
      # A run that goes on: what was before is in its metrics, which process 0 writes.
      told = hosts.first(lambda: [[row['step'], row['kl']] for row in read_jsonl(self._folder / 'metrics.jsonl')])
      for number, kl in told:
        if first <= number < step:
          self.after(number, kl)
    return self._next[1]

  def after(self, step: int, kl: float | None) -> None:
    if self._config.kl_target:
      weight = self._next[1]
      # That of a step that is skipped may not be finite, and says nothing.
      if kl is not None and math.isfinite(kl):
        weight = adapt_kl(weight, kl, self._config.kl_target)
      self._next = step + 1, weight


def _note(values: Mapping[str, float]) -> str:
  told = {
    'reward': 'reward {:.3f}', 'kl': 'KL {:.3f} a token', 'ranked_accuracy': '{:.0%} of ranked pairs',
    'shown_kl': 'KL {:.3f} to the trait shown',
  }  # fmt: skip
  return ', '.join(text.format(values[name]) for name, text in told.items() if name in values)


def make_policy_batch(
  session: Session,
  shapes: FixedShapes,
  shapes_shown: FixedShapes | None,
  asked: Sequence[Row],
  neutral: Sequence[Row],
  rollout: Rollout | None,
) -> Batch:
  """What the loss of one step takes; to each prompt its drawn replies come first, then its ranked ones."""
  config, said = session.config.policy, iter(rollout.drawn if rollout else ())
  drawn, ranked, shown = config.replies_per_prompt, config.ranked_replies, config.shown_replies
  parts = parts_of_step(config)
  arrays: Row = {
    'neutral': shapes.rows(
      [Group(row['prompt'], [row['reply']]) for row in neutral], 1, _neutral_rows(len(neutral), parts), parts
    ),
    'weight': np.array([item['weight'] for item in asked], np.float32),
  }
  whole: Row = {
    'opening': shapes.opening,
    'ends': end_ids(session.model.eos_ids),
    'prompts': np.float32(len(asked)),
    'neutral_tokens': np.float32(sum(len(row['reply']) for row in neutral)),
  }
  if drawn + ranked:
    groups = [
      Group(item['prompt'], [*(next(said).tokens for _ in range(drawn)), *item['ranked'].replies]) for item in asked
    ]
    arrays['rows'] = shapes.rows(groups, drawn + ranked, microbatches=parts)
    # Of each reply.
    temperature = np.array([config.temperature] * drawn + [config.ranked_temperature] * ranked, np.float32)
    arrays |= {
      'temperature': np.tile(temperature, len(asked)),
      'going_on': np.tile([False] * drawn + [True] * ranked, len(asked)),
    }
  if rollout:
    arrays['drawn'] = {'before': rollout.before, 'advantages': rollout.advantages}
    if rollout.returns is not None:
      arrays['drawn']['returns'] = rollout.returns
    whole['drawn_tokens'] = np.float32(sum(len(reply.tokens) for reply in rollout.drawn))
  # Backwards through frozen weights costs once more, through trained ones twice.
  times = 2 if config.lora_rank else 3
  passes = {'rows': (shapes, times), 'neutral': (shapes, times + 1), 'shown': (shapes, times)}
  if shapes_shown:
    passes['teacher'] = shapes_shown, 1
    pairs = [(shapes, 'prompt', 'shown'), (shapes_shown, 'shown_prompt', 'teacher')]
    for some, prompt, name in pairs:
      arrays[name] = some.rows([Group(item[prompt], item['shown']) for item in asked], shown, microbatches=parts)
    whole['shown_tokens'] = np.float32(max(1, sum(len(reply) for item in asked for reply in item['shown'])))
    whole['shown_opening'] = shapes_shown.opening
  if ranked:
    arrays['ranked'] = {key: np.stack([item[key] for item in asked]) for key in ('before', 'real', 'preferred', 'best')}
    _, whole['ranked_pairs'] = count_pairs(arrays['ranked']['real'], arrays['weight'])
  for name, (some, count) in passes.items():
    if name in arrays:
      work.count_rows(session.model.decoder.config, arrays[name], some.cut, times=count, heads=count)
  names = 'clip', 'neutral_weight', 'shown_weight', 'ranked_weight', 'ranked_beta', 'ranked_likelihood'
  return make_batch(whole | {name: np.float32(config[name]) for name in names}, arrays, parts)


def read(config: Any, asked: Sequence[Row], neutral: Sequence[Row], seed: int) -> Together:
  """The batches of a training, of both kinds of messages."""
  size, parts = config.prompts_per_step, parts_of_step(config)

  def outline(item: Row) -> Row:
    ranked = item['ranked']
    texts = {name: as_long(item[name]) for name in ('prompt', 'shown_prompt') if name in item}
    replies = {'shown': [as_long(reply) for reply in item['shown']]}
    return item | texts | replies | {'ranked': ranked._replace(replies=[as_long(reply) for reply in ranked.replies])}

  def outline_neutral(row: Row) -> Row:
    return {name: as_long(tokens) for name, tokens in row.items()}

  # All processes draw the replies to the prompts of a step together: for that each reads all of them.
  each = config.ranked_replies, config.shown_replies
  here = None if config.replies_per_prompt else held_here(size, parts, each)
  here_neutral = held_here(_neutral_rows(size, parts), parts)[:size]
  return Together(
    asked=batches(asked, size, seed, here, outline),
    # At least as many neutral messages as trait messages, so that the rest of the model is held as firmly.
    neutral=batches(neutral, size, seed + 1, here_neutral, outline_neutral),
  )


def _neutral_rows(count: int, parts: int) -> int:
  """How many rows so many neutral replies make up: fewer than the drawn ones, with empty rows up to what is divided
  among all devices."""
  multiple = parts * batch_parts()
  return -(-count // multiple) * multiple


def _figures(rollout: Rollout, kl_weight: float) -> dict[str, float]:
  """Of the replies that were drawn for this step."""
  tokens = sum(len(reply.tokens) for reply in rollout.drawn)
  return {
    'reward': float(rollout.rewards.mean()),
    'penalised_reward': float((rollout.rewards - kl_weight * rollout.log_ratio.sum(-1)).mean()),
    'kl': float(rollout.log_ratio.sum() / tokens),
    'length': tokens / len(rollout.drawn),
    'ended': float(np.mean([reply.finish == 'stop' for reply in rollout.drawn])),
    'entropy': float(-rollout.before.sum() / tokens),
    'kl_weight': kl_weight,
  }


def _tokens(config: Any, asked: Sequence[Row], rollout: Rollout | None) -> dict[str, float]:
  """How many tokens of replies were drawn for this step, and how many it learns from; neutral ones are not counted."""
  drawn = sum(len(reply.tokens) for reply in rollout.drawn) if rollout else 0
  read = sum(len(reply) for item in asked for reply in (*_learned(config, item), *item['shown']))
  return {'tokens_read': float(drawn + read)} | ({'tokens_drawn': float(drawn)} if rollout else {})


def _learned(config: Any, item: Row) -> Sequence[Sequence[int]]:
  """The ranked replies that teach: all of them by their order, or the best one alone by its likelihood."""
  replies = item['ranked'].replies
  if config.ranked_weight or not replies:
    return replies
  return [replies[item['best']]] if config.ranked_likelihood else []


def learning(config: Any) -> tuple[Any, Any]:
  """The loss of a train step and its optimizer."""
  return policy_loss, make_optimizer(
    config.learning_rate, config.warmup, config.steps, config.weight_decay, config.max_gradient,
    apart='head' if _has_value_head(config) else '',
  )  # fmt: skip


def _has_value_head(config: Any) -> bool:
  return config.advantages == 'ppo' and config.replies_per_prompt > 0


def untrained(session: Session, decoder: Decoder) -> Any:
  """What is trained, as it is before the first step."""
  config = session.config.policy
  return make_trainable(
    decoder,
    config.lora_rank,
    seed(session) + 10,
    lora_targets=config.lora_targets,
    traits=int(_has_value_head(config)),
  )


def load(session: Session) -> Any:
  """The trained policy: what training.heads.bind takes."""
  trainable = untrained(session, session.model.decoder)
  with Checkpoints(session.folder('policy') / 'checkpoints', seed(session)) as checkpoints:
    return checkpoints.load(trainable)


# ---- what is asked ----


def _trait_prompts(session: Session) -> list[Row]:
  """Training messages of the traits whose preference model is better than chance, with what rewards their replies."""
  earns, config = earnings(session), session.config.policy
  if not earns:
    raise UserError(
      f'policy: no trait{" of config.policy.traits" if config.traits else ""} has a preference model better than '
      'chance, so there is nothing to reward; see preference/report.json, or set '
      'config.policy.keep_unproven_traits=True'
    )
  ranked, said = ranked_replies(session), shown_replies(session)
  weight = {trait.id: trait.weight for trait in session.character.traits if trait.id in earns}
  # What counts is how much more one trait does than another: all together pull as hard whatever their weights.
  mean = sum(weight.values()) / len(weight)
  if not mean:
    raise UserError(
      f'policy: the traits that can be rewarded ({", ".join(weight)}) have weight 0; raise one, or set '
      'config.policy.keep_unproven_traits=True'
    )
  before = {trait.id: replies.shown(session, trait) for trait in session.character.traits}

  def distilled(row: Row) -> Row:
    if not config.shown_replies:
      return {'shown': []}
    prompt = session.model.prompt([*before[row['trait']], prompts.user(row['text'])])
    return {'shown': said[row['id']], 'shown_prompt': prompt}

  return [
    {
      'id': row['id'],
      'trait': row['trait'],
      'text': row['text'],
      'prompt': session.model.prompt(prompts.alone(row['text'])),
      'weight': weight[row['trait']] / mean,
      'earns': earns[row['trait']],
      'ranked': ranked[row['id']],
    }
    | distilled(row)
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
    drawn = sample(model.decoder, asked, keys, model.eos_ids, drawing(config), width=config.prompt_width)
    return [{'prompt': p, 'reply': reply.tokens} for p, reply in zip(asked, drawn, strict=True)]

  return chunks(session, 'policy', 'neutral', rows, 256, make)


# ---- samples ----


def _save_samples(session: Session, step: int, asked: Sequence[Row], rollout: Rollout) -> None:
  """The replies drawn for this step, before it is learned from; `kl` is the log-ratio of a whole reply, in nats."""
  rows = []
  for i, reply in enumerate(rollout.drawn):
    message, place = divmod(i, session.config.policy.replies_per_prompt)
    rows.append(
      {
        'step': step,
        'message': asked[message]['id'],
        'trait': asked[message]['trait'],
        'prompt': asked[message]['text'],
        'reply': place,
        'text': session.model.text(reply.tokens),
        'finish': reply.finish,
        'reward': round(float(rollout.rewards[i]), 4),
        'kl': round(float(rollout.log_ratio[i].sum()), 4),
      }
    )
  write_jsonl(session.folder('policy') / 'samples' / f'{step:06d}.jsonl', rows)


def _merge_samples(session: Session) -> None:
  folder = session.folder('policy')
  files = sorted((folder / 'samples').glob('*.jsonl'))
  write_jsonl(folder / 'samples.jsonl', [row for file in files for row in read_jsonl(file)])
