"""Which reply is drawn in which row: every reply once, from its own prompt, and no row idle without need."""

import numpy as np
import pytest

from charjax.engine.slots import Slots


def play(jobs, groups, each, parts, length):
  """Draws replies of `length[item]` tokens, refilling at every step; how many steps it took, and who was where."""
  slots, steps, room, seen = Slots(jobs, groups, each, parts), 0, {}, []
  prompt_of = {item: prompt for prompt, items in jobs for item in items}
  while slots.wanting() or slots.busy():
    read = {(group, half): prompt for group, half, prompt in slots.refill()}
    # What is read must not stand where a reply is still drawn.
    for place in read:
      assert not any(
        row.item >= 0 and row.drawn and (number // each, row.half) == place for number, row in enumerate(slots.rows)
      )
    room |= read
    for number, row in enumerate(slots.rows):
      if row.item >= 0:
        if not row.drawn:
          seen.append((row.item, number))
        assert room[number // each, row.half] == prompt_of[row.item]
        row.drawn += 1
        if row.drawn == length[row.item]:
          slots.end(number)
    steps += 1
  return steps, seen


@pytest.mark.parametrize(('groups', 'each', 'parts'), [(1, 1, 1), (4, 1, 2), (2, 3, 1), (8, 4, 2), (16, 4, 4)])
def test_every_reply_is_drawn_once_from_its_prompt(groups, each, parts):
  rng = np.random.default_rng(groups)
  jobs, count = [], 0
  for number in range(37):
    some = int(rng.integers(1, 2 * each + 1))
    jobs.append(((number,), list(range(count, count + some))))
    count += some
  _, seen = play(jobs, groups, each, parts, rng.integers(1, 40, count))
  assert sorted(item for item, _ in seen) == list(range(count))
  # Each device draws what was dealt to it.
  owner = {item: place % parts for place, (_, items) in enumerate(jobs) for item in items}
  assert all(number // each // (groups // parts) == owner[item] for item, number in seen)


def test_rows_seldom_idle():
  """128 prompts with 4 replies each in 128 rows: few more steps than if any row could draw any reply."""
  rng = np.random.default_rng(0)
  jobs = [((number,), list(range(4 * number, 4 * number + 4))) for number in range(128)]
  length = np.minimum(rng.geometric(1 / 60, 512), 128)
  steps, _ = play(jobs, 32, 4, 1, length)
  # The last replies to begin may take 128 steps, with which no order can do away.
  assert steps < length.sum() / 128 + 128
  waiting = sum(max(length[group : group + 16]) for group in range(0, 512, 16)) / 8  # rows that wait for each other
  assert steps < waiting
