"""Scoring: log-probs of replies that are already written, and their hidden states.

A prompt goes through the model once for all replies to it, as what all prompts begin with does for all prompts.

Letters: M prompts, P prompt tokens, K replies to a prompt, N = M K replies, T tokens of a row, R = T - 1 reply tokens,
D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from charjax.engine import work
from charjax.engine.batch import (
  EACH,
  PROMPT_STEP,
  REPLY_STEP,
  Tokens,
  bucket,
  by_prompt,
  common_prefix,
  compute_prefix,
  in_groups,
  length_before,
  pad,
  prefill,
)
from charjax.mesh import batch_parts, constrain, fetch, no_silent_transfers, replicate, shard_batch
from charjax.model.decoder import Decoder, Prefix, forward, logits

_CHUNK = 512  # tokens whose full-vocabulary logits are held at once


class Rows(NamedTuple):
  """A batch of prompts and K replies to each, padded on the right.

  Attributes:
    prompts: [M, P] ids, without the last token.
    prompt_lengths: [M] how many of them are real.
    tokens: [N, T] the prompt's last token, from which a reply's first is predicted, then the reply.
    lengths: [N] how many of them are real; 0 where there is no reply.
  """

  prompts: Any
  prompt_lengths: Any
  tokens: Any
  lengths: Any


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


class FixedShapes:
  """Shapes that all batches of a training run share, so that each of its programs is compiled once.

  Attributes:
    cut: how many tokens all prompts begin with.
    prefix: tokens [1, P] of them, padded to at least one; on the devices.
    length: [1] how many of them are real; on the devices.
  """

  def __init__(self, prompts: Sequence[Tokens], longest_reply: int):
    """Args: prompts, all that will come; longest_reply, in tokens."""
    self.cut = common_prefix(prompts)
    self._prompt_width = bucket(max(map(len, prompts)) - self.cut - 1, PROMPT_STEP)
    self._width = bucket(1 + longest_reply, REPLY_STEP)
    prefix, _ = pad([prompts[0][: self.cut]], max(1, self.cut))
    self.prefix, self.length = replicate((prefix, np.array([self.cut], np.int32)))

  def rows(self, groups: Sequence[Group], each: int, count: int = 0) -> Rows:
    """Groups of up to `each` replies, without the prefix, as host arrays, with empty groups up to `count`."""
    rest = [Group(prompt[self.cut :], replies) for prompt, replies in groups]
    return make_rows(rest, each, self._prompt_width, self._width, count)

  def shared(self) -> dict[str, Any]:
    """What every batch carries beside its rows."""
    return {'prefix': self.prefix, 'prefix_length': self.length}


def parts_of(rows: Rows, count: int) -> list[Rows]:
  """Rows of the host in `count` parts of as many prompts, which it must divide."""
  cut = [np.split(array, count) for array in rows]
  return [Rows(*arrays) for arrays in zip(*cut, strict=True)]


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


def hidden_states(
  decoder: Decoder, rows: Rows, *, adapter: Any = None, before: Sequence[Prefix] = (), tap: int | None = None
) -> Any:
  """Final hidden states [N, T, D], each token attending to what stands before, to its prompt and to its own reply.

  With `tap` a pair, as `model.decoder.forward` gives it.
  """
  asked = compute_prefix(decoder, rows.prompts, rows.prompt_lengths, adapter, before)
  before = (*before, asked)
  count, width = rows.tokens.shape
  slots = jnp.arange(width)
  positions = length_before(before, count) + slots
  return forward(decoder, rows.tokens, positions, adapter=adapter, before=before, tap=tap)[0]


def over_chunks(function: Callable[..., Any], *arrays: jax.Array) -> Any:
  """Maps `function` over chunks of the flattened leading axes, so that no [N, R, V] array is ever held.

  Each chunk is recomputed in the backward pass. `arrays` share their two leading axes; the result has them too.
  """
  lead = arrays[0].shape[:2]
  count = lead[0] * lead[1]
  chunk = min(_CHUNK, count)
  flat = [a.reshape(count, *a.shape[2:]) for a in arrays]
  flat = [jnp.pad(a, ((0, -count % chunk), *[(0, 0)] * (a.ndim - 1))).reshape(-1, chunk, *a.shape[1:]) for a in flat]
  # Every device takes its part of each chunk. Left as they were, split by rows, each device would gather all chunks
  # and compute all logits.
  flat = [constrain(a, None, 'batch', *(None,) * (a.ndim - 2)) for a in flat]
  out = jax.lax.map(jax.checkpoint(lambda xs: function(*xs)), tuple(flat))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count].reshape(*lead, *x.shape[2:]), out)


def token_log_probs(
  decoder: Decoder, hidden_ntd: jax.Array, rows: Rows, temperature: Any, barred: Any = None
) -> jax.Array:
  """log softmax(logits / temperature) of the tokens of replies, [N, R] float32; 0 in the padding.

  Args:
    decoder: the weights.
    hidden_ntd: final hidden states of `rows`.
    rows: prompts and replies.
    temperature: of the distribution.
    barred: ids that cannot be drawn, their probability shared by all others.
  """

  def one(hidden_nd: jax.Array, ids_n: jax.Array) -> jax.Array:
    scaled = logits(decoder, hidden_nd) / temperature
    if barred is not None:
      scaled = jnp.where(jnp.isin(jnp.arange(scaled.shape[-1]), barred), -1e9, scaled)
    chosen = jnp.take_along_axis(scaled, ids_n[:, None], 1)[:, 0]
    return chosen - jax.nn.logsumexp(scaled, -1)

  return jnp.where(reply_mask(rows), over_chunks(one, hidden_ntd[:, :-1], rows.tokens[:, 1:]), 0.0)


def reply_log_probs(
  decoder: Decoder, rows: Rows, *, adapter: Any = None, before: Sequence[Prefix] = (), temperature: float = 1.0
) -> jax.Array:
  """Log-probs [N, R] of each reply's tokens given all before them; 0 in the padding."""
  return token_log_probs(decoder, hidden_states(decoder, rows, adapter=adapter, before=before), rows, temperature)


def mean_over_tokens(values: jax.Array, rows: Rows) -> jax.Array:
  """The mean of values [N, R, ...] over the tokens of each reply, [N, ...]; 0 where there is none."""
  mask = reply_mask(rows).reshape(*values.shape[:2], *(1,) * (values.ndim - 2))
  return jnp.where(mask, values, 0.0).sum(1) / jnp.maximum(mask.sum(1), 1)


def mean_states(hidden_ntd: jax.Array, rows: Rows) -> jax.Array:
  """The mean hidden state over the tokens of each reply, [N, D]."""
  return mean_over_tokens(hidden_ntd[:, 1:], rows)


@partial(jax.jit, static_argnames=('temperature',))
def _score(decoder: Decoder, adapter: Any, before: Sequence[Prefix], rows: Rows, temperature: float) -> jax.Array:
  return reply_log_probs(decoder, rows, adapter=adapter, before=before, temperature=temperature)


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

  def run(before: Sequence[Prefix], rows: Rows) -> jax.Array:
    return _score(decoder, adapter, before, rows, temperature)

  out = map_rows(run, decoder, prompts, replies, adapter=adapter, batch_size=batch_size, heads=1)
  return [row[: len(reply)] for row, reply in zip(out, replies, strict=True)]


@no_silent_transfers
def map_rows(
  function: Callable[[Sequence[Prefix], Rows], jax.Array],
  decoder: Decoder,
  prompts: Sequence[Tokens],
  replies: Sequence[Tokens],
  *,
  adapter: Any = None,
  batch_size: int = 32,
  models: int = 1,
  heads: int = 0,
) -> list[np.ndarray]:
  """Calls a jitted `function(before, rows)` on batches of replies of like length; its rows in the order given.

  What all prompts have in common at their beginning goes through the model once, with `adapter`, unless `models`, which
  is how many read the rows, is more than one. `heads` is how often the function computes the distribution of a token.
  """
  if not prompts:
    return []
  cut = common_prefix(prompts) if models == 1 else 0
  before = prefill(decoder, prompts[0][:cut], adapter)
  places = by_prompt(prompts, cut)
  # As even as may be: of ten replies five and five, where eight and two would leave six rows empty.
  most = max(map(len, places.values()))
  each = -(-most // -(-most // EACH))
  groups = in_groups(places, each)
  longest = [max(len(replies[i]) for i in index) for _, index in groups]
  order = sorted(range(len(groups)), key=longest.__getitem__)
  # Every shape is a program to compile, which for a small model takes longer than some padding: one width for all
  # prompts, widths of replies that halve, and batches that are filled alike.
  prompt_width = bucket(max(len(prompt) for prompt, _ in groups) - 1, PROMPT_STEP)
  widest = bucket(1 + max(longest), REPLY_STEP)
  at_once = max(1, batch_size // each)
  count = -(-len(groups) // -(-len(groups) // at_once))
  count += -count % batch_parts()
  out: list[np.ndarray] = [np.zeros(0)] * len(prompts)
  for first in range(0, len(groups), count):
    some = [groups[i] for i in order[first : first + count]]
    width, needed = widest, 1 + max(1, longest[order[min(first + count, len(order)) - 1]])
    while width // 2 >= needed:
      width //= 2
    filled = [Group(prompt, [replies[i] for i in index]) for prompt, index in some]
    rows = make_rows(filled, each, prompt_width, width, count)
    work.count_rows(decoder.config, rows, cut, times=models, heads=heads)
    values = np.asarray(fetch(function(before, shard_batch(rows))))
    for m, (_, index) in enumerate(some):
      for k, i in enumerate(index):
        out[i] = values[m * each + k]
  return out


@jax.jit
def _next_tokens(decoder: Decoder, options: jax.Array, before: Sequence[Prefix], rows: Rows) -> jax.Array:
  hidden_nd = hidden_states(decoder, rows, before=before)[:, 0]
  return jax.nn.log_softmax(logits(decoder, hidden_nd), -1)[:, options]


def score_options(
  decoder: Decoder, prompts: Sequence[Tokens], options: Sequence[int], *, batch_size: int = 32
) -> np.ndarray:
  """Log-probs [len(prompts), len(options)] of each option as the next token after each prompt."""
  run = partial(_next_tokens, decoder, replicate(np.asarray(options, np.int32)))
  values = map_rows(run, decoder, prompts, [[]] * len(prompts), batch_size=batch_size)
  work.count(decoder.config, 0, 0, predicted=len(prompts))
  return np.array(values, np.float64).reshape(len(prompts), len(options))
