"""Several runs on one page: what differs between them, beside what each did; and the same as a table for a terminal."""

import base64
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from etils import epath
from markupsafe import Markup

from charjax import starting_model
from charjax.errors import UserError
from charjax.files import write_text
from charjax.progress import duration
from charjax.report import differences, document, figures, panels, words
from charjax.report.columns import (
  Column,
  head_to_head,
  margin_apart,
  mean_margin_apart,
  mean_over,
  read_columns,
  seed_of,
  settings,
)
from charjax.report.compare_behaviour import BESIDE, habits, matrices
from charjax.report.crosstalk import crosstalk
from charjax.report.differences import Change
from charjax.report.figures import Figure, Table
from charjax.report.page import without_nan
from charjax.report.read import STAGES, Estimate, section
from charjax.report.words import MINUS, spoken
from charjax.terminal import printable

_MARK = '<meta name="generator" content="charjax compare">'  # of pages that may be written over
_NONE = '\u2013'
_MOST_FIELDS, _LONGEST_FIELD = 3, 20  # that a row of figures has room for
_LEAST_SPREAD = 0.1  # of distances that are worth a plot, as a share of the largest


@dataclasses.dataclass(frozen=True)
class TraitView:
  """What the page shows of one trait in all runs."""

  name: str
  anchor: str
  statement: str
  notes: Sequence[str]
  figures: Sequence[Figure]
  table: Table


@dataclasses.dataclass(frozen=True)
class CharacterView:
  """How the character of one run differs from that of the first."""

  name: str
  notes: Sequence[str]
  changes: Sequence[Change]


def write(folders: Sequence[epath.Path], output: epath.Path) -> str:
  """Writes the page and returns what a terminal shows.

  Raises:
    UserError: a folder is no run's, a file in it cannot be read, or a file that is no such page stands in its place.
  """
  if output.exists() and (output.is_dir() or _MARK.encode() not in output.read_bytes()[:2000]):
    raise UserError(f'{output}: is there, and no page of charjax compare; move it away, or give another --output')
  for folder in folders:
    starting_model.read_run(folder)
  columns = read_columns(folders)
  write_text(output, render(columns, output))
  return f'{console(columns)}\n\nComparison: {output}'


def render(columns: Sequence[Column], output: epath.Path) -> str:
  """The whole page; `output` is where links to the runs' own reports start from."""
  evaluated = [column for column in columns if column.evaluated]
  matrix = crosstalk(columns)
  return document.fill(
    'compare.html',
    mark=Markup(_MARK),
    title=f'{len(columns)} runs side by side' if len(columns) > 1 else f'One run: {columns[0].name}',
    meta=[column.name for column in columns],
    answer=_answer(evaluated),
    notes=_notes(columns),
    summary=_summary(columns),
    overview=_overview(evaluated),
    fields=differences.field_table(columns),
    characters=_characters(columns),
    traits=_traits(evaluated),
    crosstalk=matrix,
    rest=_rest(evaluated),
    matrices=matrices(evaluated, _shared_traits(evaluated)),
    habits=habits(evaluated),
    reference=evaluated[0].name if evaluated else '',
    cost=_cost(columns),
    runs=_runs(columns, output),
    numbers_base64=base64.b64encode(json.dumps(_numbers(columns), ensure_ascii=True).encode()).decode(),
  )


def _numbers(columns: Sequence[Column]) -> dict[str, Any]:
  """What stands behind the page: of every run its settings and its figures."""
  return {
    str(folder): without_nan({'settings': settings(run), 'summary': run.summary, 'behaviour': run.behaviour})
    for column in columns
    for run, folder in zip(column.runs, column.folders, strict=True)
  }


# ---- the answer ----


def _shared_traits(columns: Sequence[Column]) -> list[str]:
  """The traits that all of them were measured on."""
  return [
    trait for trait in (columns[0].traits if columns else []) if all(trait in column.traits for column in columns)
  ]


def _overall(columns: Sequence[Column], measure: str) -> dict[str, Estimate | None]:
  """By run, the mean over the traits that all have."""
  traits = _shared_traits(columns)
  return {column.name: column.mean(traits, measure) for column in columns}


def _risen(column: Column) -> list[str]:
  return [t for t in column.traits if (value := column.margin(t)) is not None and value.side_of(0.0) == 1]


def _answer(columns: Sequence[Column]) -> list[str]:
  """What the runs did, in a few sentences; the first is the answer."""
  if not columns:
    return ['None of these runs has been evaluated yet, so the page cannot say what they did.']
  if len(columns) == 1:
    return [f'One run alone has been evaluated, {columns[0].name}; its own report says more.']
  first, traits = columns[0], _shared_traits(columns)
  counts = {column.name: len(_risen(column)) for column in columns}
  some = [
    f'{counts[column.name]} of {len(column.traits)} in {column.name}' for column in columns if counts[column.name]
  ]
  risen = f'Traits that moved clearly towards the character: {words.together(some) if some else "none"}.'
  if traits:
    over = 'On the one trait' if len(traits) == 1 else f'On the mean over {len(traits)} traits'
    margins = _overall(columns, 'margin')
    clear = [name for name, value in margins.items() if value is not None and value.side_of(0.0) == 1]
    where = words.together(clear) if clear else 'none of the runs'
    measured = any(value is not None for value in margins.values())
    gaps = {c.name: mean_margin_apart(first, c, traits) for c in columns[1:]}
    wins = {c.name: mean_over([head_to_head(first, c, trait) for trait in traits]) for c in columns[1:]}
    sentences = [
      f'{over}, training moved the margin clearly towards the character in {where}.'
      if measured
      else 'Margins were not measured, for want of kept pairs: the held-out judge alone says what training changed.',
      risen if measured else '',
      _told_apart(f'{over}, the margin', first.name, gaps),
      _told_apart(f'{over}, the held-out judge', first.name, wins, 0.5, share=True),
    ]
  else:
    sentences = [risen, 'No trait was measured in all of them: each stands in a section of its own below.']
  for side, word in ((-1, 'worse'), (1, 'better')):
    some = [c.name for c in columns if (v := c.figure('neutral', 'log_prob', 'delta')) and v.side_of(0.0) == side]
    if some:
      sentences.append(f'Neutral reference answers are clearly {word} than before training in {words.together(some)}.')
  return [sentence for sentence in sentences if sentence]


def _told_apart(
  what: str, first: str, gaps: Mapping[str, Estimate | None], reference: float = 0.0, share: bool = False
) -> str:
  """Which runs differ from the first by more than their interval; nothing where nothing could be measured."""
  known = {name: value for name, value in gaps.items() if value is not None}
  sides: dict[int, list[str]] = {1: [], -1: [], 0: []}
  for name, value in known.items():
    # One alone is told with its figure; those of several stand in the tables.
    told = f'{name} in {_cell(value, True)} of cases' if share else f'{name} by {_cell(value, signed=True)}'
    sides[value.side_of(reference)].append(name if len(known) > 1 else told)
  if not known:
    return ''
  forms = (
    ('prefers {} to {first}', 'prefers {first} to {}')
    if share
    else ('is above that of {first} in {}', 'is below that of {first} in {}')
  )
  parts = [
    form.format(words.together(sides[side]), first=first)
    for side, form in zip((1, -1), forms, strict=True)
    if sides[side]
  ]
  if not parts:
    return f'{what} {"tells none from" if share else "is in none told from that of"} {first}.'
  rest = f', and is not told apart in {words.together(sides[0])}' if sides[0] and not share else ''
  return f'{what} {" and ".join(parts)}{rest}.'


def _cell(value: Estimate | None, share: bool = False, signed: bool = False) -> str:
  figure, *between = words.cell(value, share, signed).split(' ')
  return ' '.join([figure, *(['\u00a0'.join(between)] if between else [])])  # It is broken before its interval.


def _notes(columns: Sequence[Column]) -> list[str]:
  """What a reader must know before comparing."""
  notes = []
  for column in columns:
    if not column.evaluated:
      made = [stage for stage in STAGES if stage in column.first.stages]
      how = f'finished: {words.together(made)}' if made else 'no stage is finished'
      notes.append(f'{column.name} is not evaluated yet ({how}); its figures are missing.')
    for run, folder in zip(column.runs, column.folders, strict=True):
      if run.outdated:
        notes.append(f'{folder}: {words.outdated_sentence(run.outdated)}')
  evaluated = [column for column in columns if column.evaluated]
  for column in evaluated:
    asked = section(column.first.config, 'config', 'behaviour').get('sets')
    wanted = [stage for stage in STAGES if stage != 'behaviour' or asked]
    if gone := [stage for stage in wanted if stage not in column.first.stages]:
      notes.append(f'{column.name} has no finished {words.together(gone)}; what that would tell is missing.')
  unsure: dict[str, list[str]] = {}
  for column in evaluated:
    if traits := panels.unsure_judge(column.first):
      unsure.setdefault(words.together([spoken(trait) for trait in traits]), []).append(column.name)
  for some, names in unsure.items():
    of = 'all runs' if len(names) == len(evaluated) > 1 else words.together(names)
    notes.append(f'The held-out judge of {of} is not told from chance on the written pairs of {some}.')
  shared = _shared_traits(evaluated)
  every = list(dict.fromkeys(trait for column in evaluated for trait in column.traits))
  if len(shared) < len(every) and shared:
    some = words.together([spoken(trait) for trait in every if trait not in shared])
    notes.append(f'Not in all runs: {some}. Means are over the other traits.')
  if any(len(column.runs) > 1 for column in columns):
    notes.append(
      'Of runs that differ by their seed alone the mean is shown, and its interval is Student\u2019s t over the seeds, '
      'with the luck of the messages and pairs that they have in common added: it is wide for few seeds.'
    )
  return notes


def _summary(columns: Sequence[Column]) -> Table:
  """A row a run: what is different in it, and what it did."""
  different = differences.fields(columns)
  shown = _short(different)
  evaluated = [column for column in columns if column.evaluated]
  margins = _overall(evaluated, 'margin')
  wins = _overall(evaluated, 'win_rate')
  over_prompted = _overall(evaluated, 'win_rate_vs_prompted')
  rows = []
  for place, column in enumerate(columns):
    row = [column.name, *(different[name][place] for name in shown)]
    if column.evaluated:
      won = sum((value := column.wins(trait)) is not None and value.side_of(0.5) == 1 for trait in column.traits)
      count = len(column.traits)
      risen, won_of = (f'{some}\u00a0of\u00a0{count}' for some in (len(_risen(column)), won))
      row += [risen, won_of, _cell(margins[column.name], signed=True),
              _cell(wins[column.name], True), _cell(over_prompted[column.name], True)]  # fmt: skip
      row += [_cell(column.figure('neutral', 'log_prob', 'delta'), signed=True), _cell(column.kl())]
    else:
      row += [_NONE] * 7
    rows.append(row)
  head = ('run', *shown, 'margins risen', 'traits won', 'mean margin', 'wins against base', 'against prompted',
          'neutral log-prob', 'KL a token')  # fmt: skip
  return Table(head, rows)


def _short(fields: Mapping[str, Sequence[str]]) -> list[str]:
  """The fields that differ, where all of them can stand beside the figures."""
  fits = len(fields) <= _MOST_FIELDS and all(len(cell) <= _LONGEST_FIELD for cells in fields.values() for cell in cells)
  return list(fields) if fits else []


def _overview(columns: Sequence[Column]) -> list[Figure]:
  if len(columns) < 2:
    return []
  margin, win, several = words.measure('margin'), words.measure('win_rate'), len(_shared_traits(columns)) > 1
  over = ', mean over traits' if several else ''
  margins = _overall(columns, 'margin')
  far = {c.name: (kl.mean, value) for c in columns
         if (kl := c.kl()) is not None and (value := margins[c.name]) is not None}  # fmt: skip
  distances = [kl for kl, _ in far.values()]
  return figures.present([
    figures.by_name('run', f'{margin.title}: trained {MINUS} base{over}', margin.unit, margins, note=margin.meaning),
    figures.by_name('run', f'{win.title}: trained{over}', win.unit, _overall(columns, 'win_rate'), 0.5, True,
                    note=win.meaning),
    figures.against('Margin against distance', 'KL to the starting model, nats a token', 'nats per token', far,
                    note='Of its replies to held-out messages. Further up and further left is better.')
    if max(distances, default=0.0) > 0 and min(distances) < (1 - _LEAST_SPREAD) * max(distances) else None,
  ])  # fmt: skip


# ---- what differs ----


def _characters(columns: Sequence[Column]) -> list[CharacterView]:
  """Of every run whose character is not that of the first."""
  found = []
  for column in columns[1:]:
    notes, changes = differences.character(columns[0].first, column.first)
    if notes or changes:
      found.append(CharacterView(column.name, notes, changes))
  return found


# ---- trait by trait, and the rest ----


def _traits(columns: Sequence[Column]) -> list[TraitView]:
  views = []
  for place, trait in enumerate(dict.fromkeys(trait for column in columns for trait in column.traits)):
    having = [column for column in columns if trait in column.traits]
    margin, win = words.measure('margin'), words.measure('win_rate')
    missing = [column.name for column in columns if trait not in column.traits]
    left_out = [column.name for column in having if trait not in column.rewarded]
    written = [_written(column, trait) for column in having]
    statements = list(dict.fromkeys(str(entry.get('statement', '')) for entry in written))
    notes = [
      f'Not in {words.together(missing)}.' if missing else '',
      f'Not rewarded in {words.together(left_out)}.' if left_out else '',
      'Its wording is not the same in all runs.' if len(statements) > 1 else '',
    ]
    views.append(TraitView(
      name=spoken(trait),
      anchor=f'trait-{place}',
      statement=statements[0] if len(statements) == 1 else '',
      notes=[note for note in notes if note],
      figures=figures.present([
        figures.by_name('run', f'{margin.title}: trained {MINUS} base', margin.unit,
                        {column.name: column.margin(trait) for column in having}),
        figures.by_name('run', f'{win.title}: trained', win.unit,
                        {column.name: column.wins(trait) for column in having}, 0.5, True),
        *(beside.figure(having, trait) for beside in BESIDE),
      ]),
      table=_trait_table(having, trait),
    ))  # fmt: skip
  return views


def _written(column: Column, trait: str) -> Mapping[str, object]:
  return next((entry for entry in column.first.traits if entry['id'] == trait), {})


def _trait_table(columns: Sequence[Column], trait: str) -> Table:
  """Every figure of a trait, a row a run, and how far it is from the first run that has the trait."""
  first = columns[0]
  more = [beside for beside in BESIDE if any(beside.of(column, trait) for column in columns)]
  rows = []
  for column in columns:
    judge = column.figure('traits', trait, 'judge', 'delta')
    row = [column.name, _cell(column.margin(trait), signed=True), _cell(column.wins(trait), True),
           _cell(column.figure('traits', trait, 'win_rate_vs_prompted', 'trained'), True),
           _cell(judge, signed=True),
           *(_cell(beside.of(column, trait), beside.share, signed=not beside.share) for beside in more)]  # fmt: skip
    if len(columns) > 1:
      is_first = column is first
      row += ['' if is_first else _cell(margin_apart(first, column, trait), signed=True),
              '' if is_first else _cell(head_to_head(first, column, trait), True)]  # fmt: skip
    rows.append(row)
  head = ['run', f'margin, trained {MINUS} base', 'wins against base', 'against prompted',
          f'judge, trained {MINUS} base', *(beside.head for beside in more)]  # fmt: skip
  if len(columns) > 1:
    head += [f'margin, less {first.name}', f'wins against {first.name}']
  return Table(head, rows)


def _rest(columns: Sequence[Column]) -> list[Figure]:
  """Neutral ability, distance and side effects, a figure each."""
  if not columns:
    return []
  wanted = [('neutral', 'log_prob', 'delta'), ('neutral', 'accuracy', 'delta'), ('neutral', 'kl', 'trained')]
  wanted += [('side_effects', name, 'delta') for name in columns[0].first.summary.get('side_effects', {})]
  found = []
  for path in wanted:
    measure = words.measure(path[1])
    change = path[2] == 'delta'
    title = f'{measure.title}: trained {MINUS} base' if change else f'{measure.title}, on neutral replies'
    values = {column.name: column.figure(*path) for column in columns}
    found.append(figures.by_name('run', title, measure.unit, values, 0.0 if change else None, measure.share))
  return figures.present(found)


def _cost(columns: Sequence[Column]) -> list[Figure]:
  took = {column.name: column.seconds() for column in columns}
  partly = {column.name: column.cut_off() for column in columns}
  total = figures.durations(
    'Time of each run',
    {name: sum(each.values()) for name, each in took.items() if each},
    ' '.join(f'{name}: {words.at_least(stages)}' for name, stages in partly.items() if stages),
  )
  if total is None:
    return []
  rows = []
  for column in columns:
    each, tokens = took[column.name], [column.tokens(which) for which in ('drawn', 'read')]
    times = (_time(each[stage], stage in partly[column.name]) if stage in each else _NONE for stage in STAGES)
    rows.append((column.name, *times, *(_NONE if count is None else f'{count:,.0f}' for count in tokens)))
  head = ('run', *STAGES, 'tokens the policy drew', 'tokens it learned from')
  return [dataclasses.replace(total, table=Table(head, rows))]


def _time(seconds: float, partly: bool) -> str:
  return ('at least ' if partly else '') + duration(seconds)


def _runs(columns: Sequence[Column], output: epath.Path) -> list[tuple[str, str, str]]:
  """Of every run its folder, its seed, and the way from the page to its own report, or ''."""
  found = []
  for column in columns:
    for run, folder in zip(column.runs, column.folders, strict=True):
      page = folder / 'report' / 'index.html'
      link = quote(os.path.relpath(page, output.parent)) if '://' not in f'{page}{output}' and page.exists() else ''
      found.append((str(folder), seed_of(run), link))
  return found


# ---- the terminal ----


def console(columns: Sequence[Column]) -> str:
  """The figures of each trait and of each run, with their intervals; * where one is clear of no effect."""
  lines, fields = _notes(columns), differences.fields(columns)
  for view in _characters(columns):
    told = [*view.notes, *(f'{change.where} has other words.' for change in view.changes)]
    lines.append(f'The character of {view.name} is not that of {columns[0].name}: {" ".join(told)}')
  shown = _short(fields)
  if fields and not shown:
    lines += ['', *_aligned([('', *(column.name for column in columns)), *((f, *v) for f, v in fields.items())])]
  evaluated = [column for column in columns if column.evaluated]
  rows = [('', 'run', 'margin on kept pairs', 'wins against base', 'judge')]
  for trait in dict.fromkeys(trait for column in evaluated for trait in column.traits):
    for place, column in enumerate(column for column in evaluated if trait in column.traits):
      rows.append((
        spoken(trait) if place == 0 else '', column.name, _starred(column.margin(trait)),
        _starred(column.wins(trait), 0.5, True), _starred(column.figure('traits', trait, 'judge', 'delta')),
      ))  # fmt: skip
  whole = [['run', *shown, 'change of neutral log-prob', 'of neutral accuracy, in points', 'KL a token', 'time']]
  for place, column in enumerate(columns):
    seconds = sum(column.seconds().values())
    whole.append([
      column.name, *(fields[name][place] for name in shown),
      _starred(column.figure('neutral', 'log_prob', 'delta')),
      _points(column.figure('neutral', 'accuracy', 'delta')),
      _cell(column.kl()).replace('\u00a0', ' '), _time(seconds, bool(column.cut_off())) if seconds else _NONE,
    ])  # fmt: skip
  if len(rows) > 1:
    lines += ['', *_aligned(rows)]
  lines += ['', *_aligned(whole), '', '* clear of no effect: of 0, or of an even chance']
  return printable('\n'.join(lines))


def _points(value: Estimate | None) -> str:
  """A change of a share."""
  return _NONE if value is None else words.difference(value, share=True) + (' *' if value.side_of(0.0) else '')


def _starred(value: Estimate | None, reference: float = 0.0, share: bool = False) -> str:
  if value is None:
    return _NONE
  return _cell(value, share, signed=not share).replace('\u00a0', ' ') + (' *' if value.side_of(reference) else '')


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
  return ['  '.join(f'{cell:<{width}}' for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
