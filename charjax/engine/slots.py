"""Which reply is drawn in which row: a fixed number of rows, each refilled from a queue as soon as its reply ends.

Rows come in groups that share the keys and values of their prompts, so that a prompt is read once for all replies to it
that are under way. A group has room for two prompts: while the last replies to one are drawn, those to the next begin
in the rows that are free. Which prompt goes to which group depends on lengths of replies alone, so that all processes
of a run decide alike.

Letters: A groups, E rows of one, B = A E rows.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence

_HALVES = 2  # prompts that a group has room for


@dataclasses.dataclass
class Job:
  """A prompt with the replies that are wanted to it.

  Attributes:
    prompt: its tokens.
    items: numbers of the replies that have not begun.
    running: how many are under way.
  """

  prompt: tuple[int, ...]
  items: deque[int]
  running: int = 0


@dataclasses.dataclass
class Row:
  """What is drawn in a row: reply `item` to the prompt in a half of the group's room; -1: nothing."""

  item: int = -1
  half: int = 0
  drawn: int = 0


class Slots:
  """The rows of all groups, and the queues that they are refilled from.

  Attributes:
    rows: B of them; those of a group follow one another.
    halves: prompts that a group has room for; one where that is enough, since all prompts have a group or a row each.
  """

  def __init__(self, jobs: Sequence[tuple[tuple[int, ...], Sequence[int]]], groups: int, each: int, parts: int):
    """Args: jobs, prompts and the numbers of their replies; groups A; each E; parts, devices that groups lie on."""
    self.each = each
    self.rows = [Row() for _ in range(groups * each)]
    self.halves = 1 if len(jobs) <= groups or each == 1 else _HALVES
    self._room: list[list[Job | None]] = [[None] * self.halves for _ in range(groups)]
    # Prompts are dealt to the devices in advance: each refills its groups from its own.
    self._queues = [deque(Job(prompt, deque(items)) for prompt, items in jobs[part::parts]) for part in range(parts)]
    self._groups_of_a_part = groups // parts

  def wanting(self) -> bool:
    """Whether some reply has not begun."""
    return any(self._queues) or any(job is not None and job.items for room in self._room for job in room)

  def busy(self) -> bool:
    """Whether some reply is under way."""
    return any(row.item >= 0 for row in self.rows)

  def end(self, number: int) -> None:
    """The reply in this row has ended."""
    row = self.rows[number]
    room = self._room[number // self.each]
    job = room[row.half]
    assert job is not None
    job.running -= 1
    if not job.running and not job.items:
      room[row.half] = None
    row.item = -1

  def refill(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Gives rows without a reply the next one. Yields (group, half, prompt) for each prompt that must be read first."""
    for number, row in enumerate(self.rows):
      group = number // self.each
      room, queue = self._room[group], self._queues[group // self._groups_of_a_part]
      if row.item < 0 and not any(job and job.items for job in room) and None in room and queue:
        half = room.index(None)
        room[half] = first = queue.popleft()
        yield group, half, first.prompt
      for half, job in enumerate(room):
        if row.item < 0 and job and job.items:
          row.item, row.half, row.drawn = job.items.popleft(), half, 0
          job.running += 1
