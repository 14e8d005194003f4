"""Runs that differ in a few settings, made side by side on this machine; what they have in common is made once.

Each trial is a run folder inside the sweep's, and a process of its own. A stage's key says what its result depends on:
its config, and the keys of the stages it reads. Of trials with the same key the first makes the stage, and the others
wait and copy it before they start: `charjax run` then finds it done. A trial that failed leaves the stage to the next
one. All that is known of a sweep stands in its folder, so that the same command goes on with it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import glob
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from charjax import hosts, interrupts, storage, workdir
from charjax.errors import UserError
from charjax.files import write_text
from charjax.progress import duration
from charjax.stages import STAGES
from charjax.terminal import printable

# A report tells of its own folder.
_SHARED = tuple(stage for stage in STAGES if stage.name != 'report')
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_LINES = 10.0
_TAIL = 4000  # bytes of a log in which its last line stands
_UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f]')


@dataclasses.dataclass(eq=False)
class Trial:
  """One run of a sweep.

  Attributes:
    name: also that of its folder.
    session: its config, character and folder.
    command: the arguments of `charjax` that make it.
    seconds: what each finished stage took, those that were copied among them; in the order of STAGES.
    since: when the last of them was found finished, or the trial was started; of time.monotonic().
    process: that makes it.
    state: 'waiting', 'running', 'finished' or 'failed'.
    place: which of those that run at a time it is.
  """

  name: str
  session: workdir.Session
  command: Sequence[str]
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  since: float = 0.0
  process: subprocess.Popen[bytes] | None = None
  state: str = 'waiting'
  place: int = 0

  @functools.cached_property
  def keys(self) -> dict[str, str]:
    """By stage, what stands for its result and all that it depends on."""
    found: dict[str, str] = {}
    for stage in _SHARED:
      config = workdir.relevant_config(stage, self.session)
      found[stage.name] = workdir.fingerprint([stage.name, config, [found[name] for name in stage.reads]])
    return found

  @property
  def done(self) -> int:
    """How many of STAGES are finished."""
    return len(self.seconds)

  @property
  def log(self) -> Path:
    """What its process said."""
    return Path(self.session.workdir) / 'log.txt'

  def look(self) -> None:
    """Counts the stages that were finished since the last look."""
    while self.done < len(STAGES) and _is_done(stage := STAGES[self.done], self.session):
      record = json.loads((self.session.folder(stage.name) / 'stage.json').read_text())
      self.seconds[stage.name] = float(record.get('seconds', 0.0))
      self.since = time.monotonic()


def run(trials: Sequence[Trial], parallel: int, made: Sequence[Trial] = ()) -> list[Trial]:
  """Makes the trials that are not finished, `parallel` at a time, and says how it goes.

  Args:
    trials: to be made.
    parallel: how many at a time.
    made: others, from which stages may be taken.

  Returns:
    Those that failed.

  Raises:
    UserError: this machine has not as many accelerators.
    SystemExit: 130 after Ctrl-C, 143 after SIGTERM: each trial has saved where it was.
  """
  devices = shares(parallel)
  status, began = _Status(), time.monotonic()
  for trial in made:
    trial.look()
    trial.state = 'finished'
  try:
    with interrupts.raising():
      while True:
        for trial in trials:
          _look(trial, status)
        running = [trial for trial in trials if trial.state == 'running']
        waiting = [trial for trial in trials if trial.state == 'waiting']
        if not running and not waiting:
          break
        for trial in waiting:
          free = {*range(parallel)} - {other.place for other in trials if other.state == 'running'}
          if free:
            trial.place = min(free)
            _start_if_ready(trial, [*made, *trials], devices[trial.place], status)
        status.show(lambda: _progress(trials, parallel))
        time.sleep(_SECONDS_BETWEEN_LOOKS)
  except KeyboardInterrupt as error:
    status.say('stopping once each trial has saved; interrupt again to stop at once')
    _stop(trials, signal.SIGTERM)
    status.say('sweep: interrupted; give the same command again to go on from here')
    raise SystemExit(143 if isinstance(error, interrupts.Terminated) else 130) from None
  finally:
    _stop(trials, signal.SIGKILL)
  failed = [trial for trial in trials if trial.state == 'failed']
  status.say(f'sweep: {len(trials) - len(failed)} of {len(trials)} trials are finished, '
             f'after {duration(time.monotonic() - began)}')  # fmt: skip
  return failed


# ---- the record of a sweep ----


def write_record(folder: epath.Path, base: str, trials: Sequence[Trial]) -> None:
  """Writes sweep.json: the config that is varied, and the command of each trial."""
  commands = {trial.name: shlex.join(['charjax', *trial.command]) for trial in trials}
  record = _read_record(folder) | {'base': base, 'trials': commands}
  write_text(folder / 'sweep.json', json.dumps(record, indent=2, ensure_ascii=False))


def trials_of(folder: epath.Path) -> list[epath.Path]:
  """The folders of a sweep's trials that were begun; of a run its own.

  Raises:
    UserError: the record is damaged.
  """
  names = _read_record(folder).get('trials')
  return [folder] if names is None else [folder / name for name in names if (folder / name / 'config.json').exists()]


def pin_model(folder: epath.Path, session: workdir.Session) -> list[str]:
  """Names the very commit of a model of the hub: of all trials the one that the sweep was begun with.

  Returns:
    What more a trial's command then says.
  """
  from charjax.model import hub

  path, record = session.config.model.path, _read_record(folder)
  if not hub.is_address(path):
    return []
  models = record.setdefault('models', {})
  if path not in models:
    models[path] = hub.pin(path)
    write_text(folder / 'sweep.json', json.dumps(record, indent=2, ensure_ascii=False))
  session.config.model.path = models[path]
  return [f'--config.model.path={models[path]}']


def _read_record(folder: epath.Path) -> dict[str, Any]:
  """sweep.json, or {}."""
  path = folder / 'sweep.json'
  try:
    record = json.loads(path.read_text()) if path.exists() else {}
    return record | {field: dict(record[field]) for field in ('trials', 'models') if field in record}
  except (OSError, ValueError, TypeError, RecursionError) as error:
    raise UserError(f'{path}: damaged ({type(error).__name__}); restore it, or remove it') from error


# ---- what is done ----


def _is_done(stage: workdir.Stage, session: workdir.Session) -> bool:
  if not (session.folder(stage.name) / 'stage.json').exists():  # as it is most of the time
    return False
  try:
    return workdir.status(stage, session) == 'done'
  except UserError:  # damaged: its own process says so
    return False


def _look(trial: Trial, status: _Status) -> None:
  """Sees how far a trial is, and how its process ended."""
  if trial.state in ('finished', 'failed'):
    return
  code = trial.process.poll() if trial.process else None
  trial.look()
  if trial.done == len(STAGES) and (trial.process is None or code is not None):
    trial.state = 'finished'
    status.say(f'{trial.name}: finished' if trial.process else f'{trial.name}: finished already')
  elif code is not None:
    trial.state = 'failed'
    reason = _last_line(trial.log) if code else 'its config is no longer what it was when the sweep began'
    status.say(f'{trial.name}: failed: {reason or f"exit code {code}"} ({trial.log})')


def _last_line(log: Path) -> str:
  try:
    with log.open('rb') as file:
      file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
      lines = file.read().decode(errors='replace').split('\n')
  except OSError:
    return ''
  return next((_UNPRINTABLE.sub(' ', line).strip() for line in reversed(lines) if line.strip()), '')


# ---- starting and stopping ----


def shares(parallel: int) -> list[dict[str, str]]:
  """What is set in the environment of each of the trials at a time, so that no two have the same GPU: of those of this
  machine, or that CUDA_VISIBLE_DEVICES leaves, each has as many.

  Raises:
    UserError: there are fewer GPUs than trials, or a TPU, which one process has as a whole.
  """
  if parallel == 1 or os.environ.get('JAX_PLATFORMS') == 'cpu':
    return [{} for _ in range(parallel)]
  if hosts.on_tpu():
    raise UserError(f'--parallel={parallel}: a TPU takes one process at a time; leave it 1, or give --launch=FILE')
  named = os.environ.get('CUDA_VISIBLE_DEVICES')
  if named is None:
    gpus = [str(i) for i in range(len(glob.glob('/dev/nvidia[0-9]*')))]
  else:
    gpus = [gpu for gpu in named.split(',') if gpu.strip() not in ('', '-1')]  # Either hides them all.
  if gpus and len(gpus) < parallel:
    raise UserError(f'--parallel={parallel}: there are {len(gpus)} GPUs, and each trial needs one of its own')
  each = len(gpus) // parallel
  some = [gpus[i * each : (i + 1) * each] for i in range(parallel)]
  return [{'CUDA_VISIBLE_DEVICES': ','.join(own)} if own else {} for own in some]


def _start_if_ready(trial: Trial, trials: Sequence[Trial], devices: Mapping[str, str], status: _Status) -> None:
  """Starts a trial once what it shares with others is made, or none of them is going to make it."""
  sources: dict[str, Trial] = {}
  for place, stage in enumerate(_SHARED):
    if place < trial.done:
      continue
    others = [other for other in trials if other is not trial and other.keys[stage.name] == trial.keys[stage.name]]
    made = [other for other in others if place < other.done]
    first = trials.index(trial)
    if made:
      sources[stage.name] = made[0]
    elif any(o.state == 'running' or (o.state == 'waiting' and trials.index(o) < first) for o in others):
      return
  try:
    # A process that outlived an earlier sweep may still be at work there; then the trial goes on waiting.
    with workdir.lock(trial.session.workdir):
      for stage in _SHARED:
        if stage.name in sources:
          _copy(stage, sources[stage.name].session, trial.session)
  except storage.Locked as error:
    status.say(f'{trial.name}: waiting: {error}', once=True)
    return
  except (UserError, OSError) as error:
    trial.state = 'failed'
    status.say(f'{trial.name}: failed: {error}')
    return
  for source in dict.fromkeys(source.name for source in sources.values()):
    names = ', '.join(stage for stage, found in sources.items() if found.name == source)
    status.say(f'{trial.name}: {names} from {source}')
  with trial.log.open('ab') as log:
    trial.process = subprocess.Popen(
      [sys.executable, '-m', 'charjax.main', *trial.command],
      env={**os.environ, **devices},
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      process_group=0,  # Ctrl-C is this process's, which passes it on
      preexec_fn=_end_with_parent,  # noqa: PLW1509  (there are no threads here)
    )
  trial.state, trial.since = 'running', time.monotonic()
  status.say(f'{trial.name}: started')


def launches(trials: Sequence[Trial], root: epath.Path, base: str) -> list[list[str]]:
  """A command of tpu/babysit.sh for each trial: a slice of its own, deleted when it is over. What kind of slice, and
  where, is said by flags or by the environment of who gives the command.

  Args:
    trials: of the sweep, whose names tell the slices apart.
    root: the folder of the sweep.
    base: the config that they vary.

  Raises:
    UserError: slices could not see the folder, or the config.
  """
  if not (storage.is_bucket(root) or root.is_absolute()):
    raise UserError(f'--workdir={root}: no slice sees it; give a folder that all share, as gs://BUCKET/FOLDER')
  files = [('--config', base)]
  for trial in trials:
    config = trial.session.config
    files += [('config.character.path', part) for part in config.character.path.split('+')]
    files += [(f'config.evaluation.{field}', config.evaluation[field]) for field in ('probes', 'neutral')]
  shared = '' if storage.is_bucket(root) else root.parts[1]  # What is mounted there is mounted on a slice, too.
  for flag, file in dict.fromkeys(files):
    if shared and Path(file).parts[:2] == ('/', shared):
      continue
    if os.path.isabs(file) or '..' in Path(file).parts:
      raise UserError(f'{flag}: slices get this checkout, and {file} is elsewhere; name it from the checkout on')
  found = []
  for trial in trials:
    name = re.sub('[^a-z0-9]+', '-', f'{root.name}-{trial.name}'.lower()).strip('-')
    # As gcloud takes it: small letters, digits and hyphens, at most 40. The digest keeps those apart that read alike.
    name = f'run-{name}'[:33].rstrip('-') + '-' + workdir.fingerprint([str(root), trial.name])[:6]
    found.append(['tpu/babysit.sh', f'--name={name}', '--delete', '--', *trial.command])
  return found


def _end_with_parent() -> None:
  """Has the kernel send SIGTERM when the sweep is killed; others than Linux let the trial go on to its end."""
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _copy(stage: workdir.Stage, source: workdir.Session, target: workdir.Session) -> None:
  """Copies a finished stage. What people may edit is copied, and what is large is linked where it can be."""
  folder = Path(target.folder(stage.name))
  if folder.exists() and not any((folder / name).exists() for name in ('stage.json', 'unfinished.json')):
    return  # not ours: the trial says so
  whole = folder.parent / f'.{stage.name}.copy'
  shutil.rmtree(whole, ignore_errors=True)
  shutil.copytree(source.folder(stage.name), whole, copy_function=_link_or_copy)
  shutil.rmtree(folder, ignore_errors=True)
  whole.rename(folder)


def _link_or_copy(source: str, target: str) -> None:
  try:
    if not source.endswith(('.json', '.jsonl')):
      os.link(source, target)
      return
  except OSError:  # another file system, or one without links
    pass
  shutil.copy2(source, target)


def _stop(trials: Sequence[Trial], number: int) -> None:
  """Ends the processes that run, and waits for them; a second interrupt does not wait."""
  running = [trial.process for trial in trials if trial.process and trial.process.poll() is None]
  for process in running:
    process.send_signal(number)
  for process in running:
    process.wait()


# ---- how it goes ----


def _progress(trials: Sequence[Trial], parallel: int) -> str:
  """'2/5 trials, about 12 min left; kl=0.04: policy: 12/32 steps ...'"""
  finished = sum(trial.state in ('finished', 'failed') for trial in trials)
  left = time_left(trials, parallel, time.monotonic())
  words = f'{finished}/{len(trials)} trials' + (f', about {duration(left)} left' if left is not None else '')
  now = [f'{trial.name}: {_last_line(trial.log)}' for trial in trials if trial.state == 'running']
  return '; '.join([words, *now])


def time_left(trials: Sequence[Trial], parallel: int, now: float) -> float | None:
  """Seconds until all trials are finished, from what each stage took so far; None where one was never finished."""
  took: dict[str, dict[str, float]] = defaultdict(dict)  # by stage and key
  for trial in trials:
    for name, seconds in trial.seconds.items():
      took[name][trial.keys.get(name, trial.name)] = seconds
  each: list[float] = []
  counted: set[tuple[str, str]] = set()
  for trial in trials:
    if trial.state in ('finished', 'failed'):
      continue
    total = 0.0
    for place, stage in enumerate(STAGES[trial.done :]):
      key = trial.keys.get(stage.name, trial.name)
      if (stage.name, key) in counted or key in took[stage.name]:
        continue
      counted.add((stage.name, key))
      if not took[stage.name]:
        return None
      mean = sum(took[stage.name].values()) / len(took[stage.name])
      spent = now - trial.since if trial.state == 'running' and place == 0 else 0.0
      total += max(0.0, mean - spent)
    each.append(total)
  return max([sum(each) / parallel, *each], default=0.0)


class _Status:
  """Lines of what happened, and one of how far all is, which a terminal shows in place."""

  def __init__(self) -> None:
    self._terminal = sys.stderr.isatty()
    self._last = time.monotonic()
    self._said: set[str] = set()

  def say(self, line: str, once: bool = False) -> None:
    if once and line in self._said:
      return
    self._said.add(line)
    if self._terminal:
      print('\r\x1b[K', end='', file=sys.stderr, flush=True)
    print(printable(line), flush=True)  # It may quote other people's files.

  def show(self, line: Callable[[], str]) -> None:
    """A line that is made when it is due: every second in place, or every ten seconds."""
    now = time.monotonic()
    if now - self._last < (1.0 if self._terminal else _SECONDS_BETWEEN_LINES):
      return
    self._last = now
    if self._terminal:
      columns = shutil.get_terminal_size().columns
      print('\r' + line()[: columns - 1] + '\x1b[K', end='', file=sys.stderr, flush=True)
    else:
      print(line(), file=sys.stderr, flush=True)
