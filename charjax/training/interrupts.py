"""Ctrl-C and SIGTERM while a model is trained: what was learned is saved first, and by all processes together."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

import jax

from charjax import hosts
from charjax.interrupts import LEFT

T = TypeVar('T')

_LOOK = 0.2  # seconds after which it is seen whether another process was interrupted


class Interrupts:
  """Holds the first interrupt back until the loop can save; a second one goes through at once.

  with Interrupts() as interrupts:
    for step in steps:
      drawn, interrupted = interrupts.work(lambda: draw(step))
      if interrupted:
        save(step - 1)
        interrupts.let_through()
      learn(drawn.result())
      if (interrupted := interrupts.agreed()) or due(step):
        save(step)
      if interrupted:
        interrupts.let_through()

  Only what would raise in this process is held: a handler in Python, in the main thread. Of many processes, any that is
  interrupted speaks for all; that a whole pod is told to stop, each process a moment after another, is one interrupt.
  """

  def __init__(self) -> None:
    self._before: dict[int, Any] = {}
    self._came: int | None = None
    self._own = False  # whether it came to this process, too

  def agreed(self) -> bool:
    """Whether an interrupt is held in some process. All of them ask after the same step, and are told the same."""
    heard = hosts.first(self._heard)
    self._came = heard or self._came
    return heard is not None

  def work(self, function: Callable[[], T]) -> tuple[Future[T], bool]:
    """Calls the function, and returns when it is done, or sooner, in all processes, where an interrupt came: with True.

    Another thread calls it, since one that waits for a program of the devices hears of no signal meanwhile.
    """
    future: Future[T] = Future()
    mesh = jax.sharding.get_mesh()

    def call() -> None:
      try:
        with contextlib.nullcontext() if mesh.empty else jax.set_mesh(mesh):
          future.set_result(function())
      except BaseException as error:
        future.set_exception(error)

    threading.Thread(target=call, name=LEFT, daemon=True).start()

    def done() -> bool:
      while not wait([future], _LOOK).done:
        if self._heard():
          return False
      return True

    interrupted = not hosts.first(done, lambda: future.done() and future.result())
    if interrupted:
      self._came = self._heard()
    else:
      wait([future])
    return future, interrupted

  def let_through(self) -> None:
    """Does what the interrupt would have done, if one is held."""
    if self._came is not None:
      self._before.get(self._came, signal.default_int_handler)(self._came, None)

  def _heard(self) -> int | None:
    """The interrupt that is held, here or in another process."""
    return self._came or hosts.told('interrupt')

  def _hold(self, number: int, frame: FrameType | None) -> None:
    if self._own:
      self._before[number](number, frame)
      return
    self._own = True
    if self._came is not None:
      return
    self._came = number
    hosts.tell('interrupt', number)
    if hosts.is_first_process():
      print('stopping once all is saved; interrupt again to stop at once', file=sys.stderr, flush=True)

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
