"""A character as data: what a TOML file of traits says, read and checked before any work starts.

The form of a file (charjax/characters/assistant.toml is a whole one):

  name = "assistant"
  description = "..."
  [[traits]]
  id = "honesty"
  statement = "I ..."                  # first person
  weight = 1.0                         # optional
  seeds = ["a human message", ...]     # eight or more
  [traits.opposites]
  flattering = "I ..."                 # one entry for each vice the trait can be missed by
  [[traits.pairs]]
  use = "shown"                        # shown: a worked example, choosing: for the ranker, kept: evaluation
  opposite = "flattering"
  message = "..."
  in_character = "..."
  out_of_character = "..."
"""

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from etils import epath

from charjax.errors import UserError
from charjax.files import read_file

USES = ('shown', 'choosing', 'kept')

_SHIPPED = epath.Path(__file__).parent / 'characters'
_MAX_BYTES = 5_000_000
_MAX_CHARS = 10_000
_MIN_SEEDS = 8
_MOST_WEIGHT = 1e9
_WEIGHT_RULE = 'must be a finite number from 0 to 1e9; 1.0 is usual'
_SIMPLE_NAME = re.compile(r'[a-z][a-z0-9_]{0,63}')


@dataclasses.dataclass(frozen=True)
class Pair:
  """One message with a reply in character and one out of it, alike in length and manner."""

  message: str
  in_character: str
  out_of_character: str
  opposite: str  # the id of the opposite that out_of_character shows
  use: str  # one of USES


@dataclasses.dataclass(frozen=True)
class Trait:
  """One trait: what the model is to be (statement) and the vices it can be missed by (opposites)."""

  id: str
  statement: str
  opposites: dict[str, str]  # id -> first-person statement
  seeds: tuple[str, ...]
  pairs: tuple[Pair, ...]
  weight: float = 1.0

  def pairs_for(self, use: str) -> tuple[Pair, ...]:
    """The pairs of one use, in the order of the file."""
    return tuple(pair for pair in self.pairs if pair.use == use)


@dataclasses.dataclass(frozen=True)
class Character:
  name: str
  description: str
  traits: tuple[Trait, ...]


def load(path: str) -> Character:
  """Reads and checks a character.

  Args:
    path: a .toml file, or the name of a character that ships with charjax ('assistant'); or several of either joined by
      +, as in 'stoic+poet': a character with the traits of all.

  Raises:
    UserError: one line naming file, line, field and remedy.
  """
  return _combine([_load(part) for part in _parts(path)])


def _combine(characters: Sequence[Character]) -> Character:
  owners: dict[str, str] = {}
  for character in characters:
    for trait in character.traits:
      if trait.id in owners:
        raise UserError(
          f'{_joined(characters)}: {owners[trait.id]} and {character.name} both have a trait {trait.id}; rename one'
        )
      owners[trait.id] = character.name
  traits = tuple(trait for character in characters for trait in character.traits)
  return Character(_joined(characters), ' '.join(character.description for character in characters), traits)


def _joined(characters: Sequence[Character]) -> str:
  return '+'.join(character.name for character in characters)


def _load(path: str) -> Character:
  text, file = _source(path), str(_locate(path))
  try:
    data = tomllib.loads(text)
  except RecursionError as error:
    raise UserError(f'{file}: values are nested too deeply; use the form shown in assistant.toml') from error
  except ValueError as error:  # TOMLDecodeError, or an integer of thousands of digits
    found = re.search(r'\(at line (\d+)', str(error))
    line = int(found[1]) if found else text.rstrip().count('\n') + 1
    reason = ' '.join(str(error).split())
    raise UserError(f'{file}, line {line}: this is not valid TOML: {reason}; mend the line') from error
  return _Reader(file, _line_numbers(text)).character(data)


def source(path: str) -> str:
  """The text of a character, as `load` takes it; of several, one text with the traits of all.

  Raises:
    UserError: a file is missing, unreadable, over 5 MB or no UTF-8, or cannot be joined to another.
  """
  parts = _parts(path)
  if len(parts) == 1:
    return _source(path)
  character, texts = load(path), [_source(part) for part in parts]
  # A string of JSON is one of TOML too.
  head = {'name': character.name, 'description': character.description}
  text = '\n'.join(f'{key} = {json.dumps(value, ensure_ascii=False)}' for key, value in head.items())
  for part, own in zip(parts, texts, strict=True):
    found = re.search(r'^\[\[traits\]\].*', own, re.DOTALL | re.MULTILINE)
    text += f'\n\n# of {part}\n{found[0] if found else ""}'
  wanted = [trait for own in texts for trait in tomllib.loads(own)['traits']]
  try:
    same = tomllib.loads(text) == head | {'traits': wanted}
  except ValueError:
    same = False
  if not same:
    raise UserError(f'{_short(path)}: to be joined, each file must have its traits last, each under [[traits]]')
  return text


def _source(path: str) -> str:
  file = _locate(path)
  try:
    size = file.stat().length
    data = b'' if size > _MAX_BYTES else read_file(file)
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or str(error)
    raise UserError(
      f'{_short(path)}: cannot read this character ({reason}); give the path of a .toml file or a shipped '
      f'character ({", ".join(_shipped_names())})'
    ) from error
  if size > _MAX_BYTES:
    raise UserError(f'{file}: the file has {size:,} bytes; shorten it to {_MAX_BYTES:,} or split it')
  try:
    return data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = data[: error.start].count(b'\n') + 1
    raise UserError(f'{file}, line {line}: broken UTF-8; save the file with UTF-8 encoding') from error


def select(character: Character, traits: Sequence[str]) -> Character:
  """The character with only the named traits, in the character's order; an empty sequence keeps all.

  A name may be followed by a weight of its own, as in 'honesty:2'.

  Raises:
    UserError: a name is no trait of the character, its weight no number that the file may hold, or all weights are 0.
  """
  found = {trait.id: trait for trait in character.traits}
  chosen: dict[str, Trait] = {}
  for entry in traits:
    if not isinstance(entry, str):
      raise UserError(f'config.character.traits: {_short(entry)} is no text; choose from {", ".join(found)}')
    name, weight = parse_choice(entry)
    if name not in found:
      raise UserError(
        f'config.character.traits: character {character.name} has no trait {_short(name)}; choose from '
        f'{", ".join(found)}, or give () for all'
      )
    if weight is not None and not 0 <= weight <= _MOST_WEIGHT:
      raise UserError(f'config.character.traits: {_short(entry)}: the weight {_WEIGHT_RULE}')
    chosen[name] = found[name] if weight is None else dataclasses.replace(found[name], weight=weight)
  kept = chosen or found
  if not any(trait.weight for trait in kept.values()):
    raise UserError(
      f'character {character.name}: the weight of every trait is 0, so that nothing is learned; raise one'
    )
  return dataclasses.replace(character, traits=tuple(kept[name] for name in found if name in kept))


def check_rewarded(character: Character, traits: Sequence[str]) -> None:
  """Whether a policy can be rewarded for these traits of a character, () for all.

  Raises:
    UserError: one is no trait of the character, or the weights of all of them are 0.
  """
  weights = {trait.id: trait.weight for trait in character.traits}
  if wrong := [name for name in traits if name not in weights]:
    raise UserError(
      f'config.policy.traits: {_short(wrong[0])} is no trait of this run; choose from {", ".join(weights)}, or give () '
      'for all'
    )
  if traits and not any(weights[name] for name in traits):
    raise UserError(f'config.policy.traits: the weight of {" and ".join(traits)} is 0, so that nothing is learned')


def parse_choice(entry: str) -> tuple[str, float | None]:
  """Name and weight of an entry of config.character.traits: None where it gives no weight, NaN if that is no number."""
  name, colon, text = entry.partition(':')
  try:
    return name, float(text) if colon else None
  except ValueError:
    return name, math.nan


def _parts(path: str) -> list[str]:
  """The characters that a path names; a file whose own name has a + in it is one."""
  parts = path.split('+')
  try:
    whole = len(parts) == 1 or not all(parts) or epath.Path(path).exists()
  except (OSError, ValueError):
    whole = True
  return [path] if whole else parts


def _locate(path: str) -> epath.Path:
  return _SHIPPED / f'{path}.toml' if path in _shipped_names() else epath.Path(path)


def _shipped_names() -> list[str]:
  return sorted(file.stem for file in _SHIPPED.glob('*.toml'))


def _short(value: object) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'


# Where a field stands: the trait's index, the pair's index (or the word 'opposites'), the field's name.
_Place = tuple[int | str, ...]


def _line_numbers(text: str) -> dict[_Place, int]:
  """The line of each header and key. tomllib keeps none, and a writer with 300 pairs needs them.

  It reads the form shown at the top of this file; another spelling of the same data (inline tables,
  dotted keys) is loaded as well, but its errors name the nearest line found.
  """
  lines: dict[_Place, int] = {}
  table: _Place = ()
  trait = pair = -1
  inside = ''  # the quotes that close the multi-line string we are in
  for number, line in enumerate(text.split('\n'), start=1):
    if inside:
      inside = inside if line.count(inside) % 2 == 0 else ''
      continue
    stripped = line.split('#')[0].strip() if line.lstrip().startswith('[') else line.strip()
    header = re.sub(r'\s+', '', stripped)
    if header == '[[traits]]':
      trait, pair = trait + 1, -1
      table = (trait,)
      lines[table] = number
    elif header == '[[traits.pairs]]':
      pair += 1
      table = (trait, pair)
      lines[table] = number
    elif header == '[traits.opposites]':
      table = (trait, 'opposites')
      lines[table] = number
    elif key := re.match(r'(["\']?)([\w-]+)\1\s*=', stripped):
      lines.setdefault((*table, key[2]), number)
    quotes = re.search(r'"""|\'\'\'', line)
    if quotes and line.count(quotes[0]) % 2:
      inside = quotes[0]
  return lines


class _Reader:
  """Turns parsed TOML into a Character; it only carries what an error message needs to know."""

  def __init__(self, file: str, lines: dict[_Place, int]) -> None:
    self.file = file
    self.lines = lines

  def character(self, data: dict[str, Any]) -> Character:
    self.fields(data, (), ('name', 'description', 'traits'))
    name = self.text(data, (), 'name')
    description = self.text(data, (), 'description')
    if not isinstance(data['traits'], list) or not data['traits']:
      self.fail(('traits',), 'must be one or more [[traits]] tables')
    traits = tuple(self.trait(entry, (i,)) for i, entry in enumerate(data['traits']))
    first: dict[str, int] = {}
    for i, trait in enumerate(traits):
      if trait.id in first:
        self.fail((i, 'id'), f'{trait.id!r} is also the id of traits[{first[trait.id]}]; rename one of them')
      first[trait.id] = i
    return Character(name, description, traits)

  def trait(self, data: Any, place: _Place) -> Trait:
    self.fields(data, place, ('id', 'statement', 'opposites', 'seeds', 'pairs'), optional=('weight',))
    trait_id = self.text(data, place, 'id')
    self.simple_name(trait_id, (*place, 'id'))
    if trait_id == 'neutral':
      self.fail((*place, 'id'), "'neutral' is what messages without a trait are called; choose another name")
    statement = self.text(data, place, 'statement')
    weight = data.get('weight', 1.0)
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)  # a bool is an int in Python
    if not number or not 0 <= weight <= _MOST_WEIGHT:  # not a number, infinite and negative all fail this
      self.fail((*place, 'weight'), f'{_short(weight)} {_WEIGHT_RULE}')

    opposites = data['opposites']
    if not isinstance(opposites, dict) or not opposites:
      self.fail((*place, 'opposites'), 'must be a table of one or more lines: name = "I ..."')
    for name in opposites:
      self.simple_name(name, (*place, 'opposites', name))
      self.text(opposites, (*place, 'opposites'), name)

    seeds = data['seeds']
    if not isinstance(seeds, list) or len(seeds) < _MIN_SEEDS:
      count = f'has {len(seeds)}' if isinstance(seeds, list) else f'is {_short(seeds)}'
      self.fail((*place, 'seeds'), f'{count}; it must be a list of {_MIN_SEEDS} or more human messages')
    for i, seed in enumerate(seeds):
      self.check_text(seed, (*place, 'seeds'), f'[{i}]')

    if not isinstance(data['pairs'], list):
      self.fail((*place, 'pairs'), 'must be [[traits.pairs]] tables')
    pairs = tuple(self.pair(entry, (*place, i), opposites) for i, entry in enumerate(data['pairs']))
    if not any(pair.use == 'shown' for pair in pairs):
      self.fail((*place, 'pairs'), 'none has use = "shown"; mark four as the worked examples')
    return Trait(trait_id, statement, dict(opposites), tuple(seeds), pairs, float(weight))

  def pair(self, data: Any, place: _Place, opposites: Collection[str]) -> Pair:
    names = tuple(field.name for field in dataclasses.fields(Pair))
    self.fields(data, place, names)
    pair = Pair(**{name: self.text(data, place, name) for name in names})
    if pair.use not in USES:
      self.fail((*place, 'use'), f'{_short(pair.use)} is unknown; use {", ".join(USES)}')
    if pair.opposite not in opposites:
      self.fail((*place, 'opposite'), f'{_short(pair.opposite)} is unknown; use {", ".join(opposites)}')
    if pair.in_character == pair.out_of_character:
      self.fail((*place, 'out_of_character'), 'equals in_character; write a reply that lacks the trait')
    return pair

  def fields(self, data: Any, place: _Place, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    if not isinstance(data, dict):
      self.fail(place, f'{_short(data)} must be a table')
    for name in data:
      if name not in required + optional:
        self.fail((*place, name), f'unknown field; the fields are {", ".join(required + optional)}')
    for name in required:
      if name not in data:
        self.fail((*place, name), 'the field is missing; add it')

  def text(self, data: dict[str, Any], place: _Place, name: str) -> str:
    return self.check_text(data[name], (*place, name))

  def check_text(self, value: Any, place: _Place, item: str = '') -> str:
    if not isinstance(value, str):
      self.fail(place, f'{_short(value)} must be text in quotes', item)
    if not value.strip():
      self.fail(place, 'is empty; write some text', item)
    if len(value) > _MAX_CHARS:
      self.fail(place, f'has {len(value):,} characters; shorten it to {_MAX_CHARS:,}', item)
    return value

  def simple_name(self, name: str, place: _Place) -> None:
    if not _SIMPLE_NAME.fullmatch(name):
      self.fail(place, f'{_short(name)} is no simple name; use a-z, 0-9 and _, a letter first, 64 at most')

  def fail(self, place: _Place, problem: str, item: str = '') -> NoReturn:
    # A missing or oddly spelled field has no line of its own: name that of the table it belongs to.
    nearest = (*(place[:n] for n in range(len(place), 0, -1)), ('traits',))
    line = next((self.lines[p] for p in nearest if p in self.lines), None)
    at = f'{self.file}, line {line}' if line else self.file
    words: list[str] = []
    for depth, part in enumerate(place):
      if isinstance(part, int):
        words.append(f'traits[{part}]' if depth == 0 else f'pairs[{part}]')
      else:
        words.append(part if re.fullmatch(r'[\w-]{1,60}', part) else _short(part))
    raise UserError(f'{at}: {".".join(words)}{item}: {problem}')
