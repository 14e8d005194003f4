"""Ragged token lists as rectangular arrays: shared prefix, length buckets, padding, per-item random keys.

Letters: B rows, T tokens, A texts before rows, P tokens of one.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from charjax.engine import work
from charjax.mesh import replicate
from charjax.model.attention import Places
from charjax.model.decoder import Decoder, Prefix, forward

Tokens = Sequence[int]

# Lengths are rounded up to whole steps: every new length is a program to compile, which for a small model takes longer
# than the padding of a few hundred rows.
PREFIX_STEP, PROMPT_STEP, REPLY_STEP, GROUP_STEP = 64, 16, 8, 4
EACH = 8  # replies that share one pass of their prompt: more would save little and leave rows empty


def bucket(length: int, step: int) -> int:
  """`length` rounded up to a whole number of steps, which double where it would be more than eight of them."""
  while length > 8 * step:
    step *= 2
  return -(-max(length, 1) // step) * step


def pad(rows: Sequence[Tokens], width: int) -> tuple[np.ndarray, np.ndarray]:
  """Rows, padded on the right, as tokens [B, width] int32 and which of them are real [B, width] bool."""
  tokens = np.zeros((len(rows), width), np.int32)
  real = np.zeros((len(rows), width), bool)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
    real[i, : len(row)] = True
  return tokens, real


def common_prefix(rows: Sequence[Tokens]) -> int:
  """How many leading tokens all rows share, leaving each at least one token of its own."""
  if not rows:
    return 0
  first, last = min(map(tuple, rows)), max(map(tuple, rows))  # the lexicographic extremes share what all rows share
  limit = min(len(row) for row in rows) - 1
  length = 0
  while length < limit and first[length] == last[length]:
    length += 1
  return length


def by_prompt(prompts: Sequence[Tokens], cut: int) -> dict[tuple[int, ...], list[int]]:
  """The places of each prompt among `prompts`; each without its first `cut` tokens."""
  places: dict[tuple[int, ...], list[int]] = {}
  for i, prompt in enumerate(prompts):
    places.setdefault(tuple(prompt[cut:]), []).append(i)
  return places


def in_groups(places: Mapping[tuple[int, ...], list[int]], each: int) -> list[tuple[tuple[int, ...], list[int]]]:
  """Each prompt with up to `each` of its places, as often as it takes."""
  return [(p, some[begin : begin + each]) for p, some in places.items() for begin in range(0, len(some), each)]


def compute_prefix(
  decoder: Decoder,
  tokens_ap: jax.Array,
  lengths_a: jax.Array,
  adapter: Any = None,
  before: Sequence[Prefix] = (),
) -> Prefix:
  """Runs texts that stand before rows through the model.

  Args:
    decoder: the weights.
    tokens_ap: A texts, padded on the right.
    lengths_a: how many of each text's tokens are real.
    adapter: a LoRA adapter, or None.
    before: what stands before all of these texts.
  """
  places = text_places(tokens_ap, lengths_a, length_before(before))
  _, kv = forward(decoder, tokens_ap, *places, adapter=adapter, before=before)
  return Prefix(kv, places)


def text_places(tokens_bt: jax.Array, lengths_b: jax.Array, start: Any) -> Places:
  """Where the tokens of texts stand, of which so many are real, that begin at a position."""
  slots = jnp.arange(tokens_bt.shape[1])
  positions = jnp.broadcast_to(start + slots, tokens_bt.shape)
  return Places(positions, (slots < lengths_b[:, None]).astype(jnp.int32))


def length_before(before: Sequence[Prefix], rows: int = 1) -> Any:
  """How many tokens stand before each of `rows` rows, [rows, 1]; an int 0 where nothing does."""
  lengths = [(prefix.places.texts > 0).sum(-1) for prefix in before]
  return sum(jnp.repeat(length, rows // len(length))[:, None] for length in lengths)


_prefill = jax.jit(compute_prefix)


def prefill(decoder: Decoder, tokens: Tokens, adapter: Any = None) -> tuple[Prefix, ...]:
  """What stands before all rows, as `forward` takes it; nothing when there are no tokens."""
  if not tokens:
    return ()
  padded, _ = pad([tokens], bucket(len(tokens), PREFIX_STEP))
  work.count(decoder.config, 0, len(tokens))
  return (_prefill(decoder, *replicate((padded, np.array([len(tokens)], np.int32))), adapter),)


def item_keys(seed: int, stage: str, items: Sequence[str]) -> np.ndarray:
  """The data [B, 2] of a threefry key for each item: of (seed, stage, item) alone, so that order does not matter."""
  digests = [hashlib.sha256(f'{seed}/{stage}/{item}'.encode()).digest()[:8] for item in items]
  return np.frombuffer(b''.join(digests), np.uint32).reshape(-1, 2)
