"""The exceptions that a user is meant to read, and how other errors are quoted in them."""

import json
from typing import Any


class UserError(Exception):
  """Something the user can put right: a file, a field, a value.

  The message is one line that names the file, the field and the remedy. The command line prints it
  without a stack trace and exits with code 2.
  """


class Passing(Exception):
  """Something that may pass by itself, as what a network or another machine does; the message is as a UserError's.

  The command line exits with code 75: who watches over a run gives the same command again.
  """


def quoted(value: Any) -> str:
  """A value of a file as part of such a line: as JSON, at most 60 characters."""
  text = json.dumps(value)
  return text if len(text) <= 60 else f'{text[:57]}...'


def one_line(error: Exception) -> str:
  """A library's error as part of such a line: at most 200 printable characters, never empty."""
  text = ' '.join(str(error).split()) or type(error).__name__
  return ''.join(c for c in text if c.isprintable())[:200]
