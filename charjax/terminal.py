"""Texts of models and of other people's files, as a terminal may be given them; and a reader who has gone."""

import os
import select
import sys
import textwrap
import unicodedata

_WIDTH = 96
# Formatting characters that turn the direction of what follows, and so what a line seems to say.
_TURNING = {*'\u061c\u200e\u200f', *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}


def printable(text: str) -> str:
  """The text without what could drive a terminal, or make a line seem to say something else."""
  text = text.replace('\t', '    ')
  return ''.join(
    c for c in text if c == '\n' or (unicodedata.category(c) not in ('Cc', 'Cs', 'Zl', 'Zp') and c not in _TURNING)
  )


def wrapped(text: str, first: str, rest: str) -> str:
  """The same in lines of 96 characters, of which the first begins with `first` and the others with `rest`."""
  text = ' '.join(printable(text).split())
  return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=rest)


def is_unread() -> bool:
  """Whether what is printed goes into a pipe that nobody reads any more."""
  streams = select.poll()
  for stream in (sys.stdout, sys.stderr):
    streams.register(stream.fileno(), 0)  # Of errors it tells without being asked.
  return bool(streams.poll(0))


def print_nowhere() -> None:
  """Has what is still to be printed go nowhere: Python would say that nobody reads it once more when it ends."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
