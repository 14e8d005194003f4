"""Several processes as one run: they end alike, whatever one of them meets, and what they made is what one makes.

`scripts/verify_hosts.py` does the same for the whole loop, on eight devices and in more ways, in half an hour.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import read_batches
import verify_hosts

from charjax import hosts
from charjax.errors import UserError

DEVICES = 4


def start(workdir: Path, *flags: str, **options) -> verify_hosts.Group:
  return verify_hosts.Group(workdir, 2, verify_hosts.DATA, *flags, devices=DEVICES, **options)


def test_a_kill_of_one_ends_all_and_started_again_they_write_what_one_process_writes(smoke_run, tmp_path):
  workdir = tmp_path / 'run'
  group = start(workdir, '--config.faults.lost_seconds=5', command='messages')
  group.wait_for(workdir / 'messages' / 'chunks')
  group.processes[1].kill()
  assert group.codes(60) == [75, -signal.SIGKILL], group.says(0)[-5:]
  assert re.fullmatch(r'charjax: process 1 \(.+\) was lost.*; start all again .*', group.says(0)[-1])

  group = start(workdir, command='messages')
  assert group.codes(300) == [0, 0], group.says(0)[-5:]
  assert group.says(0)[0] == 'messages: going on where it was cut off' and group.says(1) == []
  made = [verify_hosts.rows(run / 'messages' / 'messages.jsonl') for run in (workdir, smoke_run[0])]
  assert made[0] == made[1]


def test_sigterm_to_one_has_all_save_the_same_step(smoke_run, tmp_path):
  for stage in ('messages', 'replies', 'rankings'):
    shutil.copytree(smoke_run[0] / stage, tmp_path / 'run' / stage)
  flags = ('--config.preference.head_steps=2', '--config.preference.epochs=999', '--config.preference.save_every=999')
  group = start(tmp_path / 'run', *flags, command='preference')
  folder = tmp_path / 'run' / 'preference' / 'train'
  group.wait_for(folder / 'metrics.jsonl')
  while len(verify_hosts.rows(folder / 'metrics.jsonl')) < 5:
    time.sleep(0.02)
  group.processes[1].send_signal(signal.SIGTERM)
  assert group.codes(60) == [143, 143], group.says(0)[-5:]
  steps = [row['step'] for row in verify_hosts.rows(folder / 'metrics.jsonl')]
  assert steps == list(range(1, len(steps) + 1)) and 5 <= len(steps) < 999
  assert [path.name for path in folder.iterdir() if path.name.isdigit()] == [str(len(steps) - 2)]
  said = group.says(0)[-1]
  assert re.fullmatch(r'charjax: process 1 \(.+\): .*', said) or 'give the same command again' in said


def test_a_mistake_of_one_ends_all_in_one_line(tmp_path):
  group = start(tmp_path / 'run', each=lambda i: ['--config.model.path=none.gguf'] if i else [])
  assert group.codes(60) == [2, 2]
  assert len(group.says(0)) == 1 and group.says(1) == []
  assert re.fullmatch(r'charjax: process 1 \(.+\): config.model.path=none.gguf: no such file.*', group.says(0)[0])


def test_each_process_reads_what_its_devices_hold_and_all_together_the_batches_of_one():
  address = verify_hosts.free_address()
  env = {**os.environ, 'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}
  processes = [
    subprocess.Popen([sys.executable, read_batches.__file__, address, '2', str(i)], env=env, stdout=subprocess.PIPE)
    for i in range(2)
  ]
  # Before the last line stands what the library says that joins CPUs.
  told = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]
  for shape, *both in zip(read_batches.SHAPES, *told, strict=True):
    digest, read = read_batches.batches(shape)
    size = 4 if shape == (4, 2, 1) else 16
    assert read == [[size] * 3] * 2
    # Each process has half of the rows, unless all devices have all of them, or replies lie apart from their messages
    # (those of neutral ones do not).
    some = {(1, 1, 8): [16] * 3, (4, 2, 1): [4, 4, 2]}.get(shape, [8] * 3)
    assert both == [[digest, [some] * 2]] * 2, shape


@pytest.mark.parametrize(
  ('given', 'expected'),
  [
    (('127.0.0.1:1', None, None), 'not all is said'),
    (('', 2, 0), 'not all is said'),
    (('localhost', 2, 0), 'the coordinator is localhost; give each process --coordinator=HOST:PORT'),
    (('localhost:1', 2, 2), 'process 2 of 2: they are numbered from 0 to 1'),
  ],
)
def test_what_is_said_of_the_processes_is_checked(monkeypatch, given, expected):
  for variable in ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID', 'SLURM_PROCID'):
    monkeypatch.delenv(variable, raising=False)
  with pytest.raises(UserError, match=expected):
    hosts.join(*given)
  monkeypatch.setenv('JAX_NUM_PROCESSES', 'two')
  with pytest.raises(UserError, match='JAX_NUM_PROCESSES=two is no number'):
    hosts.join()


# In a process of its own: the topology of a TPU comes with libtpu, which may be loaded once.
_SLICES = """
import os, sys
os.environ |= {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1'}
from jax.experimental import topologies
from charjax import mesh
from charjax.errors import UserError
devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x4', num_slices=2).devices
made = mesh.make_mesh((-1, 4, 1), devices)
print([sorted({device.slice_index for device in row.flat}) for row in made.devices])
try:
  mesh.make_mesh((1, -1, 1), devices)
except UserError as error:
  print(error)
"""


def test_between_slices_only_data_is_split():
  pytest.importorskip('libtpu')
  done = subprocess.run([sys.executable, '-c', _SLICES], capture_output=True, text=True, timeout=120, check=True)
  assert done.stdout.splitlines() == [
    '[[0], [0], [1], [1]]',
    'config.mesh (1, -1, 1) does not fit the 2 slices here, between which only data is split; its first size must be a '
    'multiple of 2; use e.g. (2, -1, 1)',
  ]


_ABORT = """
import os, sys, threading
from charjax import interrupts, watch
watch.speak_after_abort('process 0 was lost')
with interrupts.raising(), interrupts.leaving_within(25.0, lambda *_: None):
  if sys.argv[1] == 'abort':
    threading.Thread(target=os.abort).start()
    threading.Event().wait()
"""


@pytest.mark.parametrize(
  ('how', 'code', 'said'), [('abort', -signal.SIGABRT, 'charjax: process 0 was lost\n'), ('end', 0, '')]
)
def test_a_process_that_is_ended_past_python_still_says_why(how, code, said):
  done = subprocess.run([sys.executable, '-c', _ABORT, how], capture_output=True, text=True, timeout=60, check=False)
  assert (done.returncode, done.stderr) == (code, said)
