"""Plots of the report: numbers in, an inline SVG string out. Colours and fonts are in the page's style sheet.

Every function takes text that may come from a model or a character file, and escapes it. Lengths are SVG user
units; a plot is WIDTH units wide and is shown at about one unit a pixel, on a phone too.
"""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Sequence
from html import escape

from charjax.report.words import ellipsis, plain

WIDTH = 360.0
_CHARACTER = 7.0  # width of a character at the style sheet's 12-unit font, in the widest of its fonts
_ROW = 25.0
_LABEL_CHARACTERS = 20


@dataclasses.dataclass(frozen=True)
class Mark:
  """A dot with its interval. `look` is the CSS class that gives the colour, and chooses the dot's shape."""

  mean: float
  low: float | None
  high: float | None
  look: str
  text: str


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of a dot-and-whisker plot; the first mark's text is written at its right end."""

  label: str
  marks: Sequence[Mark]


@dataclasses.dataclass(frozen=True)
class Line:
  """One series of a line plot, xs rising."""

  label: str
  look: str
  xs: Sequence[float]
  ys: Sequence[float]


def whiskers(
  rows: Sequence[Row],
  axis: str,
  describe: str,
  reference: float | None = None,
  limits: tuple[float, float] | None = None,
  tick: Callable[[float], str] = plain,
) -> str:
  """Dots with whiskers, one row each, over a common axis; `reference` (zero, or chance) is dashed."""
  left = 12 + _CHARACTER * min(_LABEL_CHARACTERS, max((len(row.label) for row in rows), default=0))
  right = WIDTH - 12 - _CHARACTER * max((len(row.marks[0].text) for row in rows if row.marks), default=0)
  marks = [mark for row in rows for mark in row.marks]
  ends = [end for mark in marks for end in (mark.mean, mark.low, mark.high) if end is not None]
  low, high, ticks = _axis(limits or (), ends if limits is None else (), reference)
  across = _scale(low, high, left + 6, right - 8)
  height = _ROW + 7.0 * max(0, max((len(row.marks) for row in rows), default=1) - 1)
  bottom = 6 + height * len(rows)
  parts = [_vertical(across(value), 4, bottom, 'grid') + _tick(across(value), bottom + 16, tick(value))
           for value in ticks]  # fmt: skip
  if reference is not None:
    parts.append(_vertical(across(reference), 0, bottom + 4, 'reference'))
  for index, row in enumerate(rows):
    middle = 6 + height * (index + 0.5)
    parts.append(_text(left - 6, middle + 4, ellipsis(row.label, _LABEL_CHARACTERS), 'label', 'end'))
    if not row.marks:
      parts.append(_text(left + 8, middle + 4, 'not measured', 'absent'))
      continue
    parts.append(_text(right + 6, middle + 4, row.marks[0].text, 'value'))
    # The first mark is drawn last, so that it lies on top.
    for order, mark in reversed(list(enumerate(row.marks))):
      y = middle + 11.0 * (order - (len(row.marks) - 1) / 2)
      parts.append(_mark(mark, across, y, row.label))
  parts.append(_text((left + right) / 2, bottom + 32, axis, 'axis', 'middle'))
  return _svg(bottom + 38, describe, parts)


def lines(series: Sequence[Line], x_axis: str, y_axis: str, describe: str) -> str:
  """Series over a common x axis; each is drawn faint as it is and, where long, bold as a running mean."""
  height, top = 194.0, 26.0
  xs = [x for line in series for x in line.xs]
  ys = [y for line in series for y in line.ys]
  y_low, y_high, y_ticks = _axis(ys, (), None)
  left = 14 + _CHARACTER * max(len(plain(value)) for value in y_ticks)
  x_low, x_high, x_ticks = _axis((min(xs), max(xs)), (), None, whole=True)
  across, up = _scale(x_low, x_high, left, WIDTH - 12), _scale(y_low, y_high, height - 38, top)
  parts = [_text(0, 12, y_axis, 'axis')]
  for value in y_ticks:
    parts.append(f'<path class="grid" d="M{left:.1f} {up(value):.1f}H{WIDTH - 12:.1f}"/>')
    parts.append(_text(left - 6, up(value) + 4, plain(value), 'tick', 'end'))
  parts += [_tick(across(value), height - 20, plain(value)) for value in x_ticks]
  parts.append(_text((left + WIDTH - 12) / 2, height - 4, x_axis, 'axis', 'middle'))
  for line in series:
    smooth = running_mean(line.ys)
    look = escape(line.look, quote=True)
    if smooth:
      parts.append(f'<path class="line raw {look}" d="{_path(line.xs, line.ys, across, up)}"/>')
    body = _path(line.xs, smooth or line.ys, across, up)
    parts.append(f'<path class="line {look}" d="{body}"><title>{escape(line.label)}</title></path>')
    if len(line.xs) == 1:
      parts.append(f'<g class="mark {look}">{_dot("", across(line.xs[0]), up(line.ys[0]))}</g>')
  return _svg(height, describe, parts)


def bars(rows: Sequence[tuple[str, float, str]], axis: str, describe: str) -> str:
  """Horizontal bars from zero: (label, length, text at the end)."""
  left = 12 + _CHARACTER * min(_LABEL_CHARACTERS, max(len(label) for label, _, _ in rows))
  right = WIDTH - 12 - _CHARACTER * max(len(text) for _, _, text in rows)
  across = _scale(0.0, max([length for _, length, _ in rows] + [1e-9]), left, right)
  parts = []
  for index, (label, length, text) in enumerate(rows):
    top = 4 + _ROW * index
    parts.append(_text(left - 6, top + 15, ellipsis(label, _LABEL_CHARACTERS), 'label', 'end'))
    parts.append(
      f'<rect class="bar" x="{left:.1f}" y="{top + 3:.1f}" height="15" width="{across(length) - left:.1f}"/>'
    )
    parts.append(_text(across(length) + 6, top + 15, text, 'value'))
  bottom = 4 + _ROW * len(rows)
  parts.append(_text(left, bottom + 14, axis, 'axis'))
  return _svg(bottom + 20, describe, parts)


@dataclasses.dataclass(frozen=True)
class Trail:
  """Dots (x, y with its whisker) joined in their order; the place of the one that is ringed, if any."""

  label: str
  points: Sequence[tuple[float, Mark]]
  ringed: int | None = None


def trails(series: Sequence[Trail], x_axis: str, y_axis: str, describe: str, diagonal: bool = False) -> str:
  """Series over two axes from zero, each a trail of dots with whiskers, a little apart where they have the same x; with
  a dashed line where x and y are the same, as far as both axes go, if wanted."""
  parts, across, up, height, ends = _plane([point for trail in series for point in trail.points], x_axis, y_axis)
  if diagonal:
    end = min(ends)
    parts.append(f'<path class="reference" d="M{across(0):.1f} {up(0):.1f}L{across(end):.1f} {up(end):.1f}"/>')
  for place, trail in enumerate(series):
    aside = 5.0 * (place - (len(series) - 1) / 2)
    xs, marks = [across(x) + aside for x, _ in trail.points], [mark for _, mark in trail.points]
    look = escape(marks[0].look, quote=True) if marks else ''
    joined = 'L'.join(f'{x:.1f} {up(mark.mean):.1f}' for x, mark in zip(xs, marks, strict=True))
    parts.append(f'<path class="line {look}" d="M{joined}"><title>{escape(trail.label)}</title></path>')
    for i, (x, mark) in enumerate(zip(xs, marks, strict=True)):
      parts.append(_upright(mark, x, up, trail.label))
      if i == trail.ringed:
        parts.append(f'<circle class="ring" cx="{x:.1f}" cy="{up(mark.mean):.1f}" r="9"/>')
  return _svg(height, describe, parts)


def scatter(points: Sequence[tuple[float, Mark, str]], x_axis: str, y_axis: str, describe: str) -> str:
  """Named dots (x, y with its whisker, name) over two axes, of which y has a dashed zero."""
  parts, across, up, height, _ = _plane([(x, mark) for x, mark, _ in points], x_axis, y_axis)
  named: list[tuple[float, float]] = []
  for x, mark, name in points:
    parts.append(_upright(mark, across(x), up, name))
    # To the side on which there is room; a name that would lie on another one is told by its title and the table.
    if all(abs(across(x) - other_x) > 100 or abs(up(mark.mean) - y) > 12 for other_x, y in named):
      named.append((across(x), up(mark.mean)))
      end = across(x) > WIDTH * 0.6
      parts.append(_text(across(x) + (-8 if end else 8), up(mark.mean) - 5, name, 'tick', 'end' if end else 'start'))
  return _svg(height, describe, parts)


@dataclasses.dataclass(frozen=True)
class Cell:
  """One square of a heat map: `size`, from -1 to 1, gives its colour, and what is not `clear` is written faint."""

  size: float
  text: str
  small: str
  clear: bool


def heat_map(
  rows: Sequence[str],
  columns: Sequence[str],
  cells: Sequence[Sequence[Cell | None]],
  axes: tuple[str, str],
  describe: str,
) -> str:
  """Figures in a grid, each with its interval under it; `axes` say what rows and columns are."""
  wide, tall = 88.0, 46.0
  heads = [_two_lines(label, math.ceil(wide / _CHARACTER)) for label in columns]
  top = 26.0 + 14 * max(map(len, heads))
  left = 12 + _CHARACTER * min(_LABEL_CHARACTERS, max(len(label) for label in rows))
  width = left + wide * len(columns)
  parts = [_text(left + wide * len(columns) / 2, 12, axes[1], 'axis', 'middle')]
  parts.append(_text(left - 8, top - 8, axes[0], 'axis', 'end'))
  for place, lines in enumerate(heads):
    for above, words in enumerate(reversed(lines)):
      parts.append(_text(left + wide * (place + 0.5), top - 8 - 14 * above, words, 'label', 'middle'))
  for index, (label, line) in enumerate(zip(rows, cells, strict=True)):
    y = top + tall * index
    parts.append(_text(left - 8, y + tall / 2 + 4, ellipsis(label, _LABEL_CHARACTERS), 'label', 'end'))
    for place, cell in enumerate(line):
      x = left + wide * place
      if cell is None:
        parts.append(_text(x + wide / 2, y + tall / 2 + 4, '\u2013', 'absent', 'middle'))
        continue
      look, strength = 'up' if cell.size > 0 else 'down', 0.5 * min(1.0, abs(cell.size))
      parts.append(
        f'<g class="cell {look}"><title>{escape(label)}, {escape(columns[place])}: {escape(cell.text)}</title>'
      )
      parts.append(f'<rect x="{x + 1.5:.1f}" y="{y + 1.5:.1f}" width="{wide - 3:.1f}" height="{tall - 3:.1f}" rx="3" '
                   f'fill-opacity="{strength:.3f}"/>')  # fmt: skip
      parts.append(_text(x + wide / 2, y + tall / 2 - 1, cell.text, 'value' if cell.clear else 'absent', 'middle'))
      parts.append(_text(x + wide / 2, y + tall / 2 + 14, cell.small, 'tick', 'middle') + '</g>')
  return _svg(top + tall * len(rows) + 4, describe, parts, width)


def _two_lines(label: str, fits: int) -> list[str]:
  """The label in one line, or in two the second of which may be cut."""
  first, *rest = textwrap.wrap(label, fits) or ['']
  return [first, ellipsis(' '.join(rest), fits)] if rest else [first]


def running_mean(ys: Sequence[float], parts: int = 12, shortest: int = 20) -> list[float]:
  """A centred running mean over 1/parts of the series; empty where the series is too short to need one."""
  if len(ys) < shortest:
    return []
  half = max(1, len(ys) // parts // 2)
  windows = (ys[max(0, i - half) : i + half + 1] for i in range(len(ys)))
  return [sum(window) / len(window) for window in windows]


def ticks_between(low: float, high: float, about: int = 4, whole: bool = False) -> list[float]:
  """Round numbers (steps of 1, 2 or 5 times a power of ten) from at or below `low` to at or above `high`."""
  raw = (high - low) / about
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
  step = max(step, 1.0) if whole else step
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  digits = max(0, 1 - math.floor(math.log10(step)))
  return [round(index * step, digits) + 0.0 for index in range(first, last + 1)]


def _axis(
  fixed: Sequence[float], ends: Sequence[float], reference: float | None, whole: bool = False
) -> tuple[float, float, list[float]]:
  values = [*fixed, *ends, *([] if reference is None else [reference])] or [0.0, 1.0]
  low, high = min(values), max(values)
  if high - low <= 1e-9 * max(abs(low), abs(high)):
    margin = 1.0 if whole else (abs(low) * 0.1 or 1.0)
    low, high = low - margin, high + margin
  ticks = ticks_between(low, high, whole=whole)
  if whole or (fixed and not ends and reference is not None):
    # Steps and shares end where they end: running on to the next round number would waste half the plot.
    return low, high, [tick for tick in ticks if low <= tick <= high]
  return ticks[0], ticks[-1], ticks


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
  def at(value: float) -> float:
    inside = min(max(value, low), high)
    return start + (end - start) * (inside - low) / (high - low)

  return at


def _plane(
  points: Sequence[tuple[float, Mark]], x_axis: str, y_axis: str
) -> tuple[list[str], Callable[[float], float], Callable[[float], float], float, tuple[float, float]]:
  """Two axes from zero, that of y dashed: what is drawn, where x and y lie, the height, and where the axes end."""
  height, top = 230.0, 26.0
  ends = [end for _, mark in points for end in (mark.mean, mark.low, mark.high) if end is not None]
  y_low, y_high, y_ticks = _axis((), ends, 0.0)
  left = 14 + _CHARACTER * max(len(plain(value)) for value in y_ticks)
  x_low, x_high, x_ticks = _axis((), [x for x, _ in points], 0.0)
  across, up = _scale(x_low, x_high, left + 8, WIDTH - 12), _scale(y_low, y_high, height - 38, top)
  parts = [_text(0, 12, y_axis, 'axis')]
  for value in y_ticks:
    look = 'grid' if value else 'reference'
    parts.append(f'<path class="{look}" d="M{left:.1f} {up(value):.1f}H{WIDTH - 12:.1f}"/>')
    parts.append(_text(left - 6, up(value) + 4, plain(value), 'tick', 'end'))
  parts += [_tick(across(value), height - 20, plain(value)) for value in x_ticks]
  parts.append(_text((left + WIDTH - 12) / 2, height - 4, x_axis, 'axis', 'middle'))
  return parts, across, up, height, (x_high, y_high)


def _upright(mark: Mark, x: float, up: Callable[[float], float], label: str) -> str:
  """A dot whose whisker is upright."""
  text = f'<g class="mark {escape(mark.look, quote=True)}"><title>{escape(label)}: {escape(mark.text)}</title>'
  if mark.low is not None and mark.high is not None:
    text += f'<path class="whisker" d="M{x:.1f} {up(mark.low):.1f}V{up(mark.high):.1f}"/>'
  return text + _dot(mark.look, x, up(mark.mean)) + '</g>'


def _mark(mark: Mark, across: Callable[[float], float], y: float, label: str) -> str:
  x, look = across(mark.mean), escape(mark.look, quote=True)
  parts = [f'<g class="mark {look}"><title>{escape(label)}: {escape(mark.text)}</title>']
  if mark.low is not None and mark.high is not None:
    a, b = across(mark.low), across(mark.high)
    parts.append(f'<path class="whisker" d="M{a:.1f} {y - 4:.1f}v8M{a:.1f} {y:.1f}H{b:.1f}M{b:.1f} {y - 4:.1f}v8"/>')
  parts.append(_dot(mark.look.split()[0] if mark.look else '', x, y))
  return ''.join(parts) + '</g>'


def _dot(look: str, x: float, y: float) -> str:
  """A shape for each look, so that nothing hangs on colour alone."""
  if look == 'prompted':
    return f'<rect class="dot" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
  if look in ('prompted_examples', 'judge'):
    return f'<path class="dot" d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"/>'
  hollow = ' hollow' if look in ('base', 'without', 'unclear') else ''
  return f'<circle class="dot{hollow}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'


def _path(
  xs: Sequence[float], ys: Sequence[float], across: Callable[[float], float], up: Callable[[float], float]
) -> str:
  points = (f'{across(x):.1f} {up(y):.1f}' for x, y in zip(xs, ys, strict=True))
  return 'M' + 'L'.join(points)


def _vertical(x: float, top: float, bottom: float, look: str) -> str:
  return f'<line class="{look}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'


def _tick(x: float, y: float, text: str) -> str:
  return _text(x, y, text, 'tick', 'middle')


def _text(x: float, y: float, text: str, look: str, anchor: str = 'start') -> str:
  return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, describe: str, parts: Sequence[str], width: float = WIDTH) -> str:
  # One that is wider than the others keeps its size, and is scrolled.
  look = 'class="plot"' if width == WIDTH else f'class="plot wide" width="{width:.0f}"'
  head = f'<svg {look} viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(describe)}">'
  return head + ''.join(parts) + '</svg>'
