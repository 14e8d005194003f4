"""Measures charjax beside what a user would pick instead: the same weights, token ids and threads, in one run.

  scripts/peers.sh                                    # once: each peer's own environment, in .peers/
  python scripts/bench.py --tune                      # once a machine: which setting of each side is the fastest
  python scripts/bench.py [--tasks=sample,score] [--peers=transformers] [--rounds=3] [--json=FILE]

Tasks (bench_workers/tasks.py has the texts):

  sample      32 ragged chat prompts, 4 replies to each, of 128 new tokens; replies are never ended
  sample_eos  128 such prompts, 128 rows at a time; replies end where the model ends them, or after 128 tokens
  score       log-probs of 256 replies, each behind another prompt, of about 256 tokens together
  score_4     the same with 64 prompts, each before four replies
  reward      a step of a preference model: 16 prompts, 4 ranked replies to each; all parameters, AdamW
  rl          a step of GRPO: 8 prompts, 4 replies of 64 tokens to each, log-probs of the reference, all parameters

For each task every side runs in a process of its own. They are set up and warmed up, which is not timed; then they
take turns, and the one that works is the only one that is not stopped. A row of the table compares medians over the
rounds. It has no ratio where the two sides did not do the same: token counts, greedy tokens and log-probs are compared.

--dtypes names precisions; of each both sides take their fastest setting, and of `best` whatever is the fastest. Without
--tune, the first settings of SETTINGS are taken. --model is a Hugging Face directory; without it SmolLM2-135M-Instruct,
as `charjax export` writes it. Linux only.
"""

import contextlib
import glob
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import app, flags
from bench_workers import tasks
from bench_workers.settings import SETTINGS, Setting

from charjax.model import checkpoint_source

_TASKS = flags.DEFINE_list('tasks', list(tasks.TASKS), 'what is measured')
_PEERS = flags.DEFINE_list('peers', ['transformers', 'vllm', 'trl'], 'what charjax is compared with')
_DTYPES = flags.DEFINE_list('dtypes', ['best'], 'best, float32, bfloat16')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'turns of each side', lower_bound=1)
_THREADS = flags.DEFINE_integer('threads', 2, 'processors that each side may use', lower_bound=1)
_MODEL = flags.DEFINE_string('model', None, 'a Hugging Face directory')
_FOLDER = flags.DEFINE_string(
  'folder', '.peers', 'where peers.sh made environments; the tuned settings and logs are there'
)
_JSON = flags.DEFINE_string('json', None, 'a file for the rows')
_TUNE = flags.DEFINE_bool('tune', False, 'measure all settings once, and keep the order')

_HERE = pathlib.Path(__file__).resolve().parent
# What is counted as done, by the first word of a task; a peer's accuracy is told beside charjax's.
_UNITS = {'sample': 'tokens/s', 'score': 'tokens/s', 'reward': 'prompts/s', 'rl': 'steps/s'}
# Of every side: huge pages, and memory that is kept instead of given back, as charjax itself has it on CPUs.
_ALLOCATOR = ':'.join(
  f'glibc.malloc.{name}' for name in ('hugetlb=1', 'mmap_max=0', 'trim_threshold=100000000000', 'arena_max=1')
)
_TUNE_SHARE = 0.25  # of the work, by which settings are compared


class Failed(Exception):
  """A worker that cannot do its task; the message is the last line of its log."""


# ---- workers ----


class Worker:
  """A process that does one task with one setting, stopped whenever it is not asked for anything."""

  def __init__(self, side: str, task: str, setting: Setting, data: dict[str, Any], model: str):
    folder = pathlib.Path(_FOLDER.value)
    self.side, self.setting, self.rates, self.found = side, setting, [], {}
    self._log = folder / 'logs' / f'{task}-{side}.log'
    self._log.parent.mkdir(parents=True, exist_ok=True)
    python = sys.executable if side == 'charjax' else str(folder / side / 'bin' / 'python')
    environment = {
      **os.environ,
      'GLIBC_TUNABLES': _ALLOCATOR,
      'OMP_NUM_THREADS': str(_THREADS.value),
      'TOKENIZERS_PARALLELISM': 'false',
      'HF_HUB_OFFLINE': '1',
      **setting.get('env', {}),
    }
    if 'preload' in setting:
      environment['LD_PRELOAD'] = ':'.join(_library(pattern) for pattern in setting['preload'])
    with self._log.open('w') as log:
      self._process = subprocess.Popen(
        [python, _HERE / 'bench_workers' / f'with_{side}.py'], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=log, env=environment, text=True, start_new_session=True,
      )  # fmt: skip
    job = {'task': task, 'data': data, 'setting': setting, 'model': model, 'threads': _THREADS.value}
    self._write(json.dumps(job))
    try:
      self.warm = self.ask('warm_up')
    except BaseException:
      self.end()
      raise

  def _write(self, line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # What it died of is found when its answer is read.
      print(line, file=self._process.stdin, flush=True)

  def ask(self, command: str) -> dict[str, Any]:
    """Lets the process do something, and stops it again."""
    os.killpg(self._process.pid, signal.SIGCONT)
    self._write(command)
    answer = self._process.stdout.readline()
    if not answer:
      self.end()
      lines = [line.strip() for line in self._log.read_text(errors='replace').splitlines() if line.strip()]
      raise Failed(f'{lines[-1][:200] if lines else "no output"} ({self._log})')
    os.killpg(self._process.pid, signal.SIGSTOP)
    return json.loads(answer)

  def go(self) -> None:
    """A round; once more where it met lengths that a program had to be compiled for."""
    for _ in range(3):
      self.found = self.ask('go')
      if self.found['compiled'] < 0.01 * self.found['seconds']:
        break
    self.rates.append(self.found['done'] / self.found['seconds'])

  @property
  def rate(self) -> float:
    return statistics.median(self.rates)

  def peak_gib(self) -> float:
    """The most memory that the worker and its children ever held."""
    total = 0
    for status in pathlib.Path('/proc').glob('[0-9]*/status'):
      try:
        if os.getpgid(int(status.parent.name)) == self._process.pid:
          total += next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith('VmHWM'))
      except (OSError, StopIteration):
        pass  # It ended meanwhile.
    return total / 2**20

  def end(self) -> None:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()


def _library(pattern: str) -> str:
  found = glob.glob(os.path.join(_FOLDER.value, pattern))
  if not found:
    raise Failed(f'{pattern} is not installed')
  return os.path.abspath(found[0])


# ---- settings ----


def _tuned_path() -> pathlib.Path:
  return pathlib.Path(_FOLDER.value) / 'settings.json'


def _settings(side: str, task: str) -> list[Setting]:
  """From the fastest on, as far as that was measured here."""
  try:
    tuned = json.loads(_tuned_path().read_text())
  except FileNotFoundError:
    tuned = {}
  measured = [row['setting'] for row in tuned.get(f'{task}/{side}', ())]
  return [*measured, *(setting for setting in SETTINGS[side][task] if setting not in measured)]


def _choose(side: str, task: str, dtype: str) -> Setting | None:
  some = [setting for setting in _settings(side, task) if dtype in ('best', setting['dtype'])]
  return some[0] if some else None


def _tune(task: str, sides: Sequence[str], data: dict[str, Any], model: str) -> None:
  for side in sides:
    found = []
    for setting in SETTINGS[side][task]:
      try:
        worker = Worker(side, task, setting, data, model)
      except Failed as error:
        print(f'{task} {side} {_words(setting)}: {error}', flush=True)
        continue
      try:
        worker.go()
        print(f'{task} {side} {_words(setting)}: {worker.rate:.3g}, {worker.peak_gib():.1f} GiB', flush=True)
        found.append({'setting': setting, 'rate': worker.rate})
      except Failed as error:
        print(f'{task} {side} {_words(setting)}: {error}', flush=True)
      finally:
        worker.end()
    path = _tuned_path()
    tuned = json.loads(path.read_text()) if path.exists() else {}
    tuned[f'{task}/{side}'] = sorted(found, key=lambda row: -row['rate'])
    path.write_text(json.dumps(tuned, indent=2))


def _words(setting: Setting) -> str:
  plain = {key: value for key, value in setting.items() if key not in ('env', 'preload')}
  libraries = [os.path.basename(pattern) for pattern in setting.get('preload', ())]
  return ' '.join([*(f'{key}={value}' for key, value in (plain | setting.get('env', {})).items()), *libraries])


# ---- comparing ----


def unlike(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
  """In what the work of two sides differed, '' where it was the same.

  Args:
    ours: what charjax answered when it was warmed up and in the last round, together.
    theirs: the same of a peer.
  """
  if 'mean_length' in ours:
    # Replies are drawn, and where they may end their lengths are random.
    if abs(ours['mean_length'] / theirs['mean_length'] - 1) > 0.1:
      return f'replies of {ours["mean_length"]:.0f} and {theirs["mean_length"]:.0f} tokens'
  elif ours['done'] != theirs['done']:
    return f'{ours["done"]} and {theirs["done"]} done'
  if 'greedy' in ours:
    pairs = [pair for a, b in zip(ours['greedy'], theirs['greedy'], strict=False) for pair in zip(a, b, strict=False)]
    same = statistics.mean(a == b for a, b in pairs)
    if same < 0.7:  # Precisions differ, and after one token that differs the others do.
      return f'{same:.0%} of the most probable tokens are the same'
  if 'log_probs' in ours:
    gap = max(abs(a - b) for a, b in zip(ours['log_probs'], theirs['log_probs'], strict=True))
    if gap > 0.03:
      return f'log-probs of a sequence differ by {gap:.3f} a token'
  if 'tokens' in ours and ours['tokens'] != theirs['tokens']:
    return f'{ours["tokens"]} and {theirs["tokens"]} tokens drawn'
  if 'entropy' in ours and abs(ours['entropy'] / theirs['entropy'] - 1) > 0.15:
    return f'replies of {ours["entropy"]:.2f} and {theirs["entropy"]:.2f} nats a token'
  return ''


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    unit: of the medians `charjax` and `peer_value`, and of their rounds.
    ratio: how many times as fast charjax is.
    charjax_gib, peer_gib: the most memory that each ever held.
    charjax_setting, setting: charjax's and the peer's.
    note: why there is no ratio, or what else was found.
  """

  task: str
  peer: str
  unit: str
  charjax: float | None = None
  peer_value: float | None = None
  ratio: float | None = None
  charjax_gib: float | None = None
  peer_gib: float | None = None
  charjax_rounds: Sequence[float] = ()
  peer_rounds: Sequence[float] = ()
  charjax_setting: str = ''
  setting: str = ''
  note: str = ''


def _unit(task: str) -> str:
  return _UNITS[task.split('_')[0]]


def _row(task: str, ours: Worker, theirs: Worker) -> Row:
  note = unlike(ours.warm | ours.found, theirs.warm | theirs.found)
  ratio = None if note else ours.rate / theirs.rate
  if 'accuracy' in ours.found:
    told = f'held-out accuracy of charjax {ours.found["accuracy"]:.3f}, of the peer {theirs.found["accuracy"]:.3f}'
    note = '; '.join(filter(None, [note, told]))
  return Row(
    task, theirs.side, _unit(task), ours.rate, theirs.rate, ratio, ours.found['gib'], theirs.found['gib'], ours.rates,
    theirs.rates, _words(ours.setting), _words(theirs.setting), note,
  )  # fmt: skip


def _compare(task: str, peers: Sequence[str], data: dict[str, Any], model: str) -> list[Row]:
  """Rows of a task: of each precision, charjax beside each peer."""
  workers: dict[str, Worker] = {}
  failed: dict[str, str] = {}
  chosen = [(dtype, side, _choose(side, task, dtype)) for dtype in _DTYPES.value for side in ('charjax', *peers)]
  key = {(dtype, side): f'{side} {setting}' for dtype, side, setting in chosen}
  try:
    for _, side, setting in chosen:
      name = f'{side} {setting}'
      if setting is None or name in workers or name in failed:
        continue
      try:
        workers[name] = Worker(side, task, setting, data, model)
        print(f'{task}: {side} is ready', file=sys.stderr, flush=True)
      except Failed as error:
        failed[name] = str(error)
    for number in range(1, _ROUNDS.value + 1):
      for name, worker in list(workers.items()):
        try:
          worker.go()
        except Failed as error:
          failed[name] = str(error)
          del workers[name]
          continue
        seconds = f'{worker.found["seconds"]:.1f} s'
        print(f'{task}: round {number}, {worker.side}: {seconds}', file=sys.stderr, flush=True)
    for worker in workers.values():
      worker.found['gib'] = worker.peak_gib()
      if task == 'reward':
        worker.found |= worker.ask('measure')
  finally:
    for worker in workers.values():
      worker.end()
  rows = []
  for dtype in _DTYPES.value:
    ours = workers.get(key[dtype, 'charjax'])
    for peer in peers:
      theirs = workers.get(key[dtype, peer])
      if ours and theirs:
        rows.append(_row(task, ours, theirs))
      else:
        why = failed.get(key[dtype, peer]) or failed.get(key[dtype, 'charjax']) or f'no setting for {dtype}'
        rows.append(Row(task, peer, _unit(task), note=f'cannot run here: {why}'))
  return rows


def _print(rows: Sequence[Row]) -> None:
  print('| task | peer | unit | charjax | peer | ratio | charjax GiB | peer GiB | settings |')
  print('|---|---|---|---|---|---|---|---|---|')
  for row in rows:
    cells = [row.charjax, row.peer_value, row.ratio, row.charjax_gib, row.peer_gib]
    figures = ['' if value is None else f'{value:.3g}' for value in cells]
    settings = [f'charjax: {row.charjax_setting}', f'peer: {row.setting}'] if row.setting else []
    print('|', ' | '.join([row.task, row.peer, row.unit, *figures, '; '.join([*settings, row.note]).strip('; ')]), '|')


def main(_: Any) -> None:
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # By way of what ends the workers.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _THREADS.value])
  folder = pathlib.Path(_FOLDER.value)
  model = _MODEL.value or str(folder / 'model')
  if not _MODEL.value and not os.path.exists(model):
    command = [sys.executable, '-m', 'charjax.main', 'export', checkpoint_source.EMBEDDED, f'--output={model}']
    subprocess.run(command, check=True)
  peers = [peer for peer in _PEERS.value if (folder / peer / 'bin' / 'python').exists()]
  for peer in set(_PEERS.value) - set(peers):
    print(f'{peer} is not in {folder}; run scripts/peers.sh', file=sys.stderr)
  checkpoint, rows = checkpoint_source.load(model), []
  for task in _TASKS.value:
    data = tasks.make(task, checkpoint, _TUNE_SHARE if _TUNE.value else 1.0)
    print(f'{task}: {tasks.describe(data)}', file=sys.stderr, flush=True)
    able = [peer for peer in peers if task in SETTINGS[peer]]
    if _TUNE.value:
      _tune(task, ['charjax', *able], data, model)
    else:
      rows += _compare(task, able, data, model)
  if _TUNE.value:
    return
  _print(rows)
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps([row._asdict() for row in rows], indent=2))
  sys.exit(int(any(row.ratio is None for row in rows)))


if __name__ == '__main__':
  app.run(main)
