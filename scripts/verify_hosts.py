"""The smoke run in many processes on this machine beside the same run in one, and what becomes of it when they end.

  python scripts/verify_hosts.py [--workdir=DIR] [--parts=layouts sgd sharded killed told ...]

Eight CPU devices in one process, in two and in four, which speak over loopback:

  layouts   configs/smoke.py over (8, 1, 1): messages and replies are the same to the byte, scores to six digits, and
            losses, by Adam, within 1e-4 of their size.
  sgd       the same with plain gradient descent: what was trained is the same within 1e-5.
  sharded   the same over (1, 8, 1), weights split over all processes: texts the same to the byte, scores to six digits.
  killed    begun in four processes, of which one is killed while the policy is trained: the others end, and say which
            one was lost; two processes of two devices each end the run, as one that nobody disturbed.
  told      one of four processes is sent SIGTERM: all save, end with 143, and four go on to the same end.
  rollout   the same where the devices are at something long, for which it does not wait.
  leader    process 0 of two is killed: the other says so, and ends with 75, or 134 where JAX ends it first.
  stuck     a process that never comes to where the other waits: both end with 75, and where each was is told.
  apart     a process that was given another config, and one that cannot read its model: all end with 2, in one line.
  bucket    as `killed`, where the run is in a bucket, of an emulator on this machine (tests/bucket_emulator.py).

Run it after ./scripts/test.sh. Exits with 1 where anything is otherwise. It takes half an hour on two cores; compiled
programs are kept.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

ROOT = Path(__file__).parent.parent
DEVICES = 8
_FAR = 1.5e-6  # scores are written with six decimals: two that are all but the same may be rounded to neighbours
LOST = ('--config.faults.lost_seconds=10',)
DATA, SHARDED = '--config.mesh=(-1,1,1)', '--config.mesh=(1,-1,1)'
# JAX's own flag that spares most of the time of compiling, which is most of the time.
_FLAGS = ' --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
_MAIN = 'import sys; from charjax.main import main; sys.exit(main())'
# By a schedule, which counts steps: a checkpoint takes no empty state.
SGD = (
  'import optax; from charjax.stages import policy, preference; '
  'policy.make_optimizer = preference.make_optimizer = lambda rate, *_, **__: optax.sgd(lambda _: 30 * rate); '
) + _MAIN
# From the third step on, drawing replies takes the devices of all processes minutes.
LONG = (
  'import jax; import numpy as np; from charjax import mesh; from charjax.stages import policy; '
  'real, ones = policy.roll_out, np.ones((8, 8), np.float32); '
  'turn = jax.jit(lambda x: jax.lax.fori_loop(0, 10**6, lambda _, x: x + x.sum() * 1e-9, x)); '
  'policy.roll_out = lambda *args: (args[5] < 3 or mesh.fetch(turn(mesh.shard_batch(ones))), real(*args))[1]; '
) + _MAIN
# Process 1 goes to sleep where the others wait for it.
STUCK = (
  'import time; from charjax import hosts, mesh; from charjax.engine import score; real = score.fetch; '
  'score.fetch = lambda tree: (hosts.is_first_process() or time.sleep(600), real(tree))[1]; '
) + _MAIN


def free_address() -> str:
  """Where process 0 may answer on this machine."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{free.getsockname()[1]}'


class Group:
  """The processes of one run, as they would stand on many hosts, each with its part of the devices.

  Attributes:
    processes: theirs.
    logs: the files of what each says.
  """

  def __init__(
    self,
    workdir: Path | str,
    count: int,
    *flags: str,
    command: str = 'run',
    program: str = _MAIN,
    devices: int = DEVICES,
    each: Callable[[int], Sequence[str]] = lambda i: (),
    logs: Path | None = None,
  ):
    coordinator = free_address()
    logs = logs or Path(workdir)  # What is said stands beside a workdir, unless that is in a bucket.
    logs.parent.mkdir(parents=True, exist_ok=True)
    self.logs = [logs.parent / f'{logs.name}.{i}.log' for i in range(count)]
    self.processes = []
    for i, log in enumerate(self.logs):
      many = (f'--coordinator={coordinator}', f'--processes={count}', f'--process={i}') if count > 1 else ()
      arguments = [command, f'--config={ROOT / "configs" / "smoke.py"}', f'--workdir={workdir}', *flags, *each(i)]
      split = f' --xla_force_host_platform_device_count={devices // count}'
      with log.open('w') as out:
        self.processes.append(
          subprocess.Popen(
            [sys.executable, '-c', program, *arguments, *many], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': _FLAGS + split, 'PYTHONPATH': str(ROOT)},
          )
        )  # fmt: skip

  def codes(self, seconds: float = 1200) -> list[int]:
    """The exit codes; what has not ended by then is killed."""
    deadline = time.monotonic() + seconds
    try:
      return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
    finally:
      for process in self.processes:
        process.kill()

  def says(self, i: int) -> list[str]:
    """The lines of one process, without those of the library that joins CPUs; of the compiler, on splitting so small
    a model; and of TensorStore, which looks for a Google account that the emulator of a bucket does not need."""
    # Gloo's threads write at once, so that the end of one line of it may stand in another.
    others = re.compile(r'^\[Gloo\]|peer ranks|spmd_partitioner|google_auth_provider')
    return [line for line in self.logs[i].read_text().splitlines() if not others.search(line)]

  def wait_for(self, path: Path | str, seconds: float = 600, exists: Callable[[Any], bool] = Path.exists) -> None:
    """Returns when there is such a file."""
    deadline = time.monotonic() + seconds
    while not exists(path):
      if any(process.poll() is not None for process in self.processes) or time.monotonic() > deadline:
        self.codes(0)
        raise AssertionError(f'the run was over before {path} appeared: ' + '\n'.join(self.says(0)[-20:]))
      time.sleep(0.02)


def run(workdir: Path | str, count: int, *flags: str, **options: Any) -> Path | str:
  """A run to its end."""
  group = Group(workdir, count, *flags, **options)
  codes = group.codes()
  assert codes == [0] * count, (codes, group.says(0)[-20:])
  assert all(not group.says(i) for i in range(1, count)), 'others than process 0 said something'
  return workdir


# ---- what two runs have in common ----


def texts(workdir: Path, whole: bool = True) -> list[bytes]:
  """Messages and replies; without `whole`, their texts alone."""
  files = [workdir / name / f'{name}.jsonl' for name in ('messages', 'replies')]
  if whole:
    return [file.read_bytes() for file in files]
  return [json.dumps([row['text'] for row in rows(file)]).encode() for file in files]


def rows(file: Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in file.read_text().splitlines()]


def scores_apart(one: Path, other: Path) -> float:
  """Of the rankings: the largest difference, in units of the scores' size."""
  found, expected = (
    np.array([score for row in rows(run / 'rankings' / 'rankings.jsonl') for score in row['scores']])
    for run in (other, one)
  )
  return float((np.abs(found - expected) / np.maximum(np.abs(expected), 1)).max())


def losses_apart(one: Path, other: Path) -> float:
  """Of both trainings: the largest difference of a loss, in units of its size."""
  far = 0.0
  for stage in ('preference', 'policy'):
    found, expected = ([row['loss'] for row in rows(run / stage / 'metrics.jsonl')] for run in (other, one))
    assert len(found) == len(expected), (stage, len(found), len(expected))
    far = max(far, *(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)))
  return far


def weights_apart(one: Path, other: Path) -> float:
  """Of all that was trained: the largest difference of a weight."""
  from etils import epath

  from charjax.training.checkpoint import read_trained

  far = 0.0
  for folder in ('preference/train', 'preference/judge', 'policy/checkpoints'):
    found, expected = (read_trained(epath.Path(run / folder)) for run in (other, one))
    assert found.keys() == expected.keys()
    for name in expected:
      far = max(far, float(np.abs(found.read(name, np.float32) - expected.read(name, np.float32)).max()))
  return far


# ---- the parts ----


class Report:
  """Says what was found, and remembers whether all of it was right."""

  def __init__(self) -> None:
    self.failed = False

  def __call__(self, what: str, found: Any, right: bool) -> None:
    print(f'  {what:64} {found}{"" if right else "   WRONG"}', flush=True)
    self.failed |= not right


def _each(top: Path, name: str, commands: Sequence[str], mesh: str, begun: Sequence[str] = (), **options: Any) -> Any:
  """Runs `commands` on one process, on two and on four, from what one process wrote of the stages `begun`."""
  runs = {count: top / f'{name}-{count}' for count in (1, 2, 4)}
  for count, workdir in runs.items():
    for stage in begun:
      if not (workdir / stage).exists():
        shutil.copytree(top / 'layouts-1' / stage, workdir / stage)
    for command in commands:
      run(workdir, count, mesh, command=command, **options)
  return [(f'{count} processes x {DEVICES // count} devices', runs[1], runs[count]) for count in (2, 4)]


def layouts(top: Path, report: Report) -> None:
  for case, one, many in _each(top, 'layouts', ('run',), DATA):
    same = texts(many) == texts(one)
    report(f'{case}: messages and replies the same', same, same)
    report(f'{case}: scores apart', f'{scores_apart(one, many):.1e}', scores_apart(one, many) < _FAR)
    report(f'{case}: losses apart', f'{losses_apart(one, many):.1e}', losses_apart(one, many) < 1e-4)


def sgd(top: Path, report: Report) -> None:
  begun = ('messages', 'replies', 'rankings')
  for case, one, many in _each(top, 'sgd', ('preference', 'policy'), DATA, begun, program=SGD):
    report(f'{case}: weights apart', f'{weights_apart(one, many):.1e}', weights_apart(one, many) < 1e-5)
    report(f'{case}: losses apart', f'{losses_apart(one, many):.1e}', losses_apart(one, many) < 1e-4)


def sharded(top: Path, report: Report) -> None:
  for case, one, many in _each(top, 'sharded', ('messages', 'replies', 'rankings'), SHARDED):
    same = texts(many, whole=False) == texts(one, whole=False)
    report(f'{case}: texts of messages and replies the same', same, same)
    report(f'{case}: scores apart', f'{scores_apart(one, many):.1e}', scores_apart(one, many) < _FAR)


def _begun(top: Path, name: str) -> Path:
  """A folder with all that stands before the policy in the undisturbed run of one process."""
  done, workdir = top / 'layouts-1', top / name
  if not done.exists():
    run(done, 1, DATA)
  shutil.rmtree(workdir, ignore_errors=True)
  workdir.mkdir(parents=True)
  for stage in ('messages', 'replies', 'rankings', 'preference', 'baseline'):
    shutil.copytree(done / stage, workdir / stage)
  return workdir


def _same_end(top: Path, workdir: Path, report: Report) -> None:
  same = texts(workdir) == texts(top / 'layouts-1')
  report('  in the end: messages and replies the same', same, same)
  far = losses_apart(top / 'layouts-1', workdir)
  report('  in the end: losses apart', f'{far:.1e}', far < 1e-4)
  answers = [[row['text'] for row in rows(run / 'evaluation/replies.jsonl')] for run in (workdir, top / 'layouts-1')]
  alike = sum(a == b for a, b in zip(*answers, strict=True)) / len(answers[0])
  report('  in the end: replies of the evaluation alike', f'{alike:.0%}', alike > 0.95)


def killed(top: Path, report: Report) -> None:
  workdir = _begun(top, 'killed')
  group = Group(workdir, 4, DATA, *LOST)
  group.wait_for(workdir / 'policy' / 'checkpoints' / '2')
  _lose_one(group, report)
  run(workdir, 2, DATA, devices=4)
  _same_end(top, workdir, report)


def bucket(top: Path, report: Report) -> None:
  sys.path.insert(0, str(ROOT / 'tests'))
  import bucket_emulator
  import fsspec

  workdir, there = _begun(top, 'bucket'), 'gs://tests/bucket'
  with bucket_emulator.serve() as environment, mock.patch.dict(os.environ, environment):
    files = fsspec.filesystem('gs', token='anon', use_listings_cache=False)
    files.put(str(workdir), there, recursive=True)
    group = Group(there, 4, DATA, *LOST, logs=workdir)
    # A checkpoint in a bucket is whole when this is there.
    group.wait_for(f'{there}/policy/checkpoints/2/commit_success.txt', exists=files.exists)
    _lose_one(group, report)
    run(there, 2, DATA, devices=4, logs=workdir)
    shutil.rmtree(workdir)
    files.get(there, str(workdir), recursive=True)
  _same_end(top, workdir, report)


def _lose_one(group: Group, report: Report) -> None:
  """Of four processes, the third by SIGKILL; the others are to end."""
  group.processes[2].kill()
  begun = time.monotonic()
  codes = group.codes(120)
  seconds = time.monotonic() - begun
  report('one of four was killed: exit codes', codes, codes == [75, 75, -signal.SIGKILL, 75])
  report('  seconds to the end', f'{seconds:.1f}', seconds < 30)
  line = group.says(0)[-1]
  report('  ' + line, '', re.fullmatch(r'charjax: process 2 \(.+\) was lost.*', line) is not None)


def told(top: Path, report: Report) -> None:
  workdir = _begun(top, 'told')
  group = Group(workdir, 4, DATA)
  group.wait_for(workdir / 'policy' / 'checkpoints' / '2')
  group.processes[3].send_signal(signal.SIGTERM)
  begun = time.monotonic()
  codes = group.codes(120)
  report('one of four was sent SIGTERM: exit codes', codes, codes == [143] * 4)
  report('  seconds to the end', f'{time.monotonic() - begun:.1f}', time.monotonic() - begun < 30)
  steps = len((workdir / 'policy' / 'metrics.jsonl').read_text().splitlines())
  saved = [int(path.name) for path in (workdir / 'policy' / 'checkpoints').iterdir()]
  report('  steps done, and saved', (steps, saved), saved == [steps])
  run(workdir, 4, DATA)
  _same_end(top, workdir, report)


def rollout(top: Path, report: Report) -> None:
  workdir = _begun(top, 'rollout')
  group = Group(workdir, 2, DATA, '--config.policy.save_every=100', program=LONG)
  metrics = workdir / 'policy' / 'metrics.jsonl'
  group.wait_for(metrics)
  while len(metrics.read_text().splitlines()) < 2:
    time.sleep(0.1)
  time.sleep(5)
  group.processes[1].send_signal(signal.SIGTERM)
  begun = time.monotonic()
  codes = group.codes(120)
  report('one of two was sent SIGTERM amid a long rollout: exit codes', codes, codes == [143] * 2)
  report('  seconds to the end', f'{time.monotonic() - begun:.1f}', time.monotonic() - begun < 25)
  saved = [int(path.name) for path in (workdir / 'policy' / 'checkpoints').iterdir()]
  report('  steps saved', saved, saved == [2])
  run(workdir, 2, DATA)
  _same_end(top, workdir, report)


def leader(top: Path, report: Report) -> None:
  workdir = _begun(top, 'leader')
  group = Group(workdir, 2, DATA)
  group.wait_for(workdir / 'policy' / 'chunks')
  group.processes[0].kill()
  codes = group.codes(120)
  # JAX ends a process, too, that has lost process 0, by SIGABRT, and may be faster. It takes a callback in place of
  # that, but dies of calling one of Python (std::bad_cast, jax 0.10.2).
  expected = (75, -signal.SIGABRT)
  report('process 0 of two was killed: exit codes', codes, codes[0] == -signal.SIGKILL and codes[1] in expected)
  time.sleep(1)  # Of one that was ended past Python, a shell says it.
  line = next((line for line in group.says(1) if re.match(r'charjax: process 0 \(.+\) was lost', line)), '')
  report('  ' + line, '', bool(line))


def stuck(top: Path, report: Report) -> None:
  shutil.rmtree(top / 'stuck', ignore_errors=True)
  group = Group(top / 'stuck', 2, DATA, '--config.faults.stuck_seconds=30', program=STUCK)
  codes = group.codes(600)
  report('process 1 never comes: exit codes', codes, codes == [75, 75])
  line = next((line for line in group.says(0) if line.startswith('charjax: ')), '')
  report('  ' + line, '', 'nothing moves: process 0' in line and 'process 1' in line)
  report('  and where it was', '', any('time.sleep' in line or 'score.py' in line for line in group.says(1)))


def apart(top: Path, report: Report) -> None:
  cases = {
    'config.seed is 0 in process 0 and 1 in process 1': lambda i: [f'--config.seed={i}'],
    'process 1 (': lambda i: ['--config.model.path=none.gguf'] if i else [],
  }
  for said, each in cases.items():
    shutil.rmtree(top / 'apart', ignore_errors=True)
    group = Group(top / 'apart', 2, DATA, each=each)
    codes = group.codes(120)
    report('processes that differ: exit codes', codes, codes == [2, 2])
    lines = group.says(0)
    report('  ' + '\n'.join(lines), '', len(lines) == 1 and said in lines[0])
    report('  the other says nothing', '', not group.says(1))


def _main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', type=Path)
  names = ('layouts', 'sgd', 'sharded', 'killed', 'told', 'rollout', 'leader', 'stuck', 'apart', 'bucket')
  parser.add_argument('--parts', nargs='+', default=names, choices=names)
  arguments = parser.parse_args()
  top = (arguments.workdir or Path(tempfile.mkdtemp(prefix='charjax-hosts-'))).resolve()
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(top / 'xla'))
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
  report = Report()
  for name in arguments.parts:
    print(name, flush=True)
    globals()[name](top, report)
  return int(report.failed)


if __name__ == '__main__':
  sys.exit(_main())
