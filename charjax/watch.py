"""What keeps the processes of a run from waiting for ever for one that is gone.

Each says once a second where it is. Process 0 judges: who says nothing for long is lost; where none has moved for long,
all are stuck; who failed said why. Its verdict ends them all, each from a thread of its own, since its main thread may
wait in a program of the devices for what will never come. Only of the loss of process 0, which holds what they speak
by, each other process judges itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from charjax import hosts
from charjax.hosts import LOST
from charjax.interrupts import LEFT
from charjax.progress import duration

_BEAT = 1.0  # seconds
_QUIET = 5.0  # of silence from one, after another failed: then that is why
_REASON = 10.0  # seconds in which it may be found out why an error came that no user made
_GOODBYE = 5.0  # that process 0 waits for the others to end
_AGAIN = 'start all again to go on from what was saved'
_PACKAGE = os.path.dirname(os.path.abspath(__file__))

_watches: list[_Watch] = []  # one, where there are many processes


def begin() -> None:
  """Watches from now on, if there are many processes."""
  if hosts.client() is not None:
    _watches.append(_Watch())


def be_patient(lost_seconds: float, stuck_seconds: float) -> None:
  """Sets for how long a process may be silent, and for how long all of them may be at the same point."""
  for watch in _watches:
    watch.lost_seconds, watch.stuck_seconds = lost_seconds, stuck_seconds


def end(code: int, line: str, trace: str = '') -> None:
  """Ends all processes with this code, for a reason that process 0 prints; returns only where there are no others.

  Args:
    code: the exit code.
    line: the reason; '' if process 0 said it.
    trace: printed here, unless another process turns out to be lost.
  """
  for watch in _watches:
    watch.end(code, line, trace)


def end_now(code: int, line: str) -> None:
  """Ends all processes, or the one there is, whatever it is at."""
  end(code, line)
  hosts.exit_now(code, line)


def finish() -> None:
  """Waits for all to have done their work, and watches no longer."""
  while _watches:
    hosts.meet('finished')
    _watches.pop().stop()


def speak_after_abort(line: str) -> None:
  """Has a line printed if this process ends by SIGABRT, as JAX ends one whose process 0 is gone, past Python.

  What Python writes of the signal goes into a pipe, at whose other end a shell waits for this process to end.
  """
  read, write = os.pipe()
  faulthandler.enable(write, all_threads=False)
  subprocess.Popen(
    ['sh', '-c', '! grep -q Aborted || echo "charjax: $0" >&2', line], stdin=read, start_new_session=True
  )
  os.close(read)


class _Watch:
  def __init__(self) -> None:
    self.lost_seconds, self.stuck_seconds = 60.0, 1200.0
    self._over = False
    self._client, self._index, self._count = hosts.client(), hosts.index(), hosts.count()
    self._main = threading.main_thread().ident
    self._trace = ''
    now = time.monotonic()
    self._heard: dict[int, tuple[Any, float]] = {i: (None, now) for i in range(self._count)}
    self._failed_at = 0.0
    self._say()
    self._leader = json.loads(hosts.wait('charjax/at/0'))['host']
    if self._index:
      speak_after_abort(f'process 0 ({self._leader}) was lost, or JAX failed, as it says above; {_AGAIN}')
    self._answered = time.monotonic()  # when process 0 last took what this one said
    self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._obey)]
    for thread in self._threads:
      thread.start()

  def stop(self) -> None:
    """Watches no longer."""
    self._over = True
    for thread in self._threads:
      thread.join()

  # ---- in all processes ----

  def _say(self) -> None:
    where, since = hosts.where()
    said = {'host': socket.gethostname(), 'at': where, 'for': time.monotonic() - since, 'in': self._line()}
    self._client.key_value_set(f'charjax/at/{self._index}', json.dumps(said), True)

  def _line(self) -> str:
    """The line of this package that the main thread is at, or the one that works for it."""
    threads = {thread.name: thread.ident for thread in threading.enumerate()}
    frame: FrameType | None = sys._current_frames().get(threads.get(LEFT) or self._main or 0)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
      frame = frame.f_back
    return f'{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}' if frame is not None else 'Python'

  def _beat(self) -> None:
    with contextlib.suppress(RuntimeError):  # Process 0 is lost: `_obey` hears of it, too.
      while not self._over:
        self._say()
        self._answered = time.monotonic()
        if self._index == 0 and self._judge(time.monotonic()):
          return
        time.sleep(_BEAT)

  def _obey(self) -> None:
    """Waits for the verdict, and ends this process."""
    verdict: dict[str, Any] = {}
    try:
      while not verdict:
        if self._over:
          return
        # A machine that is gone breaks no connection, and its store answers nothing: no more than that a key is unset.
        silent = time.monotonic() - self._answered
        if self._index and silent > self.lost_seconds:
          lost = f'process 0 ({self._leader}) was lost: no answer for {duration(silent)}'
          hosts.exit_now(LOST, f'{lost}; {_AGAIN}')
        with hosts.no_answer_yet():
          verdict = json.loads(self._client.blocking_key_value_get('charjax/end', round(1000 * _BEAT)))
    except RuntimeError:
      hosts.exit_now(LOST, f'process 0 ({self._leader}) was lost; {_AGAIN}')
    if verdict['dump']:
      faulthandler.dump_traceback(sys.stderr, all_threads=True)
    if self._trace and verdict['code'] != LOST:
      print(self._trace, file=sys.stderr)
    if self._index == 0:
      if verdict['line']:
        print(f'charjax: {verdict["line"]}', file=sys.stderr)
      deadline = time.monotonic() + _GOODBYE
      while len(self._client.key_value_dir_get('charjax/left')) < self._count - 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    else:
      with contextlib.suppress(RuntimeError):
        self._client.key_value_set(f'charjax/left/{self._index}', '')
    hosts.exit_now(verdict['code'])

  def end(self, code: int, line: str, trace: str) -> NoReturn:
    self._trace = trace
    with contextlib.suppress(RuntimeError):
      self._client.key_value_set(f'charjax/failed/{self._index}', json.dumps([code, line]), True)
    while True:  # A signal is heard between two waits, and ends this process at once.
      time.sleep(1)

  # ---- in process 0 ----

  def _judge(self, now: float) -> bool:
    """Whether there is a verdict now."""
    said = {key.rpartition('/')[2]: value for key, value in self._client.key_value_dir_get('charjax/at')}
    for i, (before, _) in self._heard.items():
      if said.get(str(i)) not in (None, before):
        self._heard[i] = said[str(i)], now
    failed = {
      int(key.rpartition('/')[2]): json.loads(value) for key, value in self._client.key_value_dir_get('charjax/failed')
    }
    silence = {i: now - heard for i, (_, heard) in self._heard.items() if i not in failed}
    if failed:
      self._failed_at = self._failed_at or now
      return self._why(failed, silence, now - self._failed_at)
    if lost := [i for i, seconds in silence.items() if seconds > self.lost_seconds]:
      return self._verdict(LOST, f'{self._names(lost)} lost: not heard of for {duration(silence[lost[0]])}; {_AGAIN}')
    where = {i: json.loads(value) for i, (value, _) in self._heard.items() if value}
    if len(where) == self._count and min(each['for'] for each in where.values()) > self.stuck_seconds:
      told = '; '.join(
        f'process {i} ({each["host"]}) has been at {each["at"]}, {each["in"]}, for {duration(each["for"])}'
        for i, each in where.items()
      )
      return self._verdict(
        LOST,
        f'nothing moves: {told}. {_AGAIN.capitalize()}; if it was at work, raise config.faults.stuck_seconds',
        dump=True,
      )
    return False

  def _why(self, failed: dict[int, Any], silence: dict[int, float], waited: float) -> bool:
    """A verdict on those that failed, once it is known why."""
    if all(code == 1 for code, _ in failed.values()):
      quiet = [i for i, seconds in silence.items() if seconds > _QUIET]
      if quiet:
        return self._verdict(LOST, f'{self._names(quiet)} lost; {_AGAIN}')
      if waited < _REASON:
        return False
    elif 0 not in failed and waited < 2 * _BEAT:  # Most mistakes come up everywhere: its own needs no name.
      return False
    i = min(failed, key=lambda i: (failed[i][0] == 1, i))
    code, line = failed[i]
    return self._verdict(code, line if i == 0 else f'{self._name(i)}: {line}')

  def _verdict(self, code: int, line: str, dump: bool = False) -> bool:
    self._client.key_value_set('charjax/end', json.dumps({'code': code, 'line': line, 'dump': dump}))
    return True

  def _name(self, i: int) -> str:
    said, _ = self._heard[i]
    return f'process {i} ({json.loads(said)["host"]})' if said else f'process {i}'

  def _names(self, some: list[int]) -> str:
    names = [self._name(i) for i in some[:8]] + (['others'] if len(some) > 8 else [])
    return ' and '.join(names) + (' was' if len(some) == 1 else ' were')
