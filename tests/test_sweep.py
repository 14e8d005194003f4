"""Sweeps: what trials share is made once, a killed one goes on, a failed trial stops no other; all end on one page."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from smoke import ROOT, environment

from charjax import character as characters
from charjax import config_file, sweep
from charjax import main as command_line
from charjax.errors import UserError
from charjax.main import main

SWEEPS = ROOT / 'configs' / 'sweeps'
STAGES = ('messages', 'replies', 'rankings', 'preference', 'baseline', 'policy', 'evaluation')

SWEEP = """
def get_sweep(config):
  yield 'as-it-is', {}
  yield 'free', {'policy.kl': 0.0}
  yield 'wild', {'policy.learning_rate': 1e30, 'policy.skipped_steps': 1}
"""


def command(folder: Path, workdir: Path, *flags: str) -> list[str]:
  config = f'--config={folder / "sweep.py"}:{ROOT / "configs" / "smoke.py"}'
  return [sys.executable, '-m', 'charjax.main', 'sweep', config, f'--workdir={workdir}', *flags]


def is_alive(process: int) -> bool:
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  return 'zombie' not in Path(f'/proc/{process}/status').read_text()


def test_a_killed_sweep_goes_on_and_a_failed_trial_stops_no_other(smoke_run, tmp_path):
  (tmp_path / 'sweep.py').write_text(SWEEP)
  workdir = tmp_path / 'runs'
  shutil.copytree(smoke_run[0], workdir / 'as-it-is')
  begun = subprocess.Popen(command(tmp_path, workdir), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
  checkpoint, deadline = workdir / 'free' / 'policy' / 'checkpoints' / '2', time.monotonic() + 300
  while not checkpoint.exists() and begun.poll() is None and time.monotonic() < deadline:
    time.sleep(0.02)
  trial = int((workdir / 'free' / '.lock').read_text())
  assert begun.poll() is None and trial != begun.pid
  begun.kill()
  begun.wait()
  # Its trial saves and ends, too; until then the next sweep waits for it.
  again = subprocess.run(
    command(tmp_path, workdir, '--parallel=2'), cwd=ROOT, env=environment(), capture_output=True, text=True,
    timeout=600, check=False,
  )  # fmt: skip
  assert not is_alive(trial)
  assert again.returncode == 1, again.stderr[-3000:]
  assert 'as-it-is: finished already' in again.stdout and 'free: finished\n' in again.stdout
  assert (
    'free: messages, replies, rankings, preference, baseline from as-it-is' not in again.stdout
  )  # copied before the kill
  assert 'wild: messages, replies, rankings, preference, baseline from as-it-is' in again.stdout
  assert f'charjax: trial wild failed; see {workdir / "wild" / "log.txt"}' in again.stderr
  assert 'wild: failed: charjax: ' in again.stdout and 'not a finite number' in again.stdout
  log = (workdir / 'free' / 'log.txt').read_text()
  assert 'policy: going on where it was cut off' in log and log.count('baseline: done already') == 2
  page = (workdir / 'comparison' / 'index.html').read_text()
  assert '2 runs side by side' in page and 'policy.kl' in page and f'Comparison: {workdir}' in again.stdout
  # Edits of one trial's texts are its own, and large files are there once.
  for stage in STAGES[:5]:
    made, shared = (workdir / name / stage / 'stage.json' for name in ('as-it-is', 'free'))
    assert made.read_bytes() == shared.read_bytes() and made.stat().st_ino != shared.stat().st_ino
  weights = [file for file in (workdir / 'free' / 'preference').rglob('*') if file.parent.name == 'd']
  assert weights and all(file.stat().st_nlink == 3 for file in weights)


@pytest.mark.parametrize(
  ('name', 'trials', 'shared'),
  [('kl', 4, 5), ('learning_rate', 4, 5), ('ranker', 3, 2), ('k', 4, 1), ('crosstalk', 3, 5), ('methods', 18, 5)],
)
def test_what_the_shipped_sweeps_share(tmp_path, monkeypatch, name, trials, shared):
  found = []
  monkeypatch.setattr(sweep, 'run', lambda some, parallel: found.extend(some) or list(some))
  assert main(['sweep', f'--config={SWEEPS / name}.py:smoke', f'--workdir={tmp_path}', '--parallel=2']) == 1
  assert len(found) == trials
  for place, stage in enumerate(STAGES):
    assert len({trial.keys[stage] for trial in found}) == (1 if place < shared else trials), stage
  record = json.loads((tmp_path / 'sweep.json').read_text())
  assert list(record['trials']) == [trial.name for trial in found]


def test_crosstalk_rewards_each_trait_alone_and_all_but_one():
  trials = config_file.read_sweep(str(SWEEPS / 'crosstalk.py'), []).trials
  assert trials['only-honesty'][:2] == ['--config.policy.traits=honesty', '--config.policy.prompts_per_step=3']
  assert trials['without-honesty'][0] == '--config.policy.traits=perspectives,ai_nature,curiosity'
  assert len(trials) == 9
  # As many a trait, in parts that are no larger than the config's own, however many these are.
  parts = ['--config.policy.microbatches=4', '--config.policy.prompts_per_step=16']
  found = {}
  for name, trial in config_file.read_sweep(str(SWEEPS / 'crosstalk.py'), parts).trials.items():
    own = dict(change.removeprefix('--config.policy.').split('=') for change in trial)
    found[name] = int(own['prompts_per_step']), int(own['microbatches'])
  assert (found['all'], found['only-honesty'], found['without-honesty']) == ((16, 4), (4, 1), (12, 3))


def test_a_way_to_train_takes_nothing_from_the_others():
  """Whatever the base learns from: what a trial is named for is all that it learns from."""
  base = [f'--config.policy.{field}' for field in ('shown_replies=2', 'kl_target=0.02', 'ranked_replies=4')]
  for name, trial in config_file.read_sweep(str(SWEEPS / 'methods.py'), base).trials.items():
    own = dict(change.removeprefix('--config.policy.').split('=') for change in trial)
    kinds = [field for field in ('replies_per_prompt', 'ranked_replies', 'shown_replies') if own[field] != '0']
    way = name.rpartition('-')[0]
    wanted = {'distillation': 'shown_replies', 'dpo': 'ranked_replies', 'best-of-n': 'ranked_replies'}
    assert kinds == [wanted.get(way, 'replies_per_prompt')]
    assert own['kl_target'] == ('0.02' if kinds == ['replies_per_prompt'] else '0.0')


def test_a_trial_may_be_written_as_a_command(tmp_path, capsys, monkeypatch):
  file = tmp_path / 'commands.txt'
  arguments = ['sweep', f'--config={SWEEPS / "kl.py"}:smoke', '--workdir=gs://bucket/kl', '--config.seed=3']
  assert main([*arguments, f'--launch={file}']) == 0
  first = file.read_text().splitlines()[0]
  base = ROOT / 'configs' / 'smoke.py'
  none = '--config.policy.kl=0.0 --config.policy.kl_target=0.0'
  assert first == f'charjax run --config={base} --config.seed=3 {none} --workdir=gs://bucket/kl/kl=0'
  assert main(arguments) == 2 and 'needs a folder of this machine' in capsys.readouterr().err
  # Or as a slice of a TPU each, whose name tells it apart.
  assert (
    main([*arguments, f'--launch={file}', '--tpu']) == 2 and 'name it from the checkout on' in capsys.readouterr().err
  )
  monkeypatch.chdir(ROOT)
  arguments[1] = '--config=configs/sweeps/kl.py:smoke'
  assert main([*arguments, f'--launch={file}', '--tpu']) == 0
  lines = [shlex.split(line) for line in file.read_text().splitlines()]
  assert lines[0][0] == 'tpu/babysit.sh' and lines[0][2:5] == ['--delete', '--', 'run']
  assert lines[0][-1] == '--workdir=gs://bucket/kl/kl=0' and lines[0][5] == '--config=configs/smoke.py'
  names = [line[1].removeprefix('--name=') for line in lines]
  assert len(set(names)) == 4 and all(re.fullmatch('[a-z]([-a-z0-9]{0,38}[a-z0-9])?', name) for name in names)
  # Another sweep of that name, in another folder, has other slices.
  arguments[2] = '--workdir=gs://bucket/again/kl'
  assert main([*arguments, f'--launch={file}', '--tpu']) == 0
  assert not {*names} & {shlex.split(line)[1].removeprefix('--name=') for line in file.read_text().splitlines()}
  # Nor need this machine see the weights, and what it alone sees is told.
  assert main([*arguments, f'--launch={file}', '--tpu', '--config.model.path=/mnt/of/slices']) == 0
  own = tmp_path / 'mine.toml'
  own.write_text(characters.source('stoic'))
  assert main([*arguments, f'--launch={file}', '--tpu', f'--config.character.path={own}']) == 2
  assert main([*arguments, '--tpu']) == 2 and '--tpu goes with --launch' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('x = 1', 'has no function get_sweep; see configs/sweeps/kl.py'),
    ('def get_sweep(config):\n  yield "a", {}\n  yield "a", {}', "trial 'a' is there twice"),
    ('def get_sweep(config):\n  yield "a/b", {}', "trial 'a/b' cannot name a folder"),
    ('def get_sweep(config):\n  yield "a"', "get_sweep yields 'a'; it must yield (name"),
    ('def get_sweep(config):\n  return []', 'get_sweep yields no trial'),
    ('def get_sweep(config):\n  yield "a", {"policy.kll": 1}', 'no config field policy.kll; did you mean kl?'),
    ('def get_sweep(config):\n  yield "a", {"policy.kl": -1.0}', 'config.policy.kl is -1.0; it must be at least 0'),
    ('def get_sweep(config):\n  yield config.polisy', 'sweep.py:2: AttributeError'),
  ],
)
def test_a_broken_sweep_is_told_before_any_work(tmp_path, capsys, text, expected):
  (tmp_path / 'sweep.py').write_text(text)
  assert main([*command(tmp_path, tmp_path / 'runs')[3:]]) == 2
  error = capsys.readouterr().err
  assert expected in error and error.count('\n') == 1
  assert not (tmp_path / 'runs').exists()


def test_the_config_that_is_varied_must_be_there(tmp_path, capsys):
  (tmp_path / 'sweep.py').write_text(SWEEP)
  assert main(['sweep', f'--config={tmp_path}/sweep.py:nowhere']) == 2
  assert 'nowhere.py to vary; name a config' in capsys.readouterr().err
  assert main(['run', f'--config={tmp_path}/sweep.py', f'--workdir={tmp_path}/run']) == 2
  assert 'has no function get_config; it is a sweep: charjax sweep' in capsys.readouterr().err


SEARCH = """
def get_search(config, trial):
  return {'policy.kl': trial.suggest_float('kl', 0.0, 1.0)}

def get_value(summary):
  return summary['kl']
"""


def test_workers_share_a_study_and_take_up_what_a_killed_one_left(tmp_path, monkeypatch):
  """Runs are stood in for: what is tested is who makes which trial, and what the study is told."""
  optuna = pytest.importorskip('optuna')
  (tmp_path / 'sweep.py').write_text(SEARCH)
  arguments = command(tmp_path, tmp_path / 'runs', '--trials=3')[3:]
  made, left = [], []

  def killed(trials, parallel, made=()):
    left.extend(trials)
    raise KeyboardInterrupt

  def run(trials, parallel, made=()):
    [trial] = trials
    kl = trial.session.config.policy.kl
    log.append((trial.name, kl, len(made)))
    evaluation = trial.session.folder('evaluation')
    evaluation.mkdir(parents=True, exist_ok=True)
    (evaluation / 'summary.json').write_text(json.dumps({'kl': kl}))
    if kl > 0.0 and len(log) == 1 and others:
      # Meanwhile another worker comes along, which leaves this trial alone.
      others.pop()
      assert main(arguments) == 0
    return []

  log, others = made, [True]
  monkeypatch.setattr(command_line, '_tell_apart', lambda runs, output: None)
  monkeypatch.setattr(sweep, 'run', killed)
  assert main(arguments) == 130
  monkeypatch.setattr(sweep, 'run', run)
  assert main(arguments) == 0
  assert made[0][:2] == ('trial-0000', left[0].session.config.policy.kl)
  assert sorted(name for name, _, _ in made) == ['trial-0000', 'trial-0001', 'trial-0002']
  assert {name: count for name, _, count in made} == {'trial-0000': 0, 'trial-0001': 0, 'trial-0002': 1}
  backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / 'runs' / 'study.journal'))
  study = optuna.load_study(study_name='charjax', storage=optuna.storages.JournalStorage(backend))
  assert [trial.value for trial in study.trials] == [kl for _, kl, _ in sorted(made)]
  best = max(made, key=lambda one: one[1])[0]
  assert next(iter(json.loads((tmp_path / 'runs' / 'sweep.json').read_text())['trials'])) == best


class Planned(sweep.Trial):
  """A trial of which only the keys are known."""

  def __init__(self, name, keys, **state):
    super().__init__(name, None, (), **state)
    self.__dict__['keys'] = dict(zip(STAGES, keys, strict=True))


def test_no_two_trials_at_a_time_have_the_same_gpu(monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert sweep.shares(2) == [{}, {}]
  monkeypatch.delenv('JAX_PLATFORMS')
  monkeypatch.setattr(sweep.hosts, 'on_tpu', lambda: False)
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5,7,8,9')
  assert sweep.shares(2) == [{'CUDA_VISIBLE_DEVICES': '3,5'}, {'CUDA_VISIBLE_DEVICES': '7,8'}]
  assert sweep.shares(1) == [{}]
  with pytest.raises(UserError, match='there are 5 GPUs, and each trial needs one'):
    sweep.shares(6)
  for hidden in ('', '-1'):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', hidden)
    assert sweep.shares(2) == [{}, {}]
  monkeypatch.setattr(sweep.hosts, 'on_tpu', lambda: True)
  with pytest.raises(UserError, match='a TPU takes one process at a time'):
    sweep.shares(2)


def test_the_time_left_counts_what_is_shared_once():
  took = dict(zip(STAGES, (10.0, 20.0, 30.0, 5.0, 15.0, 60.0, 40.0), strict=True)) | {'behaviour': 0.25, 'report': 0.75}
  first = Planned('a', 'mrRpbPE', seconds=took, state='finished')
  running = Planned('b', 'mrRpbQF', seconds=dict(list(took.items())[:5]), since=100.0, state='running')
  other = Planned('c', 'mrSqcUG')
  # 60 - 25 of the policy, 40 of the evaluation, 1 of behaviour and report; and all from the rankings on.
  assert sweep.time_left([first, running], 1, 125.0) == pytest.approx(35 + 40 + 1)
  assert sweep.time_left([first, running, other], 1, 125.0) == pytest.approx(76 + 30 + 5 + 15 + 60 + 40 + 1)
  # At a time: no sooner than the longest of them.
  assert sweep.time_left([first, running, other], 2, 125.0) == pytest.approx(151)
  # What other trials are to make is theirs alone.
  assert sweep.time_left([first, other, Planned('d', 'mrSqcUG')], 1, 0.0) == pytest.approx(151 + 1)
  # Nobody knows yet how long an evaluation takes.
  del first.seconds['evaluation'], first.seconds['report']
  assert sweep.time_left([first, running], 1, 125.0) is None
