"""What differs between two characters, trait by trait and word by word, as text for a terminal.

charjax character diff A B        # shipped names, .toml files, or folders of runs
"""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from charjax import defaults
from charjax.character import Character, Trait, load, select
from charjax.config_file import merge
from charjax.errors import UserError
from charjax.starting_model import read_record
from charjax.terminal import wrapped

_LISTED = 5  # seeds or messages of pairs that are written out


def read(path: str) -> Character:
  """A character as `load` takes it, or the one that stands in the folder of a run: with the traits and weights that the
  run chose.

  Raises:
    UserError: naming what is wrong with it, or that the folder holds none.
  """
  try:
    return load(path)  # First: a folder of its name does not hide a shipped character.
  except UserError:
    folder = Path(os.path.expanduser(path))  # which leaves the ~ of an unknown user as it is
    if not folder.is_dir():
      raise
  if not (folder / 'character.toml').exists():
    raise UserError(f'{folder}: a folder without a character.toml; name a character file or the folder of a run')
  config = defaults.get_config()
  record = read_record(folder)
  if record and 'character' in record:
    merge(config, ConfigDict({'character': record['character']}), str(folder / 'config.json'), '')
  return select(load(str(folder / 'character.toml')), config.character.traits)


def diff(one: Character, other: Character) -> str:
  """Texts with what went as [-so-] and what came as {+so+}; seeds and pairs as lists. '' where nothing differs."""
  lines: list[str] = []
  for field in ('name', 'description'):
    lines += _text(field, getattr(one, field), getattr(other, field))
  traits = [{trait.id: trait for trait in character.traits} for character in (one, other)]
  for name in dict.fromkeys([*traits[0], *traits[1]]):
    before, now = (some.get(name) for some in traits)
    if before is None or now is None:
      found = before or now
      assert found is not None
      lines += ['', f'trait {name}: {"gone" if now is None else "new"}']
      lines += _text('statement', *((found.statement, '') if now is None else ('', found.statement)))
    elif changes := _trait(before, now):
      lines += ['', f'trait {name}', *changes]
  order = [[name for name in some if name in traits[0] and name in traits[1]] for some in traits]
  if order[0] != order[1]:
    lines += ['', f'traits come in another order: {", ".join(order[1])}']
  return '\n'.join(lines).strip('\n')


def _trait(before: Trait, now: Trait) -> list[str]:
  lines = _text('statement', before.statement, now.statement)
  if before.weight != now.weight:
    lines.append(f'  weight: {before.weight:g} -> {now.weight:g}')
  for name in dict.fromkeys([*before.opposites, *now.opposites]):
    lines += _text(f'opposite {name}', before.opposites.get(name, ''), now.opposites.get(name, ''))
  lines += _list('seeds', before.seeds, now.seeds)
  for use in dict.fromkeys(pair.use for pair in (*before.pairs, *now.pairs)):
    pairs = [
      [f'{p.message} / {p.in_character} / {p.out_of_character} ({p.opposite})' for p in trait.pairs_for(use)]
      for trait in (before, now)
    ]
    lines += _list(f'{use} pairs', *pairs)
    if use == 'kept' and pairs[0] != pairs[1]:
      lines.append('  (margins of runs with other kept pairs are not to be compared one by one)')
  return lines


def _list(what: str, before: Sequence[str], now: Sequence[str]) -> list[str]:
  """Of many items how many are new and gone, and the first of them."""
  gone, new = [item for item in before if item not in now], [item for item in now if item not in before]
  if not gone and not new:
    return [f'  {what}: in another order'] if list(before) != list(now) else []
  lines = [f'  {what}: {len(gone)} gone, {len(new)} new']
  for sign, items in (('-', gone), ('+', new)):
    lines += [_wrapped(f'{sign} {item}', '      ') for item in items[:_LISTED]]
    if items[_LISTED:]:
      lines.append(f'      {sign} and {len(items) - _LISTED} more')
  return lines


def _text(field: str, before: str, now: str) -> list[str]:
  return [_wrapped(f'{field}: {marked(before, now)}', '  ')] if before != now else []


def marked(before: str, now: str) -> str:
  """A text with the words that went and those that came."""
  old, new = before.split(), now.split()
  parts = []
  for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
    if kind == 'equal':
      parts.append(' '.join(old[a:b]))
      continue
    parts += [f'[-{" ".join(old[a:b])}-]'] * (b > a) + [f'{{+{" ".join(new[c:d])}+}}'] * (d > c)
  return ' '.join(parts)


def _wrapped(text: str, indent: str) -> str:
  return wrapped(text, indent, indent + '  ')
