"""A trace of a few batches of each stage, for xprof, once its programs are compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from etils import epath

_BATCHES = 3

_folder: ContextVar[epath.Path | None] = ContextVar('folder', default=None)


@contextlib.contextmanager
def into(folder: epath.Path | None) -> Iterator[None]:
  """Traces the work of each progress bar in here into `folder`; None: traces nothing."""
  before = _folder.set(folder)
  try:
    yield
  finally:
    _folder.reset(before)


class Trace:
  """Of the work of one bar, the first batches that follow one another after one in which nothing was compiled.

  trace = Trace()
  trace.advance(work)   # after each batch, with the work that it did
  trace.stop()
  """

  def __init__(self) -> None:
    self._left = _BATCHES if _folder.get() else 0
    self._running = False

  def advance(self, work: Any) -> None:
    """Begins or ends the trace; `work` is an `engine.work.Work`."""
    if self._running:
      self._left -= 1
      if not self._left:
        self.stop()
    elif self._left and work.tokens and not work.compile_seconds:
      import jax

      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # Calls of Python would fill the trace.
      jax.profiler.start_trace(str(_folder.get()), profiler_options=options)
      self._running = True

  def stop(self) -> None:
    """Writes what was traced, if anything is being traced."""
    if self._running:
      import jax

      jax.profiler.stop_trace()
      self._running, self._left = False, 0
