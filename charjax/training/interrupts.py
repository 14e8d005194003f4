"""Ctrl-C and SIGTERM while a model is trained: the step at hand is finished and saved first."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from charjax.progress import is_first_process


class Interrupts:
  """Holds the first interrupt back until the loop can save; a second one goes through at once.

  with Interrupts() as interrupts:
    for step in steps:
      ...
      if interrupts.came or due(step):
        save(step)
      interrupts.let_through()

  Only what would raise in this process is held: a handler in Python, in the main thread.
  """

  def __init__(self) -> None:
    self._before: dict[int, Any] = {}
    self._came: int | None = None

  @property
  def came(self) -> bool:
    """Whether an interrupt is held."""
    return self._came is not None

  def let_through(self) -> None:
    """Does what the interrupt would have done, if one is held."""
    if self._came is not None:
      self._before[self._came](self._came, None)

  def _hold(self, number: int, frame: FrameType | None) -> None:
    if self._came is not None:
      self._before[number](number, frame)
      return
    self._came = number
    if is_first_process():
      print('stopping once this step is saved; interrupt again to stop at once', file=sys.stderr, flush=True)

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        if callable(signal.getsignal(number)):
          self._before[number] = signal.signal(number, self._hold)
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    if kind is None:
      self.let_through()
