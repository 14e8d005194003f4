"""The processes of a run: how they join, and how they take the same decisions.

On many hosts each process runs the same program, over its own devices, and JAX joins them. All have the same texts and
compute the same from them. Where something is decided by what stands in the run's folder, process 0 looks and tells
the others (`first`), so that it does not matter when a change of a file can be seen where; it alone writes. They speak
by the key-value store of JAX's coordination service, which process 0 holds.

In a single process, as most runs are, all of this is nothing.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

from charjax.errors import Passing, UserError, one_line, quoted

T = TypeVar('T')

_HOW = (
  'give each process --coordinator=HOST:PORT (the same for all, where process 0 runs), --processes=N and its own '
  '--process=I, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in its environment'
)
_TURN = 1000  # milliseconds after which a wait looks whether a signal came
_JOINING = 300.0  # seconds that the processes have to find each other

LOST = 75  # the exit code of those that lost one, or hung: start again (EX_TEMPFAIL of sysexits.h)


class _Process:
  """What this process knows: its number, of how many; the client of JAX's coordination service, once joined; where it
  is, and since when."""

  index: int = 0
  count: int = 1
  client: Any = None
  where: tuple[str, float] = ('the start', time.monotonic())
  turns: Counter[str]  # how often each of its threads was in `first`

  def __init__(self) -> None:
    self.turns = Counter()


class _Thread(threading.local):
  """Whether a thread is in `first`."""

  alone = False


_process, _thread = _Process(), _Thread()


def is_first_process() -> bool:
  """True in the one process that prints and writes."""
  return _process.index == 0


def index() -> int:
  """The number of this process."""
  return _process.index


def count() -> int:
  """How many processes were joined."""
  return _process.count


def client() -> Any:
  """The client of the key-value store that all processes share, or None: there is one process."""
  return _process.client


# ---- joining ----


def join(address: str = '', count: int | None = None, index: int | None = None) -> bool:
  """Joins the processes of a run, where there are to be many; call it before JAX has looked at its devices.

  What is not given stands in the environment, or is known to what launched the processes, as on a TPU pod.

  Args:
    address: 'HOST:PORT', where process 0 answers.
    count: of processes.
    index: of this one, from 0.

  Returns:
    whether there are many.

  Raises:
    UserError: something is missing or wrong, or the others were not found.
    Passing: of machines that know each other, one does not answer.
  """
  address = address or os.environ.get('JAX_COORDINATOR_ADDRESS', '')
  count = _number('JAX_NUM_PROCESSES') if count is None else count
  index = _number('JAX_PROCESS_ID') if index is None else index
  launched = _launched()
  named = bool(address) or count is not None or index is not None
  if count == 1 or not (named or launched):
    return False
  if named and not launched and (not address or count is None or index is None):
    raise UserError(f'one of many processes, as it seems, but not all is said; {_HOW}')
  if address and not re.fullmatch(r'.+:[0-9]{1,5}', address):
    raise UserError(f'the coordinator is {address}; {_HOW}')
  if count is not None and index is not None and not 0 <= index < count:
    raise UserError(f'process {index} of {count}: they are numbered from 0 to {count - 1}; {_HOW}')

  import jax
  from jax._src import distributed

  # JAX ends a process that waits in vain without a word to its user.
  line = f'the other processes were not found within {_JOINING:.0f} s; are all of them running, can they reach '
  line += f'{address or "the coordinator"}, and is it the same for all?'
  alone = threading.Timer(_JOINING, lambda: exit_now(LOST, line))
  alone.daemon = True
  alone.start()
  # It would take SIGTERM for itself, and tell nobody in time.
  jax.config.update('jax_enable_preemption_service', False)
  interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python would not hear of it before all are there.
  try:
    jax.distributed.initialize(address or None, count, index, initialization_timeout=round(_JOINING) + 60)
  except ValueError as error:
    if not named:  # A TPU that belongs to no pod.
      return False
    raise UserError(f'the processes cannot be joined ({one_line(error)}); {_HOW}') from error
  except Exception as error:  # Also of what asks the launcher.
    if named:
      raise UserError(
        f'the processes cannot be joined at {address} ({one_line(error)}); is its port in use?'
      ) from error
    # Of those that the machines know of themselves, which may not answer yet.
    remedy = 'if there is but this one, give --processes=1'
    raise Passing(f'the processes cannot be joined at the coordinator ({one_line(error)}); {remedy}') from error
  finally:
    alone.cancel()
    signal.signal(signal.SIGINT, interrupt)
  # JAX shows it to nobody, and its own helpers for many hosts lead through the devices, which wait for ever.
  joined = distributed.global_state
  if joined.num_processes == 1:
    jax.distributed.shutdown()
    return False
  _process.index, _process.count, _process.client = joined.process_id, joined.num_processes, joined.client
  return True


def _number(variable: str) -> int | None:
  value = os.environ.get(variable, '')
  if not value:
    return None
  if not value.isdecimal():
    raise UserError(f'{variable}={value} is no number; {_HOW}')
  return int(value)


def _launched() -> bool:
  """Whether JAX can ask what launched this process for the others: Slurm, Open MPI, or a TPU's own host."""
  for variable, needed in (('SLURM_NTASKS', 'SLURM_PROCID'), ('OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_RANK')):
    if needed in os.environ and os.environ.get(variable, '1') != '1':
      return True
  return on_tpu()


def on_tpu() -> bool:
  """Whether this machine has chips of a TPU, and JAX would use them; asked without touching them."""
  if not {'', 'tpu'} & set(os.environ.get('JAX_PLATFORMS', '').split(',')):
    return False
  chips = glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*')
  return bool(chips) and importlib.util.find_spec('libtpu') is not None


def leave() -> None:
  """Ends the connection, once all are here."""
  if _process.client is not None:
    import jax

    _process.client = None
    jax.distributed.shutdown()


def at(place: str) -> None:
  """Remembers where this process is, for those who wait for it."""
  _process.where = (place, time.monotonic())


def where() -> tuple[str, float]:
  """Where this process is, and since when on the clock of time.monotonic."""
  return _process.where


def exit_now(code: int, line: str = '') -> NoReturn:
  """Ends this process from any of its threads: what its main thread waits for may never come."""
  if line:
    print(f'charjax: {line}', file=sys.stderr)
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(code)


# ---- deciding ----


def first(work: Callable[[], T], while_waiting: Callable[[], object] = lambda: None) -> T:
  """What `work` gives in process 0, in every process: it is called there alone.

  All processes must call this alike. What it raises is raised in process 0 alone, which ends them all; within it, this
  function calls its argument and no more.

  Args:
    work: gives something that JSON can hold.
    while_waiting: is called now and then in the other processes.
  """
  if _process.client is None or _thread.alone:
    return work()
  # Threads have turns of their own: which of two is sooner may differ between processes.
  thread = threading.current_thread().name
  _process.turns[thread] += 1
  key = f'charjax/first/{thread}/{_process.turns[thread]}'
  if is_first_process():
    _thread.alone = True
    try:
      said = json.dumps(work())
    finally:
      _thread.alone = False
    _process.client.key_value_set(key, said)
  else:
    said = wait(key, while_waiting)
  return json.loads(said)


def wait(key: str, while_waiting: Callable[[], object] = lambda: None) -> str:
  """The value of a key in the store, as soon as it has one."""
  while True:
    while_waiting()
    with no_answer_yet():
      return _process.client.blocking_key_value_get(key, _TURN)


@contextlib.contextmanager
def no_answer_yet() -> Iterator[None]:
  """Passes over the error by which the store says that a key had no value in time."""
  try:
    yield
  except RuntimeError as error:
    if 'DEADLINE_EXCEEDED' not in str(error):
      raise


def tell(name: str, value: Any) -> None:
  """Tells all processes something; what was told before under this name is forgotten."""
  if _process.client is not None:
    _process.client.key_value_set(f'charjax/told/{name}/{_process.index}', json.dumps(value), True)


def told(name: str) -> Any:
  """What some process told under this name, or None."""
  if _process.client is None:
    return None
  found = _process.client.key_value_dir_get(f'charjax/told/{name}')
  return json.loads(found[0][1]) if found else None


def meet(name: str) -> None:
  """Returns when all processes are here. A name is used once."""
  if _process.client is not None:
    _gather(name, '')


def check_alike(values: Mapping[str, Any]) -> None:
  """Whether all processes were given the same values, by name.

  Raises:
    UserError: naming the first that differs.
  """
  if _process.client is None:
    return
  mine, *others = _gather('values', json.dumps(values, default=str)) or ['{}']
  for number, other in enumerate(others, 1):
    ours, theirs = json.loads(mine), json.loads(other)
    for name in {**ours, **theirs}:
      if ours.get(name) != theirs.get(name):
        raise UserError(
          f'{name} is {quoted(ours.get(name))} in process 0 and {quoted(theirs.get(name))} in process {number}; start '
          'all from the same files, with the same command and version, or with --processes=1 if they are no one run'
        )


def _gather(name: str, value: str) -> list[str]:
  """The values of all processes, in process 0; it has them when any returns."""
  _process.client.key_value_set(f'charjax/{name}/{_process.index}', value)
  found: list[str] = []

  def collect() -> None:
    found.extend(wait(f'charjax/{name}/{i}') for i in range(_process.count))

  first(collect)
  return found
