"""The order of the examples that train: endless, each as often as the others, and going on from a saved position."""

import numpy as np
import pytest

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
