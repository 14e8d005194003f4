"""Training state in Orbax checkpoints: parameters, optimizer, data position; and fingerprints of weights."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from orbax.checkpoint import v1 as ocp

from charjax import hosts
from charjax.errors import UserError, one_line
from charjax.mesh import fetch, is_apart
from charjax.model.checkpoint_source import Tensors
from charjax.storage import absolute, is_bucket, unread

_AT_ONCE = 2**28  # bytes

# Its processes would wait for each other by way of the devices, and so for whatever is at work there.
flags.FLAGS['experimental_orbax_use_distributed_barrier'].value = True


class Checkpoints:
  """The checkpoints of one training run, in `folder`; the latest is kept, and those after the steps `kept`.

  Each holds what is trained, the optimizer's state, the random seed, the data position, and as a rule (see `save`) a
  fingerprint of what is trained.
  """

  def __init__(self, folder: epath.Path, seed: int, kept: Sequence[int] = ()):
    policies = ocp.training.preservation_policies
    self._seed = seed
    self._checkpointer = ocp.training.Checkpointer(
      absolute(folder),
      preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(1), policies.CustomSteps(kept)]),
      cleanup_tmp_directories=True,
    )

  def save(self, step: int, trainable: Any, optimizer_state: Any, position: dict[str, Any], kept: bool = True) -> None:
    """Saves the state and the data position (JSON) after `step` steps; returns when it is on disk.

    Of what many processes hold in parts, those that are not to be `kept` have no fingerprint: each process would have
    to gather all of it by way of the devices, which may be busy, and in the seconds that a preemption leaves.
    """
    apart = any(is_apart(leaf) for leaf in jax.tree.leaves(trainable))
    digest = fingerprint(trainable) if kept or not apart else None
    record = {'seed': self._seed, 'data': position, 'fingerprint': digest}
    named = {'trainable': _named(trainable), 'optimizer': _named(optimizer_state), 'record': record}
    self._checkpointer.save_checkpointables(step, named, force=True)

  def restore(self, trainable: Any, optimizer_state: Any) -> tuple[int, Any, Any, dict[str, Any]]:
    """The latest (step, trainable, optimizer state, data position), laid out as those given; step 0 without one.

    Raises:
      UserError: the checkpoint is damaged, or of a run with another seed.
    """
    step = self._latest()
    if step is None:
      return 0, trainable, optimizer_state, {}
    loaded = self._load(step, {'trainable': trainable, 'optimizer': optimizer_state})
    if loaded['record']['seed'] != self._seed:
      raise UserError(f'{self._checkpointer.directory}: its seed is {loaded["record"]["seed"]}, not {self._seed}')
    return step, loaded['trainable'], loaded['optimizer'], loaded['record']['data']

  def load(self, trainable: Any, step: int | None = None) -> Any:
    """What was trained, laid out as `trainable` is, without the optimizer's state; after a step, or the latest.

    Raises:
      UserError: there is no checkpoint, or it is damaged.
    """
    step = self._latest() if step is None else step
    if step is None:
      raise UserError(
        f"{self._checkpointer.directory}: the checkpoint is gone; remove the stage's folder to train again"
      )
    return self._load(step, {'trainable': trainable})['trainable']

  def keep_only(self, step: int) -> None:
    """Removes all checkpoints but that after a step."""
    for other in hosts.first(lambda: [found.step for found in self._checkpointer.checkpoints]):
      if other != step:
        self._checkpointer.delete(other, missing_ok=True)

  def _latest(self) -> int | None:
    latest = self._checkpointer.latest
    return hosts.first(lambda: latest and latest.step)

  def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
    where = f'{self._checkpointer.directory}: checkpoint {step}'
    remedy = "remove the stage's folder to train again"
    abstract: dict[str, Any] = {
      name: {
        key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for key, leaf in _named(tree).items()
      }
      for name, tree in wanted.items()
    }
    try:
      loaded = self._checkpointer.load_checkpointables(step, abstract | {'record': None})
    except (ValueError, KeyError, OSError) as error:
      if isinstance(error, OSError) and is_bucket(self._checkpointer.directory):
        raise unread(self._checkpointer.directory, error) from error
      raise UserError(f'{where} cannot be read ({str(error).splitlines()[0]}); {remedy}') from error
    for name, tree in wanted.items():
      values = [loaded[name][key] for key in _named(tree)]
      loaded[name] = jax.tree.unflatten(jax.tree.structure(tree), values)
    if loaded['record']['fingerprint'] not in (None, fingerprint(loaded['trainable'])):
      raise UserError(f'{where} is damaged (wrong fingerprint); {remedy}')
    return loaded

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_: object) -> None:
    self._checkpointer.close()


def read_trained(folder: epath.Path) -> Tensors:
  """What the latest checkpoint in a folder holds of what was trained, read array by array, and changed in nothing.

  Their names are those of a trainable's parts: 'adapter.q.a', 'decoder.blocks.q', 'head.w'.

  Raises:
    UserError: there is no checkpoint, or it is damaged.
  """
  steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.exists() else []
  if not steps:
    raise UserError(f'{folder}: the checkpoint is gone; restore it, or train again')
  where = absolute(folder / str(max(steps)))
  try:
    stored = ocp.checkpointables_metadata(where).metadata['trainable']
    record = ocp.load_checkpointables(where, {'record': None})['record']
    keys = {'.'.join(re.findall(r'\w+', key.removesuffix('.value'))): key for key in stored}

    def read(name: str, dtype: Any) -> np.ndarray:
      leaf = stored[keys[name]]
      wanted = {key: ... for key in stored} | {keys[name]: np.empty(leaf.shape, leaf.dtype)}
      loaded = ocp.load_checkpointables(where, {'trainable': wanted})['trainable'][keys[name]]
      return np.asarray(loaded).astype(dtype, copy=False)

    # As jax.tree.leaves orders them.
    trained = Tensors(keys, read)
    found = _digest(read(name, stored[keys[name]].dtype) for name in sorted(keys, key=lambda name: keys[name]))
  except (ValueError, KeyError, OSError, TypeError) as error:
    raise UserError(f'{where}: cannot be read ({one_line(error)}); restore it, or train again') from error
  if record['fingerprint'] not in (None, found):
    raise UserError(f'{where}: the checkpoint is damaged (wrong fingerprint); restore it, or train again')
  return trained


def _named(tree: Any) -> dict[str, jax.Array]:
  """The arrays of a pytree by their path in it."""
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def fingerprint(tree: Any) -> str:
  """sha256 over the contents of all arrays of a pytree, in order."""
  return _digest(jax.tree.leaves(tree))


def _digest(arrays: Iterable[Any]) -> str:
  digest = hashlib.sha256()
  for array in arrays:
    digest.update(f'{array.dtype}{array.shape}'.encode())
    for part in _parts(array):
      digest.update(np.ascontiguousarray(fetch(part)).tobytes())
  return digest.hexdigest()


def _parts(array: Any) -> Iterator[Any]:
  """The array by its rows, some at a time where it lies in parts on devices that each will hold all of them at once."""
  if isinstance(array, np.ndarray) or array.is_fully_addressable or array.ndim == 0:
    yield array
    return
  rows = max(1, len(array) * _AT_ONCE // max(array.nbytes, 1))
  for begin in range(0, len(array), rows):
    yield array[begin : begin + rows]
