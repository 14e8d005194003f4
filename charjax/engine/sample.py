"""Sampling: what turns prompts into replies, with the log-probs of what was drawn.

A prompt goes through the model once for all replies to it, as what all prompts begin with does for all prompts. A row
whose reply has ended is given another (slots.py), so that none idles until the longest ends.

Letters: A rooms of prompts, E seats in one, B rows, M rows of packed prompts, P tokens of a prompt, S slots of a row's
cache.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from charjax.engine import decode, work
from charjax.engine.batch import EACH, PROMPT_STEP, Tokens, bucket, by_prompt, common_prefix, in_groups, prefill
from charjax.engine.slots import Row, Slots
from charjax.mesh import batch_parts, fetch, no_silent_transfers, replicate, shard_batch
from charjax.model.attention import Places, Seats
from charjax.model.decoder import Decoder, Prefix

_SLOTS = 64  # of a row's cache to begin with, unless replies are shorter; they double as replies grow
_READ_TOKENS = 512  # prompts are read in batches of at least so many tokens, or of all rooms at once
MOVES = 4  # packed prompts to a row of such a batch, on average, at most
_IDLE = 8  # rows are refilled when one in so many is idle
_WORTH = 64  # more steps, at the most, for which half of the rows are worth programs of their own
# Rooms to one that rows need: the last of several replies takes much longer than they do on average. With lengths that
# fall off exponentially, 1 is too few by twice the steps, 2 spare some 5% more of them, and each is read at every step.
_ROOMS = 1.75


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn.

  Attributes:
    max_new_tokens: a reply that has not ended by then is cut off.
    temperature: logits are divided by it; 0 takes the most probable token.
    top_p: keep the smallest set of tokens whose probability reaches this (Holtzman et al. 2020); 1 keeps all.
    batch_size: rows decoded together.
    top_k: keep so many of the most probable tokens (Fan et al. 2018), before `top_p`; 0 keeps all.
  """

  max_new_tokens: int
  temperature: float = 1.0
  top_p: float = 1.0
  batch_size: int = 64
  top_k: int = 0


def as_told(config: Any, **other: Any) -> Sampling:
  """How a section of the config says that replies are drawn, but for `other` fields."""
  return dataclasses.replace(
    Sampling(config.max_new_tokens, config.temperature, config.top_p, config.batch_size, config.top_k), **other
  )


class Reply(NamedTuple):
  """One drawn reply.

  Attributes:
    tokens: ids, the end-of-turn id included when it was drawn.
    log_probs: of each token under the distribution it was drawn from (after temperature and top-p).
    finish: 'stop' when the model ended its turn, 'length' when it was cut off.
  """

  tokens: list[int]
  log_probs: np.ndarray
  finish: str


class Shapes(NamedTuple):
  """The sizes that the programs of sampling are compiled for.

  Attributes:
    each: E, seats in a room: replies to a prompt that are under way together.
    rows: B.
    rooms: A; each device has as many, and as many rows.
    width: tokens of a prompt's room.
    packed: rows of packed prompts that are read together.
    slots: of a row's cache in the end; a few to begin with.
  """

  each: int
  rows: int
  rooms: int
  width: int
  packed: int
  slots: int


def choose_shapes(settings: Sampling, prompts: int, replies: int, longest: int) -> Shapes:
  """The sizes for so many prompts of up to `longest` tokens, most with so many replies, on the current mesh."""
  parts, each = batch_parts(), min(EACH, settings.batch_size, replies)
  # A batch that the devices do not divide evenly would be decoded whole by each of them.
  at_once = _even(max(1, settings.batch_size // each), parts)
  spare = each > 1 and prompts * -(-replies // each) > at_once
  width = bucket(longest - 1, PROMPT_STEP)
  packed = _even(min(at_once, max(-(-at_once // 16), -(-_READ_TOKENS // width))), parts)
  rooms = _even(math.ceil(at_once * _ROOMS), parts) if spare else at_once
  return Shapes(each, at_once * each, rooms, width, packed, -(-settings.max_new_tokens // 8) * 8)


def _even(count: int, parts: int) -> int:
  return count + -count % parts


@no_silent_transfers
def sample(
  decoder: Decoder,
  prompts: Sequence[Tokens],
  keys: np.ndarray,
  eos_ids: Sequence[int],
  settings: Sampling,
  *,
  adapter: Any = None,
  width: int = 0,
) -> list[Reply]:
  """Draws one reply to each prompt; a prompt that is to have several stands there several times.

  The same call gives the same replies, to the bit. In another order, or beside others, a reply stands in another row,
  and its sums are rounded otherwise: its log-probs change by less than 1e-4, and a token only where a draw lies so near
  to the edge of another.

  Args:
    decoder: the weights.
    prompts: token ids; none may be empty.
    keys: one random key a prompt (engine.batch.item_keys): a reply depends on its key, not on its neighbours.
    eos_ids: ids that end a reply; none: every reply has `max_new_tokens`.
    settings: how to draw.
    adapter: a LoRA adapter, or None.
    width: the least width that prompts are padded to, so that calls with other prompts need no new program.
  """
  if not prompts:
    return []
  cut, parts = common_prefix(prompts), batch_parts()
  places = by_prompt(prompts, cut)
  sizes = choose_shapes(
    settings, len(places), statistics.mode(map(len, places.values())), max(width, *map(len, places))
  )
  slots = Slots(in_groups(places, sizes.each), sizes.rooms, sizes.rows, parts)

  shared = prefill(decoder, prompts[0][:cut], adapter)
  layers, before = decode.prepare(decoder, adapter, shared)
  kv = decode.make_cache(decoder, rows=sizes.rooms, slots=sizes.width).kv
  size, first = min(_SLOTS, sizes.slots), 0
  cache = decode.make_cache(decoder, rows=sizes.rows, slots=size)
  fixed = replicate((np.int32(settings.max_new_tokens), end_ids(eos_ids), np.float32(settings.temperature)))
  drawn: list[list[tuple[int, float]]] = [[] for _ in prompts]

  while slots.wanting() or slots.busy():
    read = list(slots.refill())
    for batch in _pack(read, sizes, parts, cut):
      kv = decode.read_prompts(decoder, adapter, shared, kv, *shard_batch(batch), width=sizes.width)
    work.count(decoder.config, cut, [len(prompt) - 1 for _, prompt in read])

    under_way = [row.drawn for row in slots.rows if row.item >= 0]
    last = not slots.wanting() and settings.max_new_tokens - min(under_way) > _WORTH
    if last and (fewer := _fewer(sizes, slots, parts)) != sizes:
      kept = slots.shrink(fewer.rows, fewer.rooms)
      cache, kv = decode.keep(cache, kv, *shard_batch(tuple(np.array(numbers, np.int32) for numbers in kept)))
      sizes = fewer

    rows = slots.rows
    steps = size - max(under_way)
    if not steps:
      old, size = size, min(2 * size, sizes.slots)
      cache = decode.grow(cache, replicate(np.int32(first)), slots=size)
      steps, first = size - old, old
    enough = len(rows) - len(under_way) + max(1, len(rows) // _IDLE)
    if not slots.wanting():
      enough = max(enough, len(rows) // 2) if last else len(rows) + 1
    state, reading = shard_batch((_row_state(rows, prompts, keys, drawn), _read_by(slots, sizes, parts, cut)))
    now = replicate((np.int32(first), np.int32(steps), np.int32(enough)))
    cache, *out = decode.decode(
      decoder, layers, before, Prefix(kv, *reading), cache, state, *now, *fixed,
      top_p=settings.top_p, top_k=settings.top_k,
    )  # fmt: skip
    made, tokens, log_probs = (np.asarray(x) for x in fetch(out))
    first = (first + int(made)) % size
    for number, row in enumerate(rows):
      if row.item >= 0:
        length = int((tokens[:, number] >= 0).sum())
        drawn[row.item] += zip(tokens[:length, number].tolist(), log_probs[:length, number].tolist(), strict=True)
        row.drawn += length
        if row.drawn == settings.max_new_tokens or drawn[row.item][-1][0] in eos_ids:
          slots.end(number)
  lengths = np.array([len(reply) for reply in drawn])
  work.count(decoder.config, [len(prompt) - 1 for prompt in prompts], lengths, predicted=lengths.sum())
  return [
    Reply(
      [token for token, _ in reply],
      np.array([log_prob for _, log_prob in reply], np.float32),
      'stop' if reply[-1][0] in eos_ids else 'length',
    )
    for reply in drawn
  ]


def _fewer(sizes: Shapes, slots: Slots, parts: int) -> Shapes:
  """With half of the rows, or half of those and so on, as long as all replies under way have one."""
  own, busy = sizes.rows // parts, slots.fullest()
  while own > 1 and busy <= own - own // 2:
    own -= own // 2
  return sizes._replace(rows=own * parts, rooms=min(sizes.rooms, own * parts))


def _row_state(
  rows: Sequence[Row], prompts: Sequence[Tokens], keys: np.ndarray, drawn: Sequence[Sequence[tuple[int, float]]]
) -> decode.RowState:
  """Where the rows are, for the devices."""
  token, position, drawn_so_far = np.zeros((3, len(rows)), np.int32)
  live, fresh = np.zeros((2, len(rows)), bool)
  key_data = np.zeros((len(rows), 2), np.uint32)
  for number, row in enumerate(rows):
    if row.item >= 0:
      prompt = prompts[row.item]
      token[number] = drawn[row.item][-1][0] if row.drawn else prompt[-1]
      position[number] = len(prompt) - 1 + row.drawn
      drawn_so_far[number] = row.drawn
      live[number], fresh[number] = True, row.drawn == 0
      key_data[number] = keys[row.item]
  return decode.RowState(token, position, drawn_so_far, live, fresh, key_data)


def _read_by(slots: Slots, sizes: Shapes, parts: int, cut: int) -> tuple[Places, Seats]:
  """Where the tokens of the prompts in the rooms are, and who reads which, for the devices: each has rows and rooms of
  its own."""
  places = Places(*np.zeros((2, sizes.rooms, sizes.width), np.int32))
  places.positions[:] = cut + np.arange(sizes.width)
  for room, prompt in enumerate(slots.prompts()):
    places.texts[room, : max(0, len(prompt) - 1)] = 1
  seats = Seats(np.zeros((sizes.rooms, sizes.each), np.int32), np.zeros(sizes.rows, np.int32))
  for number, row in enumerate(slots.rows):
    if row.item >= 0:
      seats.rows[row.room, row.seat] = number % (sizes.rows // parts)
      seats.seat[number] = row.room % (sizes.rooms // parts) * sizes.each + row.seat
  return places, seats


def _pack(
  read: Sequence[tuple[int, Tokens]], sizes: Shapes, parts: int, cut: int
) -> Iterator[tuple[np.ndarray, Places, decode.Move]]:
  """Prompts (room, tokens) without their last token, packed into batches of `sizes.packed` rows.

  A prompt lies in a row of the device that its room is on.
  """
  # The longest first: what is short fills the gaps.
  waiting = sorted((item for item in read if len(item[1]) > 1), key=lambda item: -len(item[1]))
  shape, own, rooms = (sizes.packed, sizes.width), sizes.packed // parts, sizes.rooms // parts
  most = MOVES * own
  while waiting:
    tokens, places = np.zeros(shape, np.int32), Places(*np.zeros((2, *shape), np.int32))
    from_row, column, to_room = np.zeros((3, parts, most), np.int32)
    move = decode.Move(from_row, column, to_room, np.zeros((parts, most), bool))
    used, texts, moved = [0] * sizes.packed, [0] * sizes.packed, [0] * parts
    left = []
    for item in waiting:
      room, prompt = item
      part, length = room // rooms, len(prompt) - 1
      fits = [row for row in range(part * own, (part + 1) * own) if used[row] + length <= sizes.width]
      if not fits or moved[part] == most:
        left.append(item)
        continue
      row, n = fits[0], moved[part]
      put = slice(used[row], used[row] + length)
      texts[row] += 1
      tokens[row, put] = prompt[:-1]
      places.positions[row, put] = cut + np.arange(length)
      places.texts[row, put] = texts[row]
      for array, value in zip(move, (row - part * own, used[row], room % rooms, True), strict=True):
        array[part, n] = value
      used[row] += length
      moved[part] += 1
    yield tokens, places, move
    waiting = left


def end_ids(eos_ids: Sequence[int]) -> np.ndarray:
  """The ids that end a reply, repeated to a usual number of them: one length, one program. -1 is no token."""
  ids = np.asarray(eos_ids or [-1], np.int32)
  return np.resize(ids, max(4, len(ids)))


def compilations() -> int:
  """How many times the sampler has been compiled in this process."""
  return decode.decode._cache_size()  # type: ignore[attr-defined]
