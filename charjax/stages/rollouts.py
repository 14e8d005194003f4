"""What the policy learns from: replies to messages, some drawn for each step and some ranked before; judged.

Drawn replies are rewarded among themselves, each token with its own advantage. Ranked replies show the policy what it
would seldom draw itself, on both sides of a trait: it learns to prefer those that the preference model prefers, by
how much more likely they become than under the starting model. They teach what is said and not when to stop, since
most of them were cut off: log-probs of them are conditional on the reply going on.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from charjax.engine.batch import item_keys
from charjax.engine.rows import FixedShapes, Group, Opening, Rows, pad_values, parts_of, reply_mask
from charjax.engine.sample import Reply, Sampling, end_ids, sample
from charjax.engine.score import hidden_states, in_rows, mean_over_tokens, token_log_probs
from charjax.files import Row
from charjax.mesh import fetch, no_silent_transfers, replicate, shard_batch
from charjax.model.decoder import Decoder
from charjax.progress import Progress
from charjax.stages import preference, rankings, replies
from charjax.training.advantages import (
  fit_values,
  generalised_advantages,
  leave_one_out,
  read_values,
  to_come,
  token_advantages,
  token_returns,
  value_moments,
  whiten,
)
from charjax.training.heads import bind, read_expected, read_only, read_rewards
from charjax.training.loop import microbatches
from charjax.training.losses import soft_labels
from charjax.workdir import Session

_TURNS = ('shown', 'opposed', 'plain')  # the order in which ranked replies are taken
_CRITIC_ROWS = 64  # plain replies read together


class Judge(NamedTuple):
  """What judges a reply: the starting model, and the preference model with a critic of what is to come.

  Attributes:
    decoder: the starting weights.
    trunk: the layers of them that the preference model reads through.
    model: the preference model.
    critic: [D + 1, traits] its expectations.
    mean: [traits] of the rewards of the starting model's plain replies, from which scores are counted.
    ends: ids that end a reply.
  """

  decoder: Decoder
  trunk: Decoder
  model: Any
  critic: jax.Array
  mean: jax.Array
  ends: jax.Array


class Ranked(NamedTuple):
  """Ranked replies to one message: S of them as tokens, and how surely the first of two is better [S, S], as ranked;
  None where the held-out judge was fitted to that ranking."""

  replies: list[list[int]]
  preferred: np.ndarray | None


class Rollout(NamedTuple):
  """Replies that were drawn to the prompts of one step, judged. N replies of R tokens.

  Attributes:
    drawn: N replies.
    before: [N, R] their log-probs when they were drawn.
    log_ratio: [N, R] of policy over starting model.
    advantages: [N, R] of each token.
    rewards: [N] of each reply, by its own trait and, as far as the config says, the others.
    returns: [N, R] what the policy's value head should have expected before each token; None where it has none.
  """

  drawn: list[Reply]
  before: np.ndarray
  log_ratio: np.ndarray
  advantages: np.ndarray
  rewards: np.ndarray
  returns: np.ndarray | None = None


def make_judge(session: Session, shapes: FixedShapes, asked: Sequence[Row]) -> Judge:
  """The judge of a policy: its critic is fitted to the starting model's plain replies to the messages `asked`."""
  decoder, trunk = session.model.decoder, preference.trunk(session)
  model = read_only(preference.load(session, 'train'))
  longest, ends = session.config.policy.max_new_tokens, replicate(end_ids(session.model.eos_ids))
  each = max(1, session.config.replies.plain)
  plain = _replies_by_message(session, ('plain',))
  groups = [
    Group(item['prompt'], [tokens for _, tokens in plain[item['id']][:each]]) for item in asked if plain[item['id']]
  ]
  size = max(1, _CRITIC_ROWS // each)
  moments: Any = None
  for begin in range(0, max(1, len(groups)), size):
    rows = shapes.rows(groups[begin : begin + size], each, size)
    more = fetch(_moments(trunk, model, shapes.opening, shard_batch(rows), ends, longest))
    moments = jax.tree.map(np.add, moments, more) if moments else more
  critic, mean = replicate(fit_values(*moments))
  return Judge(decoder, trunk, model, critic, mean, ends)


def _token_states(trunk: Decoder, model: Any, opening: Opening, rows: Rows) -> jax.Array:
  """States [N, R, D] that the preference model reads of each token."""
  used, adapter = bind(trunk, model)
  return in_rows(hidden_states(used, rows, adapter=adapter, opening=opening), rows)[:, 1:]


def _token_scores(model: Any, states: jax.Array, rows: Rows, ends: jax.Array, silence: Any = 0.0) -> jax.Array:
  """Scores [N, R, traits] of each token, from its state [N, R, D]; of a reply that only ends, `silence`."""
  scores = read_rewards(model, states)
  # That a reply ends is not the trait's: its end counts as its other tokens do.
  ended = jnp.isin(rows.tokens[:, 1:], ends) & reply_mask(rows)
  rest = rows._replace(lengths=rows.lengths - ended.any(1))
  others = jnp.where(reply_mask(rest).any(1)[:, None], mean_over_tokens(scores, rest), silence)
  return jnp.where(ended[..., None], others[:, None], scores)


@no_silent_transfers
@partial(jax.jit, static_argnames=('longest',))
def _moments(trunk: Decoder, model: Any, opening: Opening, rows: Rows, ends: jax.Array, longest: int) -> Any:
  mask, states = reply_mask(rows), _token_states(trunk, model, opening, rows)
  return value_moments(states, _token_scores(model, states, rows, ends), mask, to_come(mask.shape[1], longest))


@partial(jax.jit, static_argnames=('longest',))
def judge_tokens(
  judge: Judge, opening: Opening, rows: Rows, temperature: jax.Array, barred: Any, longest: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Scores of each token by every trait, what the critic expects to follow, both [N, R, traits]; and log-probs [N, R]
  of the starting model."""
  if not judge.model.keys() & {'decoder', 'adapter'}:
    # The heads read the starting weights: their states lie on the way to the log-probs.
    states, hidden = hidden_states(judge.decoder, rows, opening=opening, tap=judge.trunk.config.num_layers)
    states = in_rows(states, rows)[:, 1:]
  else:
    states = _token_states(judge.trunk, judge.model, opening, rows)
    hidden = hidden_states(judge.decoder, rows, opening=opening)
  # No reply that says nothing was ranked, and zero is no score like others: it counts as the starting model's do.
  scores = _token_scores(judge.model, states, rows, judge.ends, judge.mean)
  values = read_values(judge.critic, states, to_come(states.shape[1], longest))
  return scores - judge.mean, values, token_log_probs(judge.decoder, hidden, rows, temperature, barred)


@no_silent_transfers
def judge_ranked(session: Session, shapes: FixedShapes, judge: Judge, asked: Sequence[Row]) -> list[Row]:
  """The items `asked`, each with what the loss needs to know of its `ranked` replies, S places of R tokens.

  They stay what they are, so that they are judged once. Added are `before` [S, R], log-probs under the starting model;
  `real` [S], which places are filled; `preferred` [S, S], how surely the first of two replies is better, for a share
  `ranked_labels` by the rankings and else by the preference model, where a spread of reward counts as one logit; and
  `best`, the place of the best.
  """
  config, ends, places = session.config.policy, session.model.eos_ids, session.config.policy.ranked_replies
  limits = session.config.rankings.label_low, session.config.rankings.label_high
  if not places:
    return list(asked)
  found = []
  temperature = replicate(np.float32(config.ranked_temperature))
  with Progress('ranked replies', len(asked), 'messages') as bar:
    for begin in range(0, len(asked), config.prompts_per_step):
      some = asked[begin : begin + config.prompts_per_step]
      rows = shapes.rows(
        [Group(item['prompt'], item['ranked'].replies) for item in some], places, config.prompts_per_step
      )
      mask = reply_mask(rows) & ~np.isin(rows.tokens[:, 1:], ends)
      real = mask.any(1).reshape(-1, places)
      earns = np.zeros((len(real), len(session.character.traits)), np.float32)
      earns[: len(some)] = [item['earns'] for item in some]
      rows, earns = shard_batch((rows, earns))
      scores, _, before = judge_tokens(judge, shapes.opening, rows, temperature, judge.ends, config.max_new_tokens)
      preferred, before = fetch((_preferences(scores, rows, earns, *limits), before))
      before = before.reshape(-1, places, before.shape[1])
      preferred, best = mix_labels(preferred, [item['ranked'].preferred for item in some], real, config.ranked_labels)
      for m, item in enumerate(some):
        more = {'before': before[m], 'real': real[m], 'preferred': preferred[m], 'best': best[m]}
        found.append(item | more)
      bar.advance(len(some))
  return found


@partial(jax.jit, static_argnames=('low', 'high'))
def _preferences(scores: jax.Array, rows: Rows, earns: jax.Array, low: float, high: float) -> jax.Array:
  """How surely the first of two ranked replies is better by the preference model, [M, S, S], from scores of tokens."""
  earned = mean_over_tokens(scores, rows).reshape(len(earns), -1, earns.shape[1])
  return soft_labels(jnp.einsum('msn,mn->ms', earned, earns), 1.0, low, high)


def mix_labels(
  judged_mss: np.ndarray, ranked: Sequence[np.ndarray | None], real_ms: np.ndarray, share: float
) -> tuple[np.ndarray, np.ndarray]:
  """Labels [M, S, S], for a `share` the `ranked` ones of each message that has some, and the place [M] of the reply
  they favour."""
  labels_mss = judged_mss.copy()
  for labels, found in zip(labels_mss, ranked, strict=False):
    if found is not None:
      table = np.full_like(labels, 0.5)
      table[: len(found), : len(found)] = found
      labels[...] = (1 - share) * labels + share * table
  favour_ms = np.where(real_ms[:, None], labels_mss, 0.0).sum(2)
  return labels_mss, np.where(real_ms, favour_ms, -np.inf).argmax(1)


def seed(session: Session) -> int:
  """Of all that chance decides in training the policy, but not in what it learns from."""
  return session.config.seed + session.config.policy.seed


def drawing(config: Any) -> Sampling:
  """How the policy draws its replies."""
  at_once = min(config.batch_size, config.prompts_per_step * max(1, config.replies_per_prompt))
  return Sampling(config.max_new_tokens, config.temperature, batch_size=at_once)


def rows_to_prompt(config: Any) -> int:
  """How many replies to each prompt go through the model together."""
  return max(config.replies_per_prompt + config.ranked_replies, config.shown_replies)


def parts_of_step(config: Any) -> int:
  """In how many parts the batch of a step is judged and learned from."""
  return microbatches(config.microbatches, config.prompts_per_step, rows_to_prompt(config))


@no_silent_transfers
def roll_out(
  session: Session, shapes: FixedShapes, judge: Judge, trainable: Any, asked: Sequence[Row], step: int, kl_weight: float
) -> Rollout:
  """Draws replies to the prompts of a step and judges them, where the KL penalty has this weight."""
  config, model = session.config.policy, session.model
  each = config.replies_per_prompt
  used, adapter = bind(model.decoder, trainable)
  group = [item for item in asked for _ in range(each)]
  names = [f'{step}/{item["id"]}/{i}' for i, item in enumerate(group)]
  settings = drawing(config)
  drawn = sample(
    used, [item['prompt'] for item in group], item_keys(seed(session), 'policy', names), model.eos_ids, settings,
    adapter=adapter, width=config.prompt_width,
  )  # fmt: skip
  said = iter(drawn)
  groups = [Group(item['prompt'], [next(said).tokens for _ in range(each)]) for item in asked]
  count = parts_of_step(config)
  rows = shapes.rows(groups, each, microbatches=count)
  temperature, kl, trace = replicate(tuple(np.float32(x) for x in (config.temperature, kl_weight, config.trace)))
  # In as many parts as the step learns from it: all states of a batch would not fit.
  parts = [shard_batch(part) for part in parts_of(rows, count)]
  judged = [
    fetch(judge_tokens(judge, shapes.opening, part, temperature, None, config.max_new_tokens)) for part in parts
  ]
  scores, values, reference = (np.concatenate(arrays) for arrays in zip(*judged, strict=True))
  mask = reply_mask(rows)
  before = pad_values([reply.log_probs for reply in drawn], mask.shape[1])
  log_ratio = np.where(mask, before - reference, 0.0)

  earns = np.array([item['earns'] for item in group], np.float32)
  scores, values = (np.einsum('nrc,nc->nr', array, earns) for array in (scores, values))
  rewards = fetch(_mean_over_tokens(*shard_batch((scores, rows))))
  returns = None
  if config.advantages == 'ppo':
    expected = np.concatenate(
      [fetch(expected_values(model.decoder, trainable, shapes.opening, part)) for part in parts]
    )
    advantages, returns = fetch(_ppo(*shard_batch((scores, expected, log_ratio, mask)), trace, kl))
  else:
    grouped = shard_batch(tuple(array.reshape(len(asked), each, -1) for array in (scores, values, log_ratio, mask)))
    if config.advantages == 'rloo':
      advantages = fetch(_rloo(grouped[0], *grouped[2:], kl))
    else:
      share = replicate(to_come(mask.shape[1], config.max_new_tokens))
      advantages = fetch(_grpo(*grouped, share, trace, kl))
    advantages = advantages.reshape(mask.shape)
  advantages = advantages * np.array([item['weight'] for item in group], np.float32)[:, None]
  return Rollout(drawn, before, log_ratio, advantages, rewards, returns)


_mean_over_tokens = jax.jit(mean_over_tokens)


@jax.jit
def _grpo(
  scores: jax.Array, values: jax.Array, log_ratio: jax.Array, mask: jax.Array, share: jax.Array, trace: Any, kl: Any
) -> jax.Array:
  """Advantages of each token [M, K, R], among the K replies to each of M prompts."""

  def one(scores: jax.Array, values: jax.Array, log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    tokens = jnp.maximum(mask.sum(1, keepdims=True), 1)
    rewards = (jnp.where(mask, scores, 0.0) / tokens).sum(1)
    # Counted from what these replies earn on average: else those that end sooner would seem to forgo, or to be
    # spared, what all of them earn a token.
    level = rewards.sum() / jnp.maximum(mask.any(1).sum(), 1)
    returns = token_returns((scores - level) / tokens, values - level * share, log_ratio, mask, trace, kl)
    return token_advantages(returns, mask)

  return jax.vmap(one)(scores, values, log_ratio, mask)


@jax.jit
def _rloo(scores: jax.Array, log_ratio: jax.Array, mask: jax.Array, kl: Any) -> jax.Array:
  """The same, where each reply is worth what it earns as a whole, less the penalty."""

  def one(scores: jax.Array, log_ratio: jax.Array, mask: jax.Array) -> jax.Array:
    tokens = jnp.maximum(mask.sum(1), 1)
    earned = jnp.where(mask, scores, 0.0).sum(1) / tokens - kl * jnp.where(mask, log_ratio, 0.0).sum(1)
    return jnp.where(mask, leave_one_out(earned)[:, None], 0.0)

  return jax.vmap(one)(scores, log_ratio, mask)


@jax.jit
def _ppo(
  scores: jax.Array, expected: jax.Array, log_ratio: jax.Array, mask: jax.Array, trace: Any, kl: Any
) -> tuple[jax.Array, jax.Array]:
  """Advantages of tokens beside what the value head expected, over the whole batch, and what it should have, [N, R].

  The reward stands at a reply's last token, the penalty at each (Ouyang et al. 2022).
  """
  tokens = jnp.maximum(mask.sum(1), 1)
  last = jnp.arange(mask.shape[1]) == tokens[:, None] - 1
  rewards = jnp.where(last, (jnp.where(mask, scores, 0.0).sum(1) / tokens)[:, None], 0.0) - kl * log_ratio
  advantages, returns = generalised_advantages(rewards, expected, mask, trace)
  return whiten(advantages, mask), returns


@no_silent_transfers
@jax.jit
def expected_values(decoder: Decoder, trainable: Any, opening: Opening, rows: Rows) -> jax.Array:
  """What the policy's value head expects before each reply token, [N, R]."""
  used, adapter = bind(decoder, trainable)
  return read_expected(trainable, hidden_states(used, rows, adapter=adapter, opening=opening), rows)


# ---- what is rewarded, and what was ranked ----


def earnings(session: Session) -> dict[str, np.ndarray]:
  """For each trait that is rewarded, what a reply to one of its messages earns by each trait's direction, [traits].

  Rewards are in units of each trait's spread. A reply earns by its message's own trait, and by a share `other_traits`
  by the rest of the character (the mean of the others by their weights): else what speaks for one trait at the
  expense of another would be learned from its messages and lost on the other's.
  """
  config = session.config.policy
  report = json.loads((session.folder('preference') / 'report.json').read_text())
  traits = session.character.traits
  left_out = set() if config.keep_unproven_traits else set(report['left_out'])
  left_out |= {trait.id for trait in traits if config.traits and trait.id not in config.traits}
  spread = np.array([report['train']['reward_std'][trait.id] for trait in traits])
  weight = np.array([0.0 if trait.id in left_out else trait.weight for trait in traits])
  found = {}
  for place, trait in enumerate(traits):
    if trait.id not in left_out:
      others = np.where(np.arange(len(traits)) == place, 0.0, weight)
      share = config.other_traits * others / max(others.sum(), 1e-8)
      share[place] = 1.0
      found[trait.id] = (share / spread).astype(np.float32)
  return found


def ranked_replies(session: Session) -> dict[str, Ranked]:
  """Of the ranked replies, up to `ranked_replies` to each message: in character and not in turn."""
  most = session.config.policy.ranked_replies
  # What the held-out judge learned from stays unknown to the policy: there the preference model says what is better.
  tables = {row['message']: row for row in preference.split(rankings.load(session))['train']} if most else {}
  nothing = Ranked([], None)
  found: dict[str, Ranked] = defaultdict(lambda: nothing)
  for message, some in _replies_by_message(session, _TURNS if most else ()).items():
    names, tokens = zip(*some[:most], strict=True)
    ranking = tables.get(message)
    found[message] = Ranked(list(tokens), _ranked_labels(ranking, names) if ranking else None)
  return found


def shown_replies(session: Session) -> dict[str, list[list[int]]]:
  """Up to `shown_replies` replies to each message that its trait was shown for."""
  most = session.config.policy.shown_replies
  found = _replies_by_message(session, ('shown',) if most else ())
  return defaultdict(list, {message: [tokens for _, tokens in some[:most]] for message, some in found.items()})


def _ranked_labels(ranking: Row, names: Sequence[str]) -> np.ndarray:
  """[S, S] of the replies `names`; a half, which favours neither, where the ranking leaves one out."""
  labels = np.full((len(names), len(names)), 0.5, np.float32)
  places = {name: place for place, name in enumerate(ranking['replies'])}
  known = [i for i, name in enumerate(names) if name in places]
  index = [places[names[i]] for i in known]
  labels[np.ix_(known, known)] = np.array(ranking['probabilities'], np.float32)[np.ix_(index, index)]
  return labels


def _replies_by_message(session: Session, conditions: Sequence[str]) -> dict[str, list[tuple[str, list[int]]]]:
  """Ids and tokens of the ranked replies of some conditions to each message, the conditions in turn."""
  longest = session.config.policy.max_new_tokens
  found: dict[str, list[tuple[int, int, str, list[int]]]] = defaultdict(list)
  for row in replies.load(session):
    if row['condition'] in conditions:
      tokens = session.model.reply(row['text'], row['finish'] == 'stop')[:longest]
      number = int(row['id'].rsplit('/', 1)[1])
      found[row['message']].append((number, conditions.index(row['condition']), row['id'], tokens))
  return defaultdict(
    list, {message: [(name, tokens) for *_, name, tokens in sorted(some)] for message, some in found.items()}
  )
