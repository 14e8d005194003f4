"""Training state in Orbax checkpoints: parameters, optimizer, data position; and fingerprints of weights."""

import hashlib
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from charjax.errors import UserError


class Checkpoints:
  """The checkpoints of one training run, in `folder`; the latest is kept.

  with Checkpoints(folder / 'train') as checkpoints:
    state, position = checkpoints.restore(state)
  """

  def __init__(self, folder: epath.Path):
    policies = ocp.training.preservation_policies
    self._checkpointer = ocp.training.Checkpointer(
      folder.resolve(), preservation_policy=policies.LatestN(1), cleanup_tmp_directories=True
    )

  def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
    """Saves arrays (any pytree) and the data position (JSON) after `step` steps; returns when it is on disk."""
    leaves = {f'{i:04d}': leaf for i, leaf in enumerate(jax.tree.leaves(state))}
    self._checkpointer.save_checkpointables(step, {'state': leaves, 'position': position}, force=True)

  def restore(self, state: Any) -> tuple[int, Any, dict[str, Any]]:
    """The latest (step, state, position), laid out as `state` is; (0, state, {}) when there is none yet.

    Raises:
      UserError: the checkpoint does not fit `state`.
    """
    latest = self._checkpointer.latest
    if latest is None:
      return 0, state, {}
    leaves, structure = jax.tree.flatten(state)
    abstract = {
      f'{i:04d}': jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for i, leaf in enumerate(leaves)
    }
    try:
      loaded = self._checkpointer.load_checkpointables(latest.step, {'state': abstract, 'position': None})
    except (ValueError, KeyError, FileNotFoundError) as error:
      raise UserError(
        f'{self._checkpointer.directory}: checkpoint {latest.step} cannot be read ({str(error).splitlines()[0]}); '
        'remove the folder to train again'
      ) from error
    values = [loaded['state'][f'{i:04d}'] for i in range(len(leaves))]
    return latest.step, jax.tree.unflatten(structure, values), loaded['position']

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *_: object) -> None:
    self._checkpointer.close()


def fingerprint(tree: Any) -> str:
  """sha256 over the contents of all arrays of a pytree, in order."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    array = np.asarray(jax.device_get(leaf))
    digest.update(f'{array.dtype}{array.shape}'.encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()
