"""Scoring: log-probs of replies that are already written, and their hidden states.

A prompt goes through the model once for all replies to it, as what all prompts begin with does for all prompts. Where
lengths differ, padding goes through its attention alone (charjax.model.packing).

Letters: M prompts, P prompt tokens, K replies to a prompt, N = M K replies, T tokens of a row, R = T - 1 reply tokens,
D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from charjax.engine import work
from charjax.engine.batch import (
  EACH,
  GROUP_STEP,
  PROMPT_STEP,
  REPLY_STEP,
  Tokens,
  bucket,
  by_prompt,
  common_prefix,
  in_groups,
  length_before,
  prefill,
  text_places,
)
from charjax.engine.rows import Group, Opening, Rows, make_rows, pack_alike, reply_mask
from charjax.mesh import batch_parts, constrain, fetch, no_silent_transfers, replicate, shard_batch, split_into
from charjax.model.decoder import Decoder, Part, Prefix, forward_parts, logits, output_head
from charjax.model.packing import pack, unpack

_CHUNK = 512  # tokens whose full-vocabulary logits are held at once
_MANY = 8  # batches of a call, among which more programs are worth their compilation


def hidden_states(
  decoder: Decoder,
  rows: Rows,
  *,
  adapter: Any = None,
  opening: Opening | None = None,
  before: Sequence[Prefix] = (),
  tap: int | None = None,
) -> Any:
  """`all_hidden_states` of one batch."""
  return all_hidden_states(decoder, [rows], adapter=adapter, opening=opening, before=before, tap=tap)[0]


def all_hidden_states(
  decoder: Decoder,
  batches: Sequence[Rows],
  *,
  adapter: Any = None,
  opening: Opening | None = None,
  before: Sequence[Prefix] = (),
  tap: int | None = None,
) -> list[Any]:
  """Final hidden states [N, T, D] of batches that go through the model together, each token attending to what stands
  before, to the opening, to its prompt and to its own reply; packed where the rows are, as the functions below take
  them.

  With `tap` pairs, as `model.decoder.forward` gives them.
  """
  parts: list[Part] = []
  start = length_before(before)
  if opening is not None:
    parts.append(Part(opening.tokens, *text_places(opening.tokens, opening.length, start)))
    start = start + opening.length[:, None]
  first, said = tuple(range(len(parts))), []
  for rows in batches:
    places = text_places(rows.prompts, rows.prompt_lengths, start)
    asked = Part(rows.prompts, *places, reads=first, packing=rows.prompt_packing)
    each = len(rows.tokens) // len(rows.prompts)
    positions = start + jnp.repeat(rows.prompt_lengths, each)[:, None] + jnp.arange(rows.tokens.shape[1])
    parts += [asked, Part(rows.tokens, positions, reads=(*first, len(parts)), packing=rows.packing)]
    said.append(len(parts) - 1)
  found = forward_parts(decoder, parts, adapter=adapter, before=before, tap=tap)
  return [found[place] for place in said]


def in_rows(hidden: jax.Array, rows: Rows) -> jax.Array:
  """Hidden states by reply, [N, T, D]; in the padding anything."""
  return hidden if rows.packing is None else unpack(hidden, rows.packing)


def over_chunks(function: Callable[..., Any], *arrays: jax.Array) -> Any:
  """Maps `function` over chunks of the flattened leading axes, so that no [N, R, V] array is ever held.

  Each chunk is recomputed in the backward pass. `arrays` share their two leading axes; the result has them too.
  """
  lead = arrays[0].shape[:2]
  # Of each chunk every device has some of its own rows' tokens, so that they stay where they are.
  devices = split_into() if lead[0] % split_into() == 0 else 1
  count = lead[0] * lead[1] // devices
  chunk = min(-(-_CHUNK // devices), count)

  def cut(array: jax.Array) -> jax.Array:
    array = array.reshape(devices, count, *array.shape[2:])
    # What fills the last chunk is computed like a token: ones are fit for it, where a temperature of 0 would not be.
    ends = ((0, 0), (0, -count % chunk), *[(0, 0)] * (array.ndim - 2))
    array = jnp.pad(array, ends, constant_values=1).reshape(devices, -1, chunk, *array.shape[2:])
    array = jnp.moveaxis(array, 1, 0).reshape(-1, devices * chunk, *array.shape[3:])
    return constrain(array, None, 'batch', *(None,) * (array.ndim - 2))

  def join(array: jax.Array) -> jax.Array:
    array = jnp.moveaxis(array.reshape(-1, devices, chunk, *array.shape[2:]), 0, 1)
    return array.reshape(devices, -1, *array.shape[3:])[:, :count].reshape(*lead, *array.shape[3:])

  out = jax.lax.map(jax.checkpoint(lambda xs: function(*xs)), tuple(map(cut, arrays)))
  return jax.tree.map(join, out)


def over_tokens(function: Callable[..., Any], rows: Rows, hidden: Sequence[jax.Array], *arrays: jax.Array) -> Any:
  """Maps `function` over the tokens of replies as `over_chunks` does: of the states that each is predicted from, of
  each model in `hidden`, and of its values in `arrays` [N, R]; the result [N, R, ...] is anything in the padding."""
  if rows.packing is None:
    return over_chunks(function, *(states[:, :-1] for states in hidden), *arrays)
  packed = [pack(jnp.pad(array, ((0, 0), (0, 1)), constant_values=1), rows.packing) for array in arrays]
  return unpack(over_chunks(function, *hidden, *packed), rows.packing)[:, :-1]


def token_log_probs(
  decoder: Decoder, hidden: jax.Array, rows: Rows, temperature: Any, barred: Any = None, going_on: Any = True
) -> jax.Array:
  """log softmax(logits / temperature) of the tokens of replies, [N, R] float32; 0 in the padding.

  Args:
    decoder: the weights.
    hidden: final hidden states of `rows`.
    rows: prompts and replies.
    temperature: of the distribution; or of that of each reply [N].
    barred: ids that cannot be drawn, their probability shared by all others.
    going_on: whether those ids are barred; where `temperature` is one of each reply, in which of them [N].
  """

  head = output_head(decoder)

  def by_token(values: Any) -> jax.Array:
    return jnp.broadcast_to(values[:, None], (len(rows.tokens), rows.tokens.shape[1] - 1))

  def one(hidden_nd: jax.Array, ids_n: jax.Array, temperature_n: Any = temperature, going_on_n: Any = going_on) -> Any:
    scaled = logits(decoder, hidden_nd, head) / jnp.reshape(temperature_n, (-1, 1))
    if barred is not None:
      out = jnp.isin(jnp.arange(scaled.shape[-1]), barred) & jnp.reshape(going_on_n, (-1, 1))
      scaled = jnp.where(out, -1e9, scaled)
    chosen = jnp.take_along_axis(scaled, ids_n[:, None], 1)[:, 0]
    return chosen - jax.nn.logsumexp(scaled, -1)

  by_reply = [by_token(values) for values in (temperature, going_on)] if jnp.ndim(temperature) else []
  values = over_tokens(one, rows, [hidden], rows.tokens[:, 1:], *by_reply)
  return jnp.where(reply_mask(rows), values, 0.0)


def reply_log_probs(
  decoder: Decoder, rows: Rows, *, adapter: Any = None, before: Sequence[Prefix] = (), temperature: float = 1.0
) -> jax.Array:
  """Log-probs [N, R] of each reply's tokens given all before them; 0 in the padding."""
  return token_log_probs(decoder, hidden_states(decoder, rows, adapter=adapter, before=before), rows, temperature)


def mean_over_tokens(values: jax.Array, rows: Rows) -> jax.Array:
  """The mean of values [N, R, ...] over the tokens of each reply, [N, ...]; 0 where there is none."""
  mask = reply_mask(rows).reshape(*values.shape[:2], *(1,) * (values.ndim - 2))
  return jnp.where(mask, values, 0.0).sum(1) / jnp.maximum(mask.sum(1), 1)


def mean_states(hidden: jax.Array, rows: Rows) -> jax.Array:
  """The mean hidden state over the tokens of each reply, [N, D]."""
  return mean_over_tokens(in_rows(hidden, rows)[:, 1:], rows)


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
  # prompts, widths of replies that halve (many batches have those between, too), and batches that are filled alike.
  prompt_width = bucket(max(len(prompt) for prompt, _ in groups) - 1, PROMPT_STEP)
  widest = bucket(1 + max(longest), REPLY_STEP)
  at_once = max(1, batch_size // each)
  count = min(at_once, bucket(-(-len(groups) // -(-len(groups) // at_once)), GROUP_STEP))
  parts = batch_parts()
  count += -count % parts
  starts = range(0, len(groups), count)
  many = len(starts) >= _MANY
  by_width: dict[int, list[list[int]]] = {}
  for first in starts:
    some = order[first : first + count]
    by_width.setdefault(reply_width(widest, 1 + max(1, longest[some[-1]]), many), []).append(some)
  out: list[np.ndarray] = [np.zeros(0)] * len(prompts)
  for width, batches in by_width.items():
    hands = _deal([groups[i] for some in batches for i in some], replies, len(batches), parts)
    dealt = [[Group(prompt, [replies[i] for i in index]) for prompt, index in hand] for hand in hands]
    made = pack_alike([make_rows(some, each, prompt_width, width, count) for some in dealt], parts, many)
    for hand, rows in zip(hands, made, strict=True):
      work.count_rows(decoder.config, rows, cut, times=models, heads=heads)
      values = np.asarray(fetch(function(before, shard_batch(rows))))
      for m, (_, index) in enumerate(hand):
        for k, i in enumerate(index):
          out[i] = values[m * each + k]
  return out


def reply_width(widest: int, needed: int, many: bool) -> int:
  """The least of `widest`, half of it, a quarter and so on that is enough; of `many` batches also three quarters of
  each."""
  width = widest
  while width // 2 >= needed:
    width //= 2
  between = min(width, -(-width * 3 // (4 * REPLY_STEP)) * REPLY_STEP)
  return between if many and between >= needed else width


def _deal(groups: Sequence[Any], replies: Sequence[Tokens], batches: int, parts: int) -> list[list[Any]]:
  """Groups (prompt, places of its replies) in batches of as many, each part of which has about as many tokens."""
  ordered = sorted(groups, key=lambda group: len(group[0]) + sum(len(replies[i]) for i in group[1]))
  hands = [ordered[batch::batches] for batch in range(batches)]
  return [[group for part in range(parts) for group in hand[part::parts]] for hand in hands]


@jax.jit
def _next_tokens(decoder: Decoder, options: jax.Array, before: Sequence[Prefix], rows: Rows) -> jax.Array:
  hidden_nd = in_rows(hidden_states(decoder, rows, before=before), rows)[:, 0]
  return jax.nn.log_softmax(logits(decoder, hidden_nd), -1)[:, options]


def score_options(
  decoder: Decoder, prompts: Sequence[Tokens], options: Sequence[int], *, batch_size: int = 32
) -> np.ndarray:
  """Log-probs [len(prompts), len(options)] of each option as the next token after each prompt."""
  run = partial(_next_tokens, decoder, replicate(np.asarray(options, np.int32)))
  values = map_rows(run, decoder, prompts, [[]] * len(prompts), batch_size=batch_size)
  work.count(decoder.config, 0, 0, predicted=len(prompts))
  return np.array(values, np.float64).reshape(len(prompts), len(options))
