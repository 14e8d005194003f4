"""Runs side by side: which are one and the same but for their seed, and how far two of them are apart."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from charjax import defaults
from charjax.report.people import wins_by_people
from charjax.report.read import STAGES, Estimate, Run, cut_off, estimate, finite, listed, read_run, seconds, section
from charjax.review import verdicts
from charjax.stages import statistics
from charjax.workdir import fingerprint

_SEEDS = 'seed', 'policy.seed'
# Measured on what the character's file or the neutral one says, which another seed leaves as it is.
_SAME_ITEMS = ('margin', 'log_prob', 'accuracy')
# What of each tells what training did.
MEASURES = {'margin': 'delta', 'win_rate': 'trained', 'win_rate_vs_prompted': 'trained'}


@dataclasses.dataclass(frozen=True)
class Column:
  """One run, or several that differ by their seed alone."""

  name: str
  runs: Sequence[Run]
  folders: Sequence[epath.Path]
  judged: Sequence[Mapping[str, Estimate | None]]  # by people, of each run: its wins against base by trait

  @property
  def first(self) -> Run:
    return self.runs[0]

  @property
  def evaluated(self) -> bool:
    return bool(section(self.first.summary, 'traits'))

  @property
  def traits(self) -> list[str]:
    """Those that it was measured on; of one that is not evaluated, those that it is about."""
    return list(section(self.first.summary, 'traits')) or [str(trait['id']) for trait in self.first.traits]

  @property
  def rewarded(self) -> list[str]:
    """The traits that its policy was rewarded for: those that it names, or all, of a weight above 0, and told from
    chance by the preference model unless unproven ones are kept."""
    policy = section(self.first.config, 'config', 'policy')
    weights = {trait['id']: trait.get('weight', 1) for trait in self.first.traits}
    chosen = policy.get('traits')
    left_out = [] if policy.get('keep_unproven_traits') else listed(self.first.preference, 'left_out')
    return [
      trait
      for trait in self.traits
      if (not chosen or trait in chosen) and weights.get(trait, 1) and trait not in left_out
    ]

  def figure(self, *path: str) -> Estimate | None:
    """What stands at `path` of the summary; of several runs pooled, and None where one of them lacks it."""
    return self._pooled([_figure(run.summary, *path) for run in self.runs], path[-2] in _SAME_ITEMS)

  def behaviour(self, *paths: Sequence[str]) -> Estimate | None:
    """The same of what the behaviour stage found; of several paths the mean, as `mean` takes it."""
    authored = any(path[0] in ('side_effects', 'preference') or path[2] == 'unrelated' for path in paths)
    return self._pooled(
      [mean_over([_figure(run.behaviour, *path) for path in paths]) for run in self.runs], same_items=authored
    )

  def blind(self, trait: str) -> Estimate | None:
    """How often people who judged blind prefer the trained model's reply to the starting model's."""
    return _as_share(self._pooled([wins.get(trait) for wins in self.judged], same_items=False))

  def _pooled(self, found: Sequence[Estimate | None], same_items: bool) -> Estimate | None:
    known = [value for value in found if value is not None]
    if not known or len(known) < len(found):
      return None
    # With the same seed, what differs is the policy's: messages and the starting model's replies are the same.
    same = same_items or len({run.config.get('seed') for run in self.runs}) == 1
    return estimate(statistics.pool([_row(value) for value in known], same))

  def margin(self, trait: str) -> Estimate | None:
    """By how much training moved the margin on the trait's kept pairs."""
    return self.figure('traits', trait, 'margin', 'delta')

  def wins(self, trait: str) -> Estimate | None:
    """How often the held-out judge prefers the trained model's reply to the starting model's."""
    return _as_share(self.figure('traits', trait, 'win_rate', 'trained'))

  def mean(self, traits: Sequence[str], measure: str) -> Estimate | None:
    """The mean over traits of a measure in `MEASURES`; None where one was not measured. The traits of one run are
    independent of each other; of several runs each has one mean, since a seed's luck is in all its traits."""
    found = [
      mean_over([_figure(run.summary, 'traits', trait, measure, MEASURES[measure]) for trait in traits])
      for run in self.runs
    ]
    pooled = self._pooled(found, measure in _SAME_ITEMS)
    return pooled if measure == 'margin' else _as_share(pooled)

  def seconds(self) -> dict[str, float]:
    """What each stage took; of several runs the mean, over those in which it was not cut off if there are any."""
    partly = self.cut_off()
    found: dict[str, list[float]] = defaultdict(list)
    for run in self.runs:
      for stage, value in seconds(run).items():
        if stage in partly or stage not in cut_off(run):
          found[stage].append(value)
    return {stage: sum(values) / len(values) for stage, values in found.items()}

  def cut_off(self) -> list[str]:
    """The stages that were cut off in all runs that have them: of their time, what was before is not known."""
    having = {stage: [run for run in self.runs if stage in seconds(run)] for stage in STAGES}
    return [stage for stage, some in having.items() if some and all(stage in cut_off(run) for run in some)]

  def kl(self) -> Estimate | None:
    """KL(trained || starting), in nats a token of the trained model's replies to held-out messages, drawn as the
    evaluation draws."""
    return self.figure('distance', 'kl', 'trained')

  def tokens(self, which: str) -> float | None:
    """Of replies that the policy drew, or read to learn from, in all its steps, neutral ones apart; of several runs the
    mean."""
    found = [[finite(row.get(f'tokens_{which}')) for row in run.policy_metrics] for run in self.runs]
    told = [[value for value in values if value is not None] for values in found]
    return sum(map(sum, told)) / len(told) if told == found and all(told) else None


# ---- reading ----


def read_columns(folders: Sequence[epath.Path]) -> list[Column]:
  """Reads run folders; those that differ by their seed, and by that alone, are pooled where the first of them stands.

  Raises:
    UserError: one is no run folder, or a file in it cannot be read.
  """
  runs = [read_run(folder) for folder in folders]
  judged = [wins_by_people(run, verdicts.read_all(folder)) for run, folder in zip(runs, folders, strict=True)]
  names = dict(zip(map(str, folders), _names(folders), strict=True))
  alike: dict[str, list[int]] = defaultdict(list)
  for place, run in enumerate(runs):
    alike[_but_for_seed(run)].append(place)
  columns = []

  def column(name: str, places: Sequence[int]) -> Column:
    return Column(name, [runs[p] for p in places], [folders[p] for p in places], [judged[p] for p in places])

  for places in alike.values():
    seeds = [_seeds(runs[place]) for place in places]
    # The same run twice is no second measurement, and policies of several data are not independent of each other.
    if len(set(seeds)) < len(seeds) or all(len(set(some)) > 1 for some in zip(*seeds, strict=True)):
      columns += [column(names[str(folders[place])], [place]) for place in places]
      continue
    several = [names[str(folders[place])] for place in places]
    name = several[0] if len(several) == 1 else f'{_common(several)} ({len(several)} seeds)'
    if name in {other.name for other in columns}:  # Others, whose names begin alike.
      name = f'{several[0]} ({len(several)} seeds)'
    columns.append(column(name, places))
  return columns


def settings(run: Run) -> dict[str, Any]:
  """Every field of a run's config, dotted; those that its version did not know yet as they are by default."""

  def flat(value: Any, prefix: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
      return {name: found for key in value for name, found in flat(value[key], f'{prefix}.{key}').items()}
    return {prefix[1:]: list(value) if isinstance(value, tuple) else value}

  return flat(defaults.get_config().to_dict(), '') | flat(section(run.config, 'config'), '')


def seed_of(run: Run) -> str:
  """The seed, and what the policy adds to it."""
  seed, more = _seeds(run)
  return f'{seed}+{more}' if more else str(seed)


def _seeds(run: Run) -> tuple[Any, Any]:
  found = settings(run)
  return found[_SEEDS[0]], found[_SEEDS[1]]


def _but_for_seed(run: Run) -> str:
  """What is alike in runs that are pooled: all settings but the seed, the character, and that they are evaluated."""
  fields = {name: value for name, value in settings(run).items() if name not in (*_SEEDS, 'character.path')}
  return fingerprint([fields, run.character, run.traits, list(section(run.summary, 'traits'))])


def _names(folders: Sequence[epath.Path]) -> list[str]:
  """The last parts of each path, as many as tell all of them apart."""
  parts = [str(folder.resolve() if '://' not in str(folder) else folder).split('/') for folder in folders]
  for count in range(1, max(map(len, parts)) + 1):
    names = ['/'.join(some[-count:]) for some in parts]
    if len(set(names)) == len(names):
      break
  return names


def _common(names: Sequence[str]) -> str:
  """What the names of several seeds begin with, without a word for the seed."""
  shortest = min(names, key=len)
  same = next((i for i, letter in enumerate(shortest) if any(name[i] != letter for name in names)), len(shortest))
  return re.sub(r'(?i)[\W_]*(seed|s)?[\W_]*$', '', shortest[:same]) or names[0]


# ---- differences ----


def margin_apart(one: Column, other: Column, trait: str) -> Estimate | None:
  """By how much `other` moved a trait's margin more than `one` did: pair by pair where both are one run with the same
  pairs, and else as if they were measured apart."""
  moved = [_moved(column, trait) for column in (one, other)]
  if moved[0] and moved[0].keys() == moved[1].keys():
    return estimate(statistics.interval([moved[1][pair] - moved[0][pair] for pair in moved[0]]))
  return apart(one.margin(trait), other.margin(trait))


def apart(one: Estimate | None, other: Estimate | None) -> Estimate | None:
  """By how much the second is above the first, of figures that are independent of each other."""
  if one is None or other is None:
    return None
  return estimate(statistics.combine([(1.0, _row(other)), (-1.0, _row(one))]))


def head_to_head(one: Column, other: Column, trait: str) -> Estimate | None:
  """How often the held-out judge prefers `other`'s reply to `one`'s, message by message; None unless both are one run
  each, with the same judge and the same messages."""
  if any(len(column.runs) != 1 for column in (one, other)) or _asked(one.first) != _asked(other.first):
    return None
  first, second = (_scores(column.first, trait) for column in (one, other))
  if not first or first.keys() != second.keys():
    return None
  hits = []
  for message, scores in first.items():
    a, b = np.array(scores)[:, None], np.array(second[message])[None]
    hits.append(float(((b > a) + 0.5 * (b == a)).mean()))
  each = [min(len(scores) for scores in some.values()) for some in (first, second)]
  return estimate(statistics.share(hits, statistics.comparisons(*each)))


def mean_margin_apart(one: Column, other: Column, traits: Sequence[str]) -> Estimate | None:
  """The same in the mean over traits."""
  if len(one.runs) == len(other.runs) == 1:
    return mean_over([margin_apart(one, other, trait) for trait in traits])
  return apart(one.mean(traits, 'margin'), other.mean(traits, 'margin'))


def mean_over(values: Sequence[Estimate | None]) -> Estimate | None:
  """The mean of figures that are independent of each other; None where there are none, or one was not measured."""
  known = [value for value in values if value is not None]
  if not known or len(known) < len(values):
    return None
  return estimate(statistics.combine([(1 / len(known), _row(value)) for value in known]))


def _figure(found: Mapping[str, Any], *path: str) -> Estimate | None:
  *parents, last = path
  return estimate(section(found, *parents).get(last))


def _moved(column: Column, trait: str) -> dict[str, float]:
  """By pair, trained less base; of several runs nothing."""
  rows = column.first.margins if len(column.runs) == 1 else []
  found = {}
  for row in rows:
    base, trained = finite(row.get('base')), finite(row.get('trained'))
    if row.get('trait') == trait and base is not None and trained is not None:
      found[str(row.get('pair'))] = trained - base
  return found


def _asked(run: Run) -> tuple[Any, ...]:
  """What the messages and the judge of a run were, by their contents; of a run that does not say, nothing else's."""
  products = [section(run.stages, stage, 'products') for stage in ('messages', 'preference')]
  return tuple(tuple(sorted(files.items())) or (id(run),) for files in products)


def _scores(run: Run, trait: str) -> dict[str, list[float]]:
  """The judge's scores of the trained model's replies, by message."""
  found: dict[str, list[float]] = defaultdict(list)
  for row in run.evaluation_replies:
    score = finite(row.get('score'))
    if row.get('trait') == trait and row.get('condition') == 'trained' and score is not None:
      found[str(row.get('message'))].append(score)
  return found


def _row(value: Estimate) -> statistics.Interval:
  return dataclasses.asdict(value)


def _as_share(value: Estimate | None) -> Estimate | None:
  """An interval of a share keeps to what shares may be."""
  if value is None or value.low is None or value.high is None:
    return value
  return dataclasses.replace(value, low=max(0.0, value.low), high=min(1.0, value.high))
