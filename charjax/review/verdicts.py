"""What reviewers said, one JSON Lines file each, kept the moment it is said."""

import contextlib
import fcntl
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from charjax.errors import UserError
from charjax.files import Row, parse_rows, read_file
from charjax.review.pairs import OPPONENTS, Pair

FOLDER = 'review'
CHOICES = ('left', 'right', 'tie', 'skip')  # skip: the reviewer cannot tell; counted, not weighed
_CONDITIONS = ('trained', *OPPONENTS)
_FIELDS = {'pair': str, 'reviewer': str, 'left': str, 'right': str, 'verdict': (str, type(None)), 'note': str}


def reviewer_name(name: str) -> str:
  """The name, fit to be that of a file.

  Raises:
    UserError: it is not.
  """
  name = unicodedata.normalize('NFC', name)
  if not re.fullmatch(r'\w[\w.-]{0,39}', name):
    raise UserError(
      f'--reviewer={name[:80]!r}: give at most 40 letters, digits and . _ - that begin with a letter or digit'
    )
  return name


def path_of(workdir: epath.PathLike, reviewer: str) -> epath.Path:
  return epath.Path(workdir) / FOLDER / f'{reviewer}.jsonl'


def read(path: epath.PathLike) -> tuple[dict[str, Row], int]:
  """The verdicts of one reviewer that stand, by pair in the order they were given.

  Of several lines on a pair the last counts; one whose verdict is null takes it back.

  Returns:
    The verdicts, and how many bytes of the file are whole lines: a last line that a crash cut short is not among them.

  Raises:
    UserError: a line is damaged.
  """
  try:
    data = read_file(path)
  except FileNotFoundError:
    return {}, 0
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror or error}); move it away') from error
  whole = data.rfind(b'\n') + 1
  standing: dict[str, Row] = {}
  for number, row in parse_rows(path, data[:whole], _FIELDS):
    for field, allowed in (('verdict', (*CHOICES, None)), ('left', _CONDITIONS), ('right', _CONDITIONS)):
      if row[field] not in allowed:
        known = ', '.join('null' if value is None else value for value in allowed)
        raise UserError(f'{path}:{number}: field {field} is {row[field][:40]!r}; it must be one of {known}')
    standing.pop(row['pair'], None)  # So that the last given is last.
    if row['verdict'] is not None:
      standing[row['pair']] = row
  return standing, whole


def read_all(workdir: epath.PathLike) -> list[Row]:
  """Every verdict that stands, of all reviewers by name.

  Raises:
    UserError: a file is damaged.
  """
  folder = epath.Path(workdir) / FOLDER
  paths = sorted(folder.glob('*.jsonl')) if folder.is_dir() else []
  return [row for path in paths for row in read(path)[0].values()]


class Verdicts:
  """The file of one reviewer, open to be added to.

  Attributes:
    path: the file.
    standing: the verdicts that stand, by pair, the last given last.
    dropped: whether a line that was cut short had to be dropped.
  """

  def __init__(self, path: epath.PathLike, file: int):
    self.path = epath.Path(path)
    self._file = file
    self.standing, whole = read(path)
    self.dropped = os.fstat(file).st_size > whole
    if self.dropped:
      os.ftruncate(file, whole)

  def give(self, reviewer: str, pair: Pair, verdict: str | None, note: str = '') -> None:
    """Adds a verdict; it is on the disk when this returns.

    Raises:
      OSError: the disk does not take it. The file is as it was before.
    """
    left, right = pair.sides(reviewer)
    row: Row = {'pair': pair.id, 'trait': pair.trait, 'message': pair.message, 'reviewer': reviewer}
    row |= {'left': left, 'right': right, 'verdict': verdict, 'note': note}
    self._append(row)
    self.standing.pop(pair.id, None)
    if verdict is not None:
      self.standing[pair.id] = row

  def _append(self, row: Mapping[str, Any]) -> None:
    # A lone surrogate, which a note may hold, has no UTF-8 form; its escape is the same JSON.
    line = (json.dumps(row, ensure_ascii=False) + '\n').encode('utf-8', errors='backslashreplace')
    before = os.fstat(self._file).st_size
    try:
      written = os.write(self._file, line)
      while written < len(line):
        written += os.write(self._file, line[written:])
      os.fsync(self._file)
    except OSError:
      os.ftruncate(self._file, before)
      raise


@contextlib.contextmanager
def opened(workdir: epath.PathLike, reviewer: str) -> Iterator[Verdicts]:
  """The file of a reviewer, for one process at a time.

  Raises:
    UserError: another process has it, or it cannot be written or is damaged.
  """
  path = path_of(workdir, reviewer)
  with contextlib.ExitStack() as stack:
    try:
      path.parent.mkdir(exist_ok=True)
      file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
      stack.callback(os.close, file)
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      folder = os.open(path.parent, os.O_RDONLY)  # A new file is on the disk when its name is.
      stack.callback(os.close, folder)
      os.fsync(folder)
    except BlockingIOError as error:
      raise UserError(
        f'{path}: {reviewer} is judging in another process; end that one, or give another --reviewer'
      ) from error
    except OSError as error:
      raise UserError(f'{path}: cannot be written ({error.strerror or error}); make it writable') from error
    yield Verdicts(path, file)
