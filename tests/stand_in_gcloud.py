#!/usr/bin/env python3
"""A stand-in for gcloud, for what tpu/*.sh ask of it: no cloud is asked, and each worker is a folder of this machine.

A command for a worker is run here, with that folder as its home; the workers find each other by JAX's variables, which
on a pod the machines know themselves. Put it on PATH under the name of gcloud, and set

  STAND_IN          the folder of all it knows; commands are noted in its file `log`
  STAND_IN_WORKERS  how many a slice has (4)
  STAND_IN_WAITS    how often a request that is looked at has not been granted yet (2)
  STAND_IN_STATE    what then becomes of it (ACTIVE)
  STAND_IN_DENIES   a command that who asks has no permission for

What happens to slices is asked of it, too: `gcloud stand-in preempt NAME` takes one away, its disks with it, after
SIGTERM and up to 30 s of grace; `gcloud stand-in state NAME STATE` says what becomes of a request.
"""

import argparse
import contextlib
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TOP = Path(os.environ['STAND_IN'])
# A connection brings none of the environment; these stand for what is installed on the machines.
MACHINES_OWN = ('PATH', 'LANG', 'TMPDIR', 'GLIBC_TUNABLES', 'TPU_SKIP_MDS_QUERY', 'XLA_FLAGS')


def fail(line: str, code: int = 1) -> None:
  print(f'ERROR: (gcloud) {line}', file=sys.stderr)
  sys.exit(code)


def processes(folder: Path) -> list[int]:
  """Those of the machines in a folder."""
  found = []
  for process in Path('/proc').iterdir():
    with contextlib.suppress(OSError):
      if process.name.isdigit() and f'STAND_IN_MACHINE={folder}/' in (process / 'environ').read_text():
        found.append(int(process.name))
  return found


def end(folder: Path, grace: float) -> None:
  """Shuts machines down: SIGTERM, and SIGKILL after a while."""
  deadline = time.monotonic() + grace
  if grace:
    send(processes(folder), signal.SIGTERM)
  while processes(folder) and time.monotonic() < deadline:
    time.sleep(0.1)
  while left := processes(folder):
    send(left, signal.SIGKILL)
    time.sleep(0.05)
  shutil.rmtree(folder, ignore_errors=True)


def send(some: list[int], number: int) -> None:
  for process in some:
    with contextlib.suppress(ProcessLookupError):
      os.kill(process, number)


def slice_of(name: str, active: bool = False) -> Path:
  folder = TOP / name
  if not folder.exists():
    fail(f'NOT_FOUND: Resource {name} was not found')
  if active and (folder / 'state').read_text() != 'ACTIVE':
    fail(f'TPU {name} is not READY')
  return folder


def machines(folder: Path, which: str, node: str) -> list[Path]:
  """Those of one slice of a request, which are numbered through all of its slices."""
  nodes = (folder / 'nodes').read_text().split()
  if node not in nodes:
    fail(f'NOT_FOUND: Resource {node} was not found')
  each, number = int(os.environ.get('STAND_IN_WORKERS', '4')), nodes.index(node)
  found = [folder / 'machines' / str(number * each + i) for i in range(each)]
  return found if which == 'all' else [found[int(which)]]


def of_node(name: str) -> Path:
  """The folder of the request that a slice belongs to."""
  prefix, _, number = name.rpartition('-')
  return slice_of(prefix if number.isdecimal() and not (TOP / name).exists() else name, active=True)


def free_port() -> int:
  """Of those that no connection is given by itself, since all slices are told of it before it is used."""
  while True:
    with socket.socket() as probe, contextlib.suppress(OSError):
      probe.bind(('127.0.0.1', port := random.randrange(20000, 30000)))
      return port


def create(args: argparse.Namespace) -> int:
  folder = TOP / args.name
  if folder.exists():
    fail(f'ALREADY_EXISTS: Resource {args.name} already exists')
  if (args.node_id is None) == (args.node_count is None):
    fail('INVALID_ARGUMENT: give --node-id or --node-count')
  nodes = [args.node_id] if args.node_id else [f'{args.node_prefix}-{i}' for i in range(int(args.node_count))]
  folder.mkdir(parents=True)
  (folder / 'nodes').write_text('\n'.join(nodes))
  (folder / 'state').write_text('WAITING_FOR_RESOURCES')
  (folder / 'waits').write_text(os.environ.get('STAND_IN_WAITS', '2'))
  return 0


def describe(args: argparse.Namespace) -> int:
  folder = slice_of(args.name)
  waits = int((folder / 'waits').read_text())
  state = (folder / 'state').read_text()
  if state == 'WAITING_FOR_RESOURCES' and not waits:
    state = os.environ.get('STAND_IN_STATE', 'ACTIVE')
    (folder / 'port').write_text(str(free_port()))
    nodes = (folder / 'nodes').read_text().split()
    for i in range(int(os.environ.get('STAND_IN_WORKERS', '4')) * len(nodes)):
      (folder / 'machines' / str(i)).mkdir(parents=True)
    (folder / 'state').write_text(state)
  (folder / 'waits').write_text(str(max(0, waits - 1)))
  print(state)
  return 0


def delete(args: argparse.Namespace) -> int:
  folder = slice_of(args.name)
  if not args.force and (folder / 'state').read_text() not in ('SUSPENDED', 'FAILED'):
    fail(f'{args.name} has nodes; delete them first')
  end(folder / 'machines', 0)
  shutil.rmtree(folder)
  return 0


def scp(args: argparse.Namespace) -> int:
  name, _, to = args.to.partition(':')
  for machine in machines(of_node(name), args.worker, name):
    shutil.copy(args.source, machine / to)
  return 0


def ssh(args: argparse.Namespace) -> int:
  folder = of_node(args.name)
  count = len(list((folder / 'machines').iterdir()))
  address = f'127.0.0.1:{(folder / "port").read_text()}'
  begun = []
  for machine in machines(folder, args.worker, args.name):
    own = {name: value for name, value in os.environ.items() if name in MACHINES_OWN or name.startswith('JAX_')}
    own |= {'HOME': str(machine), 'STAND_IN_MACHINE': str(machine)}
    if count > 1:
      own |= {'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': str(count), 'JAX_PROCESS_ID': machine.name}
    begun.append(subprocess.Popen(['bash', '-c', args.command], cwd=machine, env=own, start_new_session=True))
  return next((code for code in [process.wait() for process in begun] if code), 0)


def stand_in(args: argparse.Namespace) -> int:
  folder = slice_of(args.name)
  if args.what == 'preempt':
    (folder / 'state').write_text('SUSPENDING')
    end(folder / 'machines', 30)
  (folder / 'state').write_text(args.state or 'SUSPENDED')
  return 0


def main() -> int:
  parser = argparse.ArgumentParser(prog='gcloud', allow_abbrev=False)
  groups = parser.add_subparsers(required=True)

  def command(under: argparse._SubParsersAction, name: str, act, *flags: str, **switches: bool):
    own = under.add_parser(name, allow_abbrev=False)
    own.set_defaults(act=act)
    for flag in ('--project', *flags):
      own.add_argument(flag, required=flag in ('--zone', '--command', '--accelerator-type'))
    for switch in switches:
      own.add_argument(f'--{switch}', action='store_true')
    return own

  tpus = groups.add_parser('compute').add_subparsers(required=True).add_parser('tpus').add_subparsers(required=True)
  queued = tpus.add_parser('queued-resources').add_subparsers(required=True)
  create_flags = ('--zone', '--node-id', '--node-count', '--node-prefix', '--accelerator-type', '--runtime-version')
  command(queued, 'create', create, *create_flags, spot=True).add_argument('name')
  command(queued, 'describe', describe, '--zone', '--format').add_argument('name')
  command(queued, 'delete', delete, '--zone', force=True, quiet=True).add_argument('name')
  machine = tpus.add_parser('tpu-vm').add_subparsers(required=True)
  on = command(machine, 'ssh', ssh, '--zone', '--worker', '--command')
  on.add_argument('--ssh-flag', action='append')
  on.add_argument('name')
  copy = command(machine, 'scp', scp, '--zone', '--worker')
  copy.add_argument('--scp-flag', action='append')
  copy.add_argument('source')
  copy.add_argument('to')
  own = command(groups, 'stand-in', stand_in)
  own.add_argument('what', choices=['preempt', 'state'])
  own.add_argument('name')
  own.add_argument('state', nargs='?', default='')
  args = parser.parse_args()
  if args.act.__name__ == os.environ.get('STAND_IN_DENIES'):
    fail('PERMISSION_DENIED: The caller does not have permission')
  TOP.mkdir(parents=True, exist_ok=True)
  with (TOP / 'log').open('a') as log:
    log.write(shlex.join(sys.argv[1:]) + '\n')
  return args.act(args)


if __name__ == '__main__':
  sys.exit(main())
