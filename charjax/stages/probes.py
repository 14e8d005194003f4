"""What users may measure besides a character's own pairs: files of probes and of neutral messages, and what is wrong
with them.
"""

import dataclasses
import re

from charjax import bounded
from charjax.errors import UserError
from charjax.files import Row, check_encodes, numbered_rows


@dataclasses.dataclass(frozen=True)
class Probe:
  """One line of a probe file."""

  trait: str
  message: str
  consistent: str
  inconsistent: str


def read_probes(path: str) -> list[Probe]:
  """A probe file: JSON Lines with trait, message, consistent, inconsistent; other keys are ignored.

  Raises:
    UserError: naming file, line and field.
  """
  fields = [field.name for field in dataclasses.fields(Probe)]
  return [Probe(**{field: _text(path, i, row, field) for field in fields}) for i, row in _lines(path)]


def read_neutral(path: str) -> list[Row]:
  """A neutral file: JSON Lines with message, reference, expect (a regular expression, or null).

  Raises:
    UserError: naming file, line and field.
  """
  rows = []
  for i, row in _lines(path):
    expect = row.get('expect')
    if expect is not None:
      if isinstance(expect, str):
        check_encodes(path, i, 'expect', expect)
      try:
        re.compile(expect)
        bounded.search(expect, _repetitive(expect))
      except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f'{path}:{i}: expect is no regular expression ({error}); mend it or write null') from error
      except bounded.Refused as error:
        raise UserError(f'{path}:{i}: expect is too slow ({error}); do not repeat what repeats itself') from error
    rows.append({field: _text(path, i, row, field) for field in ('message', 'reference')} | {'expect': expect})
  return rows


def _repetitive(pattern: str) -> str:
  """A text like those that small models fall into, and on which a careless pattern searches without end."""
  return '\n'.join(c * 100 + '!' for c in sorted({*'a0 ', *filter(str.isalnum, pattern)})[:40])


def found(pattern: str, text: str) -> bool:
  """Whether an answer holds what is expected of it.

  Raises:
    UserError: the search takes too long.
  """
  try:
    return bounded.search(pattern, text)
  except bounded.Refused as error:
    raise UserError(
      f'config.evaluation.neutral: expect {pattern[:80]!r} is too slow for an answer of the model ({error}); do not '
      'repeat what repeats itself'
    ) from error


def _lines(path: str) -> list[tuple[int, Row]]:
  rows = numbered_rows(path)
  if not rows:
    raise UserError(f'{path}: the file is empty; write one JSON object a line')
  return rows


def _text(path: str, line: int, row: Row, field: str) -> str:
  value = row.get(field)
  if not isinstance(value, str) or not value.strip():
    raise UserError(f'{path}:{line}: field {field} is missing or no text; give it a string')
  check_encodes(path, line, field, value)
  return value
