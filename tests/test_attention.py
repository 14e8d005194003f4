"""Attention: every form of it beside float64 NumPy, and the programs that the TPU's compiler makes of its kernels.

No TPU is needed: kernels are interpreted on the CPU, and compiled for a TPU that is not there.
"""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import NamedSharding

from charjax.engine.batch import compute_prefix
from charjax.mesh import make_mesh, shardings, spec
from charjax.model import attention, attention_tpu, decode_kernel
from charjax.model.attention import Before, Places, Seats, make_attention
from charjax.model.config import ModelConfig
from charjax.model.decoder import Prefix, Runtime, forward, layer_weights, logits, make_cache
from charjax.model.weights import abstract_decoder
from charjax.training.step import Batch, describe_optimizer, make_step

RNG = np.random.default_rng(0)


def normal(*shape):
  return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture
def interpreted(monkeypatch):
  """Kernels are computed step by step, on whatever there is. What JAX keeps of them is not for others."""
  original = pl.pallas_call
  monkeypatch.setattr(pl, 'pallas_call', lambda *args, **kwargs: original(*args, **(kwargs | {'interpret': True})))
  jax.clear_caches()
  yield
  jax.clear_caches()


def assert_close(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


# ---- float64 ----


def reference(q, k, v, mask, scale, cap, grad):
  """One query head: its mix [T, H] of values, and the gradients of q, k and v for that of the mix."""
  raw = q @ k.T * scale
  score = cap * np.tanh(raw / cap) if cap else raw
  weight = np.where(mask, np.exp(score - score.max()), 0)
  weight = weight / np.maximum(weight.sum(-1, keepdims=True), 1e-300)
  back = weight * (grad @ v.T - (weight * (grad @ v.T)).sum(-1, keepdims=True))
  back = back * (1 - (score / cap) ** 2 if cap else 1) * scale
  return weight @ v, back @ k, back.T @ q, weight.T @ grad


def reference_rows(q, k, v, masks, shared, scale, cap, grad):
  """All of it, of rows over their own keys and the shared ones: the mix, and the gradients of what was given."""
  q, k, v, grad = (np.asarray(x, np.float64) for x in (q, k, v, grad))
  parts = [(k, v), *((np.asarray(k, np.float64), np.asarray(v, np.float64)) for k, v in shared)]
  out, grad_q, grads = np.zeros(q.shape), np.zeros(q.shape), [(np.zeros(k.shape), np.zeros(v.shape)) for k, v in parts]
  rows, _, kv_heads, groups, _ = q.shape
  for b, head, g in np.ndindex(rows, kv_heads, groups):
    at = [(b * len(k) // rows, head) for k, _ in parts]
    keys, values = (np.concatenate(x) for x in ([k[i].T for (k, _), i in zip(parts, at, strict=True)],
                                                [v[i] for (_, v), i in zip(parts, at, strict=True)]))  # fmt: skip
    mask = np.concatenate([mask[b] for mask in masks], -1)
    out[b, :, head, g], grad_q[b, :, head, g], *found = reference(
      q[b, :, head, g], keys, values, mask, scale, cap, grad[b, :, head, g]
    )
    ends = np.cumsum([mask.shape[-1] for mask in masks])[:-1]
    for (grad_k, grad_v), i, of_k, of_v in zip(grads, at, *(np.split(x, ends) for x in found), strict=True):
      grad_k[i] += of_k.T
      grad_v[i] += of_v
  return out, grad_q, *grads[0], [tuple(pair) for pair in grads[1:]]


# ---- many tokens a row ----

ROWS, WIDTH, KV_HEADS, GROUPS, SIZE = 4, 40, 2, 3, 16
SHARED, PROMPTS = 21, 50  # tokens before all rows, and of the prompts before each group of two rows
ONE, PACKED, AFTER = 'one text a row', 'packed texts', 'packed texts, each after its own prompt'


def texts_of(lengths, width):
  return np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, width - sum(lengths)])


def case(kind, window=None):
  """Where tokens are, and what is seen of the own and of the shared keys, each [B, T, ...]."""
  before, masks_before, start = [], [], np.zeros((ROWS, WIDTH), int)
  lengths = [[33], [40], [7], [1]] if kind == ONE else [[11, 20, 2], [40], [1, 1, 3, 30], [13, 13, 13]]
  texts = np.stack([texts_of(some, WIDTH) for some in lengths])
  position = np.stack([np.concatenate([*map(np.arange, some), np.zeros(WIDTH - sum(some))]) for some in lengths])
  if kind != PACKED:
    real = 17  # of the tokens before all
    before.append(Before(Places(np.arange(SHARED)[None], (np.arange(SHARED) < real)[None].astype(int))))
    masks_before.append(np.broadcast_to(np.arange(SHARED) < real, (ROWS, WIDTH, SHARED)))
    start += real
  if kind == AFTER:
    prompts = np.array([30, 20])
    there = (np.arange(PROMPTS) < prompts[:, None]).astype(int)
    before.append(Before(Places(np.broadcast_to(real + np.arange(PROMPTS), there.shape), there)))
    masks_before.append(np.repeat(there, 2, 0)[:, None].astype(bool).repeat(WIDTH, 1))
    start = start + np.repeat(prompts, 2)[:, None]
  positions = (start + position).astype(int)
  slots = np.arange(WIDTH)
  own = (texts[:, :, None] == texts[:, None]) & (texts > 0)[:, None] & (slots[:, None] >= slots)
  places = [positions, *(np.repeat(some.places.positions, ROWS // len(some.places.positions), 0) for some in before)]
  masks = [own, *masks_before]
  if window:
    masks = [mask & (positions[:, :, None] - at[:, None] < window) for mask, at in zip(masks, places, strict=True)]
  return jax.tree.map(jnp.asarray, (Places(positions, texts), before)), masks


@pytest.mark.parametrize('kind', [ONE, PACKED, AFTER])
@pytest.mark.parametrize('form', ['xla', 'cpu', 'tpu'])
@pytest.mark.parametrize(('cap', 'scale', 'window'), [(0.0, 0.0, None), (2.0, 0.7, None), (0.0, 0.0, 9)])
def test_many_tokens_a_row(form, kind, cap, scale, window, interpreted, caplog, monkeypatch):
  monkeypatch.setattr(attention, '_IN_CACHE', 2 * WIDTH * KV_HEADS * GROUPS * WIDTH)  # two rows, or one
  (places, before), masks = case(kind, window)
  q = normal(ROWS, WIDTH, KV_HEADS, GROUPS, SIZE)
  k, v = normal(ROWS, KV_HEADS, SIZE, WIDTH), normal(ROWS, KV_HEADS, WIDTH, SIZE)
  sizes = [some.places.texts.shape for some in before]
  shared = [(normal(a, KV_HEADS, SIZE, p), normal(a, KV_HEADS, p, SIZE)) for a, p in sizes]
  real = np.asarray(places.texts > 0)[..., None, None, None]
  grad = normal(*q.shape) * real

  @jax.jit
  def run(q, k, v, shared):
    attend = make_attention(form, places, None, before, scale=scale, cap=cap, windows=(window or 0, 0))
    out, pull = jax.vjp(partial(attend, window=window), q, k, v, shared)
    return out, *pull(jnp.asarray(grad))

  attention_tpu._say.cache_clear()
  found = run(q, k, v, shared)
  expected = reference_rows(q, k, v, masks, shared, scale or SIZE**-0.5, cap, grad)
  assert_close((found[0] * real, found[1:]), (expected[0] * real, expected[1:]))
  # What the kernels cannot do is said.
  said = form == 'tpu' and window and before
  assert [record.getMessage() for record in caplog.records] == [
    'attention goes through XLA in place of a kernel: a window of 9 tokens, which may begin in what stands before the '
    'rows'
  ][: bool(said)]


@pytest.mark.parametrize(('shape', 'kv_heads'), [((2, 2, 2), 2), ((1, 2, 4), 1), ((8, 1, 1), 2)], ids=str)
def test_a_few_rows_at_a_time_are_those_that_a_device_has(shape, kv_heads, monkeypatch):
  monkeypatch.setattr(attention, '_IN_CACHE', 1)
  rows, groups = 16, 4
  q, grad = normal(rows, WIDTH, kv_heads, groups, SIZE), normal(rows, WIDTH, kv_heads, groups, SIZE)
  k, v = normal(rows, kv_heads, SIZE, WIDTH), normal(rows, kv_heads, WIDTH, SIZE)
  places = Places(np.broadcast_to(np.arange(WIDTH), (rows, WIDTH)), np.ones((rows, WIDTH), int))

  def run(form, q, k, v):
    out, pull = jax.vjp(lambda *given: make_attention(form, places, None, [])(*given, [], None), q, k, v)
    return out, *pull(jnp.asarray(grad))

  expected = jax.jit(partial(run, 'xla'))(q, k, v)
  mesh = make_mesh(shape)
  with jax.set_mesh(mesh):
    axes = (
      ('batch', None, 'kv_heads', None if kv_heads > 1 else 'heads', None),
      *[('batch', 'kv_heads', None, None)] * 2,
    )
    given = [
      jax.device_put(array, NamedSharding(mesh, spec(array.shape, some, mesh)))
      for array, some in zip((q, k, v), axes, strict=True)
    ]
    compiled = jax.jit(partial(run, 'cpu')).lower(*given).compile()
    found = compiled(*given)
  assert_close(found, expected)
  # A head of keys that several devices have has its gradient summed; nothing else moves.
  assert set(re.findall(r'all-[a-z]+(?=\()', compiled.as_text())) <= {'all-reduce'}


def test_layers_of_several_windows_in_a_scan(interpreted):
  (places, _), _ = case(PACKED)
  q = normal(ROWS, WIDTH, KV_HEADS, GROUPS, SIZE)
  k, v = normal(ROWS, KV_HEADS, SIZE, WIDTH), normal(ROWS, KV_HEADS, WIDTH, SIZE)
  attend = make_attention('tpu', places, None, [], windows=(5, 0, 1000, 9))
  found = jax.jit(lambda windows: jax.lax.map(lambda window: attend(q, k, v, [], window), windows))(
    jnp.array([5, 2**30, 1000, 9])
  )
  for out, window in zip(found, (5, None, None, 9), strict=True):
    expected, *_ = reference_rows(q, k, v, case(PACKED, window)[1], [], SIZE**-0.5, 0.0, np.zeros(q.shape))
    real = np.asarray(places.texts > 0)[..., None, None, None]
    assert_close(out * real, expected * real)


# ---- one token a row, over a cache ----


@pytest.mark.parametrize('form', ['xla', 'cpu', 'tpu'])
@pytest.mark.parametrize(('slots', 'cap', 'window'), [(128, 0.0, None), (300, 2.0, None), (300, 0.0, 150)])
def test_one_token_a_row(form, slots, cap, window, interpreted, monkeypatch):
  monkeypatch.setattr(decode_kernel, '_BLOCK_BYTES', 1)  # The smallest blocks, and three of them where slots are 300.
  rows, count = 8, 300
  q = normal(rows, 1, KV_HEADS, GROUPS, SIZE)
  k, v = normal(rows, KV_HEADS, SIZE, slots), normal(rows, KV_HEADS, slots, SIZE)
  shared = [(normal(a, KV_HEADS, SIZE, 20), normal(a, KV_HEADS, 20, SIZE)) for a in (1, 4)]
  # Keys of two texts lie in any order. Rows 0 and 1 see none of their own, and the others none in some blocks.
  texts, position = RNG.integers(0, 3, (rows, slots)), np.stack([RNG.permutation(count)[:slots] for _ in range(rows)])
  texts[:2], texts[2, :256], texts[3, 128:], texts[4, 128:256] = 0, 0, 0, 0
  queries = Places(np.full((rows, 1), 200), np.full((rows, 1), 2))
  there = (np.arange(20) < np.array([[3], [19], [20], [7]])).astype(int)
  # Rows read texts in any order: up to three the same, and none the third.
  reads = np.array([3, 0, 1, 3, 1, 0, 1, 3])
  seat = np.array([3 * text + np.sum(reads[:row] == text) for row, text in enumerate(reads)])
  seated = np.zeros((4, 3), int)
  seated.flat[seat] = np.arange(rows)
  before = [
    Before(Places(np.arange(20)[None], (np.arange(20) < 13)[None].astype(int))),
    Before(Places(np.broadcast_to(np.arange(20), (4, 20)) + 20, there), Seats(seated, seat)),
  ]
  masks = [
    (texts == 2) & (position <= 200),
    np.broadcast_to(np.arange(20) < 13, (rows, 20)),
    there[reads] > 0,
  ]
  if window:
    masks = [
      mask & (200 - at < window) for mask, at in zip(masks, (position, np.arange(20), 20 + np.arange(20)), strict=True)
    ]
  masks = [mask[:, None] for mask in masks]

  @jax.jit
  def run(q, k, v, shared):
    places = jax.tree.map(jnp.asarray, (queries, Places(position, texts), before))
    return make_attention(form, *places, cap=cap, windows=(window or 0,))(q, k, v, shared, window)

  by_row = [shared[0], tuple(array[reads] for array in shared[1])]
  expected, *_ = reference_rows(q, k, v, masks, by_row, SIZE**-0.5, cap, np.zeros(q.shape))
  some = np.concatenate(masks, -1).any((1, 2))  # With a window, the first two rows see nothing, and give anything.
  assert_close(run(q, k, v, shared)[some], expected[some])


def test_the_kernel_accumulates_bfloat16_in_float32(interpreted):
  # In bfloat16 a sum of 2048 ones would stop at 256, and its mean be 8 times too small or large.
  q, k = np.zeros((2, 1, 4, 8)), np.zeros((2, 1, 8, 2048))
  v, seen = np.ones((2, 1, 2048, 8)), np.ones((2, 2048), bool)
  out, log_sum = decode_kernel.attend_cache(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), seen, scale=1.0)
  assert out.dtype == log_sum.dtype == jnp.float32
  np.testing.assert_allclose(out, 1, rtol=1e-6)
  np.testing.assert_allclose(log_sum, np.log(2048), rtol=1e-6)


# ---- what compilers make of it ----

LLAMA = ModelConfig(
  num_layers=2, embed_dim=256, num_heads=8, num_kv_heads=4, head_dim=64, mlp_dim=512, vocab_size=512
)  # fmt: skip
SLOTS = 640  # which no other dimension has


@pytest.fixture
def as_on_devices():
  """What charjax.main asks of products where there is more than a CPU."""
  with jax.default_matmul_precision('highest'):
    yield


@pytest.fixture(scope='module')
def chips(compiled_anew):
  """Four chips of a TPU, as far as its compiler knows."""
  pytest.importorskip('libtpu', reason='the compiler for TPUs is not installed; the tpu extra has it')
  settings = {
    'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }  # fmt: skip
  with pytest.MonkeyPatch.context() as patch:
    for name, value in settings.items():
      patch.setenv(name, value)
    return topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices


def given(tree, layout=None):
  """Arrays that are not there, in the layouts given or split along their first axis."""
  mesh = jax.sharding.get_mesh()

  def rows(array):
    return NamedSharding(mesh, spec(array.shape, ('batch', 'kv_heads', None, None)[: array.ndim], mesh))

  layout = layout or jax.tree.map(rows, tree)
  return jax.tree.map(lambda x, some: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=some), tree, layout)


def integers(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def abstract(kind, dtype):
  decoder = abstract_decoder(LLAMA, dtype, Runtime(jnp.bfloat16, jnp.bfloat16, kind, scan_layers=True, remat=True))
  return given(decoder, shardings(decoder))


def calls(compiled):
  """How often each kernel is called in the text of a program for a TPU."""
  return Counter(re.findall(r'%(\w+?)[.\d]* = [^\n]*custom_call_target="tpu_custom_call"', compiled.as_text()))


def test_a_train_step_for_a_tpu(chips, as_on_devices):
  """Packed replies, each after its own prompt, and what stands before all."""

  def loss(trainable, frozen, batch):
    decoder = trainable['decoder']
    shared = compute_prefix(decoder, batch['shared'], jnp.array([100]))
    asked = compute_prefix(decoder, batch['prompts'], batch['lengths'], before=[shared])
    hidden, _ = forward(decoder, batch['tokens'], batch['positions'], batch['texts'], before=[shared, asked])
    return -jax.nn.log_softmax(logits(decoder, hidden))[..., 0].mean(), {}

  with jax.set_mesh(make_mesh((1, 2, 2), chips)):
    trainable, optimizer = {'decoder': abstract('tpu', jnp.float32)}, optax.adamw(1e-3)
    state, layout = describe_optimizer(optimizer, trainable)
    rows = {name: integers(8, 300) for name in ('tokens', 'positions', 'texts')}
    batch = given({**rows, 'prompts': integers(4, 200), 'lengths': integers(4)})
    parts = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), batch)
    step = make_step(loss, optimizer, trainable, layout).__wrapped__
    program = step.lower(trainable, state, None, Batch({'shared': given(integers(1, 128))}, parts)).compile()
  # Of one scanned layer: the text before all reads one part of keys, the prompts two and the rows three, once and again
  # where the layer is computed anew for its gradient.
  assert calls(program) == {
    'splash_mha_fwd_segmented_residuals': 12,
    'splash_mha_dq_segmented_no_residuals': 6,
    'splash_mha_dkv_segmented_no_residuals': 6,
  }


@pytest.mark.parametrize('kind', ['xla', 'tpu'])
def test_a_decode_step_gathers_no_cache(kind, request, as_on_devices):
  """On eight devices of the CPU, and on four of a TPU."""
  devices = request.getfixturevalue('chips') if kind == 'tpu' else jax.devices()

  def step(decoder, layers, shared, asked, cache, token, position, index):
    hidden, cache = forward(
      decoder, token, position, layers=layers, before=[shared, asked], cache=cache, cache_index=index
    )
    return logits(decoder, hidden[:, 0]), cache

  with jax.set_mesh(make_mesh((2, 2, 2) if kind == 'xla' else (1, 2, 2), devices)):
    decoder = abstract(kind, jnp.bfloat16)
    layers = jax.eval_shape(layer_weights, decoder)
    cache = jax.eval_shape(partial(make_cache, rows=16, slots=SLOTS), decoder)
    room = jax.eval_shape(partial(make_cache, rows=8, slots=320), decoder)
    first = jax.eval_shape(partial(make_cache, rows=1, slots=128), decoder)
    asked = Prefix(room.kv, room.places, Seats(integers(8, 4), integers(16)))
    program = (
      jax.jit(step, donate_argnums=4)
      .lower(decoder, layers, given(Prefix(*first)), given(asked), given(cache), *given((integers(16, 1),) * 2), 3)
      .compile()
    )
  text = program.as_text()
  assert calls(program) == ({'attend_cache': 2} if kind == 'tpu' else {})
  gathered = re.findall(r'= \S+\[([\d,]+)\]\S* all-gather(?:-start)?\(', text)
  # Keys and values of a token have as many numbers as a head has.
  found = [set(map(int, shape.split(','))) for shape in gathered]
  assert not [sizes for sizes in found if LLAMA.head_dim in sizes and sizes & {SLOTS, 320}]
