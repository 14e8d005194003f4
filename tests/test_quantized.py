"""A base in 8 or 4 bits: what is computed is what its whole numbers and scales say, and LoRA learns beside it."""

import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_reference import numpy_log_probs, random_tensors, tiny_config
from smoke import ROOT
from test_peft import random_adapter

from charjax import defaults, limits, starting_model
from charjax.engine.decode import prepare
from charjax.engine.score import score
from charjax.errors import UserError
from charjax.main import main
from charjax.mesh import make_mesh, shardings
from charjax.model import lora
from charjax.model.blocks import block_parameters
from charjax.model.checkpoint_source import Tensors
from charjax.model.decoder import Runtime, forward, lower_layers
from charjax.model.weights import dequantized, make_decoder
from charjax.training.heads import make_trainable
from charjax.training.step import init_optimizer, make_batch, make_optimizer, make_step

qwix = pytest.importorskip('qwix')

# Several tiles of inputs everywhere.
CONFIG = tiny_config(embed_dim=64, mlp_dim=96, head_dim=64, tied_embeddings=False)
TENSORS = random_tensors(CONFIG)
PROMPTS, REPLIES = [[3, 1, 4, 1, 5], [9, 2]], [[6, 5, 3, 5], [8, 9, 7]]
both = pytest.mark.parametrize('kind', ['int8', 'int4'])


@pytest.fixture(autouse=True)
def hastily_compiled():
  """Tiny programs run once: what XLA would gain by making them fast takes longer than they do."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def build(kind='', config=CONFIG, tensors=TENSORS, **runtime):
  return make_decoder(config, tensors, jnp.float32, Runtime(quantize=kind, **runtime))


def decoded(decoder):
  """The weights that a quantised decoder stands for, in float64 and by NumPy alone."""
  out = dict(TENSORS)
  for name in CONFIG.dense_projections:
    q = np.asarray(getattr(decoder.blocks, name)[...]).astype(np.float64)
    s = np.asarray(getattr(decoder.blocks, f'{name}_scale')[...]).astype(np.float64)
    for axis, (size, count) in enumerate(zip(q.shape, s.shape, strict=True)):
      s = np.repeat(s, size // count, axis)
    out[f'blocks.{name}'] = q * s
  return out


@both
@pytest.mark.parametrize('scan', [False, True], ids=['unrolled', 'scanned'])
def test_log_probs_are_those_of_the_numbers_it_holds(kind, scan):
  decoder = build(kind, scan_layers=scan)
  tensors = decoded(decoder)
  found = score(decoder, PROMPTS, REPLIES, batch_size=2)
  for prompt, reply, log_probs in zip(PROMPTS, REPLIES, found, strict=True):
    expected = numpy_log_probs(CONFIG, tensors, prompt + reply)[len(prompt) - 1 : -1]
    np.testing.assert_allclose(log_probs, expected[np.arange(len(reply)), reply], atol=1e-4)
  plain = score(dequantized(decoder), PROMPTS, REPLIES, batch_size=2)
  for one, other in zip(found, plain, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)


@both
def test_replies_are_drawn_from_the_numbers_that_training_reads(kind):
  """Products in bfloat16 round neither what is in few bits nor its scales."""
  decoder = build(kind, compute_dtype=jnp.bfloat16)
  for layer, (weights, _) in enumerate(prepare(decoder, None, ())[0]):
    for name in CONFIG.dense_projections:
      for one in (name, f'{name}_scale'):
        stored = getattr(decoder.blocks, one)[layer]
        assert weights[one].dtype == stored.dtype
        np.testing.assert_array_equal(weights[one], stored)


@both
def test_the_error_is_within_half_a_step_of_each_scale(kind):
  decoder = build(kind)
  steps = {'int8': 127.5, 'int4': 7.5}[kind]
  for name, value in decoded(decoder).items():
    part = name.removeprefix('blocks.')
    if part not in CONFIG.dense_projections:
      continue
    parameter, scale = block_parameters(CONFIG)[part], getattr(decoder.blocks, f'{part}_scale')[...]
    inputs = tuple(range(1, 1 + parameter.inputs))
    tiles = [size // count for size, count in zip(value.shape, scale.shape, strict=True)]
    whole = [value.shape[axis] if axis in inputs else 1 for axis in range(value.ndim)]
    assert tiles == (whole if kind == 'int8' else [32 if axis == inputs[-1] else 1 for axis in range(value.ndim)])
    largest = np.abs(TENSORS[name]).max() / steps
    # The largest of a scale is rounded down to the last whole number: by half a step, too.
    assert 0.2 * largest < np.abs(value - TENSORS[name]).max() <= 0.5001 * largest
    assert getattr(decoder.blocks, part)[...].dtype == jnp.dtype(kind)


def loss(adapter, decoder):
  tokens = np.array([PROMPTS[0] + REPLIES[0]])
  hidden, _ = forward(decoder, tokens, jnp.arange(tokens.shape[1])[None], adapter=adapter)
  return jnp.sin(hidden).sum()


@pytest.mark.parametrize(
  ('kind', 'ways'),
  [('int8', {}), ('int4', {'scan_layers': True, 'remat': True})],
  ids=['int8, unrolled', 'int4, scanned, recomputed'],
)
def test_an_adapter_learns_as_beside_the_weights_that_it_stands_for(kind, ways):
  decoder = build(kind, **ways)
  adapter = random_adapter(CONFIG)
  found = jax.jit(jax.grad(loss))(adapter, decoder)
  expected = jax.jit(jax.grad(loss))(adapter, dequantized(decoder))
  for name, pair in expected.arrays().items():
    for part, value in pair.items():
      assert np.abs(value).max() > 1e-3
      np.testing.assert_allclose(found.arrays()[name][part], value, atol=1e-4 * np.abs(value).max(), rtol=1e-4)
  merged = lora.merge(decoder, adapter)
  np.testing.assert_allclose(loss(None, merged), jax.jit(loss)(adapter, decoder), rtol=1e-4)


def test_a_train_step_changes_the_adapter_alone():
  decoder = build('int8', scan_layers=True, remat=True)
  before = jax.tree.map(np.asarray, decoder)
  trainable = make_trainable(decoder, 2, 0, lora_targets=('q', 'down'))
  optimizer = make_optimizer(1e-2, 1, 10, 0.0, 1.0)
  state, layout = init_optimizer(optimizer, trainable)
  step = make_step(
    lambda trainable, decoder, _: (loss(trainable['adapter'], decoder), {}), optimizer, trainable, layout
  )
  losses = []
  for _ in range(3):
    trainable, state, values = step(trainable, state, decoder, make_batch({}, {'x': np.zeros(1)}))
    assert not values['skipped']
    losses.append(float(values['loss']))
  assert losses[2] < losses[1] < losses[0] == pytest.approx(float(jax.jit(loss)(None, decoder)), abs=1e-4)
  jax.tree.map(np.testing.assert_array_equal, before, decoder)


def test_training_keeps_no_weight_in_full():
  """What the forward pass hands to the backward pass has no array of the size of a weight, but the whole numbers."""
  decoder, adapter = build('int8', scan_layers=True), random_adapter(CONFIG)
  _, backward = jax.vjp(lambda adapter: loss(adapter, decoder), adapter)
  sizes = [np.prod(leaf.shape) for leaf in jax.tree.leaves(backward) if leaf.dtype == jnp.float32]
  assert max(sizes) < CONFIG.num_layers * CONFIG.embed_dim * CONFIG.mlp_dim


def test_lower_layers_and_meshes_change_no_number():
  expected = {kind: score(build(kind), PROMPTS, REPLIES, batch_size=8) for kind in ('int8', 'int4')}
  lower = lower_layers(build('int4'), 1)
  assert lower.blocks.q_scale[...].shape[0] == lower.blocks.q[...].shape[0] == 1
  for kind, log_probs in expected.items():
    with jax.set_mesh(make_mesh((2, 2, 2))):
      decoder = build(kind, scan_layers=True)
      for found, wanted in zip(jax.tree.leaves(decoder), jax.tree.leaves(shardings(decoder)), strict=True):
        assert found.sharding == wanted
      assert {'tensor', 'fsdp'} <= set(str(decoder.blocks.gate[...].sharding.spec).split("'"))
      assert ('fsdp' in str(decoder.blocks.gate_scale[...].sharding.spec)) == (kind == 'int4')
      for found, wanted in zip(score(decoder, PROMPTS, REPLIES, batch_size=8), log_probs, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_each_tensor_is_quantised_as_it_is_read():
  shapes = {TENSORS[f'blocks.{name}'].shape for name in CONFIG.dense_projections}
  read = []

  def whole():
    return sum(array.shape in shapes and array.dtype == jnp.float32 for array in jax.live_arrays())

  def one(name, dtype):
    read.append((name, whole()))
    return TENSORS[name].astype(dtype)

  gc.collect()
  before = whole()
  decoder = build('int8', tensors=Tensors(TENSORS.keys(), one))
  assert sorted(name for name, _ in read) == sorted(TENSORS)
  assert {count for _, count in read} == {before} and whole() == before
  assert decoder.blocks.q[...].dtype == jnp.int8


def test_a_run_that_trained_beside_few_bits_starts_another_from_them(tmp_path):
  from test_starting_model import BASE, asked, write_run

  adapter = random_adapter(BASE.config)
  run = write_run(tmp_path / 'run', asked(quantize='int4', dtype='float32'), {'adapter': adapter})
  decoder = make_decoder(BASE.config, BASE.tensors, jnp.float32, Runtime(quantize='int4'))
  expected = lora.merge(decoder, adapter)
  found = starting_model.load(asked(run)).tensors
  for name in BASE.config.dense_projections:
    np.testing.assert_allclose(found[f'blocks.{name}'], getattr(expected.blocks, name)[...], atol=2e-6)
  before = starting_model.contents(asked(run))
  (run / 'config.json').write_text((run / 'config.json').read_text().replace('int4', 'int8'))
  assert starting_model.contents(asked(run)) != before


@pytest.mark.parametrize('section', ['preference', 'policy'])
def test_all_parameters_cannot_be_trained_in_few_bits(section):
  config = defaults.get_config()
  config.model.quantize = 'int8'
  config.preference.lora_rank = config.policy.lora_rank = 2
  limits.check_model(config, CONFIG)
  config[section].lora_rank = 0
  with pytest.raises(UserError, match=f'{section}.lora_rank is 0, which trains all .* config.model.quantize=int8 are'):
    limits.check_model(config, CONFIG)
  if section == 'preference':
    config.preference.epochs = 0.0
    limits.check_model(config, CONFIG)


def test_without_qwix_a_line_says_so(monkeypatch, capsys):
  config = defaults.get_config()
  config.model.quantize = 'int4'
  monkeypatch.setattr(starting_model.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"needs qwix, which is not installed; run: pip install 'charjax\[quantize\]'"):
    starting_model.check(config.model)
  plan = ['plan', f'--config={ROOT}/configs/llama3_70b_lora.py', '--topology=h100:8', '--config.model.quantize=int8']
  assert main(plan) == 2 and 'needs qwix' in capsys.readouterr().err
  config.model.quantize = 'int3'
  with pytest.raises(UserError, match=re.escape("model.quantize is 'int3'; choose from '', int8, int4")):
    limits.check(config)
