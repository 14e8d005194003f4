"""Steps that changed nothing, because a number in them was not finite: counted, kept, and at last too many."""

import json
from typing import Any

import jax
import numpy as np
from etils import epath

from charjax import hosts
from charjax.errors import UserError
from charjax.mesh import fetch

FOLDER = 'not_finite'


class Skipped:
  """Watches the steps of one training run.

  skipped = Skipped(folder, limit=3)      # after the run's metrics were truncated to its last checkpoint
  skipped.watch(step, values, batch)      # after each step

  Args:
    folder: the run's, with its metrics.jsonl, from which steps that were skipped before a restart are counted.
    limit: the number of skipped steps that stops the run.
  """

  def __init__(self, folder: epath.Path, limit: int):
    self._folder, self._metrics, self._limit = folder, folder / 'metrics.jsonl', limit
    self._count = hosts.first(self._before)

  def _before(self) -> int:
    lines = self._metrics.read_text().splitlines() if self._metrics.exists() else []
    return sum(bool(json.loads(line).get('skipped')) for line in lines)

  def watch(self, step: int, values: dict[str, Any], batch: Any) -> None:
    """Counts the step if it was skipped.

    Raises:
      UserError: it was one too many. Its batch is then in `not_finite/STEP.npz`, an array for each leaf.
    """
    if not values['skipped']:
      return
    self._count += 1
    if self._count < self._limit:
      return
    file = self._folder / FOLDER / f'{step:06d}.npz'
    leaves = jax.tree_util.tree_leaves_with_path(fetch(batch))
    arrays = {jax.tree_util.keystr(path, simple=True, separator='.'): np.asarray(leaf) for path, leaf in leaves}
    hosts.first(lambda: _write(file, arrays))
    raise UserError(
      f'{self._metrics}: in {self._count} steps, the last of them step {step}, the loss or its gradient was not a '
      f'finite number (null there), and they changed nothing; the batch of the last is in {file}. Lower the '
      'learning_rate, or let more steps be skipped (skipped_steps); earlier stages are kept'
    )


def _write(file: epath.Path, arrays: dict[str, Any]) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  with file.open('wb') as out:
    np.savez(out, **arrays)
