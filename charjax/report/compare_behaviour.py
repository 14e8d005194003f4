"""Several runs side by side beyond what every evaluation measures: probes, people's verdicts, the behaviour stage."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from charjax.report import figures, words
from charjax.report.columns import Column
from charjax.report.figures import Figure
from charjax.report.read import Estimate, listed, section
from charjax.report.words import MINUS, spoken

_RATIO = 'nats a token'


@dataclasses.dataclass(frozen=True)
class Beside:
  """A figure of a trait that some runs have.

  Attributes:
    head: what a column of it is called.
    of: it, of a column of runs and a trait.
    share: whether it is one, an even chance being no effect.
  """

  head: str
  title: str
  unit: str
  of: Callable[[Column, str], Estimate | None]
  share: bool = False

  def figure(self, columns: Sequence[Column], trait: str) -> Figure | None:
    values = {column.name: self.of(column, trait) for column in columns}
    return figures.by_name('run', self.title, self.unit, values, 0.5 if self.share else 0.0, self.share)


BESIDE = (
  Beside(
    f'likelihood ratio, trained {MINUS} base',
    f'Likelihood ratio of replies: trained {MINUS} base',
    _RATIO,
    lambda column, trait: column.behaviour(('likelihood', trait, 'delta')),
  ),
  Beside(
    'ratio on unrelated requests',
    f'Likelihood ratio on unrelated requests: trained {MINUS} base',
    _RATIO,
    lambda column, trait: column.behaviour(('rigidity', trait, 'unrelated', 'likelihood', 'delta')),
  ),
  Beside(
    f'probes, trained {MINUS} base',
    f'Margin on probes: trained {MINUS} base',
    words.measure('margin').unit,
    lambda column, trait: column.figure('probes', trait, 'margin', 'delta'),
  ),
  Beside('wins by people', 'Wins against base by people, blind', 'share of pairs', Column.blind, share=True),
)


def matrices(columns: Sequence[Column], traits: Sequence[str]) -> list[Figure]:
  """A row a run: other forms of the prompt in the mean over `traits`, and which ways to be are preferred; what no run
  has is left out."""
  return figures.present([
    figures.heat_map(
      f'Under other forms of the prompt, by likelihood ratio: trained {MINUS} base, mean over traits',
      _RATIO, ('run', 'form'), {column.name: _by_form(column, traits) for column in columns},
    ),
    figures.heat_map(
      f'What it would rather be: trained {MINUS} base', 'Bradley-Terry strength, in logits', ('run', 'way to be'),
      {column.name: _preferred(column) for column in columns},
    ),
  ])  # fmt: skip


def habits(columns: Sequence[Column]) -> list[Figure]:
  """How traits grow or fade in a conversation, and habits; what no run has is left out."""
  change = {column.name: column.behaviour(('drift', 'last_less_first', 'likelihood')) for column in columns}
  title = 'Traits from the first to the last turn, by likelihood ratio'
  drawn = [figures.by_name('run', title, _RATIO, change, note='Of all traits of each run together.')]
  names = dict.fromkeys(name for column in columns for name in section(column.first.behaviour, 'side_effects'))
  for name in names:
    measure = words.measure(name)
    values = {column.name: column.behaviour(('side_effects', name, 'delta')) for column in columns}
    title = f'{measure.title}: trained {MINUS} base'
    drawn.append(figures.by_name('run', title, measure.unit, values, 0.0, measure.share))
  return figures.present(drawn)


def _by_form(column: Column, traits: Sequence[str]) -> dict[str, Estimate | None]:
  """By form of the prompt, the mean over traits; '' is the message as it is."""
  found = section(column.first.behaviour, 'robustness')
  forms = dict.fromkeys(name for forms in found.values() for name in section(forms))
  return {
    form or 'the message alone': column.behaviour(
      *(('robustness', trait, form, 'likelihood', 'delta') for trait in traits)
    )
    for form in forms
  }


def _preferred(column: Column) -> dict[str, Estimate | None]:
  """By way to be, how much more training made the model choose it."""
  options = listed(section(column.first.behaviour, 'preference'), 'options')
  names = [str(option['id']) for option in options if isinstance(option, Mapping) and 'id' in option]
  return {
    spoken(name.replace('/', ': ')): column.behaviour(('preference', 'strength', name, 'delta')) for name in names
  }
