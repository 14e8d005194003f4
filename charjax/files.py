"""Files as a run reads and writes them: what people give, of which some is no file, text that is whole or not there at
all, and JSON Lines.
"""

import errno
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from charjax import hosts, storage
from charjax.errors import UserError, quoted

Row = dict[str, Any]


def check_ends(path: epath.PathLike) -> None:
  """Whether what is there can be read to its end.

  Raises:
    OSError: it is a folder, a device or a pipe.
  """
  if os.path.exists(path) and not os.path.isfile(path):
    if os.path.isdir(path):
      raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, 'not a file', os.fspath(path))


def read_file(path: epath.PathLike) -> bytes:
  """The contents of a file, local or of any place that etils.epath opens.

  Raises:
    OSError: it cannot be read, or has no end.
  """
  check_ends(path)
  return epath.Path(path).read_bytes()


def write_text(path: epath.PathLike, text: str, new: bool = False) -> None:
  """Writes a file as `storage.put` does. Of many processes, one writes."""
  # A lone surrogate, which a model's JSON may hold, has no UTF-8 form; its escape is the same JSON.
  data = text.encode('utf-8', errors='backslashreplace')
  hosts.first(lambda: storage.put(epath.Path(path), data, new))


def write_jsonl(path: epath.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
  """Writes one JSON object per line, keys in the order given, atomically."""
  write_text(path, ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))


def read_jsonl(path: epath.PathLike, fields: Mapping[str, Any] | None = None, *, appended: bool = False) -> list[Row]:
  """The rows of `numbered_rows`, without their lines."""
  return [row for _, row in numbered_rows(path, fields, appended=appended)]


def numbered_rows(
  path: epath.PathLike, fields: Mapping[str, Any] | None = None, *, appended: bool = False
) -> list[tuple[int, Row]]:
  """Reads one JSON object per line, with the number of its line; empty lines are passed over.

  Args:
    path: the file.
    fields: what every row must have, and of which type (or tuple of types).
    appended: whether it is written a row at a time, so that a kill may have left a last line without its end, which is
      passed over.

  Raises:
    UserError: the file is missing or not UTF-8, or a line is no JSON object or lacks a field.
  """
  try:
    with storage.reading(path):
      data = read_file(path)
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'{path}: cannot be read ({reason}); check the path') from error
  return parse_rows(path, data[: data.rfind(b'\n') + 1] if appended else data, fields)


def parse_rows(path: epath.PathLike, data: bytes, fields: Mapping[str, Any] | None = None) -> list[tuple[int, Row]]:
  """`numbered_rows` of what was read from `path`, which is only named.

  Raises:
    UserError: it is not UTF-8, or a line is no JSON object or lacks a field.
  """
  try:
    text = data.decode('utf-8')
  except UnicodeDecodeError as error:
    broken = data[: error.start].count(b'\n') + 1
    raise UserError(f'{path}:{broken}: not UTF-8 text; save the file as UTF-8') from error
  rows = []
  # Not splitlines(): it also cuts at U+2028 and others, which stand unescaped inside JSON strings.
  for number, line in enumerate(text.split('\n'), start=1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
      raise UserError(f'{path}:{number}: not JSON ({reason}); each line must be one JSON object') from error
    if not isinstance(row, dict):
      raise UserError(f'{path}:{number}: {type(row).__name__} found; each line must be one JSON object')
    for field, kind in (fields or {}).items():
      kinds = kind if isinstance(kind, tuple) else (kind,)
      if field not in row or type(row[field]) not in kinds:
        found = f'is {quoted(row[field])}' if field in row else 'is missing'
        wanted = ' or '.join(_JSON_TYPES[k] for k in kinds)
        raise UserError(f'{path}:{number}: field {field} {found}; it must be {wanted}')
    rows.append((number, row))
  return rows


def check_encodes(path: epath.PathLike, line: int, field: str, text: str) -> None:
  """Whether a text from a file can be given to a tokenizer: JSON can write half a character, as cut-off exports do.

  Raises:
    UserError: naming file, line and field.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'{path}:{line}: field {field} holds half a character, \\u{ord(text[error.start]):x}; write it anew'
    ) from error


_JSON_TYPES = {
  str: 'text',
  int: 'a whole number',
  float: 'a number',
  list: 'a list',
  dict: 'an object',
  type(None): 'null',
}
