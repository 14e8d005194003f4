"""The order of the examples that train: endless, each as often as the others, and going on from a saved position."""

import numpy as np
import pytest

from charjax import defaults
from charjax.engine.rows import FixedShapes
from charjax.stages import preference
from charjax.training.data import batches


@pytest.mark.parametrize('size', [1, 2, 5])
def test_batches_of_any_size_have_no_end_and_go_on_from_a_position(size):
  data = batches(range(3), size, seed=0)
  seen = [next(data) for _ in range(6)]
  assert all(len(batch) == size for batch in seen)
  flat = [example for batch in seen for example in batch]
  assert all(sorted(flat[start : start + 3]) == [0, 1, 2] for start in range(0, len(flat) - 2, 3))
  again = batches(range(3), size, seed=0)
  position = batches(range(3), size, seed=0)
  for _ in range(4):
    next(position)
  again.set_state(position.get_state())
  assert [next(again) for _ in range(2)] == seen[4:]


def test_processes_read_their_own_of_one_order_and_know_of_the_rest():
  whole = batches('abcdefg', 4, seed=1)
  here = np.array([True, False, False, True])
  first, second = (batches('abcdefg', 4, seed=1, here=mine, outline=str.upper) for mine in (here, ~here))
  for _ in range(5):
    batch = next(whole)
    assert next(first) == [letter if mine else letter.upper() for letter, mine in zip(batch, here, strict=True)]
    assert next(second) == [letter.upper() if mine else letter for letter, mine in zip(batch, here, strict=True)]
  assert whole.get_state() == first.get_state() == second.get_state()


def test_a_preference_training_makes_room_for_the_batches_that_it_reads():
  config, rng = defaults.get_config().preference, np.random.default_rng(2)
  config.update(messages_per_batch=8, microbatches=2)
  examples = [
    {'prompt': [1] * int(n), 'replies': [[1] * int(length) for length in rng.geometric(0.1, 3).clip(1, 80)]}
    for n in rng.integers(2, 20, 50)
  ]
  shapes, steps = FixedShapes([e['prompt'] for e in examples], 80, [r for e in examples for r in e['replies']]), 12
  preference.expect(config, shapes, examples, 3, 7, steps)
  data = preference.read(config, examples, 3, 7)
  made = [preference.make_rows(config, shapes, next(data), 3) for _ in range(steps)]
  [size] = {rows.packing.slots.shape[1] for rows in made}
  fullest = max(rows.lengths.reshape(2, -1).sum(1).max() for rows in made)
  assert fullest <= size < fullest + made[0].tokens.size / 2 / 64
