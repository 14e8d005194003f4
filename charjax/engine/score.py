"""Scoring: log-probs of replies that are already written, and their hidden states.

Replies to one prompt stand behind it in one row, each attending to the prompt and to itself: the prompt goes
through the model once.

Letters: B rows, T tokens, K replies a row, D width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from charjax.engine.batch import ROW_STEP, Tokens, bucket, common_prefix, pad, prefill
from charjax.mesh import shard_batch
from charjax.model.decoder import Decoder, Prefix, forward, logits

_CHUNK = 512  # tokens whose full-vocabulary logits are held at once
_ROW = 512  # replies share a row up to this many tokens: attention grows with its square


class Rows(NamedTuple):
  """A batch of prompts, each followed by its replies, padded on the right.

  Each reply begins with a copy of the prompt's last token, from which its first token is predicted.

  Attributes:
    tokens: [B, T] ids.
    positions: [B, T] in the text that a token belongs to: the prompt and one reply.
    segments: [B, T] 0 in the prompt, k + 1 in reply k, -1 in the padding.
    targets: [B, T] the id that is predicted from here; -1 where it is not a reply's.
    real: [B, K] which replies are there.
  """

  tokens: Any
  positions: Any
  segments: Any
  targets: Any
  real: Any


class Group(NamedTuple):
  """A prompt and the replies that share its row."""

  prompt: Tokens
  replies: Sequence[Tokens]


class Span(NamedTuple):
  """Where a reply lies: its row, its slot among that row's replies, and the tokens [begin, end) that predict it."""

  row: int
  slot: int
  begin: int
  end: int


def make_rows(groups: Sequence[Group], slots: int, width: int, count: int = 0) -> tuple[Rows, list[Span]]:
  """Lays groups of up to `slots` replies out as host arrays, with empty rows up to `count`; where each reply lies."""
  shape = (max(count, len(groups)), width)
  tokens, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  segments, targets = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
  real = np.zeros((shape[0], slots), bool)
  spans = []
  for row, (prompt, replies) in enumerate(groups):
    before = len(prompt) - 1
    tokens[row, :before], positions[row, :before], segments[row, :before] = prompt[:-1], np.arange(before), 0
    begin = before
    for slot, reply in enumerate(replies):
      end = begin + 1 + len(reply)
      tokens[row, begin:end] = [prompt[-1], *reply]
      positions[row, begin:end] = before + np.arange(end - begin)
      segments[row, begin:end] = slot + 1
      targets[row, begin : end - 1] = reply
      real[row, slot] = True
      spans.append(Span(row, slot, begin, end - 1))
      begin = end
  return Rows(tokens, positions, segments, targets, real), spans


def row_length(prompt: int, reply: int, slots: int) -> int:
  """Tokens of a row of `slots` replies of `reply` tokens behind a prompt of `prompt`."""
  return prompt - 1 + slots * (1 + reply)


def slots_a_row(prompt: int, reply: int, replies: int) -> int:
  """How many of `replies` replies to one prompt share a row, so that rows are not too long and evenly filled."""
  most = max(1, min(replies, (_ROW - prompt + 1) // (1 + reply)))
  return -(-replies // -(-replies // most))


class FixedShapes:
  """Shapes that all batches of a training run share, so that each of its programs is compiled once.

  Attributes:
    prefix: tokens [P] that all prompts begin with, padded to at least one.
    length: how many of them are real.
  """

  def __init__(self, prompts: Sequence[Tokens], reply: int):
    """Args: prompts, all that will come; reply, the most tokens of one."""
    self._cut, self._reply = common_prefix(prompts), reply
    self._prompt = max(map(len, prompts)) - self._cut
    self.prefix = pad([prompts[0][: self._cut]], max(1, self._cut))[0][0]
    self.length = np.int32(self._cut)

  def rows(self, groups: Sequence[Group], each: int, count: int = 0) -> tuple[Rows, list[Span]]:
    """Groups of up to `each` replies, without the prefix, as host arrays, with empty groups up to `count`.

    A group takes as many rows as it needs: reshaped to [groups, -1], what is computed of the replies [B, K] holds
    the replies of each group first.
    """
    slots = slots_a_row(self._prompt, self._reply, each)
    parts = -(-each // slots)
    split = [
      Group(prompt[self._cut :], replies[part * slots : (part + 1) * slots])
      for prompt, replies in groups
      for part in range(parts)
    ]
    width = bucket(row_length(self._prompt, self._reply, slots), ROW_STEP)
    return make_rows(split, slots, width, max(count, len(groups)) * parts)

  def shared(self) -> dict[str, Any]:
    """What every batch carries beside its rows."""
    return {'prefix': self.prefix, 'prefix_length': self.length}


def spread(rows: Rows, spans: Sequence[Span], values: Iterable[Any]) -> np.ndarray:
  """Values of each reply (one a token, or one for all) at the places that predict it, [B, T] float32; 0 elsewhere."""
  out = np.zeros(rows.tokens.shape, np.float32)
  for (row, _, begin, end), value in zip(spans, values, strict=True):
    out[row, begin:end] = value
  return out


def hidden_states(decoder: Decoder, rows: Rows, *, adapter: Any = None, prefix: Prefix | None = None) -> jax.Array:
  """Final hidden states [B, T, D], each token attending to the prefix, to its prompt and to its own reply."""
  before = prefix.length if prefix is not None else 0
  slots = jnp.arange(rows.tokens.shape[1])
  # Padding attends to the prompt and to itself: to something, whatever the row.
  mask = (slots[:, None] >= slots) & (
    (rows.segments[:, None] == 0) | (rows.segments[:, None] == rows.segments[:, :, None])
  )
  return forward(decoder, rows.tokens, before + rows.positions, mask, adapter=adapter, prefix=prefix)[0]


def over_chunks(function: Callable[..., Any], *arrays: jax.Array) -> Any:
  """Maps `function` over chunks of the flattened leading axes, so that no [B, T, V] array is ever held.

  Each chunk is recomputed in the backward pass. `arrays` share their two leading axes [B, T]; the result has them too.
  """
  lead = arrays[0].shape[:2]
  count = lead[0] * lead[1]
  chunk = min(_CHUNK, count)
  flat = [a.reshape(count, *a.shape[2:]) for a in arrays]
  flat = [jnp.pad(a, ((0, -count % chunk), *[(0, 0)] * (a.ndim - 1))).reshape(-1, chunk, *a.shape[1:]) for a in flat]
  out = jax.lax.map(jax.checkpoint(lambda xs: function(*xs)), tuple(flat))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count].reshape(*lead, *x.shape[2:]), out)


def token_log_probs(decoder: Decoder, hidden_btd: jax.Array, rows: Rows, temperature: float) -> jax.Array:
  """log softmax(logits / temperature) of the targets, [B, T] float32; 0 where there is no target."""

  def one(hidden_nd: jax.Array, ids_n: jax.Array) -> jax.Array:
    scaled = logits(decoder, hidden_nd) / temperature
    chosen = jnp.take_along_axis(scaled, jnp.maximum(ids_n, 0)[:, None], 1)[:, 0]
    return chosen - jax.nn.logsumexp(scaled, -1)

  return jnp.where(rows.targets >= 0, over_chunks(one, hidden_btd, rows.targets), 0.0)


def reply_log_probs(
  decoder: Decoder, rows: Rows, *, adapter: Any = None, prefix: Prefix | None = None, temperature: float = 1.0
) -> jax.Array:
  """Log-probs [B, T] of the targets given all that their reply and its prompt hold before; 0 elsewhere."""
  return token_log_probs(decoder, hidden_states(decoder, rows, adapter=adapter, prefix=prefix), rows, temperature)


def _begins(rows: Rows) -> jax.Array:
  """[B, T] where a reply's copy of the prompt's last token stands."""
  before = jnp.pad(rows.segments, ((0, 0), (1, 0)))[:, :-1]
  return (rows.segments > 0) & (rows.segments != before)


def _by_reply(values_bt: Any, rows: Rows, where_bt: jax.Array) -> jax.Array:
  """Means over the tokens of each reply that are in `where`, [B, K, ...] of values [B, T, ...]."""
  slot = jnp.arange(1, rows.real.shape[1] + 1)
  chosen = ((rows.segments[:, None] == slot[:, None]) & where_bt[:, None]).astype(jnp.float32)
  return jnp.einsum('bkt,bt...->bk...', chosen, values_bt) / jnp.maximum(
    chosen.sum(-1).reshape(*chosen.shape[:2], *(1,) * (values_bt.ndim - 2)), 1
  )


def mean_states(hidden_btd: jax.Array, rows: Rows) -> jax.Array:
  """The mean hidden state over the tokens of each reply, [B, K, D]."""
  return _by_reply(hidden_btd, rows, (rows.segments > 0) & ~_begins(rows))


def mean_over_targets(values_bt: jax.Array, rows: Rows) -> jax.Array:
  """The mean of what is computed where each reply's tokens are predicted, [B, K]."""
  return _by_reply(values_bt, rows, rows.targets >= 0)


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
) -> list[np.ndarray]:
  """Log-probs of the tokens of each reply after its prompt, in nats, one array a reply."""

  def run(prefix: Prefix | None, rows: Rows) -> jax.Array:
    return _score(decoder, adapter, prefix, rows, temperature)

  found = map_rows(run, decoder, prompts, replies, adapter=adapter, batch_size=batch_size)
  return [values[span.begin : span.end] for values, span in found]


def map_rows(
  function: Callable[[Prefix | None, Rows], jax.Array],
  decoder: Decoder,
  prompts: Sequence[Tokens],
  replies: Sequence[Tokens],
  *,
  adapter: Any = None,
  batch_size: int = 32,
  share_prefix: bool = True,
) -> list[tuple[np.ndarray, Span]]:
  """Calls a jitted `function(prefix, rows)` on batches of rows of like length.

  What all prompts have in common at their beginning goes through the model once, with `adapter`, unless
  `share_prefix` is off (for a function that reads the rows with two models); so does what replies to the same
  prompt have in common.

  Returns:
    for each reply, in the order given, its row of what `function` returned, and where in it the reply lies.
  """
  if not prompts:
    return []
  shared = common_prefix(prompts) if share_prefix else 0
  prefix = prefill(decoder, prompts[0][:shared], adapter)
  groups: dict[tuple[int, ...], list[int]] = {}
  for i, prompt in enumerate(prompts):
    groups.setdefault(tuple(prompt[shared:]), []).append(i)
  longest = max(map(len, groups)), max(map(len, replies))
  slots = slots_a_row(*longest, max(map(len, groups.values())))
  rows = [
    (prompt, index[begin : begin + slots]) for prompt, index in groups.items() for begin in range(0, len(index), slots)
  ]
  rows.sort(key=lambda row: len(row[0]) + sum(1 + len(replies[i]) for i in row[1]))
  count = max(1, batch_size // slots)
  out: list[Any] = [None] * len(prompts)
  for first in range(0, len(rows), count):
    some = rows[first : first + count]
    filled = [Group(prompt, [replies[i] for i in index]) for prompt, index in some]
    length = max(len(group.prompt) - 1 + sum(1 + len(r) for r in group.replies) for group in filled)
    arrays, spans = make_rows(filled, slots, bucket(length, ROW_STEP), count)
    values = np.asarray(jax.device_get(function(prefix, shard_batch(arrays))))
    for i, span in zip([i for _, index in some for i in index], spans, strict=True):
      out[i] = values[span.row], span
  return out


@jax.jit
def _next_tokens(decoder: Decoder, options: jax.Array, prefix: Prefix | None, rows: Rows) -> jax.Array:
  hidden = _by_reply(hidden_states(decoder, rows, prefix=prefix), rows, _begins(rows))
  return jax.nn.log_softmax(logits(decoder, hidden), -1)[..., options]


def score_options(
  decoder: Decoder, prompts: Sequence[Tokens], options: Sequence[int], *, batch_size: int = 32
) -> np.ndarray:
  """Log-probs [len(prompts), len(options)] of each option as the next token after each prompt."""
  run = partial(_next_tokens, decoder, np.asarray(options, np.int32))
  found = map_rows(run, decoder, prompts, [[]] * len(prompts), batch_size=batch_size)
  return np.array([values[span.slot] for values, span in found], np.float64).reshape(len(prompts), len(options))
