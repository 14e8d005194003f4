"""What training one trait does to the others: runs that reward one trait each, and runs that reward all but one."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from charjax.report import figures, words
from charjax.report.columns import Column, head_to_head, margin_apart
from charjax.report.figures import Figure
from charjax.report.read import Estimate
from charjax.report.words import MINUS, spoken

Matrix = Mapping[str, Mapping[str, Estimate | None]]  # by what sets the run apart, then by the trait measured


@dataclasses.dataclass(frozen=True)
class Crosstalk:
  sentences: Sequence[str]
  figures: Sequence[Figure]


def crosstalk(columns: Sequence[Column]) -> Crosstalk | None:
  """The matrices of runs that were measured on the same traits; None without two that reward one trait each."""
  evaluated = [column for column in columns if column.evaluated]
  traits = max((column.traits for column in evaluated), key=len, default=[])
  evaluated = [column for column in evaluated if column.traits == traits]
  alone = _by_trait(evaluated, lambda column: column.rewarded)
  # One that none of them rewards, as that of weight 0, is measured alone.
  trained = [trait for trait in traits if any(trait in column.rewarded for column in evaluated)]
  without = _by_trait(evaluated, lambda column: [trait for trait in trained if trait not in column.rewarded])
  whole = next((column for column in evaluated if column.rewarded == trained), None)
  order = [trait for trait in traits if trait in alone]
  if len(order) < 2 or len(traits) < 2:
    return None
  margins = {trait: {other: alone[trait].margin(other) for other in traits} for trait in order}
  wins = {trait: {other: alone[trait].wins(other) for other in traits} for trait in order}
  found = [
    _figure('Trained alone: margin on kept pairs', f'trained {MINUS} base, nats per token', 'trained', margins),
    _figure('Trained alone: wins against base', 'share of replies', 'trained', wins, 0.5, share=True),
  ]
  left = [trait for trait in trained if trait in without] if len(trained) > 2 else []
  if left and whole:
    cost = {trait: {other: margin_apart(whole, without[trait], other) for other in traits} for trait in left}
    beaten = {trait: {other: head_to_head(whole, without[trait], other) for other in traits} for trait in left}
    found.append(_figure(f'Left out: margin, less that of {whole.name}', 'nats per token', 'left out', cost))
    found.append(
      _figure(f'Left out: wins against {whole.name}', 'share of replies', 'left out', beaten, 0.5, share=True)
    )
  return Crosstalk(_sentences(margins), [figure for figure in found if figure is not None])


def _by_trait(columns: Sequence[Column], traits: Callable[[Column], Sequence[str]]) -> dict[str, Column]:
  """By trait, the first run of which `traits` says that one alone."""
  found: dict[str, Column] = {}
  for column in columns:
    some = traits(column)
    if len(some) == 1:
      found.setdefault(some[0], column)
  return found


def _sentences(margins: Matrix) -> list[str]:
  others = [(trait, other, value) for trait, line in margins.items() for other, value in line.items()
            if value is not None and trait != other]  # fmt: skip
  own = [trait for trait, line in margins.items() if (value := line.get(trait)) is not None and value.side_of(0.0) == 1]
  said = f'Trained alone, {len(own)} of {len(margins)} traits rise clear of zero'
  sentences = [said + (f': {words.together([spoken(trait) for trait in own])}.' if own else '.')]
  clear = [entry for entry in others if entry[2].side_of(0.0)]
  told = [
    f'{spoken(trait)} {"raises" if value.mean > 0 else "lowers"} {spoken(other)} '
    f'({words.figure(value.mean, signed=True)}, {words.interval(value)})'
    for trait, other, value in clear
  ]
  said = f'Of {len(others)} effects of a trait on another {len(clear) or "none"} {"is" if len(clear) < 2 else "are"}'
  sentences.append(f'{said} clear of zero' + (f': {"; ".join(told)}.' if told else '.'))
  return sentences + words.by_chance(len(others))


def _figure(
  title: str, unit: str, kind: str, matrix: Matrix, reference: float = 0.0, share: bool = False
) -> Figure | None:
  """A matrix as a heat map around its reference; None where nothing was measured."""
  named = {spoken(trait): {spoken(other): value for other, value in line.items()} for trait, line in matrix.items()}
  return figures.heat_map(title, f'{unit}; rows: the trait {kind}', (kind, 'measured on'), named, reference, share)
