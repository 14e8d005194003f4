"""The order in which examples reach a train step: Grain, seeded, with a position that can be saved."""

from collections.abc import Sequence
from typing import Any

import grain

_PASSES = 2**40  # without end for us; Grain's own endless repeat cannot be cut into batches of one


def batches(examples: Sequence[Any], batch_size: int, seed: int) -> Any:
  """An endless Grain iterator over batches (lists) of examples, reshuffled at each pass.

  Its `get_state()` and `set_state()` are the data position: JSON-able, so that a run goes on with the next batch.
  """
  return iter(
    grain.MapDataset.source(list(examples))
    .seed(seed)
    .shuffle()
    .repeat(_PASSES)
    .batch(batch_size, batch_fn=list)
    .to_iter_dataset(grain.ReadOptions(num_threads=0))
  )


class Together:
  """Several such iterators as one, over a dict of their batches; its position is a dict of theirs."""

  def __init__(self, **iterators: Any):
    self._iterators = iterators

  def __next__(self) -> dict[str, Any]:
    return {name: next(iterator) for name, iterator in self._iterators.items()}

  def get_state(self) -> dict[str, Any]:
    return {name: iterator.get_state() for name, iterator in self._iterators.items()}

  def set_state(self, state: dict[str, Any]) -> None:
    for name, iterator in self._iterators.items():
      iterator.set_state(state[name])
