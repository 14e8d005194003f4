"""Which reply is drawn in which row: every reply once, from its own prompt, and no row idle without need."""

import numpy as np
import pytest

from charjax.engine.slots import Slots


def play(jobs, rooms, rows, parts, length, shrinks=False):
  """Draws replies of `length[item]` tokens, refilling at every step; how many steps it took, and who was where.

  Where it `shrinks`, a row that is not needed any more is given up.
  """
  slots, steps, room, seen = Slots(jobs, rooms, rows, parts), 0, {}, []
  prompt_of = {item: prompt for prompt, items in jobs for item in items}
  while slots.wanting() or slots.busy():
    read = dict(slots.refill())
    # What is read must not stand where a reply is still drawn.
    assert not any(row.item >= 0 and row.drawn and row.room in read for row in slots.rows)
    room |= read
    if shrinks and not slots.wanting() and slots.fullest() * parts < rows:
      fewer, left = slots.fullest() * parts, min(rooms, slots.fullest() * parts)
      before = [(row.item, row.drawn, room[row.room]) for row in slots.rows if row.item >= 0]
      kept, kept_rooms = slots.shrink(fewer, left)
      assert len(kept) == fewer == len(slots.rows) and len(kept_rooms) == left == len(slots.prompts())
      rows, rooms, room = fewer, left, dict(enumerate(slots.prompts()))
      assert [(row.item, row.drawn, room[row.room]) for row in slots.rows if row.item >= 0] == before
    busy = [(row.room, row.seat) for row in slots.rows if row.item >= 0]
    assert len(set(busy)) == len(busy)
    for number, row in enumerate(slots.rows):
      if row.item >= 0:
        if not row.drawn:
          seen.append((row.item, number))
        assert room[row.room] == prompt_of[row.item]
        assert row.room * parts // rooms == number * parts // rows  # on the same device
        row.drawn += 1
        if row.drawn == length[row.item]:
          slots.end(number)
    steps += 1
  return steps, seen


@pytest.mark.parametrize(('rooms', 'rows', 'parts'), [(1, 1, 1), (4, 4, 2), (3, 6, 1), (8, 32, 2), (28, 64, 4)])
def test_every_reply_is_drawn_once_from_its_prompt(rooms, rows, parts):
  rng = np.random.default_rng(rooms)
  jobs, count = [], 0
  for number in range(37):
    some = int(rng.integers(1, 9))
    jobs.append(((number,), list(range(count, count + some))))
    count += some
  length = rng.integers(1, 40, count)
  steps, seen = play(jobs, rooms, rows, parts, length)
  assert play(jobs, rooms, rows, parts, length, shrinks=True)[0] == steps
  assert sorted(item for item, _ in seen) == list(range(count))
  # Each device draws what was dealt to it.
  owner = {item: place % parts for place, (_, items) in enumerate(jobs) for item in items}
  assert all(number * parts // rows == owner[item] for item, number in seen)


def test_rows_seldom_idle():
  """128 prompts with 4 replies each in 128 rows: few more steps than if any row could draw any reply."""
  rng = np.random.default_rng(0)
  jobs = [((number,), list(range(4 * number, 4 * number + 4))) for number in range(128)]
  length = np.minimum(rng.geometric(1 / 60, 512), 128)
  steps, _ = play(jobs, 56, 128, 1, length)
  # The last replies to begin may take 128 steps, with which no order can do away.
  assert steps < length.sum() / 128 + 100
  # With a room for each prompt that the rows need and no more, the last reply to it keeps rows waiting.
  assert steps < 0.7 * play(jobs, 32, 128, 1, length)[0]
