"""What differs between the configs and characters of runs, field by field and word by word."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from charjax.report.columns import Column, settings
from charjax.report.figures import Table
from charjax.report.read import Run, listed, section
from charjax.report.words import spoken, together

_FIRST = ('model.path', 'character.path', 'character.traits', 'seed')  # what is told before all other fields
_LAST = ('baseline.', 'evaluation.', 'behaviour.')  # of what was measured, which changes no model
_LONGEST = 400  # words of a text that are compared one by one
_LONGEST_VALUE = 60


@dataclasses.dataclass(frozen=True)
class Change:
  """One text of a character as it stands in two runs, with what went and what came marked."""

  where: str
  text: Markup


def fields(columns: Sequence[Column]) -> dict[str, list[str]]:
  """The settings that are not the same in all columns, each with its value in every one."""
  found = [[settings(run) for run in column.runs] for column in columns]
  names = list(dict.fromkeys(name for some in found for values in some for name in values))
  names.sort(key=lambda name: (name not in _FIRST, _FIRST.index(name) if name in _FIRST else name.startswith(_LAST)))
  rows = {}
  for name in names:
    told = [list(dict.fromkeys(_value(values.get(name)) for values in some)) for some in found]
    if any(some != told[0] for some in told):
      rows[name] = _cut([' / '.join(some) for some in told])
  for package in dict.fromkeys(name for column in columns for name in section(column.first.config, 'versions')):
    cells = [str(section(column.first.config, 'versions').get(package, '\u2013')) for column in columns]
    if len(set(cells)) > 1:
      rows[f'version of {package}'] = cells
  return rows


def field_table(columns: Sequence[Column]) -> Table | None:
  """`fields` as a table: of runs or fields, those of which there are more are its rows."""
  found = fields(columns)
  if len(found) < len(columns):
    rows = [(column.name, *(cells[place] for cells in found.values())) for place, column in enumerate(columns)]
    return Table(('run', *found), rows) if found else None
  return Table(('field', *(column.name for column in columns)), [(name, *cells) for name, cells in found.items()])


def _value(value: Any) -> str:
  if value is None:
    return '\u2013'
  return (', '.join(map(str, value)) if isinstance(value, list) else str(value)) or 'empty'


def _cut(cells: Sequence[str]) -> list[str]:
  """Long values by their first letters, or by their last where the first are the same."""
  room = _LONGEST_VALUE - 1
  short = [cell if len(cell) <= _LONGEST_VALUE else f'{cell[:room]}\u2026' for cell in cells]
  if len(set(short)) == len(set(cells)):
    return short
  return [cell if len(cell) <= _LONGEST_VALUE else f'\u2026{cell[-room:]}' for cell in cells]


def character(one: Run, other: Run) -> tuple[list[str], list[Change]]:
  """What differs between the characters of two runs: remarks, and the texts of traits that both have."""
  notes, changes = [], []
  names = [str(run.character.get('name', run.name)) for run in (one, other)]
  if names[0] != names[1]:
    notes.append(f'The character is {names[1]}, and not {names[0]}.')
  texts = [str(run.character.get('description', '')) for run in (one, other)]
  if texts[0] != texts[1]:
    changes.append(Change('description', marked(*texts)))
  traits = [{str(trait['id']): trait for trait in run.traits} for run in (one, other)]
  for mine, theirs, word in ((traits[1], traits[0], 'Added'), (traits[0], traits[1], 'Missing')):
    some = [spoken(name) for name in mine if name not in theirs]
    if some:
      notes.append(f'{word}: {together(some)}.')
  for name in traits[0]:
    if name in traits[1]:
      before, now = traits[0][name], traits[1][name]
      changes += _texts(name, before, now)
      notes += _counts(name, before, now)
  return notes, changes


def _texts(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
  texts = [
    {'statement': trait.get('statement', ''), **section(trait, 'opposites')} | {'weight': trait.get('weight', 1.0)}
    for trait in (before, now)
  ]
  return [
    Change(f'{spoken(name)}, {spoken(str(field))}', marked(str(texts[0].get(field, '')), str(texts[1].get(field, ''))))
    for field in dict.fromkeys([*texts[0], *texts[1]])
    if texts[0].get(field) != texts[1].get(field)
  ]


def _counts(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """Of seeds and pairs only how many are new: they are many."""
  notes = []
  for field in ('seeds', 'pairs'):
    old, new = (listed(trait, field) for trait in (before, now))
    added, gone = sum(item not in old for item in new), sum(item not in new for item in old)
    if added or gone:
      notes.append(f'{spoken(name)[:1].upper()}{spoken(name)[1:]}: {added} {field} are new and {gone} are gone.')
  if kept_pairs(before) != kept_pairs(now):
    notes.append(f'The margins of {spoken(name)} are of other kept pairs, and not to be compared one by one.')
  return notes


def kept_pairs(trait: Mapping[str, Any]) -> list[Any]:
  return [pair for pair in listed(trait, 'pairs') if isinstance(pair, Mapping) and pair.get('use') == 'kept']


def marked(before: str, now: str) -> Markup:
  """A text with the words that went in <del> and those that came in <ins>."""
  old, new = (re.findall(r'\S+\s*', text) for text in (before, now))
  if max(len(old), len(new)) > _LONGEST:
    return Markup('<del>{}</del> <ins>{}</ins>').format(before, now)
  parts = []
  for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
    if kind == 'equal':
      parts.append(escape(''.join(new[c:d])))
      continue
    for tag, words in (('del', old[a:b]), ('ins', new[c:d])):
      if words:
        parts.append(Markup('<{0}>{1}</{0}> ').format(Markup(tag), ''.join(words).rstrip()))
  return Markup('').join(parts)
