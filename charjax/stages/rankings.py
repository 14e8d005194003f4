"""rankings: the model ranks its own replies, after its rankers have been audited on pairs that people wrote.

Reads the character, messages/ and replies/; writes rankings/rankings.jsonl (message, reply ids, scores [K],
pairwise probabilities [K, K], ranker) and rankings/audit.json. Kept pairs only measure: the ranker, its length
treatment and the temperature of its labels are chosen on the choosing pairs.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from charjax.character import Pair, Trait
from charjax.chunks import chunks
from charjax.errors import UserError
from charjax.files import Row, numbered_rows, write_jsonl, write_text
from charjax.model.language_model import LanguageModel
from charjax.progress import Progress
from charjax.stages import messages, prompts, replies
from charjax.stages.rankers import (
  RANKERS,
  Answer,
  Settings,
  evidence,
  option_log_odds,
  pointwise,
  treat_length,
)
from charjax.stages.statistics import correlation, share
from charjax.training.losses import soft_labels
from charjax.workdir import Session

Group = tuple[list[Answer], list[str]]  # the replies to one message, and their ids

_LENGTHS = ('mean', 'sum')


def run(session: Session) -> Row:
  """Audits the rankers, chooses one, ranks all replies; returns counts."""
  config, folder = session.config.rankings, session.folder('rankings')
  traits = session.character.traits
  drawn = replies.load(session)
  groups = _grouped(messages.load(session), drawn)

  def examine(items: Sequence[tuple[Trait, Sequence[Group]]], _: int) -> list[Row]:
    return [_examine(session, trait, some) for trait, some in items]

  examined = [(trait, groups[trait.id][: config.triples]) for trait in traits]
  with Progress('audit', len(traits), 'traits') as bar:
    rows = chunks(session, 'rankings', 'audit', examined, 1, examine, bar)
  length, length_why = length_treatment(rows)
  ranker, why = _choose(config.ranker, _audit(rows, length))
  if ranker != 'likelihood':
    # Only now is it known that this ranker's figures on the kept pairs are wanted.
    more = chunks(session, 'rankings', f'audit-{ranker}', traits, 1, functools.partial(_examine_kept, session, ranker))
    for row, kept in zip(rows, more, strict=True):
      row[ranker] = {name: row[ranker][name] + kept[name] for name in kept}
  audit: Row = {
    'traits': {t.id: _audit([row], length, tuple(t.opposites)) for t, row in zip(traits, rows, strict=True)},
    'overall': _audit(rows, length),
  }
  temperature = fit_temperature(written_margins(rows, ranker, 'choosing', length))
  audit |= {
    'ranker': ranker,
    'why': why,
    'length_treatment': f'{length}: {length_why}'
    if ranker == 'likelihood'
    else 'none: this ranker reads whole replies',
    'temperature': temperature,
    'weak_traits': [t.id for t in traits if not _told_from_chance(audit['traits'][t.id][ranker])],
  }
  write_text(folder / 'audit.json', json.dumps(audit, indent=2))
  _stop_if_blind(config, ranker, audit['overall'][ranker]['choosing'])
  for name in audit['weak_traits']:
    session.log(f'rankings: {name} is not told from chance by the {ranker} ranker on the choosing pairs')

  ranked = _rank(session, groups, Settings(config.examples, length, config.batch_size), ranker)
  by_id = {row['id']: row for row in drawn}
  audit['length_control'] = control_length(ranked, by_id, config.length_limit)
  for row in ranked:
    labels = soft_labels(jnp.asarray(row['controlled']), temperature, config.label_low, config.label_high)
    row['probabilities'] = np.round(np.asarray(labels, np.float64), 4).tolist()
    row['ranker'] = ranker
  audit['sampled'] = _sampled_audit(ranked, by_id)
  write_text(folder / 'audit.json', json.dumps(audit, indent=2))
  write_jsonl(folder / 'rankings.jsonl', ranked)
  counts = {'messages': len(ranked), 'replies': sum(len(row['replies']) for row in ranked)}
  return counts | {'ranker': ranker, 'temperature': round(temperature, 4)}


# ---- the audit on written pairs ----


def written_pairs(trait: Trait) -> tuple[Pair, ...]:
  return tuple(pair for pair in trait.pairs if pair.use != 'shown')


def _examine(session: Session, trait: Trait, groups: Sequence[Group]) -> Row:
  """All that the rankers say of one trait's written pairs, as JSON.

  The likelihood ranker reads all of them, and the kept ones without examples too. The other two read the choosing
  pairs; the kept ones follow if one of the two is chosen.
  """
  config, model = session.config.rankings, session.model
  pairs = written_pairs(trait)
  settings = Settings(examples=config.examples, batch_size=config.batch_size)
  row: Row = {'trait': trait.id, 'uses': [pair.use for pair in pairs], 'opposites': [pair.opposite for pair in pairs]}
  kept = [pair for pair in pairs if pair.use == 'kept']
  for name, chosen, examples in (('examples', pairs, config.examples), ('no_examples', kept, 0)):
    row[name] = weigh(model, trait, chosen, dataclasses.replace(settings, examples=examples))
  choosing = [pair for pair in pairs if pair.use == 'choosing']
  for name in ('pairwise', 'pointwise'):
    row[name] = _ask(session, name, trait, choosing)
  row['triples'] = _triples(session, trait, groups)
  return row


def weigh(model: LanguageModel, trait: Trait, pairs: Sequence[Pair], settings: Settings) -> Row:
  """What the likelihood ranker says of written pairs: ratios and token counts of the replies in `_both`."""
  ratio, tokens = evidence(model, trait, _both(pairs), settings)
  return {'ratio': ratio.tolist(), 'tokens': tokens.tolist()}


def _examine_kept(session: Session, ranker: str, traits: Sequence[Trait], _: int) -> list[Row]:
  return [_ask(session, ranker, trait, trait.pairs_for('kept')) for trait in traits]


def _ask(session: Session, ranker: str, trait: Trait, pairs: Sequence[Pair]) -> Row:
  """What the pairwise ranker (log-odds in both orders) or the pointwise one (a score each) says of written pairs."""
  settings, half = Settings(batch_size=session.config.rankings.batch_size), len(pairs)
  answers = _both(pairs)
  if ranker == 'pairwise':
    both = list(zip(answers[:half], answers[half:], strict=True))
    inside, outside = option_log_odds(session.model, trait, both, settings).T
  else:
    inside, outside = np.split(pointwise(session.model, trait, answers, settings), 2)
  return {'uses': [pair.use for pair in pairs], 'inside': inside.tolist(), 'outside': outside.tolist()}


def _both(pairs: Sequence[Pair]) -> list[Answer]:
  """The replies in character, then those out of it."""
  return [Answer(p.message, p.in_character) for p in pairs] + [Answer(p.message, p.out_of_character) for p in pairs]


def _triples(session: Session, trait: Trait, groups: Sequence[Group]) -> list[bool]:
  """Whether the pairwise ranker is transitive on a triple of the sampled replies to each message."""
  settings = Settings(batch_size=session.config.rankings.batch_size)
  found = []
  for answers, _ in groups:
    texts = answers[:3]
    if len(texts) < 3:
      continue
    pairs = list(itertools.combinations(texts, 2))
    first, second, third = option_log_odds(session.model, trait, pairs, settings).mean(1) > 0
    # a > b, a > c, b > c: a cycle is a > b > c > a, or the reverse.
    found.append(not (first == third != second))
  return [bool(value) for value in found]


def written_margins(rows: Sequence[Row], ranker: str, use: str, length: str, shown: str = 'examples') -> np.ndarray:
  """Score of the reply in character minus that of the other, over the written pairs of one use that were read."""
  found = []
  for row in rows:
    if ranker == 'likelihood':
      uses = row['uses'] if shown == 'examples' else ['kept'] * row['uses'].count('kept')
      scores = treat_length(np.array(row[shown]['ratio']), np.array(row[shown]['tokens']), length)
      inside, outside = np.split(scores, 2)
      margins = inside - outside
    else:
      uses, first, second = row[ranker]['uses'], np.array(row[ranker]['inside']), np.array(row[ranker]['outside'])
      # The pairwise ranker's are the log-odds of the reply in character in either order, the pointwise one's scores.
      margins = (first + second) / 2 if ranker == 'pairwise' else first - second
    found.append(margins[np.array(uses, str) == use])
  return np.concatenate([*found, np.zeros(0)])


def _audit(rows: Sequence[Row], length: str, opposites: Sequence[str] = ()) -> Row:
  """The figures of one trait, or of several pooled: per ranker, on the choosing pairs and on the kept ones."""
  audit: Row = {}
  for ranker in RANKERS:
    right = written_margins(rows, ranker, 'kept', length) > 0
    kept = {'accuracy': share(right), 'sides': _sides(rows, right, opposites)} if len(right) else None
    # Only the likelihood ranker is shown examples.
    shown = ranker == 'likelihood'
    audit[ranker] = {
      'examples': kept if shown else None,
      'no_examples': None if shown else kept,
      'choosing': share(written_margins(rows, ranker, 'choosing', length) > 0),
    }
  without = written_margins(rows, 'likelihood', 'kept', length, 'no_examples') > 0
  if len(without):
    audit['likelihood']['no_examples'] = {'accuracy': share(without), 'sides': _sides(rows, without, opposites)}
  odds = [np.stack([row['pairwise']['inside'], row['pairwise']['outside']], 1) for row in rows]
  audit['pairwise'] |= _positions(np.concatenate(odds))
  triples = [value for row in rows for value in row['triples']]
  audit['pairwise']['transitivity'] = float(np.mean(triples)) if triples else None
  return audit


def _sides(rows: Sequence[Row], right: np.ndarray, opposites: Sequence[str]) -> Row:
  against = np.array(
    [o for row in rows for o, use in zip(row['opposites'], row['uses'], strict=True) if use == 'kept'], str
  )
  return {name: share(right[against == name]) for name in opposites}


def _positions(odds: np.ndarray) -> Row:
  """How the pairwise ranker follows the position instead of the reply: odds [pairs, 2] of the first, (A) then (B)."""
  if not len(odds):
    return {'swap_consistency': None, 'position_bias': None, 'prefers_a': None}
  same = (odds[:, 0] > 0) == (odds[:, 1] > 0)
  prefers_a = np.concatenate([odds[:, 0] > 0, odds[:, 1] < 0])
  return {
    'swap_consistency': float(same.mean()),
    'position_bias': float(1 - same.mean()),
    'prefers_a': float(prefers_a.mean()),
  }


def _told_from_chance(audit: Row) -> bool:
  return audit['choosing'] is not None and audit['choosing']['low'] > 0.5


# ---- choices, made on the choosing pairs ----


def _choose(wanted: str, overall: Row) -> tuple[str, str]:
  accuracy = {name: (overall[name]['choosing'] or {'mean': 0.0})['mean'] for name in RANKERS}
  figures = ', '.join(f'{name} {value:.2f}' for name, value in accuracy.items())
  if wanted != 'auto':
    return wanted, f'named in the config; accuracy on the choosing pairs: {figures}'
  best = max(accuracy, key=lambda name: accuracy[name])
  return best, f'best accuracy on the choosing pairs: {figures}'


def length_treatment(rows: Sequence[Row]) -> tuple[str, str]:
  """Per token or whole reply: by accuracy on the choosing pairs, then by how little the score follows the length."""
  choosing = np.concatenate([np.tile(np.array(row['uses'], str) == 'choosing', 2) for row in rows])
  ratio, tokens = (np.concatenate([row['examples'][name] for row in rows]) for name in ('ratio', 'tokens'))
  accuracy, follows = {}, {}
  for length in _LENGTHS:
    right = written_margins(rows, 'likelihood', 'choosing', length) > 0
    accuracy[length] = float(right.mean()) if len(right) else 0.0
    follows[length] = abs(correlation(treat_length(ratio, tokens, length)[choosing], tokens[choosing]) or 0.0)
  best = min(_LENGTHS, key=lambda length: (-round(accuracy[length], 2), follows[length]))
  figures = '; '.join(f'{n} {accuracy[n]:.2f} right, |r| with length {follows[n]:.2f}' for n in _LENGTHS)
  return best, f'on the choosing pairs {figures}'


def fit_temperature(margins: np.ndarray) -> float:
  """The tau that minimises the log-loss of sigmoid(margin / tau) where the first is always right.

  The loss is convex in 1 / tau; a grid is enough for one number and cannot fail.
  """
  if not len(margins):
    return 1.0
  scale = float(np.abs(margins).mean()) or 1.0
  grid = scale * np.geomspace(0.05, 20, 241)
  losses = np.logaddexp(0, -margins[None] / grid[:, None]).mean(1)
  return float(grid[losses.argmin()])


def _stop_if_blind(config: Any, ranker: str, choosing: Row | None) -> None:
  if choosing is None and config.minimum_accuracy > 0:
    raise UserError('rankings: the character has no choosing pairs, so its ranker cannot be judged; write some')
  if choosing is not None and choosing['low'] < config.minimum_accuracy:
    raise UserError(
      f'rankings: the {ranker} ranker is right on {choosing["mean"]:.2f} of {choosing["n"]} choosing pairs '
      f'(95% interval from {choosing["low"]:.2f}, wanted {config.minimum_accuracy}): it would train noise. Reword '
      'traits and examples, take a larger model, or lower config.rankings.minimum_accuracy; see rankings/audit.json'
    )


# ---- ranking ----


def _grouped(asked: Sequence[Row], drawn: Sequence[Row]) -> dict[str, list[Group]]:
  """The replies to each message that has two or more, by trait."""
  by_message: dict[str, list[Row]] = defaultdict(list)
  for row in drawn:
    by_message[row['message']].append(row)
  texts = {row['id']: row for row in asked}
  groups: dict[str, list[Group]] = defaultdict(list)
  for name, rows in by_message.items():
    if len(rows) > 1:
      answers = [Answer(texts[name]['text'], row['text'], row['finish'] == 'stop') for row in rows]
      groups[texts[name]['trait']].append((answers, [row['id'] for row in rows]))
  return groups


def _rank(session: Session, groups: Mapping[str, Sequence[Group]], settings: Settings, ranker: str) -> list[Row]:
  config = session.config.rankings
  ranked = []
  with Progress('rankings', sum(map(len, groups.values())), 'messages') as bar:
    for trait in session.character.traits:

      def make(items: Sequence[Group], _: int, trait: Trait = trait) -> list[Row]:
        answers = [answer for group, _ in items for answer in group]
        scores = iter(RANKERS[ranker](session.model, trait, answers, settings))
        found = [{name: round(float(next(scores)), 6) for name in ids} for _, ids in items]
        finite = [{name: score for name, score in each.items() if math.isfinite(score)} for each in found]
        return [
          {'message': ids[0].split('/')[0], 'replies': list(each), 'scores': list(each.values())}
          for (_, ids), each in zip(items, finite, strict=True)
          if len(each) > 1
        ]

      ranked += chunks(
        session, 'rankings', f'rank-{trait.id}', groups[trait.id], config.messages_per_chunk, make, bar,
        of=[ranker, settings.length, prompts.seen(trait)],
      )  # fmt: skip
  left_out = {name for some in groups.values() for _, ids in some for name in ids}
  left_out -= {name for row in ranked for name in row['replies']}
  if len(left_out) > config.skipped_replies:
    raise UserError(
      f'rankings: scores of {len(left_out)} replies are not finite numbers (or leave a message with one reply), the '
      f'first of them {min(left_out)} in replies/replies.jsonl, and at most {config.skipped_replies} may be left out '
      '(config.rankings.skipped_replies); the weights at config.model.path may be damaged, or '
      'config.model.compute_dtype too narrow for them'
    )
  return ranked


def control_length(ranked: Sequence[Row], by_id: dict[str, Row], limit: float) -> Row:
  """Adds `controlled` scores to each ranked message: without what a reply's length alone explains.

  Where the correlation of score and length among the replies to one message exceeds `limit`, the least-squares effect
  of the token count, and of having been cut off, is taken out of the scores. Else a preference model learns to count:
  in this project's first trial its reward followed length at r = -0.7.
  """
  scores, features = [], []
  for row in ranked:
    rows = [by_id[name] for name in row['replies']]
    found = np.array([[r['tokens'], r['finish'] == 'length'] for r in rows], np.float64)
    features.append(found - found.mean(0))
    scores.append(np.array(row['scores']) - np.mean(row['scores']))
  every, score = np.concatenate([*features, np.zeros((0, 2))]), np.concatenate([*scores, np.zeros(0)])
  before = correlation(score, every[:, 0]) or 0.0
  effect = np.linalg.lstsq(every, score, rcond=None)[0] if abs(before) > limit else np.zeros(2)
  for row, found in zip(ranked, features, strict=True):
    row['controlled'] = np.round(np.array(row['scores']) - found @ effect, 6).tolist()
  after = correlation(score - every @ effect, every[:, 0]) or 0.0
  return {'before': before, 'after': after, 'per_token': float(effect[0]), 'cut_off': float(effect[1])}


def _sampled_audit(ranked: Sequence[Row], by_id: dict[str, Row]) -> Row:
  """Of the ranked replies themselves: how often the longer one wins, and how the conditions compare.

  Shown against plain or opposed is circular for the likelihood ranker: a reply drawn with the trait shown has a
  higher ratio almost by definition. It is recorded as such.
  """
  longer, wins = [], defaultdict(list)
  for row in ranked:
    for (i, a), (j, b) in itertools.combinations(enumerate(row['replies']), 2):
      first, second = by_id[a], by_id[b]
      ahead = row['scores'][i] > row['scores'][j]
      if first['tokens'] != second['tokens']:
        longer.append(ahead == (first['tokens'] > second['tokens']))
      if first['condition'] != second['condition']:
        wins[f'{first["condition"]} over {second["condition"]}'].append(ahead)
  scores = [score for row in ranked for score in row['scores']]
  tokens = [by_id[name]['tokens'] for row in ranked for name in row['replies']]
  return {
    'longer_wins': float(np.mean(longer)) if longer else None,
    'length_correlation': correlation(scores, tokens),
    'circular': {name: float(np.mean(values)) for name, values in wins.items()},
  }


def load(session: Session) -> list[Row]:
  """The rankings of this run, which a person may have edited.

  Raises:
    UserError: naming the line and the field.
  """
  path = session.folder('rankings') / 'rankings.jsonl'
  rows = numbered_rows(path, {'message': str, 'replies': list, 'probabilities': list})
  known = {row['id']: row['message'] for row in replies.load(session)}
  for line, row in rows:
    names, table = row['replies'], row['probabilities']
    lost = [name for name in names if not isinstance(name, str) or known.get(name) != row['message']]
    if lost or not names:
      raise UserError(f'{path}:{line}: field replies: {lost[:1]} is no reply to {row["message"]!r}; remove the line')
    square = [each for each in table if isinstance(each, list) and len(each) == len(names)]
    numbers = [value for each in square for value in each if type(value) in (int, float) and 0 <= value <= 1]
    if len(table) != len(names) or len(numbers) != len(names) ** 2:
      raise UserError(
        f'{path}:{line}: field probabilities must hold, for {len(names)} replies, as many lists of as many numbers '
        'from 0 to 1; remove the line'
      )
  return [row for _, row in rows]
