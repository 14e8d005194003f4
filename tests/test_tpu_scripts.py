"""tpu/*.sh: what they ask of gcloud, what they refuse, and what babysit.sh does about each way in which a run may end.

gcloud is a stand-in (stand_in_gcloud.py), and so is charjax: a script that ends as it is told. `scripts/verify_tpu.sh`
does the same with charjax itself, on four workers.
"""

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from smoke import ROOT

WORKERS = 2
RUN = ('--', 'run', '--config=configs/smoke.py', '--workdir=/shared/it is', '--config.seed=3')
COST = 'v5litepod-16, 16 chips: about $19.20 an hour, $461 a day, until tpu/delete.sh'

# The n-th start of all workers ends with the n-th word of the file `ends`; at `stay` it waits for a signal.
CHARJAX = """#!/usr/bin/env bash
echo "worker $JAX_PROCESS_ID of $JAX_NUM_PROCESSES:$(printf ' <%s>' "$@")"
echo >>"{top}/started-$JAX_PROCESS_ID"
end=$(sed -n "$(wc -l <"{top}/started-$JAX_PROCESS_ID")p" "{top}/ends")
case $end in
  stay)
    trap 'exit 143' TERM
    while true; do sleep 0.05; done
    ;;
  kill) [[ $JAX_PROCESS_ID == 1 ]] && kill -KILL $$; exit 75 ;;
  *) exit "$end" ;;
esac
"""


class Cloud:
  """A stand-in for gcloud on PATH, and for charjax on the workers."""

  def __init__(self, top: Path):
    self.top = top
    (top / 'bin').mkdir()
    (top / 'bin' / 'gcloud').symlink_to(ROOT / 'tests' / 'stand_in_gcloud.py')
    charjax = top / 'charjax'
    charjax.write_text(CHARJAX.format(top=top))
    charjax.chmod(0o755)
    install = f'mkdir -p .venv/bin && ln -sf {charjax} .venv/bin/python'
    ours = {'PATH': f'{top / "bin"}:{os.environ["PATH"]}', 'TPU_ZONE': 'us-west4-a', 'TPU_INSTALL': install}
    stand_in = {'STAND_IN': str(top / 'cloud'), 'STAND_IN_WORKERS': str(WORKERS), 'STAND_IN_WAITS': '1'}
    self.environment = {**os.environ, **ours, **stand_in}

  def start(self, script: str, *flags: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
      [ROOT / 'tpu' / f'{script}.sh', *flags], env=self.environment | more, cwd=self.top,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip

  def run(self, script: str, *flags: str, **more: str) -> tuple[int, str, str]:
    process = self.start(script, *flags, **more)
    try:
      out, told = process.communicate(timeout=600)
    finally:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, told

  def babysit(self, ends: str, *flags: str) -> subprocess.Popen[str]:
    (self.top / 'ends').write_text('\n'.join(ends.split()) + '\n')
    return self.start('babysit', '--every=0.1', *flags, *RUN)

  def gcloud(self, *words: str) -> str:
    return subprocess.check_output(['gcloud', *words], env=self.environment, text=True)

  def asked(self) -> list[str]:
    """The commands given to gcloud, shortened: `create`, `ssh tail ...`; not those that ask for a state."""
    log = self.top / 'cloud' / 'log'
    found = []
    for line in map(shlex.split, log.read_text().splitlines() if log.exists() else []):
      remote = next((word.partition('=')[2] for word in line if word.startswith('--command=')), '')
      if line[0] == 'compute' and line[3] != 'describe' and not remote.startswith('if [ -e'):
        found.append(f'{line[3]} {remote}'.strip())
    return found

  def starts(self) -> int:
    file = self.top / 'started-0'
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture
def cloud(tmp_path):
  made = Cloud(tmp_path)
  yield made
  if (tmp_path / 'cloud' / 'charjax').exists():
    made.run('delete')


LAST = 'ssh tail --lines=3 charjax-run/log'
START = 'ssh charjax/tpu/worker.sh start run --config=configs/smoke.py --workdir=/shared/it\\ is --config.seed=3'


def test_by_hand(cloud):
  assert cloud.run('create', '--spot')[0] == 0
  assert cloud.run('run', *RUN)[0] != 0  # not granted yet
  for _ in range(2):
    state = cloud.gcloud('compute', 'tpus', 'queued-resources', 'describe', 'charjax', '--zone=us-west4-a')
  assert state == 'ACTIVE\n'
  code, _, told = cloud.run('setup')
  assert code == 0 and COST in told
  machine = cloud.top / 'cloud' / 'charjax' / 'machines' / '1'
  assert (machine / 'charjax' / 'charjax' / 'main.py').read_bytes() == (ROOT / 'charjax' / 'main.py').read_bytes()
  (machine / 'charjax' / 'charjax' / 'of_before.py').write_text('')
  assert cloud.run('setup')[0] == 0
  assert not (machine / 'charjax' / 'charjax' / 'of_before.py').exists()
  assert (machine / 'charjax' / '.venv' / 'bin' / 'python').exists()
  (cloud.top / 'ends').write_text('stay\n')
  assert cloud.run('run', *RUN)[0] == 0
  code, _, told = cloud.run('run', *RUN)
  assert code == 1 and told.count('a run goes on here') == WORKERS
  code, _, told = cloud.run('setup')
  assert code == 2 and 'setup.sh: a run goes on there' in told and (machine / 'charjax' / 'pyproject.toml').exists()
  code, out, told = cloud.run('logs', '--worker=1')
  assert code == 0 and COST in told
  words = ['-m', 'charjax.main', *RUN[1:]]
  assert out == f'worker 1 of 2:{"".join(f" <{word}>" for word in words)}\n'
  code, _, told = cloud.run('delete')
  assert code == 0 and 'costs nothing any more' in told and not machine.exists()
  create, *_, delete = (cloud.top / 'cloud' / 'log').read_text().splitlines()
  wanted = '--node-id=charjax --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot'
  assert create == f'compute tpus queued-resources create charjax --zone=us-west4-a {wanted}'
  assert delete == 'compute tpus queued-resources delete charjax --zone=us-west4-a --force --quiet'


def test_babysit_starts_again_what_was_cut_off(cloud):
  process = cloud.babysit('75 kill 143 0', '--delete')
  _, told = process.communicate(timeout=600)
  assert process.returncode == 0, told
  assert cloud.asked()[:3] == ['create', 'scp', cloud.asked()[2]]
  assert cloud.asked()[3:] == [START, LAST] * 3 + [START, 'delete'] and told.count(COST) == 1


def test_babysit_sets_up_again_what_was_not_set_up_to_the_end(cloud):
  once = f'{{ mkdir {cloud.top}/tried-$JAX_PROCESS_ID 2>/dev/null && [ $JAX_PROCESS_ID = 1 ] && exit 1; }} || true'
  cloud.environment['TPU_INSTALL'] = f'{{ {once}; }} && {cloud.environment["TPU_INSTALL"]}'
  process = cloud.babysit('0')
  _, told = process.communicate(timeout=600)
  assert process.returncode == 0, told
  assert [line.split()[0] for line in cloud.asked()] == ['create', 'scp', 'ssh', 'scp', 'ssh', 'ssh']
  assert cloud.starts() == 1


def test_babysit_makes_a_preempted_slice_anew_and_may_be_cut_off_itself(cloud):
  process = cloud.babysit('stay 0')
  while cloud.starts() < 1:
    time.sleep(0.05)
  os.killpg(process.pid, signal.SIGKILL)
  process.communicate()
  process = cloud.babysit('stay 0')
  time.sleep(1)
  assert process.poll() is None and cloud.asked().count('create') == 1 and cloud.starts() == 1
  cloud.gcloud('stand-in', 'preempt', 'charjax')
  _, told = process.communicate(timeout=600)
  assert process.returncode == 0, told
  assert [line.split()[0] for line in cloud.asked()] == [
    'create', 'scp', 'ssh', 'ssh', 'delete', 'create', 'scp', 'ssh', 'ssh'
  ]  # fmt: skip
  assert 'the run is done' in told and told.count(COST) == 2  # it was left, and costs


# The last: no worker can be reached.
@pytest.mark.parametrize('state', ['FAILED', 'SUSPENDED', 'ACTIVE'])
def test_babysit_asks_anew_where_a_slice_cannot_be_used(cloud, state):
  assert cloud.run('create')[0] == 0
  cloud.gcloud('stand-in', 'state', 'charjax', state)
  process = cloud.babysit('0')
  _, told = process.communicate(timeout=600)
  assert process.returncode == 0, told
  assert [line.split()[0] for line in cloud.asked()] == ['create', 'delete', 'create', 'scp', 'ssh', 'ssh']


@pytest.mark.parametrize(
  ('ends', 'code', 'starts', 'said'),
  [
    ('1 75 2', 2, 3, 'the run ended with 2'),
    ('1 1', 1, 2, 'the run ended with 1, for the second time within an hour'),
    ('75 ' * 9, 75, 5, 'five starts in a row'),
  ],
)
def test_babysit_gives_up_what_starting_again_does_not_mend(cloud, ends, code, starts, said):
  process = cloud.babysit(ends)
  _, told = process.communicate(timeout=600)
  assert (process.returncode, cloud.starts()) == (code, starts), told
  assert said in told and told.index(said) < told.rindex(COST)  # what it is left at
  assert cloud.asked().count('create') == 1 and 'delete' not in cloud.asked()


def test_requests_that_fail_again_and_again_end(cloud):
  """Each is on its way first, as requests are before they fail."""
  cloud.environment['STAND_IN_STATE'] = 'FAILED'
  process = cloud.babysit('0', '--delete')
  _, told = process.communicate(timeout=600)
  assert process.returncode == 75 and 'ten requests in a row were refused' in told
  assert cloud.asked().count('create') == 10 and 'WAITING_FOR_RESOURCES' in told


def test_who_may_not_ask_is_told_at_once(cloud):
  cloud.environment['STAND_IN_DENIES'] = 'describe'
  process = cloud.babysit('0')
  _, told = process.communicate(timeout=600)
  assert process.returncode == 2 and 'PERMISSION_DENIED' in told and cloud.asked() == []


def test_a_slice_that_cannot_be_deleted_is_told_with_what_it_costs(cloud):
  cloud.environment['STAND_IN_DENIES'] = 'delete'
  process = cloud.babysit('0', '--delete')
  _, told = process.communicate(timeout=600)
  assert process.returncode == 0 and 'attempt 5 of 5' in told and told.index('attempt 5') < told.rindex(COST)
  del cloud.environment['STAND_IN_DENIES']


@pytest.mark.parametrize('preempted', [False, True])
def test_any_number_of_preemptions_is_no_failure(cloud, preempted):
  """Six starts that last a moment; where the slice goes away after each, the run still ends."""
  process = cloud.babysit('75 75 75 75 75 75 0')
  if preempted:
    for start in range(1, 7):
      while cloud.starts() < start and process.poll() is None:
        time.sleep(0.02)
      cloud.gcloud('stand-in', 'state', 'charjax', 'SUSPENDED')
  _, told = process.communicate(timeout=600)
  assert process.returncode == (0 if preempted else 75), told


@pytest.mark.parametrize(
  ('command', 'said'),
  [
    ('create --zone=us-west4-a --spott', 'create.sh: there is no flag --spott; --help lists those there are'),
    ('create --spot=yes', 'create.sh: --spot takes no value'),
    ('create --zone=', 'create.sh: --zone= has no value; write --zone=VALUE'),
    ('create --zone=uswest', 'create.sh: --zone=uswest: no zone, which is called as us-west4-a is'),
    ('create --name=My_TPU', 'create.sh: --name=My_TPU: give small letters, digits and hyphens, at most 40'),
    ('create --accelerator=h100-8', 'create.sh: --accelerator=h100-8: give v4-N, v5litepod-N, v5p-N or v6e-N, such as'),
    ('create --accelerator=v5p-7', 'create.sh: --accelerator=v5p-7: N counts cores, two a chip; give an even one'),
    ('create --price=cheap', 'create.sh: --price=cheap: give US dollars a chip-hour, as 1.20'),
    ('run', 'run.sh: what is to be run? give it behind --, as in: -- run --config=configs/llama3_8b.py'),
    ('run -- run --workdir=/x', 'run.sh: charjax needs --config=FILE.py behind --'),
    ('run -- export /x --config=x.py', 'run.sh: behind -- comes run, or one of its stages, and not export'),
    (
      'run -- run --config=x.py --workdir=runs/x',
      'run.sh: charjax needs --workdir= behind --: a folder that all workers',
    ),
    ('babysit --every=soon -- run --config=x.py --workdir=/x', 'babysit.sh: --every=soon: give seconds'),
    ('logs --slices=2 --slice=2', 'logs.sh: --slice=2: give a number from 0, below --slices=2'),
    ('logs --worker=first', 'logs.sh: --worker=first: give a number from 0, or all'),
    ('gke -- run --config=x.py --workdir=/x', 'gke.sh: which cluster? give --cluster=NAME'),
    (
      'gke --cluster=ours --slices=two -- run --config=x.py --workdir=/x',
      'gke.sh: --slices=two: give a whole number from 1',
    ),
  ],
)
def test_a_mistake_is_told_in_one_line(cloud, command, said):
  script, *flags = command.split()
  code, out, told = cloud.run(script, *flags)
  assert code == 2 and out == '' and told.startswith(said) and told.count('\n') == 1, told
  assert cloud.asked() == []


def test_a_zone_is_needed_and_gcloud(cloud):
  assert cloud.run('create', TPU_ZONE='')[2].startswith('create.sh: where is it? give --zone=us-west4-a')
  only = cloud.top / 'only'
  only.mkdir()
  for tool in ('bash', 'dirname', 'env'):
    (only / tool).symlink_to(shutil.which(tool))
  assert (
    cloud.run('create', PATH=str(only))[2] == 'create.sh: gcloud is not there; see cloud.google.com/sdk/docs/install\n'
  )


def test_several_slices_are_one_run(cloud):
  cloud.environment['TPU_SLICES'] = '2'
  babysitter = cloud.babysit('75 0', '--price=1', '--delete')
  _, told = babysitter.communicate(timeout=600)
  assert babysitter.returncode == 0, told
  assert '2 x v5litepod-16, 32 chips: about $32.00 an hour' in told and 'charjax is deleted' in told
  log = [shlex.split(line) for line in (cloud.top / 'cloud' / 'log').read_text().splitlines()]
  create = next(line for line in log if line[3] == 'create')
  assert {'--node-count=2', '--node-prefix=charjax'} < set(create) and '--node-id=charjax' not in create
  # Each slice is set up, started twice and asked; its last words are those of process 0 alone.
  first, second = 'charjax-0', 'charjax-1'
  for step, slices in (
    ('cd charjax && find', [first, second]),
    ('worker.sh start run', [first, first, second, second]),
    ('tail --lines=3', [first]),
  ):
    assert sorted(line[4] for line in log if line[3] == 'ssh' and any(step in word for word in line)) == slices
  assert all((cloud.top / f'started-{i}').read_text().count('\n') == 2 for i in range(2 * WORKERS))


@pytest.mark.parametrize('failing', [1, 3])
def test_what_fails_on_one_slice_fails(cloud, failing):
  cloud.environment['TPU_SLICES'] = '2'
  assert cloud.run('create')[0] == 0
  for _ in range(2):
    cloud.gcloud('compute', 'tpus', 'queued-resources', 'describe', 'charjax', '--zone=us-west4-a')
  assert cloud.run('setup')[0] == 0
  (cloud.top / 'ends').write_text('stay\n')
  (cloud.top / 'cloud' / 'charjax' / 'machines' / str(failing) / 'charjax' / '.ready').unlink()
  code, _, told = cloud.run('run', *RUN)
  assert code == 1 and told.count('not set up') == 1
  assert cloud.run('logs', '--slice=1')[1].startswith('worker 2 of 4:')
  for flags, workers in (('--slice=1',), {2, 3}), ((), {0, 1, 2, 3}):
    _, out, _ = cloud.run('logs', '--worker=all', *flags)
    assert {int(line.split()[1]) for line in out.splitlines()} == workers - {failing}


@pytest.mark.parametrize(
  ('script', 'flags', 'expected'),
  [
    ('create', ['--accelerator=v6e-16', '--price=1.5'], ['create']),
    ('setup', [], ['scp', 'ssh mkdir']),
    ('run', [*RUN], [START]),
    ('logs', ['--worker=all', '--follow'], ['ssh tail --lines=50 --follow charjax-run/log']),
    ('delete', [], ['delete']),
    ('babysit', [*RUN], ['create', 'scp', 'ssh mkdir', START, 'ssh charjax/tpu/worker.sh state']),
  ],
)
def test_a_dry_run_says_what_it_would_do_and_does_nothing(cloud, script, flags, expected):
  code, out, told = cloud.run(script, '--project=mine', '--dry_run', *flags)
  assert code == 0 and cloud.asked() == []
  lines = [shlex.split(line) for line in out.splitlines()]
  assert all('--zone=us-west4-a' in line and '--project=mine' in line for line in lines)
  remotes = [next((word.partition('=')[2] for word in line if word.startswith('--command=')), '') for line in lines]
  said = [f'{line[4]} {remote}'.strip() for line, remote in zip(lines, remotes, strict=True)]
  assert len(said) == len(expected) and all(map(str.startswith, said, expected)), said
  if script == 'create':
    assert 'v6e-16, 16 chips: about $24.00 an hour, $576 a day' in told and 'you said' in told
  elif script != 'delete':
    assert COST in told and 'prices change' in told


def test_for_gke_the_run_is_given_to_xpk(cloud):
  code, out, told = cloud.run('gke', '--cluster=ours', '--dry_run', *RUN)
  words = shlex.split(out)
  assert code == 0 and words[:3] == ['xpk', 'workload', 'create'] and '--restart-on-exit-codes=75' in words
  assert 'until the nodes of the cluster are gone' in told
  taken = next(word.partition('=')[2] for word in words if word.startswith('--script-dir='))
  assert not taken.startswith(str(ROOT)) and taken.endswith('/charjax')  # without what git ignores
  assert words[-1] == '--command=./tpu/install.sh && .venv/bin/charjax ' + START.split(' start ')[1]
  _, out, told = cloud.run('gke', '--cluster=ours', '--slices=2', '--price=1', '--dry_run', *RUN)
  assert '--num-slices=2' in shlex.split(out) and '2 x v5litepod-16, 32 chips: about $32.00 an hour' in told
