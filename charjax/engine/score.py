"""Scoring: log-probs of replies that are already written, and their hidden states.

Letters: B rows, T tokens, R reply tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from charjax.engine.batch import REPLY_STEP, ROW_STEP, Tokens, bucket, common_prefix, pad, prefill
from charjax.mesh import shard_batch
from charjax.model.decoder import Decoder, Prefix, forward, logits

_CHUNK = 512  # tokens whose full-vocabulary logits are held at once


class Rows(NamedTuple):
  """A batch of prompt + reply, padded on the right.

  Attributes:
    tokens: [B, T] ids.
    lengths: [B] how many are real.
    starts: [B] where the reply begins.
    replies: [B, R] ids of the reply.
    reply_mask: [B, R] which of them are real.
  """

  tokens: Any
  lengths: Any
  starts: Any
  replies: Any
  reply_mask: Any


def make_rows(
  prompts: Sequence[Tokens], replies: Sequence[Tokens], rows: int = 0, width: int = 0, reply_width: int = 0
) -> Rows:
  """Lays out prompts and replies as host arrays, with empty rows up to `rows`."""
  extra = max(0, rows - len(prompts))
  whole = [[*p, *r] for p, r in zip(prompts, replies, strict=True)] + [[]] * extra
  tokens, real = pad(whole, width or bucket(max(len(row) for row in whole), ROW_STEP))
  replies = [*replies, *[[]] * extra]
  ids, mask = pad(replies, reply_width or bucket(max(len(r) for r in replies), REPLY_STEP))
  starts = np.array([len(p) for p in prompts] + [1] * extra, np.int32)
  return Rows(tokens, real.sum(-1).astype(np.int32), starts, ids, mask)


class FixedShapes:
  """Shapes that all batches of a training run share, so that each of its programs is compiled once.

  Attributes:
    prefix: tokens [P] that all prompts begin with, padded to at least one.
    length: how many of them are real.
  """

  def __init__(self, prompts: Sequence[Tokens], longest: int, reply_width: int):
    """Args: prompts, all that will come; longest, the most tokens of a prompt and its reply; reply_width, R."""
    self._cut = common_prefix(prompts)
    self._width, self._reply_width = bucket(longest - self._cut, ROW_STEP), reply_width
    self.prefix = pad([prompts[0][: self._cut]], max(1, self._cut))[0][0]
    self.length = np.int32(self._cut)

  def rows(self, prompts: Sequence[Tokens], replies: Sequence[Tokens], count: int = 0) -> Rows:
    """Prompts without the prefix, and their replies, as host arrays, with empty rows up to `count`."""
    rest = [prompt[self._cut :] for prompt in prompts]
    return make_rows(rest, replies, count, self._width, self._reply_width)

  def shared(self) -> dict[str, Any]:
    """What every batch carries beside its rows."""
    return {'prefix': self.prefix, 'prefix_length': self.length}


def hidden_states(decoder: Decoder, rows: Rows, *, adapter: Any = None, prefix: Prefix | None = None) -> jax.Array:
  """Final hidden states [B, T, D] of the rows, each token attending to the prefix and to its own row."""
  width = rows.tokens.shape[1]
  before = prefix.length if prefix is not None else 0
  slots = jnp.arange(width)
  mask = (slots[None, :, None] >= slots[None, None]) & (slots[None, None] < rows.lengths[:, None, None])
  positions = jnp.broadcast_to(before + slots[None], rows.tokens.shape)
  return forward(decoder, rows.tokens, positions, mask, adapter=adapter, prefix=prefix)[0]


def predicting(hidden_btd: jax.Array, rows: Rows) -> jax.Array:
  """The hidden states [B, R, D] from which each reply token is predicted."""
  index = rows.starts[:, None] - 1 + jnp.arange(rows.replies.shape[1])[None]
  return jnp.take_along_axis(hidden_btd, jnp.clip(index, 0, hidden_btd.shape[1] - 1)[..., None], 1)


def over_chunks(function: Callable[..., Any], *arrays: jax.Array) -> Any:
  """Maps `function` over chunks of the flattened leading axes, so that no [B, R, V] array is ever held.

  Each chunk is recomputed in the backward pass. `arrays` share their two leading axes [B, R]; the result has them too.
  """
  lead = arrays[0].shape[:2]
  count = lead[0] * lead[1]
  chunk = min(_CHUNK, count)
  flat = [a.reshape(count, *a.shape[2:]) for a in arrays]
  flat = [jnp.pad(a, ((0, -count % chunk), *[(0, 0)] * (a.ndim - 1))).reshape(-1, chunk, *a.shape[1:]) for a in flat]
  out = jax.lax.map(jax.checkpoint(lambda xs: function(*xs)), tuple(flat))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count].reshape(*lead, *x.shape[2:]), out)


def token_log_probs(decoder: Decoder, hidden_brd: jax.Array, ids_br: jax.Array, temperature: float) -> jax.Array:
  """log softmax(logits / temperature)[ids], [B, R] float32."""

  def one(hidden_nd: jax.Array, ids_n: jax.Array) -> jax.Array:
    scaled = logits(decoder, hidden_nd) / temperature
    chosen = jnp.take_along_axis(scaled, ids_n[:, None], 1)[:, 0]
    return chosen - jax.nn.logsumexp(scaled, -1)

  return over_chunks(one, hidden_brd, ids_br)


def reply_log_probs(
  decoder: Decoder, rows: Rows, *, adapter: Any = None, prefix: Prefix | None = None, temperature: float = 1.0
) -> jax.Array:
  """Log-probs [B, R] of each reply token given all before it; 0 where `reply_mask` is false."""
  hidden = predicting(hidden_states(decoder, rows, adapter=adapter, prefix=prefix), rows)
  return jnp.where(rows.reply_mask, token_log_probs(decoder, hidden, rows.replies, temperature), 0.0)


@partial(jax.jit, static_argnames=('temperature',))
def _score(decoder: Decoder, adapter: Any, prefix: Prefix | None, rows: Rows, temperature: float) -> jax.Array:
  return reply_log_probs(decoder, rows, adapter=adapter, prefix=prefix, temperature=temperature)


def score(
  decoder: Decoder,
  prompts: Sequence[Tokens],
  replies: Sequence[Tokens],
  *,
  adapter: Any = None,
  temperature: float = 1.0,
  batch_size: int = 32,
  on_batch: Callable[[int], None] = lambda rows: None,
) -> list[np.ndarray]:
  """Log-probs of the tokens of each reply after its prompt, in nats, one array a reply."""

  def run(prefix: Prefix | None, rows: Rows) -> jax.Array:
    return _score(decoder, adapter, prefix, rows, temperature)

  out = map_rows(run, decoder, prompts, replies, adapter=adapter, batch_size=batch_size, on_batch=on_batch)
  return [row[: len(reply)] for row, reply in zip(out, replies, strict=True)]


def map_rows(
  function: Callable[[Prefix | None, Rows], jax.Array],
  decoder: Decoder,
  prompts: Sequence[Tokens],
  replies: Sequence[Tokens],
  *,
  adapter: Any = None,
  batch_size: int = 32,
  share_prefix: bool = True,
  on_batch: Callable[[int], None] = lambda rows: None,
) -> list[np.ndarray]:
  """Calls a jitted `function(prefix, rows)` on batches of rows of like length; returns its rows in the order given.

  What all prompts have in common at their beginning goes through the model once, with `adapter`, unless
  `share_prefix` is off (for a function that reads the rows with two models).
  """
  if not prompts:
    return []
  shared = common_prefix(prompts) if share_prefix else 0
  prefix = prefill(decoder, prompts[0][:shared], adapter)
  rest = [prompt[shared:] for prompt in prompts]
  order = sorted(range(len(rest)), key=lambda i: (len(rest[i]) + len(replies[i]), i))
  out: list[np.ndarray] = [np.zeros(0)] * len(rest)
  for begin in range(0, len(order), batch_size):
    index = order[begin : begin + batch_size]
    rows = make_rows([rest[i] for i in index], [replies[i] for i in index], batch_size)
    values = np.asarray(jax.device_get(function(prefix, shard_batch(rows))))
    for i, value in zip(index, values, strict=False):
      out[i] = value
    on_batch(len(index))
  return out


@jax.jit
def _next_tokens(decoder: Decoder, options: jax.Array, prefix: Prefix | None, rows: Rows) -> jax.Array:
  hidden = hidden_states(decoder, rows, prefix=prefix)
  last = jnp.take_along_axis(hidden, jnp.maximum(rows.lengths - 1, 0)[:, None, None], 1)[:, 0]
  return jax.nn.log_softmax(logits(decoder, last), -1)[:, options]


def score_options(
  decoder: Decoder, prompts: Sequence[Tokens], options: Sequence[int], *, batch_size: int = 32
) -> np.ndarray:
  """Log-probs [len(prompts), len(options)] of each option as the next token after each prompt."""
  run = partial(_next_tokens, decoder, np.asarray(options, np.int32))
  values = map_rows(run, decoder, prompts, [[]] * len(prompts), batch_size=batch_size)
  return np.array(values, np.float64).reshape(len(prompts), len(options))
