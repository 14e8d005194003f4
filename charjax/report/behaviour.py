"""Sections on what the behaviour stage found: a nudge or a rule, does it last, side effects, and what is preferred."""

from collections.abc import Mapping
from typing import Any

from charjax.report import figures, words
from charjax.report.figures import Figure, Table
from charjax.report.panels import Panel
from charjax.report.read import Estimate, Run, estimate, finite, listed, section
from charjax.report.words import MINUS, cell, spoken

_RATIO = 'nats a token'
_ORDER = (('own', 'its own messages', 'trained'), ('plain', 'plain style asked', 'prompted'),
          ('unrelated', 'unrelated requests', 'base'))  # fmt: skip


def _delta(metrics: Any, measure: str) -> Estimate | None:
  return estimate(section(metrics, measure).get('delta'))


def rigidity(run: Run) -> Panel:
  """Each trait where it is wanted, and where it is not."""
  found = section(run.behaviour, 'rigidity')
  ratios, judged = (
    [
      (name, look, {trait: _delta(section(groups, group), measure) for trait, groups in found.items()})
      for group, name, look in _ORDER
    ]
    for measure in ('likelihood', 'judge')
  )
  drawn = [
    figures.several(f'Trait in replies, by likelihood ratio: trained {MINUS} base', _RATIO, ratios),
    figures.several(f'The same by the held-out judge: trained {MINUS} base', 'spreads of its score', judged,
                    note='The judge was fitted to replies to the trait\u2019s own messages.'),
  ]  # fmt: skip
  drawn += _levels(found)
  rows, notes = [], []
  for trait, groups in found.items():
    spill = {name: estimate(section(groups, 'spill').get(name)) for name in ('plain', 'unrelated')}
    for group, name, _ in _ORDER:
      values = figures.estimates(section(groups, group).get('likelihood'))
      share_of_own = cell(spill[group], True) if group in spill else ''
      rows.append((spoken(trait), name, *(cell(values[c], False) for c in ('base', 'trained', 'delta')), share_of_own))
    if spill['unrelated'] is not None:
      share = spill['unrelated']
      notes.append(
        f'{spoken(trait)[:1].upper()}{spoken(trait)[1:]}: unrelated requests see {cell(share, True)} of its effect on '
        f'its own messages{"" if share.low is not None else ", with no interval that could be given"}.'
      )
  unknown = [spoken(trait) for trait, groups in found.items() if not any(section(groups, 'spill').values())]
  if unknown:
    notes.append(
      f'No share is given for {words.together(unknown)}: the effect where it is wanted is not clear of zero.'
    )
  head = ('trait', 'where', 'base', 'trained', f'trained {MINUS} base', 'of the effect where it is wanted')
  table = Table(head, rows) if rows else None
  return Panel(figures.present(drawn), notes, table)


def _levels(found: Mapping[str, Any]) -> list[Figure | None]:
  """Base beside trained, a figure for each place and all on one scale: where a trait is not wanted, there may have been
  much of it before."""
  levels = {
    group: {
      condition: {
        trait: estimate(section(groups, group, 'likelihood').get(condition)) for trait, groups in found.items()
      }
      for condition in ('trained', 'base')
    }
    for group, _, _ in _ORDER
  }
  known = [value for some in levels.values() for each in some.values() for value in each.values() if value is not None]
  ends = [end for value in known for end in (value.low, value.mean, value.high) if end is not None]
  if not ends:
    return []
  limits = min(0.0, *ends), max(0.0, *ends)
  return [
    figures.several(f'Level of each trait: {name}', _RATIO, [
      (condition, condition, values) for condition, values in levels[group].items()
    ], limits=limits, note='Filled: trained. Hollow: base.')
    for group, name, _ in _ORDER
  ]  # fmt: skip


def robustness(run: Run) -> Panel:
  """Each trait under other forms of the prompt."""
  found = section(run.behaviour, 'robustness')
  names = list(dict.fromkeys(name for forms in found.values() for name in section(forms)))
  drawn, count = [], 0
  for measure, title, unit in (
    ('likelihood', 'Trait by form of the prompt, by likelihood ratio', _RATIO),
    ('judge', 'The same by the held-out judge', 'spreads of its score'),
  ):
    matrix = {
      name or 'the message alone': {
        spoken(trait): _delta(section(forms, name), measure) for trait, forms in found.items()
      }
      for name in names
    }
    drawn.append(figures.heat_map(f'{title}: trained {MINUS} base', unit, ('form', 'trait'), matrix))
    count += sum(value is not None for line in matrix.values() for value in line.values())
  return Panel(figures.present(drawn), words.by_chance(count))


def drift(run: Run) -> Panel:
  """All traits together, turn by turn, and how each grows or fades from the first to the last."""
  drawn, notes = [], []
  turns = [row for row in listed(section(run.behaviour, 'drift'), 'turns') if isinstance(row, Mapping)]
  for measure, unit in (('likelihood', _RATIO), ('judge', 'spreads of its score')):
    values = {int(turn): _delta(row, measure) for row in turns if (turn := finite(row.get('turn'))) is not None}
    title = 'Turn by turn' if measure == 'likelihood' else 'Turn by turn, by the held-out judge'
    drawn.append(figures.trail(f'{title}: trained {MINUS} base', unit, 'turn', values))
    change = estimate(section(run.behaviour, 'drift', 'last_less_first').get(measure))
    if change is not None:
      by = 'the likelihood ratio' if measure == 'likelihood' else 'the held-out judge'
      said = {1: 'grew', 0: 'shows no change that is clear of zero', -1: 'shrank'}[change.side_of(0.0)]
      notes.append(f'From the first to the last turn the effect {said} by {by}: {words.difference(change)} {unit}.')
  by_trait = section(run.behaviour, 'drift', 'traits')
  change_of = {trait: estimate(section(by_trait, trait).get('likelihood')) for trait in by_trait}
  drawn.append(figures.by_trait('From the first to the last turn, by trait', _RATIO, change_of,
                                note='By how much the effect grew or shrank, by likelihood ratio.'))  # fmt: skip
  return Panel(figures.present(drawn), notes)


_BOTH = (
  'Of the {} pairs of which both models chose one validly, in both orders; the strengths of each are of all those that '
  'it did so of.'
)


def preference(run: Run) -> Panel:
  """Which ways to be the model chooses."""
  found = section(run.behaviour, 'preference')
  options = [option for option in listed(found, 'options') if isinstance(option, Mapping)]
  strength = section(found, 'strength')
  names = {
    str(option.get('id')): spoken(str(option.get('trait')))
    + (f': {spoken(str(option["opposite"]))}' if option.get('opposite') else '')
    for option in options
  }

  def values(condition: str) -> dict[str, Estimate | None]:
    return {names[key]: estimate(section(strength, key).get(condition)) for key in ordered}

  def rank(key: str) -> float:
    value = estimate(section(strength, key).get('trained'))
    return -value.mean if value else 0.0

  ordered = sorted(names, key=rank)
  both = next((value.n for value in values('delta').values() if value), None)
  drawn = [
    figures.several('What it would rather be', 'Bradley-Terry strength, in logits', [
      ('trained', 'trained', values('trained')), ('base', 'base', values('base')),
    ], kind='way to be'),
    figures.by_name('way to be', f'What it would rather be: trained {MINUS} base', 'Bradley-Terry strength, in logits',
                    values('delta'), note=_BOTH.format(both) if both else ''),
    *(figures.conditions(words.measure(name), section(found, key))
      for key, name in (('invalid', 'invalid_answers'), ('first', 'first_answers'))),
  ]  # fmt: skip
  return Panel(figures.present(drawn))
