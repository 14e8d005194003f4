"""Ragged token lists as rectangular arrays: shared prefix, length buckets, padding, per-item random keys.

Letters: B rows, T tokens, P prefix tokens.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from charjax.model.decoder import KV, Decoder, Prefix, forward

Tokens = Sequence[int]

# Lengths are rounded up to buckets counted in these steps: every new bucket is a program to compile, which for a
# small model takes longer than the padding of a few hundred rows.
PREFIX_STEP, ROW_STEP = 128, 32


def bucket(length: int, step: int) -> int:
  """`length` rounded up to 1, 2, 3, 4, 6, 8 ... steps: few shapes to compile, at most half of each padding."""
  size = step
  while size < length:
    if size + size // 2 >= length and size > step:
      return size + size // 2
    size *= 2
  return size


def pad(rows: Sequence[Tokens], width: int, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
  """Rows as tokens [B, width] int32 and which of them are real [B, width] bool."""
  tokens = np.zeros((len(rows), width), np.int32)
  real = np.zeros((len(rows), width), bool)
  for i, row in enumerate(rows):
    where = slice(width - len(row), width) if left else slice(0, len(row))
    tokens[i, where] = row
    real[i, where] = True
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


def compute_prefix(decoder: Decoder, tokens_p: jax.Array, length: jax.Array, adapter: Any = None) -> Prefix:
  """Runs a padded prefix of `length` real tokens through the model; inside a loss, gradients flow through it."""
  size = tokens_p.shape[0]
  mask = jnp.tril(jnp.ones((1, size, size), bool))
  _, kv = forward(decoder, tokens_p[None], jnp.arange(size)[None], mask, adapter=adapter)
  axis = 1 if decoder.runtime.scan_layers else 0
  return Prefix(KV(*jax.tree.map(lambda x: x.squeeze(axis), tuple(kv))), length)


_prefill = jax.jit(compute_prefix)


def prefill(decoder: Decoder, tokens: Tokens, adapter: Any = None) -> Prefix | None:
  """The keys and values of a prefix that many rows share; None when it is empty."""
  if not tokens:
    return None
  padded, _ = pad([tokens], bucket(len(tokens), PREFIX_STEP))
  return _prefill(decoder, padded[0], np.int32(len(tokens)), adapter)


def item_keys(seed: int, stage: str, items: Sequence[str]) -> jax.Array:
  """A random key for each item, a function of (seed, stage, item) alone: the order of work does not matter."""
  digests = [hashlib.sha256(f'{seed}/{stage}/{item}'.encode()).digest()[:8] for item in items]
  data = np.frombuffer(b''.join(digests), np.uint32).reshape(-1, 2)
  return jax.random.wrap_key_data(jnp.asarray(data), impl='threefry2x32')
