"""How a run starts: what is checked before any work, what is recorded of it, the devices it finds."""

import contextlib
import ctypes
import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Sequence

import ml_collections
from etils import epath

import charjax
from charjax import character as characters
from charjax import files, hosts, interrupts, limits, starting_model, storage, watch
from charjax import workdir as workdirs
from charjax.errors import Passing, UserError, one_line
from charjax.stages import STAGES

_PACKAGES = ('charjax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def prepare(config: ml_collections.ConfigDict, workdir: epath.Path, elsewhere: bool = False) -> workdirs.Session:
  """Reads all that can be wrong before a stage starts; of a run that is to be `elsewhere` not the model, which this
  machine need not see.

  Raises:
    UserError: naming the first thing that is.
  """
  limits.check(config)
  character = characters.select(characters.load(config.character.path), config.character.traits)
  characters.check_rewarded(character, config.policy.traits)
  _can_be_judged(config, character)
  if not elsewhere:
    starting_model.check(config.model)
  if config.evaluation.probes or config.evaluation.neutral:
    from charjax.stages import probes

    if config.evaluation.probes:
      probes.read_probes(config.evaluation.probes)
    if config.evaluation.neutral:
      probes.read_neutral(config.evaluation.neutral)
  return workdirs.Session(config=config, character=character, workdir=workdir)


def _can_be_judged(config: ml_collections.ConfigDict, character: characters.Character) -> None:
  """A ranker that has all choosing pairs right must be found good enough; else the run would stop in the middle."""
  from charjax.stages.statistics import share

  count, wanted = sum(len(trait.pairs_for('choosing')) for trait in character.traits), config.rankings.minimum_accuracy
  if wanted <= 0:
    return
  if not count:
    raise UserError(
      f'{config.character.path}: traits.pairs: none has use = "choosing", by which the ranker is chosen; write twelve '
      'a trait, or set config.rankings.minimum_accuracy=0.0'
    )
  best = share([1.0] * count)
  if best is not None and best['low'] < wanted:
    raise UserError(
      f'{config.character.path}: traits.pairs: only {count} with use = "choosing"; were the ranker right on them all, '
      f'it could be as bad as {best["low"]:.2f}, and config.rankings.minimum_accuracy is {wanted}; write twelve '
      'a trait, or lower that'
    )


def pin(session: workdirs.Session) -> None:
  """Names the very commit of a model of the hub, so that it is the same in all of a run: the one it was begun with."""
  from charjax.model import hub

  path = session.config.model.path
  if hub.is_address(path):

    def pinned() -> str:
      asked, before = starting_model.read_asked(session.workdir)
      return before if path in (asked, before) else hub.pin(path)

    session.asked = path
    session.config.model.path = hosts.first(pinned)
    session.log(f'model: {session.config.model.path}')


def record(session: workdirs.Session) -> None:
  """Writes what the run was started with beside its stages."""
  versions = {'python': platform.python_version()}
  for package in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  record = {'seed': session.config.seed, 'config': session.config.to_dict(), 'versions': versions}
  if session.asked:
    record['asked'] = session.asked
  files.write_text(session.workdir / 'character.toml', characters.source(session.config.character.path))
  files.write_text(
    session.workdir / 'config.json', json.dumps(record, indent=2, ensure_ascii=False, default=str) + '\n'
  )


@contextlib.contextmanager
def devices(config: ml_collections.ConfigDict, workdir: epath.Path | None = None) -> Iterator[None]:
  """JAX as the stages find it: compiled programs kept between processes, and a mesh. Of many processes the first writes
  what was compiled, and all read it in the run's folder, unless that is in a bucket.

  Raises:
    UserError: there is no device to run on, or the mesh does not fit those that are there.
    Passing: of many processes, this one finds no device.
  """
  import jax

  from charjax import chips, mesh
  from charjax.engine import work

  work.watch_compilation()
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    caches = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    cache = os.path.join(caches, 'charjax', 'xla')
    if workdir is not None and hosts.count() > 1 and not storage.is_bucket(workdir):
      cache = str(workdir / '.xla')
    jax.config.update('jax_compilation_cache_dir', cache)
  # Of a GPU's memory, what a plan counts on; by itself JAX takes three quarters.
  if not os.environ.keys() & {'XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'}:
    os.environ['XLA_CLIENT_MEM_FRACTION'] = f'{chips.GPU_SHARE}'
  if not os.environ.get('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'):
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
  try:
    backend = jax.default_backend()
  except RuntimeError as error:
    # Of many machines, one may have begun before its devices were there.
    kind = Passing if hosts.count() > 1 else UserError
    raise kind(f'no device to run on ({one_line(error)}); is another process using it?') from error
  if backend != 'cpu':
    # Else products of float32 would be rounded to bfloat16 or TF32 there, though the config says float32.
    jax.config.update('jax_default_matmul_precision', 'highest')
  else:
    _keep_memory()
  with jax.set_mesh(mesh.make_mesh(config.mesh)):
    yield


def _keep_memory() -> None:
  """Has glibc keep what a program worked in for the next one, instead of giving it back to the system, which clears
  each page anew: up to a third of a large train step on a virtual machine. A process then holds the most that it ever
  needed."""
  with contextlib.suppress(AttributeError):  # of another C library
    mallopt = ctypes.CDLL(None).mallopt
    # malloc.h: M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD.
    for parameter, value in ((-8, 1), (-4, 0), (-1, -1)):
      mallopt(parameter, value)


def _sources(stage: workdirs.Stage) -> set[str]:
  """The stages it reads, and those that they read."""
  found = set(stage.reads)
  for other in STAGES:
    if other.name in stage.reads:
      found |= _sources(other)
  return found


def run(chosen: Sequence[workdirs.Stage], config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
  watch.be_patient(config.faults.lost_seconds, config.faults.stuck_seconds)
  if config.profile and storage.is_bucket(workdir):
    raise UserError(f'config.profile: traces are written to this machine, not to {workdir}; choose another --workdir')
  session = prepare(config, workdir)
  starting_model.check_apart(config.model, workdir)
  hosts.check_alike(
    {'charjax': charjax.__version__, 'the command': [stage.name for stage in chosen], '--workdir': str(workdir)}
    | dict(workdirs.flat(config.to_dict(), 'config'))
    | {'the character': workdirs.fingerprint(dataclasses.asdict(session.character))}
  )
  with workdirs.lock(workdir), interrupts.leaving_within(config.faults.grace_seconds, watch.end_now):
    pin(session)
    if len(chosen) == 1:
      for stage in STAGES:
        state = workdirs.status(stage, session) if stage.name in _sources(chosen[0]) else 'done'
        if state != 'done':
          folder = session.folder(stage.name)
          raise UserError(f'{folder}: {state}, and {chosen[0].name} builds on it; run {stage.name} first')
    workdirs.check(chosen, session)
    with devices(config, workdir):
      # A broken model file is told of before any work too, unless there is none that needs the model.
      if any(stage.name != 'report' and workdirs.status(stage, session) != 'done' for stage in chosen):
        limits.check_model(config, session.checkpoint.config)
      # Only now: what a run in this folder was started with is not overwritten by a mistake.
      record(session)
      workdirs.execute(chosen, session)
  if chosen[-1].name == 'report' and hosts.is_first_process():
    from charjax.stages import report

    session.log('\n' + report.console_summary(session.workdir))
