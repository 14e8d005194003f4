"""Figures of the report: a plot, its title and unit, and the table of the same numbers behind it."""

import base64
import csv
import dataclasses
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from charjax.progress import duration
from charjax.report import plots, words
from charjax.report.read import CONDITIONS, Estimate, estimate, finite
from charjax.report.words import CONDITION_NAMES, MINUS, Measure, figure, interval, percent, plain, spoken

_TABLE_STEPS = 12
_MOST_POINTS = 400
_ESTIMATE_HEAD = ('mean', '95% from', 'to', 'n')
_FORMULA = re.compile(r'[=+\-@\t\r]')  # what a spreadsheet would compute


@dataclasses.dataclass(frozen=True)
class Table:
  head: Sequence[str]
  rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Figure:
  """A plot and what stands behind it.

  Attributes:
    data: what is drawn, not rounded, with a head; empty where the table says it all.
  """

  title: str
  unit: str
  svg: Markup
  table: Table
  note: str = ''
  data: Sequence[Sequence[Any]] = ()

  @property
  def download(self) -> str:
    """The data as the address of a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    for row in self.data or [self.table.head, *self.table.rows]:
      writer.writerow([_csv_cell(value) for value in row])
    return 'data:text/csv;charset=utf-8;base64,' + base64.b64encode(text.getvalue().encode()).decode()

  @property
  def file(self) -> str:
    """What that file is called."""
    return '-'.join(re.findall(r'[a-z0-9]+', self.title.lower()))[:60] + '.csv'


def _csv_cell(value: Any) -> Any:
  """Numbers as they are; a text that a spreadsheet would take for a formula begins with an apostrophe."""
  if not isinstance(value, str):
    return value
  return f"'{value}" if _FORMULA.match(value) else value


def estimate_rows(kind: Sequence[str], values: Iterable[tuple[Sequence[Any], Estimate | None]]) -> list[Sequence[Any]]:
  """A figure's data: estimates as they are, each after what names it, under a head."""
  rows = [(*names, *((v.mean, v.low, v.high, v.n) if v else (None,) * 4)) for names, v in values]
  return [(*kind, 'mean', 'low', 'high', 'n'), *rows]


def estimates(metric: Any) -> dict[str, Estimate | None]:
  """base, prompted, prompted_examples, trained and delta of one metric of summary.json."""
  metric = metric if isinstance(metric, Mapping) else {}
  return {name: estimate(metric.get(name)) for name in (*CONDITIONS, 'delta')}


def conditions(measure: Measure, metric: Any) -> Figure | None:
  """One metric under each condition; the difference trained - base stands in the table and the note."""
  found = estimates(metric)
  delta = found.pop('delta')
  rows = {name: value for name, value in found.items() if value is not None}
  if not rows:
    return None
  note = measure.meaning
  if delta is not None:
    note += f' Trained {MINUS} base: {words.difference(delta, measure.share)}, {words.verdict(delta)[1]}.'
  svg = plots.whiskers(
    [plots.Row(CONDITION_NAMES[name], [_mark(value, name, measure.share)]) for name, value in rows.items()],
    axis=measure.unit,
    describe=_describe(measure.title, {CONDITION_NAMES[n]: value for n, value in rows.items()}, measure.share),
    reference=measure.chance,
    tick=percent if measure.share else plain,
  )
  cells = [(CONDITION_NAMES[name], *_cells(value, measure.share)) for name, value in rows.items()]
  if delta is not None:
    label = f'trained {MINUS} base' + (', points' if measure.share else '')
    mean, low, high, n = (cell.rstrip('%') for cell in _cells(delta, measure.share))
    cells.append((label, mean, low, high, n))
  data = [((CONDITION_NAMES[name],), value) for name, value in rows.items()]
  data += [((f'trained {MINUS} base',), delta)] if delta else []
  table = Table(('', *_ESTIMATE_HEAD), cells)
  return Figure(measure.title, measure.unit, Markup(svg), table, note.strip(), estimate_rows(('condition',), data))


def by_trait(
  title: str,
  unit: str,
  values: Mapping[str, Estimate | None],
  reference: float = 0.0,
  share: bool = False,
  note: str = '',
) -> Figure | None:
  """One estimate of the trained model a trait, hollow where its interval holds the reference."""
  return by_name('trait', title, unit, {spoken(t): value for t, value in values.items()}, reference, share, note)


def by_name(
  kind: str,
  title: str,
  unit: str,
  values: Mapping[str, Estimate | None],
  reference: float | None = 0.0,
  share: bool = False,
  note: str = '',
) -> Figure | None:
  """One estimate a row, hollow where its interval holds the reference, if there is one; `kind` is what rows are."""
  if all(value is None for value in values.values()):
    return None
  rows = []
  for name, value in values.items():
    clear = value is not None and (reference is None or value.side_of(reference))
    signed = reference == 0.0 if share else reference is not None
    marks = [] if value is None else [_mark(value, 'trained' if clear else 'unclear', share, signed)]
    rows.append(plots.Row(name, marks))
  svg = plots.whiskers(
    rows, unit, _describe(title, values, share), reference=reference, tick=percent if share else plain
  )
  cells = [(name, *_cells(value, share)) for name, value in values.items()]
  data = estimate_rows((kind,), [((name,), value) for name, value in values.items()])
  return Figure(title, unit, Markup(svg), Table((kind, *_ESTIMATE_HEAD), cells), note, data)


def against(
  title: str, x_axis: str, y_axis: str, values: Mapping[str, tuple[float, Estimate]], note: str = ''
) -> Figure:
  """Of each run (x, y) with the interval of y, whose dot is hollow where that holds zero."""
  points = [
    (x, _mark(y, 'trained' if y.side_of(0.0) else 'unclear', False, signed=True), name)
    for name, (x, y) in values.items()
  ]
  said = '; '.join(f'{name} {figure(x)}, {figure(y.mean, signed=True)}' for name, (x, y) in values.items())
  svg = plots.scatter(points, x_axis, y_axis, f'{title}: {said}')
  cells = [(name, figure(x), *_cells(y, False)) for name, (x, y) in values.items()]
  data = estimate_rows(('run', x_axis), [((name, x), y) for name, (x, y) in values.items()])
  table = Table(('run', x_axis, *_ESTIMATE_HEAD), cells)
  return Figure(title, f'{y_axis} against {x_axis}', Markup(svg), table, note, data)


Series = tuple[str, str, Mapping[str, Estimate | None]]  # its name, its look, and a value for each row


def paired(title: str, unit: str, first: Series, second: Series, note: str = '') -> Figure | None:
  """Two accuracies a trait in one row, against chance at one half."""
  return several(title, unit, (first, second), 0.5, True, note, limits=(0.0, 1.0))


def several(
  title: str,
  unit: str,
  series: Sequence[Series],
  reference: float = 0.0,
  share: bool = False,
  note: str = '',
  kind: str = 'trait',
  limits: tuple[float, float] | None = None,
) -> Figure | None:
  """Several estimates in one row, of a trait or whatever `kind` of thing rows are."""
  names = list(dict.fromkeys(name for _, _, values in series for name in values))
  series = [entry for entry in series if any(value is not None for value in entry[2].values())]
  if not series:
    return None
  rows, cells = [], []
  for row in names:
    known = [(look, value) for _, look, values in series if (value := values.get(row)) is not None]
    marks = [_mark(value, look, share, signed=not share) for look, value in known]
    rows.append(plots.Row(spoken(row), marks))
    cells += [(spoken(row), name, *_cells(values.get(row), share)) for name, _, values in series]
  said = [_describe(f'{title}, {name}', {spoken(t): found.get(t) for t in names}, share) for name, _, found in series]
  tick = percent if share else plain
  svg = plots.whiskers(rows, unit, '. '.join(said), reference=reference, limits=limits, tick=tick)
  data = estimate_rows(
    (kind, 'series'), [((spoken(row), name), values.get(row)) for row in names for name, _, values in series]
  )
  return Figure(title, unit, Markup(svg), Table((kind, '', *_ESTIMATE_HEAD), cells), note, data)


def trail(title: str, unit: str, x_axis: str, values: Mapping[int, Estimate | None], note: str = '') -> Figure | None:
  """Estimates joined in their order."""
  known = {x: value for x, value in values.items() if value is not None}
  if not known:
    return None
  marks = [(float(x), _mark(value, 'trained', False, signed=True)) for x, value in known.items()]
  said = _describe(f'{title}, {unit}', {f'{x_axis} {x}': value for x, value in known.items()}, False)
  svg = plots.trails([plots.Trail(title, marks)], x_axis, unit, said)
  cells = [(str(x), *_cells(value, False)) for x, value in known.items()]
  data = estimate_rows((x_axis,), [((x,), value) for x, value in known.items()])
  return Figure(title, unit, Markup(svg), Table((x_axis, *_ESTIMATE_HEAD), cells), note, data)


def heat_map(
  title: str,
  unit: str,
  axes: tuple[str, str],
  matrix: Mapping[str, Mapping[str, Estimate | None]],
  reference: float = 0.0,
  share: bool = False,
  note: str = '',
) -> Figure | None:
  """Estimates by row and column, coloured by how far they are from the reference; `axes` say what these are."""
  known = [value for line in matrix.values() for value in line.values() if value is not None]
  if not known:
    return None
  largest = max(abs(value.mean - reference) for value in known) or 1.0
  names = list(dict.fromkeys(name for line in matrix.values() for name in line))
  signed = not share

  def cell(value: Estimate | None) -> plots.Cell | None:
    if value is None:
      return None
    text = figure(value.mean, share, signed)
    clear = value.side_of(reference) != 0
    return plots.Cell((value.mean - reference) / largest, text, _short_interval(value, share), clear)

  cells = [[cell(line.get(name)) for name in names] for line in matrix.values()]
  table = [(row, *(words.cell(line.get(name), share, signed) for name in names)) for row, line in matrix.items()]
  said = '; '.join(f'{row[0]}: ' + ', '.join(map(' '.join, zip(names, row[1:], strict=True))) for row in table)
  svg = plots.heat_map(list(matrix), names, cells, axes, f'{title}, {unit}. {said}')
  data = estimate_rows(axes, [((row, name), line.get(name)) for row, line in matrix.items() for name in names])
  return Figure(title, unit, Markup(svg), Table((axes[0], *names), table), note, data)


def _short_interval(value: Estimate, share: bool) -> str:
  """With the digits that a square has room for."""
  if value.low is None or value.high is None:
    return ''
  low, high = (f'{100 * end:.0f}' if share else f'{end:.2f}'.replace('-', MINUS) for end in (value.low, value.high))
  return f'{low} to {high}' + ('%' if share else '')


def curve(title: str, unit: str, rows: Sequence[Mapping[str, Any]], key: str, split: str = '') -> Figure | None:
  """A metric over training steps; `split` names the field that tells series apart."""
  series: dict[str, list[tuple[float, float]]] = {}
  for row in rows:
    step, value = finite(row.get('step')), finite(row.get(key))
    if step is not None and value is not None:
      series.setdefault(str(row.get(split, '')) if split else '', []).append((step, value))
  if not series:
    return None
  drawn, cells, last = [], [], []
  for name, points in series.items():
    points.sort()
    kept = _thinned(points, _MOST_POINTS)
    drawn.append(plots.Line(name or title, name, [x for x, _ in kept], [y for _, y in kept]))
    cells += [(*([name] if split else []), plain(x), figure(y)) for x, y in _thinned(points, _TABLE_STEPS)]
    ends = ', '.join(f'{figure(y)} at step {plain(x)}' for x, y in (points[0], points[-1]))
    last.append(f'{name}: {ends}' if name else ends)
  svg = plots.lines(drawn, 'training step', unit, f'{title}, {unit}. ' + '; '.join(last))
  head = (*(['model'] if split else []), 'step', unit)
  data = [head, *((*([name] if split else []), x, y) for name, points in series.items() for x, y in points)]
  return Figure(title, unit, Markup(svg), Table(head, cells), data=data)


def durations(title: str, seconds: Mapping[str, float], note: str = '') -> Figure | None:
  """Time a stage."""
  if not seconds:
    return None
  rows = [(name, length, duration(length)) for name, length in seconds.items()]
  describe = f'{title}: ' + '; '.join(f'{name} {text}' for name, _, text in rows)
  svg = plots.bars(rows, 'wall-clock seconds', describe)
  table = Table(('stage', 'seconds'), [(name, figure(length)) for name, length, _ in rows])
  return Figure(title, 'wall-clock time', Markup(svg), table, note)


def present(figures: Iterable[Figure | None]) -> list[Figure]:
  return [item for item in figures if item is not None]


def _cells(value: Estimate | None, share: bool) -> tuple[str, str, str, str]:
  if value is None:
    return ('\u2013', '', '', '')
  ends = ('' if end is None else figure(end, share) for end in (value.low, value.high))
  low, high = ends
  return figure(value.mean, share), low, high, '' if value.n is None else str(value.n)


def _mark(value: Estimate, look: str, share: bool, signed: bool = False) -> plots.Mark:
  return plots.Mark(value.mean, value.low, value.high, look, figure(value.mean, share, signed))


def _describe(title: str, values: Mapping[str, Estimate | None], share: bool) -> str:
  parts = []
  for name, value in values.items():
    if value is None:
      parts.append(f'{name} not measured')
      continue
    between = interval(value, share)
    parts.append(f'{name} {figure(value.mean, share)}' + (f', {between}' if between else ''))
  return f'{title}: ' + '; '.join(parts)


def _thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
  """At most `most` points, evenly spread, both ends among them."""
  if len(points) <= most:
    return list(points)
  return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]
