"""Ctrl-C and SIGTERM, which end what is at work wherever they find it, and are not lost.

What a signal's handler raises is dropped where it comes while Python is in a callback of its garbage collector or in a
finaliser, and JAX has such callbacks. So what came is remembered, too, and `check`, which whatever takes long calls
between its parts, raises it once more.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

LEFT = 'left at an interrupt'  # the name of threads that may be long at something when the process is to end


class Terminated(KeyboardInterrupt):
  """SIGTERM, as an exception, so that files are closed and the lock is let go."""


_came: list[int] = []


@contextlib.contextmanager
def raising() -> Iterator[None]:
  """Within it the two signals raise KeyboardInterrupt and Terminated; an ignored one stays ignored."""
  if threading.current_thread() is not threading.main_thread():  # Only that one may handle signals.
    yield
    return
  before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  hook, sys.unraisablehook = sys.unraisablehook, _quietly
  _came.clear()
  try:
    for number, handler in before.items():
      if handler != signal.SIG_IGN:
        signal.signal(number, _raise)
    yield
    check()
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
    sys.unraisablehook = hook
    _came.clear()


@contextlib.contextmanager
def leaving_within(seconds: float, leave: Callable[[int, str], object]) -> Iterator[None]:
  """Within it, and within `raising`, the process is left so many seconds after SIGTERM, whatever it is at.

  A handler in Python is called between two steps of Python, which may be a long program of the devices apart: the
  signal is heard by a thread.

  Args:
    seconds: from the signal on.
    leave: ends the process with an exit code and a line that says why.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  heard, told = os.pipe()
  os.set_blocking(told, False)
  over = threading.Event()

  def listen() -> None:
    with open(heard, 'rb', buffering=0) as signals:
      while number := signals.read(1):
        if number[0] == signal.SIGTERM and not over.wait(seconds):
          leave(143, f'not done {seconds:g} s after SIGTERM (config.faults.grace_seconds); what was saved is kept')

  before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
  threading.Thread(target=listen, daemon=True).start()
  try:
    yield
  finally:
    over.set()
    signal.set_wakeup_fd(before)
    os.close(told)


def check() -> None:
  """Raises what came and was dropped."""
  if _came:
    raise (Terminated if _came[0] == signal.SIGTERM else KeyboardInterrupt)


def _raise(number: int, _: FrameType | None) -> None:
  _came[:] = [number]
  check()


def _quietly(lost: Any) -> None:
  """Says nothing of an interrupt that was dropped: it comes again."""
  if not isinstance(lost.exc_value, KeyboardInterrupt):
    sys.__unraisablehook__(lost)
