"""Which reply is drawn in which row: a fixed number of rows, each refilled from a queue as soon as its reply ends.

The keys and values of a prompt lie in a room, and are read there by all rows that draw replies to it, whichever those
are. There are more rooms than the rows need, so that a row goes on to the next prompt while the last replies to others
are still drawn. What goes where depends on lengths of replies alone, so that all processes of a run decide alike.

Letters: A rooms, E seats in one, B rows.
"""

import dataclasses
from collections import Counter, deque
from collections.abc import Iterator, Sequence


@dataclasses.dataclass
class Job:
  """A prompt with the replies that are wanted to it.

  Attributes:
    prompt: its tokens.
    items: numbers of the replies that have not begun.
    begun: how many have, each in a seat of its own.
    running: how many are under way.
  """

  prompt: tuple[int, ...]
  items: deque[int]
  begun: int = 0
  running: int = 0


@dataclasses.dataclass
class Row:
  """What is drawn in a row: reply `item` to the prompt in a room, where it has a seat; -1: nothing."""

  item: int = -1
  room: int = 0
  seat: int = 0
  drawn: int = 0


class Slots:
  """The rows, the rooms of their prompts, and the queues that both are refilled from.

  Attributes:
    rows: B of them, as many on each device.
  """

  def __init__(self, jobs: Sequence[tuple[tuple[int, ...], Sequence[int]]], rooms: int, rows: int, parts: int):
    """Args: jobs, prompts and the numbers of their replies, one a seat; rooms A; rows B; parts, devices that have as
    many of both each."""
    self.rows = [Row() for _ in range(rows)]
    self._rooms: list[list[Job | None]] = [[None] * (rooms // parts) for _ in range(parts)]
    # Prompts are dealt to the devices in advance: each refills its rows from its own.
    self._queues = [deque(Job(prompt, deque(items)) for prompt, items in jobs[part::parts]) for part in range(parts)]

  def wanting(self) -> bool:
    """Whether some reply has not begun."""
    return any(self._queues) or any(job and job.items for rooms in self._rooms for job in rooms)

  def busy(self) -> bool:
    """Whether some reply is under way."""
    return any(row.item >= 0 for row in self.rows)

  def end(self, number: int) -> None:
    """The reply in this row has ended."""
    row = self.rows[number]
    rooms = self._rooms[self._part(number)]
    place = row.room % len(rooms)
    job = rooms[place]
    assert job is not None
    job.running -= 1
    if not job.running and not job.items:
      rooms[place] = None
    row.item = -1

  def refill(self) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Gives rows without a reply the next one. Yields (room, prompt) for each prompt that must be read first."""
    for number, row in enumerate(self.rows):
      if row.item >= 0:
        continue
      part = self._part(number)
      rooms, queue = self._rooms[part], self._queues[part]
      place = next((i for i, job in enumerate(rooms) if job and job.items), None)
      if place is None:
        if not queue or None not in rooms:
          continue
        place = rooms.index(None)
        rooms[place] = queue.popleft()
      job, room = rooms[place], part * len(rooms) + place
      assert job is not None
      if not job.begun:
        yield room, job.prompt
      row.item, row.room, row.seat, row.drawn = job.items.popleft(), room, job.begun, 0
      job.begun += 1
      job.running += 1

  def prompts(self) -> list[tuple[int, ...]]:
    """What is in each room; nothing: ()."""
    return [job.prompt if job else () for rooms in self._rooms for job in rooms]

  def fullest(self) -> int:
    """How many replies are under way on the device that has the most of them."""
    busy = Counter(self._part(number) for number, row in enumerate(self.rows) if row.item >= 0)
    return max(busy.values(), default=0)

  def shrink(self, rows: int, rooms: int) -> tuple[list[int], list[int]]:
    """Goes on with fewer rows and rooms, in which all that are in use have a place.

    Returns:
      the numbers of those that are kept, counted within each device's own.
    """
    parts, count = len(self._rooms), len(self.rows) // len(self._rooms)
    kept_rows: list[int] = []
    kept_rooms: list[int] = []
    left: list[Row] = []
    for part, own in enumerate(self._rooms):
      some = self.rows[part * count : (part + 1) * count]
      # Those in use come first, in their order.
      chosen = [i for _, i in sorted((row.item < 0, i) for i, row in enumerate(some))][: rows // parts]
      places = [i for _, i in sorted((job is None, i) for i, job in enumerate(own))][: rooms // parts]
      for row in (some[i] for i in chosen):
        if row.item >= 0:
          row.room = part * len(places) + places.index(row.room % len(own))
        left.append(row)
      self._rooms[part] = [own[i] for i in places]
      kept_rows += chosen
      kept_rooms += places
    self.rows = left
    return kept_rows, kept_rooms

  def _part(self, number: int) -> int:
    """Which device has a row."""
    return number * len(self._rooms) // len(self.rows)
