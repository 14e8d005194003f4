"""Every stage of the smoke loop on eight CPU devices, in several shapes, beside the same stage on one device.

  python scripts/verify_mesh.py [--shapes=8,1,1 2,2,2 ...] [--stages=replies policy ...] [--workdir=DIR]

The loop of configs/smoke.py runs once on one device, with ten steps of training. Then each stage runs on each shape,
on copies of what the one device's stages wrote, so that differences do not add up. Texts may differ only where a draw
falls on a tie, and are counted; everything else is compared on the same texts, and so with every log-prob and reward
of the one device's replies: at most 1e-4 apart (rewards: of their spread), and losses at most 1e-4 of their size. The
policy learns on each shape from the replies that the one device drew. What the rules of charjax.mesh split must lie in
its parts: before training, after it, and as restored from a checkpoint.

Exits with 1 where a bound is exceeded. About two minutes a shape on two cores, and as long for the one device.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == '__main__':
  # Before JAX is imported.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from charjax import config_file, files, mesh, start, workdir
from charjax.engine.score import score
from charjax.stages import STAGES, policy, preference, prompts, replies
from charjax.stages.rollouts import Rollout
from charjax.training import loop
from charjax.training.checkpoint import Checkpoints
from charjax.training.heads import read_rewards, reply_states

SHAPES = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2))
NAMES = tuple(stage.name for stage in STAGES if stage.name != 'report')  # which computes nothing
TOLERANCE = 1e-4
_CONFIG = Path(__file__).parent.parent / 'configs' / 'smoke.py'
# Ten steps each; batches of eight messages, which all shapes can split, and of 56 replies, which is no other array's
# length: the policy's 48 would be its prompts'.
_CHANGES = (
  'preference.epochs=10', 'preference.messages_per_batch=8', 'preference.save_every=5',
  'policy.steps=10', 'policy.prompts_per_step=8', 'policy.replies_per_prompt=4', 'policy.save_every=5',
)  # fmt: skip


def begin(folder: Path, changes: Sequence[str] = _CHANGES) -> workdir.Session:
  """A session on the current mesh, as the command line makes it."""
  config = config_file.read_config(str(_CONFIG), [f'--config.{change}' for change in changes])
  return start.prepare(config, epath.Path(folder))


def one_device() -> Any:
  """A mesh of the first device alone."""
  shape = (1,) * len(mesh.AXES)
  return jax.make_mesh(shape, mesh.AXES, axis_types=(AxisType.Auto,) * len(shape), devices=jax.devices()[:1])


class Steps:
  """What the train steps of a stage were given and gave, while `watched`.

  Attributes:
    functions: each jitted step with the shapes and layouts of its arguments.
    problems: which arrays of what is trained, and of the optimizer, do not lie as the rules say.
  """

  def __init__(self) -> None:
    self.functions: list[tuple[Any, Any]] = []
    self.problems: list[str] = []

  def make(self, *args: Any) -> Any:
    step = self._make(*args)
    abstract: list[Any] = []

    def watched(*given: Any) -> Any:
      if not abstract:
        abstract.append(jax.tree.map(_abstract, given))
        self.functions.append((step, abstract[0]))
        self.problems += [f'before training: {found}' for found in misplaced(given[:3])]
      gave = step(*given)
      self.problems += [f'after a step: {found}' for found in misplaced(gave[:2])]
      return gave

    return watched

  @contextlib.contextmanager
  def watching(self) -> Iterator[None]:
    self._make = loop.make_step
    with mock.patch.object(loop, 'make_step', self.make):
      yield


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def misplaced(tree: Any) -> list[str]:
  """Which arrays do not lie in the parts that the rules cut their logical axes into; the moments of Adam among them."""
  found = []
  now = jax.sharding.get_mesh()
  for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable)):
    if not isinstance(node, nnx.Variable):
      continue
    array, axes = node[...], node.get_metadata()['axes']
    split = [(names,) if isinstance(names, str) else names or () for names in mesh.spec(array.shape, axes, now)]
    parts = [int(np.prod([now.shape[name] for name in names])) for names in split]
    wanted = tuple(size // count for size, count in zip(array.shape, parts, strict=True))
    name = jax.tree_util.keystr(path)
    if {shard.data.shape for shard in array.addressable_shards} != {wanted}:
      found.append(f'{name} {axes} lies as {array.sharding}')
    if array.sharding.is_fully_replicated and np.prod(parts) > 1:
      found.append(f'{name} {axes} lies whole on every device')
    if len({str(shard.index) for shard in array.addressable_shards}) != np.prod(parts):
      found.append(f'{name} {axes}: devices hold the same parts')
    if not isinstance(array.sharding, NamedSharding) or array.sharding.mesh.shape != now.shape:
      found.append(f'{name} lies on another mesh')
  return found


def run_stage(session: workdir.Session, name: str) -> None:
  workdir.execute([stage for stage in STAGES if stage.name == name], session)


def run_policy(session: workdir.Session, said: Sequence[Rollout] = ()) -> tuple[list[Rollout], Steps, float]:
  """Runs the policy stage; with the rollouts `said` of another run, learns from those.

  Returns:
    its rollouts, its steps, and how far its first rewards and advantages are from those of `said`.
  """
  found: list[Rollout] = []
  apart = [0.0]
  real, steps = policy.roll_out, Steps()

  def roll_out(*args: Any) -> Rollout:
    step = args[5]
    if not said or step == 1:
      found.append(real(*args))
    if not said:
      return found[-1]
    if step == 1 and [r.tokens for r in found[0].drawn] == [r.tokens for r in said[0].drawn]:
      apart[0] = max(farthest(a, b) for a, b in zip(found[0][1:], said[0][1:], strict=True))
    return said[step - 1]

  with mock.patch.object(policy, 'roll_out', roll_out), steps.watching():
    run_stage(session, 'policy')
  return found, steps, apart[0]


def teacher_forced(session: workdir.Session) -> dict[str, Any]:
  """Log-probs of this run's replies to the plain prompts, by the starting model, and rewards of both preference models.

  The preference models are those of the run, restored onto whatever mesh there is.
  """
  model = session.model
  texts = {row['id']: row['text'] for row in files.read_jsonl(session.folder('messages') / 'messages.jsonl')}
  rows = replies.load(session)
  asked = [model.prompt(prompts.alone(texts[row['message']])) for row in rows]
  said = [model.reply(row['text'], row['finish'] == 'stop') for row in rows]
  found: dict[str, Any] = {'log_probs': np.concatenate(score(model.decoder, asked, said))}
  for name in preference.MODELS:
    trained = preference.load(session, name)
    states = reply_states(preference.trunk(session), trained, asked, said)
    found[name] = jax.device_get(read_rewards(trained, mesh.replicate(states)))
  return found


def farthest(found: Any, expected: Any) -> float:
  """The largest absolute difference between two trees of numbers."""
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  return max((float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max(initial=0.0)) for a, b in pairs), default=0)


def losses_apart(one: Path, other: Path) -> float:
  """The largest relative difference between two runs' losses, by step."""
  found, expected = ([row['loss'] for row in files.read_jsonl(path / 'metrics.jsonl')] for path in (other, one))
  assert len(found) == len(expected)
  return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def restored(session: workdir.Session, name: str, steps: Steps) -> list[str]:
  """What does not lie in its parts when the latest checkpoint is read as the stage would to go on."""
  problems = []
  folders = [session.folder(name) / m for m in preference.MODELS] if name == 'preference' else []
  folders = folders or [session.folder(name) / 'checkpoints']
  offsets = range(len(preference.MODELS)) if name == 'preference' else (0,)
  for folder, offset, (_, (trainable, state, *_)) in zip(folders, offsets, steps.functions, strict=True):
    with Checkpoints(folder, session.config.seed + offset) as checkpoints:
      step, *trees, _ = checkpoints.restore(trainable, state)
    problems += [] if step else ['nothing was restored']
    problems += [f'restored: {found}' for found in misplaced(trees)]
  return problems


def reference(folder: Path, stages: Sequence[str] = NAMES) -> tuple[list[Rollout], dict[str, Any]]:
  """Stages on one device: the policy's rollouts, and the log-probs and rewards of all replies."""
  with jax.set_mesh(one_device()):
    session = begin(folder)
    for name in stages:
      if name == 'policy':
        said, _, _ = run_policy(session)
      else:
        run_stage(session, name)
    return said, teacher_forced(session)


def verify(
  one: Path, said: Sequence[Rollout], expected: dict[str, Any], shape: Sequence[int], folder: Path,
  stages: Sequence[str],
) -> tuple[dict[str, float], dict[str, str], list[str], list[Steps]]:  # fmt: skip
  """Runs stages on a mesh, each on a copy of what one device wrote before it.

  Returns:
    distances that must not exceed TOLERANCE, what else there is to tell, what does not lie in its parts, and the
    steps of preference and policy.
  """
  far: dict[str, float] = {}
  told: dict[str, str] = {}
  problems: list[str] = []
  watched: list[Steps] = []
  with jax.set_mesh(mesh.make_mesh(shape)):
    shutil.copytree(one, folder)
    session = begin(folder)
    problems += misplaced((session.model.decoder, preference.trunk(session)))
    for name, values in teacher_forced(session).items():
      # Rewards have no scale of their own: in units of their spread.
      unit = 1.0 if name == 'log_probs' else float(expected[name].std())
      far[f'forced {name}'] = farthest(values, expected[name]) / unit
    for name in stages:
      shutil.rmtree(folder / name)
      steps = Steps()
      if name == 'policy':
        _, steps, far['first rollout'] = run_policy(session, said)
      elif name == 'preference':
        with steps.watching():
          run_stage(session, name)
      else:
        run_stage(session, name)
      if steps.functions:
        far[f'{name} losses'] = losses_apart(one / name, folder / name)
        problems += steps.problems + restored(session, name, steps)
        watched.append(steps)
      _compare(one / name, folder / name, far, told)
      # What follows is to read what one device wrote.
      shutil.rmtree(folder / name)
      shutil.copytree(one / name, folder / name)
  return far, told, problems, watched


def _compare(one: Path, other: Path, far: dict[str, float], told: dict[str, str]) -> None:
  """What a stage wrote: texts, and numbers beside equal texts."""
  name = one.name
  for file in ('messages.jsonl', 'replies.jsonl'):
    if (one / file).exists():
      rows, others = (files.read_jsonl(folder / file) for folder in (one, other))
      same = [(a, b) for a, b in zip(rows, others, strict=False) if a['text'] == b['text']]
      told[f'{name} texts alike'] = f'{len(same)} of {len(rows)}'
      for key in ('logprob', 'score'):
        apart = [abs(a[key] - b[key]) for a, b in same if key in a]
        if apart:
          # They are rounded, log-probs to four digits.
          far[f'{name} {key}'] = max(0.0, max(apart) - TOLERANCE)
  if name == 'rankings':
    scores, others = ([r['scores'] for r in files.read_jsonl(f / 'rankings.jsonl')] for f in (one, other))
    far['rankings scores'] = farthest(others, scores)
  if name == 'baseline':
    measures, others = (json.loads((f / 'measures.json').read_text()) for f in (one, other))
    for condition, measured in measures.items():
      for key in ('pairs', 'log_prob'):
        if key in measured:
          far[f'{condition} {key}'] = farthest(others[condition][key], measured[key])
  if name == 'evaluation':
    margins, others = (
      {
        trait: v['margin']['trained']['mean']
        for trait, v in json.loads((f / 'summary.json').read_text())['traits'].items()
      }
      for f in (one, other)
    )
    far['evaluation margins'] = farthest(others, margins)


def _main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--shapes', nargs='+', default=SHAPES, type=lambda text: tuple(map(int, text.split(','))))
  parser.add_argument('--stages', nargs='+', default=NAMES)
  parser.add_argument('--workdir', type=Path)
  arguments = parser.parse_args()
  top = arguments.workdir or Path(tempfile.mkdtemp(prefix='charjax-mesh-'))
  jax.config.update('jax_compilation_cache_dir', os.environ.get('JAX_COMPILATION_CACHE_DIR', str(top / 'xla')))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
  said, expected = reference(top / 'one')
  failed = False
  for shape in arguments.shapes:
    folder = top / 'x'.join(map(str, shape))
    far, told, problems, _ = verify(top / 'one', said, expected, shape, folder, arguments.stages)
    print(f'\n(data, fsdp, tensor) = {shape}')
    for name, distance in far.items():
      print(f'  {name:24} {distance:.1e}{"" if distance <= TOLERANCE else "  TOO FAR"}')
    for name, text in told.items():
      print(f'  {name:24} {text}')
    print(
      '\n'.join(f'  {problem}' for problem in problems) or '  all that the rules split lies in its parts', flush=True
    )
    failed |= bool(problems) or any(distance > TOLERANCE for distance in far.values())
    # Each compiled program holds pieces of memory of its own, and Linux gives a process only so many.
    jax.clear_caches()
  return int(failed)


if __name__ == '__main__':
  sys.exit(_main())
