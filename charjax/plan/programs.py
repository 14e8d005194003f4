"""The device programs of a run, with described arguments that the stages' own functions make, and what else is there.

A run's arrays are never made: weights, optimizer state and batches are shapes, dtypes and shardings. No tokenizer is
read: replies are as long as the config lets them be, and prompts as wide as it pads them.

Letters of arrays: as in charjax.model.decoder.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from charjax.engine import decode, sample, work
from charjax.engine.batch import PREFIX_STEP, bucket, compute_prefix
from charjax.engine.rows import FixedShapes, Group, Rows, parts_of
from charjax.engine.sample import Reply, Sampling
from charjax.limits import ranked_to_message
from charjax.mesh import batch_parts, describe, described, replicate, shard_batch, spec
from charjax.model.attention import Places, Seats
from charjax.model.blocks import block_parameters
from charjax.model.config import ModelConfig
from charjax.model.decoder import Cache, Decoder, Prefix, lower_layers
from charjax.model.language_model import LanguageModel
from charjax.model.language_model import describe as describe_model
from charjax.stages import policy, preference, replies, rollouts
from charjax.training.heads import bind, read_only
from charjax.training.loop import microbatches
from charjax.training.step import describe_optimizer, make_step
from charjax.workdir import Session

_TEMPLATE = 32  # tokens that a chat template puts around a message, about


@dataclasses.dataclass(frozen=True)
class Program:
  """One compiled program of a run.

  Attributes:
    name: what it does.
    stage: in which it runs with most beside it.
    function: jitted.
    arguments: described; by name those that are static.
    residents: everything that lies on the devices while it runs, its arguments among it, by name.
    flops: of the model, in one call.
    tokens: that one call computes, and somebody wants.
    rows: that go through the model at a time, split over the parts of a batch.
    repeats: how often a loop runs whose length the compiler does not know.
    weight_bytes: of weights, that a device reads from memory in one call.
  """

  name: str
  stage: str
  function: Callable[..., Any]
  arguments: tuple[Any, ...]
  static: Mapping[str, Any]
  residents: Mapping[str, Any]
  flops: float
  tokens: int
  rows: int
  repeats: int = 1
  weight_bytes: float = 0.0


def make(config: Any, character: Any, shape: ModelConfig, platform: str) -> list[Program]:
  """The programs of a run on the current mesh: reading prompts and drawing replies, judging them, what a value head
  expects where PPO has one, and both steps."""
  with described():
    decoder = describe_model(shape, config.model, platform)
    model = LanguageModel(decoder, SimpleNamespace(eos_ids=(0,)), None)  # type: ignore[arg-type]
    session = Session(config, character, None)
    session.__dict__['model'] = model
    learned = _preference(session)
    return [*_policy(session, learned.residents['preference model']), learned]


def nbytes(tree: Any) -> int:
  """Bytes of described arrays on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
    if hasattr(x, 'sharding')
  )


def _counted(make: Callable[[], Any]) -> tuple[Any, work.Work]:
  """What a stage's function makes, and the work it counts."""
  before = work.done()
  return make(), work.done().since(before)


def _abstract(make: Callable[[Any], Any], decoder: Decoder) -> Any:
  return describe(jax.eval_shape(make, decoder))


def _trunk(session: Session) -> Decoder:
  count, decoder = preference.layers_read(session), session.model.decoder
  lower = _abstract(lambda whole: lower_layers(whole, count), decoder)
  lower.config = decoder.config.lower(count)
  return lower


def _texts(count: int, width: int) -> list[list[int]]:
  """As many prompts, which begin alike as those of a chat template do."""
  return [[1] * _TEMPLATE + [2 + i] + [1] * (max(2, width) - 1) for i in range(count)]


# ---- preference ----


def _preference(session: Session) -> Program:
  config = session.config.preference
  lower = _trunk(session)
  trainable = _abstract(lambda lower: preference.untrained(session, lower, 'train'), lower)
  loss, optimizer = preference.learning(config, steps=100)
  state, layout = describe_optimizer(optimizer, trainable)
  k = ranked_to_message(session.config.replies)
  example = {
    'replies': [[1] * session.config.replies.max_new_tokens] * k,
    'probabilities': np.full((k, k), 0.5, np.float32),
    'trait': 0,
    'weight': 1.0,
  }
  asked = _texts(config.messages_per_batch, session.config.policy.prompt_width)
  shapes = FixedShapes(asked, session.config.replies.max_new_tokens)
  some = [example | {'prompt': prompt} for prompt in asked]
  batch, done = _counted(lambda: preference.make_examples_batch(config, lower, shapes, some, k))
  return Program(
    'preference step', 'preference', make_step(loss, optimizer, trainable, layout).__wrapped__,
    (trainable, state, lower, batch), {},
    {
      'starting weights': session.model.decoder, 'trunk': _copied(session, lower), 'preference model': trainable,
      'Adam moments': state, 'other preference model': trainable, 'batch': batch,
    },
    done.flops, done.tokens, _rows(batch),
    weight_bytes=3 * microbatches(config.microbatches, len(asked), k) * _bytes_read(lower.config),
  )  # fmt: skip


def _copied(session: Session, lower: Decoder) -> Any:
  """The layers of the trunk where it is another array than the starting weights' own."""
  whole = session.model.decoder.config.num_layers
  return () if lower.config.num_layers == whole else lower.blocks


# ---- policy ----


def _policy(session: Session, reward: Any) -> list[Program]:
  config, decoder = session.config.policy, session.model.decoder
  traits = len(session.character.traits)
  trainable = _abstract(lambda decoder: policy.untrained(session, decoder), decoder)
  loss, optimizer = policy.learning(config)
  state, layout = describe_optimizer(optimizer, trainable)
  lower, reward = _trunk(session), _abstract(read_only, reward)
  critic = replicate(np.zeros((decoder.config.embed_dim + 1, traits), np.float32))
  mean, ends = replicate((np.zeros(traits, np.float32), sample.end_ids((0,))))
  judge = rollouts.Judge(decoder, lower, reward, critic, mean, ends)
  residents = {
    'starting weights': decoder, 'trunk': _copied(session, lower), 'preference model': reward, 'policy': trainable,
    'Adam moments': state,
  }  # fmt: skip

  width, longest, each = config.prompt_width, config.max_new_tokens, config.replies_per_prompt
  ranked, shown = config.ranked_replies, config.shown_replies
  asked = _texts(config.prompts_per_step, width)
  shapes = FixedShapes(asked, longest)
  said = Reply([1] * longest, np.zeros(longest, np.float32), 'length')
  count = len(asked) * each
  # Where none is drawn, ranked ones are judged, once; and the ranker reads as many.
  judged = each or ranked or shown
  rows = shapes.rows([Group(prompt, [said.tokens] * judged) for prompt in asked], judged)
  padded = rows.tokens.shape[1] - 1
  part, done = parts_of(rows, rollouts.parts_of_step(config))[0], work.Work()
  _, done = _counted(lambda: work.count_rows(decoder.config, part, shapes.cut, times=2, heads=1))
  judging = Program(
    'scoring', 'policy', rollouts.judge_tokens,
    (judge, shapes.opening, shard_batch(part), replicate(np.float32(1)), None), {'longest': longest},
    residents | {'batch': shard_batch(part)}, done.flops, done.tokens, _rows(part),
    weight_bytes=2 * _bytes_read(decoder.config),
  )  # fmt: skip

  more = []
  if each and config.advantages == 'ppo':
    there = shard_batch(part)
    more.append(Program(
      'value head', 'policy', rollouts.expected_values.__wrapped__,  # type: ignore[attr-defined]
      (decoder, trainable, shapes.opening, there), {}, residents | {'batch': there}, done.flops / 2, done.tokens,
      _rows(part), weight_bytes=_bytes_read(decoder.config),
    ))  # fmt: skip

  nothing = np.zeros((count, padded), np.float32)
  item = {
    'weight': 1.0,
    'ranked': rollouts.Ranked([[1] * longest] * ranked, None),
    'before': np.zeros((ranked, padded), np.float32),
    'real': np.ones(ranked, bool),
    'preferred': np.full((ranked, ranked), 0.5, np.float32),
    'best': np.int64(0),
  }
  messages = [item | {'prompt': prompt, 'shown': [said.tokens] * shown} for prompt in asked]
  shapes_shown = None
  if shown:
    taught = [[1] * _TEMPLATE + [2 + i] + [1] * (_shown_tokens(session) + width) for i in range(len(asked))]
    shapes_shown = FixedShapes(taught, longest)
    messages = [message | {'shown_prompt': prompt} for message, prompt in zip(messages, taught, strict=True)]
  neutral = [{'prompt': prompt, 'reply': said.tokens} for prompt in asked]
  returns = nothing if config.advantages == 'ppo' else None
  rollout = rollouts.Rollout([said] * count, nothing, nothing, nothing, np.zeros(count, np.float32), returns)
  batch, done = _counted(
    lambda: policy.make_policy_batch(session, shapes, shapes_shown, messages, neutral, rollout if each else None)
  )
  step = Program(
    'policy step', 'policy', make_step(loss, optimizer, trainable, layout).__wrapped__,
    (trainable, state, decoder, batch), {}, residents | {'batch': batch}, done.flops, done.tokens, _rows(batch),
    weight_bytes=3 * rollouts.parts_of_step(config) * _bytes_read(decoder.config),
  )  # fmt: skip
  used, adapter = bind(decoder, trainable)
  drawing = rollouts.drawing(config)
  return [*_drawing(used, adapter, drawing, max(1, each), width, residents), judging, *more, step]


def _shown_tokens(session: Session) -> int:
  """About how many tokens what is put before a message takes, where a trait is shown."""
  shown = [replies.shown(session, trait) for trait in session.character.traits]
  return max(math.ceil(1.4 * sum(len(turn['content'].split()) for turn in turns)) for turns in shown)


def _drawing(
  decoder: Decoder, adapter: Any, settings: Sampling, replies: int, longest: int, residents: Mapping[str, Any]
) -> list[Program]:
  """Reading prompts, and drawing replies with caches that have grown to their end."""
  parts = batch_parts()
  # As many prompts as take rooms to spare, which a step that draws all of its replies at once has not.
  sizes = sample.choose_shapes(settings, settings.batch_size, replies, longest)
  shared = (_prefix(decoder, adapter, _TEMPLATE),)
  layers, before = _prepared(decoder, adapter, shared)
  rooms = _cache(decoder, sizes.rooms, sizes.width)
  cache = _cache(decoder, sizes.rows, sizes.slots)
  packed = np.zeros((sizes.packed, sizes.width), np.int32)
  most = sample.MOVES * sizes.packed // parts
  moves = np.zeros((parts, most), np.int32)
  batch = shard_batch(
    (packed, Places(*np.zeros((2, *packed.shape), np.int32)), decode.Move(moves, moves, moves, moves > 0))
  )
  there = {**residents, 'sampling copy': layers, "prompts' keys and values": rooms.kv, 'cache': cache}
  config = decoder.config
  read = np.full(sizes.packed, sizes.width)
  _, done = _counted(lambda: work.count(config, _TEMPLATE, read))
  prefill = Program(
    'prefill', 'policy', decode.read_prompts, (decoder, adapter, shared, rooms.kv, *batch), {'width': sizes.width},
    there, done.flops, done.tokens, sizes.packed, weight_bytes=_bytes_read(config),
  )  # fmt: skip

  rows = sizes.rows
  row, flag, key = np.zeros(rows, np.int32), np.zeros(rows, bool), np.zeros((rows, 2), np.uint32)
  state = shard_batch(decode.RowState(row, row, row, flag, flag, key))
  seats = shard_batch(Seats(np.zeros((sizes.rooms, sizes.each), np.int32), row))
  numbers = replicate((np.int32(0), np.int32(0), np.int32(0), np.int32(0), sample.end_ids((0,)), np.float32(1)))
  lengths = np.full(rows, settings.max_new_tokens)
  _, done = _counted(lambda: work.count(config, _TEMPLATE + longest - 1, lengths, predicted=lengths.sum()))
  drawing = Program(
    'decode', 'policy', decode.decode,
    (decoder, layers, before, Prefix(rooms.kv, rooms.places, seats), cache, state, *numbers),
    {'top_p': settings.top_p, 'top_k': settings.top_k}, there, done.flops,
    # What fills up a batch that does not divide into its parts is drawn for nobody.
    min(done.tokens, settings.batch_size * settings.max_new_tokens), rows, repeats=settings.max_new_tokens,
    # Each device reads its own part of what is split over all.
    weight_bytes=settings.max_new_tokens * (nbytes(layers) + _head_bytes(config)),
  )  # fmt: skip
  return [prefill, drawing]


def _laid_out(array: Any, *axes: str | None) -> Any:
  mesh = jax.sharding.get_mesh()
  return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec(array.shape, axes, mesh)))


def _kv(kv: Any, *first: str | None) -> Any:
  """Keys and values with the axes that the decoder gives them; `first` is what stands before the heads."""
  return jax.tree.map(lambda array: _laid_out(array, *first, 'kv_heads', None, None), kv)


def _cache(decoder: Decoder, rows: int, slots: int) -> Cache:
  empty = jax.eval_shape(lambda: decode.make_cache(decoder, rows=rows, slots=slots))
  return Cache(_kv(empty.kv, 'batch'), jax.tree.map(lambda array: _laid_out(array, 'batch', None), empty.places))


def _prefix(decoder: Decoder, adapter: Any, length: int) -> Prefix:
  """What stands before all prompts, as `engine.batch.prefill` gives it."""
  tokens, lengths = replicate((np.zeros((1, bucket(length, PREFIX_STEP)), np.int32), np.array([length], np.int32)))
  found = jax.eval_shape(compute_prefix, decoder, tokens, lengths, adapter)
  first = (None, None) if decoder.runtime.scan_layers else (None,)
  return Prefix(_kv(found.kv, *first), jax.tree.map(lambda array: _laid_out(array, None, None), found.places))


def _prepared(decoder: Decoder, adapter: Any, shared: Sequence[Prefix]) -> tuple[Any, list[Prefix]]:
  layers, before = jax.eval_shape(decode.prepare, decoder, adapter, shared)
  layers = decode.map_layers(lambda array, axes: _laid_out(array, *axes), decoder, adapter, layers)
  pairs = zip(before, shared, strict=True)
  return layers, [prefix._replace(kv=_kv(prefix.kv, None), places=old.places) for prefix, old in pairs]


# ---- sizes ----


def block_bytes(shape: ModelConfig) -> float:
  """Bytes, in bfloat16, of all blocks' weights that a device multiplies by, whoever keeps them: the part that tensor
  leaves it."""
  blocks = sum(math.prod(one.shape) for one in block_parameters(shape).values())
  return 2 * blocks / jax.sharding.get_mesh().shape['tensor']


def _head_bytes(shape: ModelConfig) -> float:
  """Bytes, in bfloat16, of the output head's part that a device multiplies by."""
  mesh = jax.sharding.get_mesh()
  return 2 * shape.vocab_size * shape.embed_dim / (mesh.shape['fsdp'] * mesh.shape['tensor'])


def _bytes_read(shape: ModelConfig) -> float:
  """Bytes of weights that a device reads for one pass through the model."""
  return block_bytes(shape) + _head_bytes(shape)


def busy(program: Program) -> float:
  """The share of the devices that compute what no other does, where rows do not divide into the parts of a batch."""
  parts = batch_parts()
  return program.rows / (-(-program.rows // parts) * parts)


def width_of(program: Program) -> int:
  """Tokens of one row of a program that is given a batch."""
  return _tokens(program.residents['batch']).shape[-1]


def _rows(batch: Any) -> int:
  return _tokens(batch).shape[-2]


def _tokens(batch: Any) -> Any:
  """Those that go through the model together, of a batch or one part of it: [..., N, T]; the first of several kinds."""
  return (batch if isinstance(batch, Rows) else batch.parts.get('rows', batch.parts.get('shown'))).tokens
