"""Batches for scoring and training: prompts and the replies to each as arrays, padded and packed into few shapes.

Letters: M prompts, P prompt tokens, K replies to a prompt, N = M K replies, T tokens of a row, R = T - 1 reply tokens.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from charjax.engine.batch import PROMPT_STEP, REPLY_STEP, Tokens, common_prefix, pad
from charjax.mesh import batch_parts, replicate
from charjax.model.packing import Packing, make_packing, packed_size

# How many sizes there are to pack batches into. Calls differ in what they need, and each size is a program to compile:
# few, unless many batches share it.
_SIZES, _SIZES_OF_MANY = 8, 64


class Rows(NamedTuple):
  """A batch of prompts and K replies to each, padded on the right.

  Attributes:
    prompts: [M, P] ids, without the last token.
    prompt_lengths: [M] how many of them are real.
    tokens: [N, T] the prompt's last token, from which a reply's first is predicted, then the reply.
    lengths: [N] how many of them are real; 0 where there is no reply.
    prompt_packing: of the prompts, where that is worth it.
    packing: of the replies, where that is worth it.
  """

  prompts: Any
  prompt_lengths: Any
  tokens: Any
  lengths: Any
  prompt_packing: Packing | None = None
  packing: Packing | None = None


class Opening(NamedTuple):
  """What all prompts begin with.

  Attributes:
    tokens: [1, P] ids, padded on the right.
    length: [1] how many of them are real.
  """

  tokens: Any
  length: Any


class Group(NamedTuple):
  """A prompt and the replies to it."""

  prompt: Tokens
  replies: Sequence[Tokens]


def make_rows(groups: Sequence[Group], each: int, prompt_width: int, width: int, count: int = 0) -> Rows:
  """Lays groups of up to `each` replies out as host arrays, with empty groups up to `count`."""
  groups = [*groups, *[Group([0], [])] * (count - len(groups))]
  prompts, real = pad([group.prompt[:-1] for group in groups], prompt_width)
  rows: list[Tokens] = []
  for prompt, replies in groups:
    rows += [[prompt[-1], *reply] for reply in replies] + [[]] * (each - len(replies))
  tokens, said = pad(rows, width)
  return Rows(prompts, real.sum(-1).astype(np.int32), tokens, said.sum(-1).astype(np.int32))


def pack_alike(batches: Sequence[Rows], parts: int, many: bool = False) -> list[Rows]:
  """Batches of one shape, each computed in so many parts, packed into one size; more closely where they are `many`."""

  def most(lengths: Sequence[np.ndarray], width: int) -> int:
    tokens = max(_fullest(some, parts) for some in lengths)
    return packed_size(tokens, len(lengths[0]) // parts, width, _SIZES_OF_MANY if many else _SIZES)

  prompt_width, width = batches[0].prompts.shape[1], batches[0].tokens.shape[1]
  prompt_size = most([rows.prompt_lengths for rows in batches], prompt_width)
  size = most([rows.lengths for rows in batches], width)
  return [
    rows._replace(
      prompt_packing=make_packing(rows.prompt_lengths, prompt_width, prompt_size, parts),
      packing=make_packing(rows.lengths, width, size, parts),
    )
    for rows in batches
  ]


class FixedShapes:
  """Shapes that all batches of a training run share, so that each of its programs is compiled once: once more where the
  tokens of a batch are so many more than expected, or than usual, that they are left padded.

  Attributes:
    cut: how many tokens all prompts begin with.
    opening: those tokens, padded to at least one; on the devices.
  """

  def __init__(self, prompts: Sequence[Tokens], longest_reply: int, replies: Sequence[Tokens] = ()):
    """Args: prompts, all that will come; longest_reply, in tokens; replies, of lengths as will come."""
    self.cut = common_prefix(prompts)
    self._prompt_lengths = np.array([len(prompt) - self.cut - 1 for prompt in prompts])
    # One program, whatever its widths are: no coarser steps for what is long.
    self._prompt_width = max(1, math.ceil(self._prompt_lengths.max() / PROMPT_STEP)) * PROMPT_STEP
    self._width = math.ceil((1 + longest_reply) / REPLY_STEP) * REPLY_STEP
    self._lengths = np.array([1 + len(reply) for reply in replies] or [1 + longest_reply])
    self._expected: dict[tuple[int, int, int], tuple[int, int]] = {}
    prefix, _ = pad([prompts[0][: self.cut]], max(1, self.cut))
    self.opening = replicate(Opening(prefix, np.array([self.cut], np.int32)))

  def expect(self, batches: Iterable[Sequence[Group]], each: int, count: int = 0, microbatches: int = 1) -> None:
    """Sees batches for which `rows` will be called so: it packs them as tightly as the fullest of them allows, where
    else it keeps room for any that might come."""
    parts = microbatches * batch_parts()
    for groups in batches:
      rows = self._padded(groups, each, count)
      if len(rows.prompts) % parts == 0:
        key = each, len(rows.prompts), parts
        now = (_fullest(lengths, parts) for lengths in (rows.prompt_lengths, rows.lengths))
        prompts, replies = map(max, now, self._expected.get(key, (0, 0)))
        self._expected[key] = prompts, replies

  def rows(self, groups: Sequence[Group], each: int, count: int = 0, microbatches: int = 1) -> Rows:
    """Groups of up to `each` replies, without the prefix, as host arrays, with empty groups up to `count`; for a batch
    that goes through the model in so many `microbatches`."""
    rows = self._padded(groups, each, count)
    parts = microbatches * batch_parts()
    expected = self._expected.get((each, len(rows.prompts), parts), (0, 0))

    def packing(own: np.ndarray, expected: int, usual: np.ndarray, width: int) -> Packing | None:
      # Rows that the devices do not divide stay as they are, and are computed by several.
      if len(own) % parts:
        return None
      count = len(own) // parts
      return make_packing(
        own, width, packed_size(expected or _usual(usual, count), count, width, _SIZES_OF_MANY), parts
      )

    return rows._replace(
      prompt_packing=packing(rows.prompt_lengths, expected[0], self._prompt_lengths, self._prompt_width),
      packing=packing(rows.lengths, expected[1], self._lengths, self._width),
    )

  def _padded(self, groups: Sequence[Group], each: int, count: int) -> Rows:
    rest = [Group(prompt[self.cut :], replies) for prompt, replies in groups]
    return make_rows(rest, each, self._prompt_width, self._width, count)


def _fullest(lengths: np.ndarray, parts: int) -> int:
  """How many tokens the fullest part of rows of such lengths has."""
  return int(lengths.reshape(parts, -1).sum(1).max())


def _usual(lengths: np.ndarray, rows: int) -> float:
  """Tokens that hardly any batch exceeds, of rows of such lengths: four standard deviations above their mean."""
  return rows * lengths.mean() + 4 * math.sqrt(rows) * lengths.std()


def parts_of(rows: Rows, count: int) -> list[Rows]:
  """Rows of the host in `count` parts of as many prompts, which it must divide."""
  leaves, structure = jax.tree.flatten(rows)
  cut = zip(*(np.split(array, count) for array in leaves), strict=True)
  return [jax.tree.unflatten(structure, arrays) for arrays in cut]


def reply_mask(rows: Rows) -> Any:
  """[N, R] which tokens of the replies are real."""
  return np.arange(rows.tokens.shape[1] - 1) < rows.lengths[:, None] - 1


def take_replies(array: jax.Array, prompts: int, some: slice) -> jax.Array:
  """Of an array [N, ...], the rows of the replies `some` among the K to each of M prompts."""
  return array.reshape(prompts, -1, *array.shape[1:])[:, some].reshape(-1, *array.shape[1:])


def pad_values(values: Sequence[Any], width: int) -> np.ndarray:
  """One value a token of each reply, as [len(values), width] float32, 0 in the padding."""
  out = np.zeros((len(values), width), np.float32)
  for row, value in zip(out, values, strict=True):
    row[: len(value)] = value
  return out
