"""What people said of the replies, blind, and how far the held-out judge and they themselves agree.

Everything rests on verdicts that say which of two replies is more like the trait. A message is what intervals are over:
verdicts on the same message are averaged, or resampled together.
"""

import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from charjax.report import figures, words
from charjax.report.figures import Figure, Table
from charjax.report.read import Estimate, Run, estimate, printable
from charjax.report.words import percent, spoken
from charjax.review.pairs import OPPONENTS, Pair, pairs
from charjax.stages import statistics

_ALL = 'all'
_AGAINST = {'base': 'the base model', 'prompted': 'the base model shown the statement'}


@dataclasses.dataclass(frozen=True)
class Verdict:
  """One verdict that stands, on a pair of this run's replies.

  Attributes:
    side: 'left' or 'right', 'tie', or 'skip' (cannot tell).
    outcome: whose reply stood on that side: 'trained', or 'other' for the one it was to beat; a tie or skip as it is.
  """

  pair: Pair
  reviewer: str
  side: str
  outcome: str
  note: str

  @property
  def decided(self) -> bool:
    return self.outcome in ('trained', 'other')

  @property
  def judge(self) -> str | None:
    """What the held-out judge says of the same two replies; None where it does not, or finds them equal."""
    return _better(self.pair.trained.score, self.pair.other.score)

  @property
  def ranker(self) -> str | None:
    """The same of the likelihood ranker, of replies that it read."""
    return _better(self.pair.trained.likelihood, self.pair.other.likelihood)


def _better(ours: float | None, theirs: float | None) -> str | None:
  if ours is None or theirs is None or ours == theirs:
    return None
  return 'trained' if ours > theirs else 'other'


@dataclasses.dataclass(frozen=True)
class Note:
  """What a reviewer noted with a verdict; `of` says who, on which trait, and the verdict."""

  of: str
  prompt: str
  text: str


@dataclasses.dataclass(frozen=True)
class People:
  """The section of the report.

  Attributes:
    wins: how often people prefer the trained model's reply to base's, by trait.
  """

  sentences: Sequence[str]
  wins: Mapping[str, Estimate | None]
  figures: Sequence[Figure]
  agreement: Table | None
  reviewers: Table | None
  notes: Sequence[Note]


def people(run: Run, rows: Sequence[Mapping[str, Any]]) -> People | None:
  """The section about the rows of `charjax.review.verdicts.read_all`; None where nobody has judged."""
  if not rows:
    return None
  asked = pairs(run)
  found = _verdicts(asked, rows)
  traits = _traits(run, asked)
  wins = {against: _wins(found, traits, against) for against in OPPONENTS}
  drawn = [_win_figure(against, *wins[against]) for against in OPPONENTS]
  agreement = {trait: _Agreement.of(_of(found, trait)) for trait in (_ALL, *traits)}
  drawn += [
    figures.by_trait(
      'People and the held-out judge, beyond chance',
      'Cohen\u2019s kappa',
      {trait: row.judge.kappa for trait, row in agreement.items() if trait != _ALL},
      note='1 is complete agreement, 0 what two raters with the same habits would reach by chance.',
    )
  ]
  return People(
    sentences=_sentences(found, len(rows) - len(found), agreement[_ALL]),
    wins=wins['base'][0],
    figures=figures.present(drawn),
    agreement=_agreement_table(agreement),
    reviewers=_reviewers_table(found),
    notes=_notes(found),
  )


def wins_by_people(run: Run, rows: Sequence[Mapping[str, Any]]) -> dict[str, Estimate | None]:
  """How often people prefer the trained model's reply to base's, by trait, of rows as `people` takes them."""
  asked = pairs(run)
  return _wins(_verdicts(asked, rows), _traits(run, asked), 'base')[0]


def _traits(run: Run, asked: Sequence[Pair]) -> list[str]:
  """Those that pairs are on, in the run's order."""
  return [str(trait['id']) for trait in run.traits if any(pair.trait == trait['id'] for pair in asked)]


def _verdicts(asked: Sequence[Pair], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
  """The verdicts on replies that the evaluation holds now."""
  by_id = {pair.id: pair for pair in asked}
  found = []
  for row in rows:
    pair, side = by_id.get(row['pair']), row['verdict']
    if pair is not None:
      outcome = side if side in ('tie', 'skip') else 'trained' if row[side] == 'trained' else 'other'
      found.append(Verdict(pair, printable(row['reviewer']), side, outcome, printable(row['note'])))
  return found


def _of(found: Sequence[Verdict], trait: str) -> list[Verdict]:
  return [verdict for verdict in found if trait in (_ALL, verdict.pair.trait)]


def _share(hits: Iterable[tuple[Verdict, float]]) -> Estimate | None:
  """A share with Wilson's interval over messages; of several verdicts on a message the mean counts."""
  by_message: dict[str, list[float]] = {}
  for verdict, hit in hits:
    by_message.setdefault(verdict.pair.message, []).append(hit)
  return estimate(statistics.share([float(np.mean(values)) for values in by_message.values()]))


# ---- who wins ----


def _wins(
  found: Sequence[Verdict], traits: Sequence[str], against: str
) -> tuple[dict[str, Estimate | None], dict[str, Estimate | None]]:
  """How often the trained model's reply wins, by trait: as people say, and as the judge says of the same pairs."""
  score = {'trained': 1.0, 'tie': 0.5, None: 0.5, 'other': 0.0}
  by_people, by_judge = {}, {}
  for trait in traits:
    told = [v for v in _of(found, trait) if v.pair.against == against and v.outcome != 'skip']
    by_people[trait] = _share((v, score[v.outcome]) for v in told)
    by_judge[trait] = _share((v, score[v.judge]) for v in told if v.pair.trained.score is not None)
  return by_people, by_judge


def _win_figure(
  against: str, by_people: Mapping[str, Estimate | None], by_judge: Mapping[str, Estimate | None]
) -> Figure | None:
  return figures.paired(
    f'The trained model beats {_AGAINST[against]}',
    'share of pairs',
    ('people', 'trained', by_people),
    ('held-out judge', 'judge', by_judge),
    note='A tie is half a win. Dots: people, blind. Diamonds: the held-out judge on the same pairs.',
  )


# ---- agreement ----


@dataclasses.dataclass(frozen=True)
class _Beside:
  """People beside a model, on pairs that both decide.

  Attributes:
    accuracy: share of decided verdicts that the model shares.
    base_rate: what always giving the reviewers' more frequent answer would share.
    kappa: agreement beyond chance.
  """

  accuracy: Estimate | None
  base_rate: float | None
  kappa: Estimate | None

  @classmethod
  def of(cls, found: Sequence[Verdict], says: Callable[[Verdict], str | None]) -> '_Beside':
    both = [(v, told) for v in found if v.decided and (told := says(v)) is not None]
    kappa = statistics.kappa([v.outcome for v, _ in both], [t for _, t in both], [v.pair.message for v, _ in both])
    return cls(_share((v, v.outcome == t) for v, t in both), _base_rate([v for v, _ in both]), estimate(kappa))

  def cells(self) -> tuple[str, str, str]:
    base = '\u2013' if self.base_rate is None else percent(self.base_rate)
    return words.cell(self.accuracy, True), base, words.cell(self.kappa)


@dataclasses.dataclass(frozen=True)
class _Agreement:
  """Verdicts, how many of them decide nothing, and how far the judge and the ranker share the others."""

  verdicts: int
  ties: int
  skips: int
  judge: _Beside
  ranker: _Beside

  @classmethod
  def of(cls, found: Sequence[Verdict]) -> '_Agreement':
    said = Counter(v.outcome for v in found)
    beside = (_Beside.of(found, says) for says in (lambda v: v.judge, lambda v: v.ranker))
    return cls(len(found), said['tie'], said['skip'], *beside)


def _base_rate(found: Sequence[Verdict]) -> float | None:
  """The share of the more frequent answer; messages count alike, as in the accuracy."""
  by_message: dict[str, Counter[str]] = defaultdict(Counter)
  for verdict in found:
    by_message[verdict.pair.message][verdict.outcome] += 1
  outcomes = {outcome for counts in by_message.values() for outcome in counts}
  shares = [[counts[o] / counts.total() for counts in by_message.values()] for o in outcomes]
  return max((sum(some) / len(some) for some in shares), default=None)


def _agreement_table(agreement: Mapping[str, _Agreement]) -> Table | None:
  ranked = any(row.ranker.accuracy for row in agreement.values())
  rows = [
    (
      spoken(trait),
      str(row.verdicts),
      str(row.ties),
      str(row.skips),
      *row.judge.cells(),
      *(row.ranker.cells() if ranked else ()),
    )
    for trait, row in agreement.items()
    if row.verdicts
  ]
  head = ('trait', 'verdicts', 'ties', 'cannot tell', 'judge agrees', 'base rate', 'kappa')
  more = ('ranker agrees', 'its base rate', 'its kappa') if ranked else ()
  return Table((*head, *more), rows) if rows else None


def _reviewers_table(found: Sequence[Verdict]) -> Table | None:
  """Each two reviewers on the pairs that both judged; a tie is an answer like the others."""
  by_reviewer: dict[str, dict[str, Verdict]] = {}
  for verdict in found:
    if verdict.outcome != 'skip':
      by_reviewer.setdefault(verdict.reviewer, {})[verdict.pair.id] = verdict
  rows = []
  for (one, first), (other, second) in itertools.combinations(by_reviewer.items(), 2):
    common = [(first[name], second[name]) for name in first if name in second]
    if not common:
      rows.append((f'{one} and {other}', '0', '\u2013', '\u2013'))
      continue
    share = _share((a, a.outcome == b.outcome) for a, b in common)
    kappa = statistics.kappa(
      [a.outcome for a, _ in common], [b.outcome for _, b in common], [a.pair.message for a, _ in common]
    )
    rows.append((f'{one} and {other}', str(len(common)), words.cell(share, True), words.cell(estimate(kappa))))
  return Table(('reviewers', 'pairs that both judged', 'the same verdict', 'kappa'), rows) if rows else None


# ---- words ----


def _sentences(found: Sequence[Verdict], earlier: int, agreement: _Agreement) -> list[str]:
  names = sorted({verdict.reviewer for verdict in found})
  count = len(found)
  sentences = [
    f'{count} verdict{"" if count == 1 else "s"} by {words.together(names)}, who did not know which reply was whose.'
    if found
    else 'None of the verdicts is on replies that this evaluation holds.'
  ]
  for name, beside in (('held-out judge', agreement.judge), ('likelihood ranker', agreement.ranker)):
    if beside.accuracy is not None and beside.base_rate is not None:
      told = f' Beyond chance that is a kappa of {words.cell(beside.kappa)}.' if beside.kappa is not None else ''
      right = words.cell(beside.accuracy, True)
      sentences.append(
        f'The {name} gives the answer that people gave in {right} of the pairs that both decide; the base rate, always '
        f'giving people\u2019s more frequent answer, is {percent(beside.base_rate)}.{told}'
      )
  left = _share((v, v.side == 'left') for v in found if v.decided)
  if left is not None:
    uneven = '; there is a liking for one side' if left.side_of(0.5) else ''
    sentences.append(f'People chose the reply on the left in {words.cell(left, True)} of decided pairs{uneven}.')
  if agreement.ranker.accuracy is None and agreement.judge.accuracy is not None:
    sentences.append(
      'The ranker, from which the held-out judge learned, read none of these replies: a run with likelihood among '
      'config.behaviour.sets has it read them.'
    )
  if earlier:
    sentences.append(
      f'{earlier} verdict{" is" if earlier == 1 else "s are"} on replies of an earlier evaluation and not counted.'
    )
  return sentences


def _notes(found: Sequence[Verdict]) -> list[Note]:
  said = {'tie': 'about the same', 'skip': 'cannot tell', 'trained': 'for trained'}
  return [
    Note(
      f'{v.reviewer}, {spoken(v.pair.trait)}, ' + said.get(v.outcome, f'for {words.CONDITION_NAMES[v.pair.against]}'),
      v.pair.prompt,
      v.note,
    )
    for v in found
    if v.note
  ]
