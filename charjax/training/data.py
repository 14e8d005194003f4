"""The order in which examples reach a train step: Grain, seeded, with a position that can be saved.

All processes of a run go through one order. Each reads the examples whose rows its own devices hold, and of the others
an outline: how long they are, from which all know alike how a batch is packed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from charjax.engine.batch import Tokens

_PASSES = 2**40  # without end for us; Grain's own endless repeat cannot be cut into batches of one


def batches(
  examples: Sequence[Any],
  batch_size: int,
  seed: int,
  here: np.ndarray | None = None,
  outline: Callable[[Any], Any] = lambda example: example,
) -> Any:
  """An endless Grain iterator over batches (lists) of examples, reshuffled at each pass.

  Its `get_state()` and `set_state()` are the data position: JSON-able, and the same for any number of processes, so
  that a run goes on with the next batch.

  Args:
    examples: what may be read.
    batch_size: how many make a batch.
    seed: of the order.
    here: [batch_size] bool, which of a batch this process reads (mesh.held_here); all of them by default.
    outline: of an example, what stands in a batch for one that others read.
  """

  def read(places: Sequence[int]) -> list[Any]:
    some = [examples[place] for place in places]
    return some if here is None else [e if mine else outline(e) for e, mine in zip(some, here, strict=True)]

  return iter(
    grain.MapDataset.source(range(len(examples)))
    .seed(seed)
    .shuffle()
    .repeat(_PASSES)
    .batch(batch_size, batch_fn=list)
    .map(read)
    .to_iter_dataset(grain.ReadOptions(num_threads=0))
  )


def as_long(tokens: Tokens) -> Tokens:
  """So many tokens of nothing, in an outline."""
  return [0] * len(tokens)


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
