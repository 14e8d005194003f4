"""Chat templates and regular expressions of others run in a process of their own, with little time and memory.

Both are programs, and nothing in a program's text tells whether it ends. A time limit in this process would stop
neither a long multiplication nor a search that backtracks, off the main thread least of all. The kernel ends the
other process instead. This file is that process, too; there it imports nothing of charjax.
"""

import contextlib
import datetime
import functools
import json
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 1.0  # of processor time for one template or search; a chat takes less than a thousandth of that
MEGABYTES = 512
_MOST_TEXT = 10_000_000  # characters that a template may write
# What templates that write today's date are told, so that a run stays repeatable: the day on which Llama 3.1's stands
# still where it is told none.
_TODAY = datetime.date(2024, 7, 26)
_LIMITS = f'it did not come to an end within {SECONDS:g} s and {MEGABYTES} MB'


class Refused(Exception):
  """The program failed, or did what it must not, or exceeded its limits: why, in a few words."""


def render(source: str, variables: dict[str, Any] | None) -> str:
  """A Jinja template as text, rendered as transformers does (trim_blocks, lstrip_blocks, loop controls, the
  `generation` block around what the assistant says), but for the date: today is always the same day.

  The sandbox refuses attributes that lead to the interpreter and changes to what it is given.

  Args:
    source: the template.
    variables: what it may read, as JSON has it; None only checks that `source` is valid Jinja.

  Raises:
    Refused: it is not valid, or fails.
  """
  return _WORKER.ask('render', source, variables)


def search(pattern: str, text: str) -> bool:
  """Whether a regular expression, whatever the case of letters, is found in the text.

  Raises:
    Refused: it is none, or takes too long.
  """
  return _WORKER.ask('search', pattern, text)


class _Worker:
  """The other process: started when it is first needed, and again after it was ended."""

  def __init__(self) -> None:
    self._process: subprocess.Popen[str] | None = None
    self._lock = threading.Lock()

  def ask(self, what: str, *arguments: Any) -> Any:
    """The answer to one request; it waits for that of another thread."""
    with self._lock:
      if self._process is None:
        # -P: modules beside this file do not stand before those of the standard library.
        self._process = subprocess.Popen(
          [sys.executable, '-P', __file__],
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          stderr=subprocess.DEVNULL,
          text=True,
          # A signal to the group is for the process that asks: if this one died of it, a template would be blamed.
          start_new_session=True,
        )
      process, line = self._process, ''
      assert process.stdin and process.stdout
      try:
        process.stdin.write(json.dumps([what, *arguments]) + '\n')
        process.stdin.flush()
        line = process.stdout.readline()
      except OSError:
        pass
      finally:
        if not line.endswith('\n'):  # It was ended, or we were interrupted: the next request needs another.
          self._process = None
          process.kill()
          process.communicate()
    if not line.endswith('\n'):
      raise Refused(_LIMITS)
    answer = json.loads(line)
    if 'refused' in answer:
      raise Refused(answer['refused'])
    return answer['value']


_WORKER = _Worker()


# ---- in the other process ----


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols', _Generation]
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _raise_exception
  environment.globals['strftime_now'] = _TODAY.strftime
  return environment.from_string(source)


def _render(source: str, variables: dict[str, Any] | None) -> str:
  template = _compiled(source)
  text = '' if variables is None else template.render(variables)
  if len(text) > _MOST_TEXT:
    raise ValueError(f'it writes {len(text):,} characters, and {_MOST_TEXT:,} are the most')
  return text


class _Generation(Extension):
  """{% generation %} ... {% endgeneration %}: what stands between, which here is nothing special."""

  tags = {'generation'}  # noqa: RUF012

  def parse(self, parser: Parser) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    # A call, as in transformers: what is set inside is unknown outside.
    return nodes.CallBlock(self.call_method('_written'), [], [], body).set_lineno(line)

  def _written(self, caller: Callable[[], str]) -> str:
    return caller()


def _to_json(
  value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
  """Jinja's own filter escapes for HTML what the model would then read."""
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> NoReturn:
  raise jinja2.TemplateError(str(message))


def _search(pattern: str, text: str) -> bool:
  return bool(re.search(pattern, text, re.IGNORECASE))


_REQUESTS: dict[str, Callable[..., Any]] = {'render': _render, 'search': _search}


def _serve() -> None:
  """Answers requests, one JSON a line, until there are none."""
  signal.signal(signal.SIGPROF, signal.SIG_DFL)
  with contextlib.suppress(OSError, ValueError):  # There is a smaller limit, or the system has none.
    resource.setrlimit(resource.RLIMIT_AS, (MEGABYTES << 20, resource.getrlimit(resource.RLIMIT_AS)[1]))
  for line in sys.stdin:
    what, *arguments = json.loads(line)
    # Nobody handles SIGPROF: it ends the process, whatever that is at.
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
      answer = {'value': _REQUESTS[what](*arguments)}
    except MemoryError:
      answer = {'refused': _LIMITS}
    except Exception as error:  # A template may raise anything: a TypeError, a ZeroDivisionError, its own.
      answer = {'refused': ' '.join(str(error).split()) or type(error).__name__}
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  _serve()
