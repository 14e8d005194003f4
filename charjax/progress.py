"""How far a stage is: a bar with the time left for people, metrics for files and TensorBoard."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from etils import epath

from charjax import hosts, interrupts
from charjax import trace as tracing
from charjax.hosts import is_first_process
from charjax.storage import Lines, is_bucket

_SECONDS_BETWEEN_LINES = 10.0


def duration(seconds: float) -> str:
  """Seconds as a person says them: '8 s', '3 min 20 s', '2 h 05 min'."""
  whole = round(seconds)
  if whole < 60:
    return f'{whole} s'
  if whole < 3600:
    return f'{whole // 60} min {whole % 60:02d} s'
  return f'{whole // 3600} h {whole % 3600 // 60:02d} min'


class Progress:
  """A progress bar on a terminal, a line at most every ten seconds elsewhere (standard error).

      with Progress('replies', total=len(prompts), unit='replies') as bar:
        bar.advance(32, note='12% cut off')

  Work that an earlier process did is counted with `skip`, so that it does not flatter the estimate.
  """

  def __init__(self, name: str, total: int, unit: str = 'items'):
    self._name, self._total, self._unit = name, total, unit
    self._done = self._skipped = 0
    self._start = self._last_line = time.monotonic()
    self._printed, self._last_count = False, 0
    # Only here, where the model is at work: without it, nobody waits for JAX to be imported.
    from charjax.engine import work

    self._work, self._before = work, work.done()
    self._trace, self._last_work = tracing.Trace(), self._before
    self._stop_telling = work.tell_of_compilation(self._compiling)
    self._bar: Any = None
    if is_first_process() and sys.stderr.isatty():
      import tqdm

      self._bar = tqdm.tqdm(total=total, desc=name, unit=f' {unit}', dynamic_ncols=True, leave=False)

  def skip(self, count: int) -> None:
    """Counts items that were already there."""
    self._skipped += count
    if self._bar is not None:
      self._bar.initial += count
      self._bar.n += count
      self._bar.refresh()

  def advance(self, count: int = 1, note: str = '') -> None:
    """Counts items that were just made; `note` stands behind the figures.

    Raises:
      KeyboardInterrupt: an interrupt came while they were made, and was dropped.
    """
    interrupts.check()
    last, self._last_work = self._last_work, self._work.done()
    self._trace.advance(self._last_work.since(last))
    self._done += count
    hosts.at(f'{self._name}, {self._done + self._skipped} of {self._total} {self._unit}')
    note = ', '.join(filter(None, [self._speed(), note]))
    if self._bar is not None:
      if note:
        self._bar.set_postfix_str(note, refresh=False)
      self._bar.update(count)
    elif is_first_process() and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
      self._print_line(note)

  def _compiling(self, program: str) -> None:
    """Shows that a program is being compiled: until it is, nothing advances."""
    note = f'compiling {program}' if program else ''
    hosts.at(', '.join(filter(None, [self._name, note])))
    if self._bar is not None:
      self._bar.set_postfix_str(note)
    elif program and is_first_process() and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
      self._print_line(note)

  def _speed(self) -> str:
    rate = self._work.rates(self._work.done().since(self._before), time.monotonic() - self._start)
    if not rate:
      return ''
    flops, unit = rate['model_flops_per_second'] / 1e9, 'GFLOP/s'
    if flops >= 1000:
      flops, unit = flops / 1000, 'TFLOP/s'
    share = f', {rate["utilisation"]:.0%} of the peak' if 'utilisation' in rate else ''
    return f'{rate["tokens_per_second"]:,.0f} tokens/s, {flops:.3g} {unit}{share}'

  def _print_line(self, note: str) -> None:
    self._last_line = time.monotonic()
    self._printed, self._last_count = True, self._done
    elapsed = self._last_line - self._start
    there = self._done + self._skipped
    line = f'{self._name}: {there}/{self._total} {self._unit} in {duration(elapsed)}'
    if self._done > 0 and there < self._total:
      line += f', about {duration(elapsed / self._done * (self._total - there))} left'
    print(line + (f' ({note})' if note else ''), file=sys.stderr, flush=True)

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self._stop_telling()
    self._trace.stop()
    if self._bar is not None:
      self._bar.close()
    elif self._printed and error is None and self._last_count != self._done:
      self._print_line(self._speed())


class Metrics:
  """Scalars of a training run: `metrics.jsonl` (no times, so that two runs can be compared) and TensorBoard.

  metrics = Metrics(folder)
  metrics.truncate_after(first_step - 1)   # when a checkpoint was restored
  metrics.write(step, {'loss': 0.3})
  """

  def __init__(self, folder: epath.Path):
    self._folder = folder
    self._lines = Lines(folder / 'metrics.jsonl')
    self._purge_step: int | None = None
    self._writer: Any = None
    self._last: Any = None

  def truncate_after(self, step: int) -> None:
    """Drops what was written after `step`, and a last line that a kill cut in two."""
    self._purge_step = step + 1
    if not is_first_process():
      return
    before, kept = self._lines.read(), []
    for line in before.split('\n'):
      try:
        row = json.loads(line)
      except ValueError:
        continue
      if row['step'] <= step:
        kept.append(line + '\n')
    if before:
      self._lines.write(''.join(kept))

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Appends one row of scalars (Python, NumPy or JAX). A value that is not finite becomes null."""
    if not is_first_process():
      return
    scalars = {name: float(value) for name, value in values.items()}
    row = {'step': step} | {name: value if math.isfinite(value) else None for name, value in scalars.items()}
    self._lines.append(json.dumps(row) + '\n')
    if is_bucket(self._folder):  # TensorBoard's events are added to, which an object cannot be.
      return
    if self._writer is None:
      import tensorboardX

      self._writer = tensorboardX.SummaryWriter(
        str(self._folder / 'tensorboard'), purge_step=self._purge_step, write_to_disk=True
      )
    for name, value in (scalars | self._speed()).items():
      self._writer.add_scalar(name, value, step)

  def _speed(self) -> dict[str, float]:
    """Of the steps since the last call: for TensorBoard alone, where times may stand."""
    from charjax.engine import work

    before, self._last = self._last, (work.done(), time.monotonic())
    return work.rates(self._last[0].since(before[0]), self._last[1] - before[1]) if before else {}

  def flush(self) -> None:
    """Returns when the rows are kept."""
    self._lines.flush()

  def close(self) -> None:
    """Flushes the rows and TensorBoard's events."""
    self.flush()
    if self._writer is not None:
      self._writer.close()
      self._writer = None

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self.close()
