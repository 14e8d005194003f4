"""The order in which examples reach a train step: Grain, seeded, with a position that can be saved."""

from collections.abc import Sequence
from typing import Any

import grain


def batches(examples: Sequence[Any], batch_size: int, seed: int) -> Any:
  """An endless Grain iterator over batches (lists) of examples, reshuffled at each pass.

  Its `get_state()` and `set_state()` are the data position: JSON-able, so that a run goes on with the next batch.
  """
  return iter(
    grain.MapDataset.source(list(examples))
    .seed(seed)
    .shuffle()
    .repeat()
    .batch(batch_size, batch_fn=list)
    .to_iter_dataset(grain.ReadOptions(num_threads=0))
  )
