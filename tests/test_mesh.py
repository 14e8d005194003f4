"""Eight devices: the numbers of one, arrays and activations that are really split, nothing moved unseen, and one
program a step."""

import contextlib
import functools
import inspect
import math
import re
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from flax import nnx
from jax.sharding import PartitionSpec
from llama_reference import random_tensors, tiny_config
from verify_mesh import misplaced

from charjax.engine import decode
from charjax.engine.batch import item_keys
from charjax.engine.rows import Group, make_rows
from charjax.engine.sample import Sampling, sample
from charjax.engine.score import hidden_states, map_rows, mean_states, reply_log_probs, score
from charjax.errors import UserError
from charjax.mesh import AXES, batch_parts, constrain, make_mesh, replicate, shard_batch, shardings, spec
from charjax.model import decoder as decoders
from charjax.model.attention import Places, Seats
from charjax.model.decoder import Prefix, Runtime
from charjax.model.lora import Adapter
from charjax.model.weights import make_decoder
from charjax.training.checkpoint import Checkpoints
from charjax.training.heads import bind, make_trainable, read_rewards, reply_states
from charjax.training.losses import bradley_terry
from charjax.training.step import Batch, init_optimizer, make_batch, make_optimizer, make_step

MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2)]
CONFIG = tiny_config(tied_embeddings=False)
EOS = (7, 9)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(10, CONFIG.vocab_size, length).tolist() for length in range(3, 11)]
REPLIES = [RNG.integers(0, CONFIG.vocab_size, length).tolist() for length in (1, 5, 2, 7, 3, 3, 6, 4)]
KEYS = [str(i) for i in range(8)]


def build(config=CONFIG):
  return make_decoder(config, random_tensors(config), jnp.float32, Runtime(scan_layers=True))


def compute():
  """Scores and replies of all prompts, on whatever mesh there is."""
  decoder = build()
  drawn = sample(decoder, PROMPTS, item_keys(0, 'test', KEYS), EOS, Sampling(5, temperature=0.8, batch_size=8))
  # Eight prompts, and two with four replies each.
  shared = score(decoder, [PROMPTS[i // 4] for i in range(8)], REPLIES, batch_size=8)
  return [*score(decoder, PROMPTS, REPLIES, batch_size=8), *shared], drawn


def rows_of_all():
  """One reply a prompt."""
  groups = [Group(prompt, [reply]) for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]
  return make_rows(groups, each=1, prompt_width=16, width=8)


def loss(trainable, decoder, batch):
  """Both of what is trained for: preferences among four replies to each of two prompts, and likely replies."""
  used, adapter = bind(decoder, trainable)
  rows = batch['rows']
  states = mean_states(hidden_states(used, rows, adapter=adapter), rows)
  scores = read_rewards(trainable, states)[..., 1].reshape(2, 4)
  total, weight = bradley_terry(scores, jnp.full((2, 4, 4), 0.8), jnp.ones((2, 4), bool), jnp.ones(2))
  likelihood = reply_log_probs(used, rows, adapter=adapter).mean()
  # Preferences alone leave some directions without a gradient, and Adam would make steps of rounding errors.
  return total / weight - likelihood + (scores.mean() - 1) ** 2, {'likelihood': likelihood}


def train(lora_rank):
  """Three steps; returns metrics, what was trained, the optimizer's state and how often the step was compiled."""
  decoder = build()
  trainable = make_trainable(decoder, lora_rank, seed=0, traits=2)
  # A learning rate that moves parameters by much more than the tolerance.
  optimizer = make_optimizer(1e-3, warmup=1, steps=3, weight_decay=0.1, max_gradient=1.0)
  state, layout = init_optimizer(optimizer, trainable)
  assert jax.sharding.get_mesh().empty or not misplaced((decoder, trainable, state))
  step = make_step(loss, optimizer, trainable, layout)
  batch = {'rows': rows_of_all()}
  history = []
  for _ in range(3):
    trainable, state, metrics = step(trainable, state, decoder, make_batch({}, batch))
    history.append({name: float(value) for name, value in metrics.items()})
  return history, trainable, state, step.__wrapped__._cache_size()


@pytest.fixture(scope='module')
def on_one_device():
  return {'compute': compute()} | {rank: train(rank) for rank in (0, 2)}


@pytest.fixture(params=MESHES, ids=str)
def mesh(request):
  mesh = make_mesh(request.param)
  with jax.set_mesh(mesh):
    yield mesh


def assert_alike(found, expected, tolerance=1e-4):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def by_name(tree):
  return {'.'.join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(tree))}


def test_scores_and_replies_are_those_of_one_device(mesh, on_one_device):
  scores, drawn = compute()
  expected_scores, expected_drawn = on_one_device['compute']
  assert_alike(scores, expected_scores)
  assert [reply.tokens for reply in drawn] == [reply.tokens for reply in expected_drawn]
  assert_alike([reply.log_probs for reply in drawn], [reply.log_probs for reply in expected_drawn])


def draw_ending_early():
  """Replies of 1 to 24 tokens, four to each of twelve prompts, in 32 rows; and how many rows were kept each time."""
  ends, kept = tuple(range(0, CONFIG.vocab_size, 12)), []
  asked = [[*PROMPTS[i % 8], i] for i in range(12) for _ in range(4)]
  keys = item_keys(0, 'early', [str(i) for i in range(48)])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('charjax.engine.sample._WORTH', 0)
    patch.setattr(decode, 'keep', lambda *args, keep=decode.keep: kept.append(len(args[2])) or keep(*args))
    return sample(build(), asked, keys, ends, Sampling(24, batch_size=32)), kept


@pytest.fixture(scope='module')
def ending_early():
  return draw_ending_early()


@pytest.mark.parametrize('mesh', MESHES[:2], indirect=True, ids=str)
def test_rows_are_given_up_on_each_device(mesh, ending_early):
  (drawn, kept), (expected, on_one) = draw_ending_early(), ending_early
  assert kept and on_one[-1] < 8
  assert len({len(reply.tokens) for reply in drawn}) > 8
  assert [reply.tokens for reply in drawn] == [reply.tokens for reply in expected]
  assert_alike([reply.log_probs for reply in drawn], [reply.log_probs for reply in expected])


@pytest.mark.parametrize(
  ('mesh', 'lora_rank'),
  [*((shape, 0) for shape in MESHES), ((2, 2, 2), 2)],
  indirect=['mesh'],
  ids=[*(f'{shape}-all parameters' for shape in MESHES), '(2, 2, 2)-adapter'],
)
def test_training_is_that_of_one_device_and_compiled_once(mesh, on_one_device, lora_rank, tmp_path):
  history, trainable, state, compiled = train(lora_rank)
  expected_history, expected, _, expected_compiled = on_one_device[lora_rank]
  assert compiled == expected_compiled == 1
  assert not any(metrics['skipped'] for metrics in history)
  assert history[2]['loss'] < history[0]['loss'] - 0.03
  assert_alike(history, expected_history)
  assert_alike(trainable, expected)
  # What was laid out at the start is laid out alike after the steps: parameters and both moments of Adam.
  wanted = jax.tree.leaves(shardings(trainable))
  moments = state[1][0]
  for tree in (trainable, moments.mu, moments.nu):
    for leaf, sharding in zip(jax.tree.leaves(tree), wanted, strict=True):
      assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
  assert not misplaced((trainable, state))
  # And as they come back from a checkpoint.
  with Checkpoints(epath.Path(tmp_path), 0) as checkpoints:
    checkpoints.save(3, trainable, state, {})
    step, *trees, _ = checkpoints.restore(trainable, state)
  assert step == 3 and not misplaced(trees)
  assert_alike(trees, (trainable, state), 0)


def devices(mesh, axes):
  return math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes or ()))


def test_each_device_holds_its_part_of_parameters_and_moments(mesh):
  decoder = build()
  state, _ = init_optimizer(make_optimizer(1e-3, 1, 3, 0.0, 1.0), {'decoder': decoder})
  for tree in (decoder, state[1][0].mu['decoder'], state[1][0].nu['decoder']):
    arrays = by_name(tree)
    for name, shape, axes in (
      ('embed', (48, 32), (None, ('tensor', 'fsdp'))),
      ('head', (32, 48), (None, ('tensor', 'fsdp'))),
      ('final_norm', (32,), (None,)),
      ('blocks.q', (2, 32, 4, 8), (None, 'fsdp', 'tensor', None)),
      ('blocks.k', (2, 32, 2, 8), (None, 'fsdp', 'tensor', None)),
      ('blocks.v', (2, 32, 2, 8), (None, 'fsdp', 'tensor', None)),
      ('blocks.o', (2, 4, 8, 32), (None, 'tensor', None, 'fsdp')),
      ('blocks.gate', (2, 32, 64), (None, 'fsdp', 'tensor')),
      ('blocks.up', (2, 32, 64), (None, 'fsdp', 'tensor')),
      ('blocks.down', (2, 64, 32), (None, 'tensor', 'fsdp')),
      ('blocks.attn_norm', (2, 32), (None, None)),
    ):
      array, parts = arrays[name], [devices(mesh, axis) for axis in axes]
      assert array.shape == shape
      part = tuple(size // count for size, count in zip(shape, parts, strict=True))
      assert {shard.data.shape for shard in array.addressable_shards} == {part}, name
      # Each part is another, and they are on as many devices each.
      assert len({str(shard.index) for shard in array.addressable_shards}) == np.prod(parts), name


def test_activations_are_split_inside_a_program(mesh):
  split = jax.jit(lambda x: constrain(x * 2, 'batch', None, 'heads', None))(np.ones((8, 3, 4, 5)))
  rows, heads = mesh.shape['data'] * mesh.shape['fsdp'], mesh.shape['tensor']
  assert {shard.data.shape for shard in split.addressable_shards} == {(8 // rows, 3, 4 // heads, 5)}


# ---- what a program says of its activations, and what it becomes ----

# Numbers of rows and tokens that no other dimension has.
ROWS, WIDTH, PROMPT = 56, 24, 16
EACH = 14 * (PROMPT + WIDTH)  # tokens of each of the four devices that rows are split over, end to end
SPLIT = Counter({
  ((4, EACH, 32), 'data,-,tensor+fsdp'): 1,  # as the embedding has them
  ((4, EACH, 32), 'data+fsdp,-,-'): 2,  # between blocks
  ((4, EACH, 4, 8), 'data+fsdp,-,tensor,-'): 1,  # queries
  # In attention, of the prompts and of the rows after them.
  ((ROWS, PROMPT, 4, 8), 'data+fsdp,-,tensor,-'): 1, ((ROWS, WIDTH, 4, 8), 'data+fsdp,-,tensor,-'): 1,  # mixed
  ((ROWS, 2, 8, PROMPT), 'data+fsdp,tensor,-,-'): 1, ((ROWS, 2, 8, WIDTH), 'data+fsdp,tensor,-,-'): 1,  # keys
  ((ROWS, 2, PROMPT, 8), 'data+fsdp,tensor,-,-'): 1, ((ROWS, 2, WIDTH, 8), 'data+fsdp,tensor,-,-'): 1,  # values
  ((4, EACH, 64), 'data+fsdp,-,tensor'): 1,  # gated
  # Of the output head, itself and in chunks: hidden states, ids, the states that all devices share, and logits.
  ((32, 48), '-,tensor+fsdp'): 1, ((3, 512, 32), '-,data+fsdp,-'): 1, ((3, 512), '-,data+fsdp'): 1,
  ((512, 32), 'data,-'): 1, ((512, 48), 'data,tensor+fsdp'): 1,
})  # fmt: skip
# Of decoding with a tied embedding: a token of each row, in two layers with caches of 8 slots.
DRAWN = Counter({
  ((ROWS, 1, 32), 'data+fsdp,-,-'): 3,  # between blocks
  ((ROWS, 1, 32), 'data,-,-'): 4,  # what meets the weights of attention and MLP
  # As the embedding has them, queries, mixed; keys, values.
  ((ROWS, 1, 32), 'data,-,tensor+fsdp'): 5, ((ROWS, 1, 16), 'data,-,tensor+fsdp'): 4,
  ((ROWS, 1, 4, 8), 'data+fsdp,-,tensor,-'): 6, ((ROWS, 1, 2, 8), 'data+fsdp,-,tensor,-'): 4,  # back with their rows
  ((ROWS, 2, 8, 8), 'data+fsdp,tensor,-,-'): 4,  # keys and values with those before them
  ((ROWS, 1, 64), 'data,-,tensor+fsdp'): 2,  # gated
  # Of the output head: itself, the states, and logits, on their way back too.
  ((48, 32), 'tensor+fsdp,-'): 1, ((ROWS, 32), 'data,-'): 1, ((ROWS, 48), 'data,tensor+fsdp'): 1,
  ((ROWS, 48), 'data+fsdp,-'): 1,
})  # fmt: skip


def on(mesh, expected):
  """The layouts on a mesh whose axes of one device are not named."""
  named = [name for name in AXES if mesh.shape[name] > 1]

  def one(part):
    return '+'.join(name for name in part.split('+') if name in named) or '-'

  return Counter({(shape, ','.join(map(one, axes.split(',')))): count for (shape, axes), count in expected.items()})


def constraints(lowered):
  """How often each layout is asked for of a shape in a program's text."""
  found = Counter()
  pattern = r'sdy\.sharding_constraint %\S+ <@mesh, \[(.*?)\]> : tensor<([\dx]+)x\w+>'
  for layout, shape in re.findall(pattern, lowered.as_text()):
    axes = [names.replace('"', '').replace(', ', '+') or '-' for names in re.findall(r'{(.*?)}', layout)]
    found[tuple(map(int, shape.split('x'))), ','.join(axes)] += 1
  return found


def scorer():
  groups = [Group([1, 2, 3], [[4, 5, 6]])] * ROWS
  rows = shard_batch(make_rows(groups, 1, PROMPT, WIDTH))
  # A function that is new each time, since JAX would know another's program from the last time.
  return jax.jit(functools.partial(reply_log_probs)).lower(build(), rows)


def sampler():
  """Decoding, of one row to each of ROWS prompts, with a cache of 8 slots."""
  decoder, one = build(tiny_config()), np.ones(ROWS, np.int32)
  layers, before = decode.prepare(decoder, None, ())
  state = decode.RowState(one, one * PROMPT, one, one > 0, one > 0, np.zeros((ROWS, 2), np.uint32))
  places = Places(np.tile(np.arange(PROMPT, dtype=np.int32), (ROWS, 1)), np.ones((ROWS, PROMPT), np.int32))
  own = np.arange(ROWS, dtype=np.int32) % (ROWS // batch_parts())
  room, cache = (decode.make_cache(decoder, rows=ROWS, slots=slots) for slots in (PROMPT, 8))
  numbers = replicate((*np.array([0, 8, ROWS, 8], np.int32), np.array([7], np.int32), np.float32(1)))
  function = jax.jit(lambda *args: decode.decode.__wrapped__(*args, top_p=0.9, top_k=0))
  rooms = Prefix(room.kv, *shard_batch((places, Seats(own[:, None], own))))
  return function.lower(decoder, layers, before, rooms, cache, shard_batch(state), *numbers)


def whole(compiled, rows, width):
  """The arrays of a compiled program, one device's part of it, that hold all rows of a batch or all their tokens."""
  shapes = {
    tuple(map(int, shape.split(','))) for shape in re.findall(r'\b(?:f32|bf16)\[([\d,]+)\]', compiled.as_text())
  }
  tokens = {rows * width, rows * (width - 1)}
  return sorted(shape for shape in shapes if (len(shape) > 2 and rows in shape) or tokens & set(shape))


@pytest.mark.parametrize('mesh', [(2, 2, 2), (1, 4, 2)], indirect=True, ids=str)
def test_a_program_s_activations_are_split(mesh):
  program = scorer()
  assert not on(mesh, SPLIT) - constraints(program)
  assert not whole(program.compile(), ROWS, WIDTH)
  program = sampler()
  assert not on(mesh, DRAWN) - constraints(program)
  compiled = program.compile()
  # All rows' activations of a token meet, and no more of them.
  assert all(math.prod(shape) <= ROWS * 64 for shape in whole(compiled, ROWS, PROMPT))
  # What is gathered is small: activations of a token a row, and no keys, values or weights.
  found = re.findall(r'= \w+\[([\d,]+)\]\S* all-gather', compiled.as_text())
  gathered = [tuple(map(int, shape.split(','))) for shape in found]
  assert gathered and all(math.prod(shape) <= ROWS * 64 for shape in gathered), gathered
  assert all({ROWS, ROWS // 2} & set(shape) for shape in gathered), gathered


LINES = inspect.getsource(decoders).splitlines()
PLACES = [number for number, line in enumerate(LINES, 1) if 'constrain(' in line]


@pytest.mark.parametrize('mesh', [(2, 2, 2)], indirect=True, ids=str)
@pytest.mark.parametrize('place', PLACES)
def test_no_constraint_of_the_decoder_can_be_left_out_unseen(mesh, place, monkeypatch):
  assert len(PLACES) == 15

  def forgetful(array, *axes):
    return array if sys._getframe(1).f_lineno == place else constrain(array, *axes)

  monkeypatch.setattr(decoders, 'constrain', forgetful)
  lost = SPLIT - constraints(scorer()), DRAWN - constraints(sampler())
  assert 1 <= max(some.total() for some in lost) <= 6


# ---- nothing moves unseen ----


@pytest.mark.parametrize('shape', [None, (2, 2, 2)], ids=str)
def test_what_was_not_put_on_the_devices_is_refused(shape):
  refused = functools.partial(pytest.raises, jax.errors.JaxRuntimeError, match=r'Disallowed .*transfer')
  with jax.set_mesh(make_mesh(shape)) if shape else contextlib.nullcontext():
    trainable, put = replicate({'w': np.ones(8, np.float32)}), make_batch({'y': np.float32(2)}, {'x': np.arange(8.0)})
    optimizer = make_optimizer(1e-3, warmup=1, steps=3, weight_decay=0.1, max_gradient=1.0)
    state, layout = init_optimizer(optimizer, trainable)
    step = make_step(lambda t, _, b: ((t['w'] * b['x']).sum() * b['y'], {}), optimizer, trainable, layout)
    for whole, parts in (
      (put.whole, {'x': np.arange(8.0)[None]}),
      ({'y': np.float32(2)}, put.parts),
      ({'y': 2.0}, put.parts),
    ):
      with refused():
        step(trainable, state, None, Batch(whole, parts))
    _, _, metrics = step(trainable, state, None, put)
    assert float(metrics['loss']) == 56
    decoder = build()
    scaled = jax.jit(lambda before, rows, scale: rows.tokens * scale)
    with refused():
      map_rows(lambda before, rows: scaled(before, rows, 2.0), decoder, PROMPTS, REPLIES)
    adapter = jax.tree.map(np.asarray, Adapter(CONFIG, 2, rngs=nnx.Rngs(0)))
    with refused():
      sample(decoder, PROMPTS, item_keys(0, 'test', KEYS), EOS, Sampling(5, batch_size=8), adapter=adapter)


def test_batches_are_split_by_rows(mesh):
  rows = shard_batch(rows_of_all())
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  for array in jax.tree.leaves(rows):
    assert {shard.data.shape for shard in array.addressable_shards} == {(8 // parts, *array.shape[1:])}
  # Numbers go to every device, as does what `replicate` is given.
  for array in (shard_batch(np.float32(2)), replicate(np.arange(8))):
    assert array.sharding.is_fully_replicated and len(array.sharding.device_set) == 8


@pytest.mark.parametrize('mesh', [(2, 2, 2)], indirect=True, ids=str)
def test_a_reply_s_state_does_not_depend_on_its_company(mesh):
  decoder = build()
  # In one batch, where all rows but one are padded, and alone.
  together = reply_states(decoder, {}, PROMPTS, REPLIES, batch_size=8)
  alone = reply_states(decoder, {}, PROMPTS[3:4], REPLIES[3:4], batch_size=8)
  assert together.shape == (8, CONFIG.embed_dim)
  np.testing.assert_allclose(alone[0], together[3], atol=1e-4)


# ---- rules ----


def test_a_mesh_axis_goes_to_the_dimension_whose_rule_comes_first():
  mesh = make_mesh((2, 2, 2))
  assert spec((8, 8), ('heads', 'mlp'), mesh) == PartitionSpec(('tensor',), None)
  assert spec((8, 8), ('embed', 'batch'), mesh) == PartitionSpec(None, ('data', 'fsdp'))
  assert spec((8, 8), ('embed', 'spread'), mesh) == PartitionSpec(None, ('tensor', 'fsdp'))
  with pytest.raises(ValueError, match='2 logical axes'):
    spec((8, 8, 8), ('embed', 'spread'), mesh)


def test_what_does_not_divide_is_not_split():
  mesh = make_mesh((2, 2, 2))
  assert spec((8, 5), ('embed', 'heads'), mesh) == PartitionSpec(('fsdp',), None)
  # Of several mesh axes those are taken that divide.
  assert spec((6, 3), ('batch', None), mesh) == PartitionSpec(('data',), None)
  # Then a mesh axis is free for another dimension.
  assert spec((5, 8), ('heads', 'mlp'), mesh) == PartitionSpec(None, ('tensor',))
  assert spec((8, 2), ('embed', 'spread'), mesh) == PartitionSpec(('fsdp',), ('tensor',))


@pytest.mark.parametrize('shape', [(3, 1, 1), (8, 1), (-1, -1, 1), (0, 1, 8), (16, 1, 1), (-1, 3, 1), (-2, 2, 2)])
def test_a_mesh_that_does_not_fit_is_refused(shape):
  with pytest.raises(UserError, match=r'config\.mesh'):
    make_mesh(shape)


def test_one_size_takes_the_devices_that_are_left():
  assert dict(make_mesh((-1, 2, 1)).shape) == {'data': 4, 'fsdp': 2, 'tensor': 1}
  assert dict(make_mesh((2, 2, -1)).shape) == {'data': 2, 'fsdp': 2, 'tensor': 2}


# ---- the step ----


def test_a_step_that_is_not_finite_changes_nothing_and_says_so():
  trainable = {'w': jnp.array([1.0, 2.0])}
  optimizer = make_optimizer(0.1, warmup=0, steps=10, weight_decay=0.0, max_gradient=1.0)
  state, layout = init_optimizer(optimizer, trainable)
  step = make_step(lambda t, frozen, batch: ((t['w'] * batch['x']).sum(), {}), optimizer, trainable, layout)
  for bad in (np.nan, np.inf):
    trainable, state, metrics = step(trainable, state, None, make_batch({}, {'x': np.array([1.0, bad])}))
    assert bool(metrics['skipped']) and trainable['w'].tolist() == [1, 2]
  assert int(optax.tree_utils.tree_get(state, 'count', filtering=lambda path, _: 'Adam' in str(path))) == 0
  trainable, state, metrics = step(trainable, state, None, make_batch({}, {'x': np.array([3.0, 4.0])}))
  assert not bool(metrics['skipped']) and float(metrics['grad_norm']) == pytest.approx(5)
  # Adam's first step is the learning rate, whatever the gradient.
  np.testing.assert_allclose(trainable['w'], [0.9, 1.9], atol=1e-5)
