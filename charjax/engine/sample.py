"""Sampling: what turns prompts into replies, with the log-probs of what was drawn.

A prompt goes through the model once for all replies to it, as what all prompts begin with does for all prompts. A row
whose reply has ended is given another (slots.py), so that none idles until the longest ends.

Letters: A groups of rows, B rows, M rows of packed prompts, P tokens of a prompt, S slots of a row's cache.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from charjax.engine import decode, work
from charjax.engine.batch import EACH, PROMPT_STEP, Tokens, bucket, by_prompt, common_prefix, in_groups, prefill
from charjax.engine.slots import Row, Slots
from charjax.mesh import batch_parts, fetch, no_silent_transfers, replicate, shard_batch
from charjax.model.attention import Places
from charjax.model.decoder import Decoder

_SLOTS = 64  # of a row's cache to begin with, unless replies are shorter; they double as replies grow
_READ_TOKENS = 512  # prompts are read in batches of at least so many tokens, or of all groups at once
MOVES = 4  # packed prompts to a row of such a batch, on average, at most
_IDLE = 8  # rows are refilled when one in so many is idle


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
    each: rows of a group, which share a prompt at a time.
    groups: of rows; each device has as many.
    width: tokens of a prompt's room.
    packed: rows of packed prompts that are read together.
    slots: of a row's cache in the end; a few to begin with.
  """

  each: int
  groups: int
  width: int
  packed: int
  slots: int


def choose_shapes(settings: Sampling, replies: int, longest: int) -> Shapes:
  """The sizes for up to `longest` tokens of a prompt, most prompts with so many replies, on the current mesh."""
  parts, each = batch_parts(), min(EACH, settings.batch_size, replies)
  groups = max(1, settings.batch_size // each)
  # A batch that the devices do not divide evenly would be decoded whole by each of them.
  groups += -groups % parts
  width = bucket(longest - 1, PROMPT_STEP)
  packed = min(groups, max(-(-groups // 8), -(-_READ_TOKENS // width)))
  packed += -packed % parts
  return Shapes(each, groups, width, packed, -(-settings.max_new_tokens // 8) * 8)


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
  each, groups, width, packed, longest = choose_shapes(
    settings, statistics.mode(map(len, places.values())), max(width, *map(len, places))
  )
  jobs = in_groups(places, each)
  slots = Slots(jobs, groups, each, parts)

  shared = prefill(decoder, prompts[0][:cut], adapter)
  layers, before = decode.prepare(decoder, adapter, shared)
  room = decode.make_cache(decoder, rows=groups, slots=width * slots.halves).kv
  seats = Places(*np.zeros((2, groups, width * slots.halves), np.int32))
  cache = decode.make_cache(decoder, rows=len(slots.rows), slots=min(_SLOTS, longest))
  size, first = min(_SLOTS, longest), 0
  fixed = replicate((np.int32(settings.max_new_tokens), end_ids(eos_ids), np.float32(settings.temperature)))
  drawn: list[list[tuple[int, float]]] = [[] for _ in prompts]

  while slots.wanting() or slots.busy():
    read = list(slots.refill())
    for group, half, prompt in read:
      put = slice(half * width, (half + 1) * width)
      seats.texts[group, put] = np.where(np.arange(width) < len(prompt) - 1, half + 1, 0)
      seats.positions[group, put] = cut + np.arange(width)
    for batch in _pack(read, packed, width, groups // parts, parts, cut):
      room = decode.read_prompts(decoder, adapter, shared, room, *shard_batch(batch), width=width)
    work.count(decoder.config, cut, [len(prompt) - 1 for *_, prompt in read])

    rows = slots.rows
    steps = size - max(row.drawn for row in rows if row.item >= 0)
    if not steps:
      old, size = size, min(2 * size, longest)
      cache = decode.grow(cache, replicate(np.int32(first)), slots=size)
      steps, first = size - old, old
    idle = sum(row.item < 0 for row in rows)
    enough = idle + max(1, len(rows) // _IDLE) if slots.wanting() else len(rows) + 1
    state = shard_batch(_row_state(rows, prompts, keys, drawn))
    now = replicate((np.int32(first), np.int32(steps), np.int32(enough)))
    cache, *out = decode.decode(
      decoder, layers, before, room, shard_batch(seats), cache, state, *now, *fixed,
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


def _row_state(
  rows: Sequence[Row], prompts: Sequence[Tokens], keys: np.ndarray, drawn: Sequence[Sequence[tuple[int, float]]]
) -> decode.RowState:
  """Where the rows are, for the devices."""
  token, position, read, drawn_so_far = np.zeros((4, len(rows)), np.int32)
  live, fresh = np.zeros((2, len(rows)), bool)
  key_data = np.zeros((len(rows), 2), np.uint32)
  for number, row in enumerate(rows):
    if row.item >= 0:
      prompt = prompts[row.item]
      token[number] = drawn[row.item][-1][0] if row.drawn else prompt[-1]
      position[number] = len(prompt) - 1 + row.drawn
      read[number], drawn_so_far[number] = row.half + 1, row.drawn
      live[number], fresh[number] = True, row.drawn == 0
      key_data[number] = keys[row.item]
  return decode.RowState(token, position, read, drawn_so_far, live, fresh, key_data)


def _pack(
  read: Sequence[tuple[int, int, Tokens]], rows: int, width: int, groups: int, parts: int, cut: int
) -> Iterator[tuple[np.ndarray, Places, decode.Move]]:
  """Prompts (group, half, tokens) without their last token, packed into batches of `rows` rows of `width` tokens.

  A prompt lies in a row of the device that its group is on: of `parts`, each with so many `groups`.
  """
  # The longest first: what is short fills the gaps.
  waiting = sorted((item for item in read if len(item[2]) > 1), key=lambda item: -len(item[2]))
  own = rows // parts
  most = MOVES * own
  while waiting:
    tokens, places = np.zeros((rows, width), np.int32), Places(*np.zeros((2, rows, width), np.int32))
    from_row, column, to_group, slot = np.zeros((4, parts, most), np.int32)
    move = decode.Move(from_row, column, to_group, slot, np.zeros((parts, most), bool))
    used, texts, moved = [0] * rows, [0] * rows, [0] * parts
    left = []
    for item in waiting:
      group, half, prompt = item
      part, length = group // groups, len(prompt) - 1
      fits = [row for row in range(part * own, (part + 1) * own) if used[row] + length <= width]
      if not fits or moved[part] == most:
        left.append(item)
        continue
      row, n = fits[0], moved[part]
      put = slice(used[row], used[row] + length)
      texts[row] += 1
      tokens[row, put] = prompt[:-1]
      places.positions[row, put] = cut + np.arange(length)
      places.texts[row, put] = texts[row]
      for array, value in zip(
        move, (row - part * own, used[row], group - part * groups, half * width, True), strict=True
      ):
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
