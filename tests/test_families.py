"""Each family of models: the numbers of transformers on the same checkpoint, and what is refused by name."""

import dataclasses
import json
import re
from functools import partial

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx
from llama_reference import random_tensors, softmax, tiny_config
from safetensors.numpy import load_file, save_file
from test_checkpoints import TEMPLATE, TOKENS

from charjax.engine.batch import compute_prefix, item_keys
from charjax.engine.sample import Sampling, sample
from charjax.engine.score import score
from charjax.errors import UserError
from charjax.mesh import make_mesh
from charjax.model import checkpoint_source
from charjax.model.decoder import Runtime, forward, lower_layers
from charjax.model.families import SUPPORTED, from_hf
from charjax.model.lora import Adapter
from charjax.model.rope import rotary, rotate, scaling
from charjax.model.weights import make_decoder

ALL = [(family, title, place > 0) for family, cases in parity.CASES.items() for place, title in enumerate(cases)]


@pytest.fixture
def hastily_compiled():
  """Tiny programs run once: what XLA would gain by making them fast takes longer than they do."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


# Of each family one checkpoint in all ways, and of the other, which scripts/parity.py measures as well, the log-probs.
@pytest.mark.usefixtures('hastily_compiled')
@pytest.mark.parametrize(
  ('family', 'title', 'only_prefill'), ALL, ids=[f'{family}: {title}' for family, title, _ in ALL]
)
def test_a_checkpoint_computes_what_transformers_does(family, title, only_prefill, tmp_path):
  pytest.importorskip('torch')
  row = parity.measure(family, parity.CASES[family][title], tmp_path, only_prefill)
  assert not row.failures(), row
  assert only_prefill or None not in row


def test_every_supported_family_has_checkpoints():
  assert set(parity.CASES) == set(SUPPORTED)


# ---- layers of several kinds, in every way a text can be read ----

KINDS = {
  'windows and two ropes': tiny_config(
    num_layers=3, windows=(4, 0, 7), local_rope_theta=30.0, rope_factors=(1.0, 0.5, 0.25, 0.125), rope_gain=1.1
  ),
  'a layer without rope, biases, norms after': tiny_config(
    num_layers=3,
    rope_layers=(True, False, True),
    windows=(0, 5, 0),
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    qk_norm='all',
    post_norms=True,
    norm_offset=1.0,
    rotary_dim=4,
  ),
  'experts': tiny_config(num_experts=4, experts_per_token=2, qk_norm='head', windows=(5, 0)),
}
PREFIX, ROWS = (list(range(1, 8)), list(range(20, 26))), 4


@pytest.fixture(params=KINDS, scope='module')
def config(request):
  return KINDS[request.param]


def build(config, **runtime):
  tensors = {name: value * (3 if 'router' in name else 1) for name, value in random_tensors(config).items()}
  return make_decoder(config, tensors, jnp.float32, Runtime(**runtime))


whole = jax.jit(lambda decoder, tokens: forward(decoder, tokens, jnp.arange(tokens.shape[1])[None])[0])


@pytest.mark.usefixtures('hastily_compiled')
@pytest.mark.parametrize('scan', [False, True], ids=['unrolled', 'scanned'])
def test_prefixes_of_rows_and_of_groups_are_as_if_they_stood_in_each(config, scan):
  decoder = build(config, scan_layers=scan)
  rng = np.random.default_rng(0)
  first, seconds, rows = (rng.integers(0, 48, shape) for shape in ((1, 6), (2, 5), (ROWS, 9)))

  @jax.jit
  def in_parts(decoder):
    shared = compute_prefix(decoder, np.pad(first, ((0, 0), (0, 3))), jnp.array([6]))
    groups = compute_prefix(decoder, np.pad(seconds, ((0, 0), (0, 2))), jnp.array([5, 3]), None, (shared,))
    lengths = 6 + jnp.repeat(jnp.array([5, 3]), 2)[:, None]
    return forward(decoder, rows, lengths + jnp.arange(9), before=(shared, groups))[0]

  found = in_parts(decoder)
  for i, row in enumerate(rows):
    text = np.concatenate([first[0], seconds[i // 2][: (5, 3)[i // 2]], row])
    expected = whole(build(config), np.pad(text, (0, 20 - len(text)))[None])[0][len(text) - 9 : len(text)]
    np.testing.assert_allclose(found[i], expected, atol=2e-5)


@pytest.mark.usefixtures('hastily_compiled')
def test_a_tap_and_the_lower_layers_keep_each_layers_kind(config):
  tokens = np.random.default_rng(0).integers(0, 48, (2, 12))
  positions = np.tile(np.arange(12), (2, 1))
  for scan in (False, True):
    decoder = build(config, scan_layers=scan)
    lower = lower_layers(decoder, 2)
    assert lower.config.layer_kinds() == config.layer_kinds()[:2]
    (tapped, last), kv = jax.jit(partial(forward, tap=2))(decoder, tokens, positions)
    expected, expected_kv = jax.jit(forward)(decoder, tokens, positions)
    np.testing.assert_allclose(last, expected, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), kv, expected_kv)
    np.testing.assert_allclose(tapped, jax.jit(forward)(lower, tokens, positions)[0], atol=1e-5)


# ---- adapters and meshes ----


@pytest.mark.usefixtures('hastily_compiled')
def test_experts_have_no_adapters_and_all_else_has():
  config = KINDS['experts']
  adapter = Adapter(config, 2, rngs=nnx.Rngs(0))
  assert set(adapter.arrays()) == {'q', 'k', 'v', 'o'}
  tokens = np.random.default_rng(0).integers(0, 48, (1, 8))
  merged = build(config)
  for i, (name, pair) in enumerate(adapter.arrays().items()):
    b = jax.random.normal(jax.random.key(i), pair['b'].shape) * 0.3
    getattr(adapter, name)['b'][...] = b
    weight = getattr(merged.blocks, name)
    weight[...] = weight[...] + (pair['a'] @ b).reshape(weight.shape)
  found = forward(build(config, scan_layers=True), tokens, np.arange(8)[None], adapter=adapter)[0]
  np.testing.assert_allclose(found, whole(merged, tokens), atol=1e-4)
  with pytest.raises(UserError, match="lora target 'gate': experts have no adapters; choose from q, k, v, o"):
    Adapter(config, 2, rngs=nnx.Rngs(0), targets=('q', 'gate'))


@pytest.mark.usefixtures('hastily_compiled')
def test_a_mesh_splits_experts_and_changes_no_number():
  config = KINDS['experts']
  prompts, replies = [[1, 2, 3, 4, 5, 6], [1, 2, 9], [1, 2, 7, 7]] * 3, [[5, 9, 11, 3], [8], [3, 3, 30]] * 3
  keys = item_keys(0, 'test', [str(i) for i in range(9)])

  def compute():
    decoder = build(config, scan_layers=True)
    drawn = sample(decoder, prompts, keys, (47,), Sampling(5, batch_size=8))
    return decoder, score(decoder, prompts, replies, batch_size=8), drawn

  _, expected, expected_drawn = compute()
  with jax.set_mesh(make_mesh((2, 2, 2))):
    decoder, found, drawn = compute()
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
  assert [reply.tokens for reply in drawn] == [reply.tokens for reply in expected_drawn]
  assert {shard.data.shape for shard in decoder.blocks.gate[...].addressable_shards} == {(2, 2, 16, 64)}


# ---- rotary positions ----


def test_factors_of_frequencies_are_those_of_the_papers():
  rotated, theta = 8, 100.0
  frequency = theta ** (-np.arange(4) / 4)
  assert scaling('default', {}, rotated, theta, 'x') == ((), 1)
  np.testing.assert_allclose(scaling('linear', {'factor': 4}, rotated, theta, 'x')[0], [0.25] * 4)
  # Pairs turn 40, 12.6, 4 and 1.3 times within 251 tokens: the first as they did, the last four times slower.
  said = {'factor': 4, 'low_freq_factor': 2, 'high_freq_factor': 10, 'original_max_position_embeddings': 80 * np.pi}
  turns = 40 * frequency
  kept = (turns[2] - 2) / 8
  np.testing.assert_allclose(scaling('llama3', said, rotated, theta, 'x')[0], [1, 1, kept + (1 - kept) / 4, 0.25])
  said = {'factor': 4, 'beta_fast': 20, 'beta_slow': 2, 'original_max_position_embeddings': 80 * np.pi}
  factors, gain = scaling('yarn', said, rotated, theta, 'x')
  # The ramp runs from the pair that turns 20 times, rounded down, to the one that turns twice, rounded up.
  np.testing.assert_allclose(factors, [1, 1 - 0.75 / 3, 1 - 1.5 / 3, 0.25])
  assert gain == pytest.approx(0.1 * np.log(4) + 1)
  assert scaling('yarn', said | {'attention_factor': 0.5}, rotated, theta, 'x')[1] == 0.5


def test_a_part_of_a_head_is_rotated_and_the_rest_left():
  x = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
  cos, sin = rotary(jnp.arange(3)[None], 6, 10.0, (1.0, 2.0, 0.5), 1.5)
  found = np.asarray(rotate(x, cos, sin))
  turn = np.exp(1j * np.arange(3)[:, None] * 10 ** (-np.arange(3) / 3) * [1, 2, 0.5])[:, None] * 1.5
  turned = (x[0, ..., :3] + 1j * x[0, ..., 3:6]) * turn
  np.testing.assert_allclose(found[0], np.concatenate([turned.real, turned.imag, x[0, ..., 6:]], -1), atol=1e-5)


# ---- configs ----

SIZES = {key: value for key, value in parity._SIZES.items() if value is not None} | {'num_hidden_layers': 3}


@pytest.mark.parametrize(
  ('family', 'changes', 'said'),
  [
    ('gpt2', {}, r"model_type 'gpt2' is not supported; use one of llama, mistral, qwen2, .*mixtral"),
    (['llama'], {}, r'model_type "\[\'llama\'\]" is not supported'),
    ('llama', {'hidden_act': 'relu'}, r"field hidden_act = 'relu' is not supported; only 'silu'"),
    ('llama', {'sliding_window': 8}, r"field sliding_window = '8' is not supported for model_type 'llama'; only None"),
    ('llama', {'partial_rotary_factor': 0.5}, 'field partial_rotary_factor'),
    ('llama', {'rope_scaling': {'type': 'dynamic', 'factor': 2}}, "rope scaling 'dynamic' is not supported; only"),
    ('llama', {'rope_scaling': {'type': 'linear'}}, "rope scaling 'linear': factor is None; it must be a number"),
    ('llama', {'rope_scaling': 'linear'}, "field rope_scaling is 'linear'; it must be an object"),
    ('llama', {'rope_scaling': {'rope_type': 'yarn', 'factor': 'x'}}, "rope scaling 'yarn': factor is x; it must"),
    ('llama', {'rope_parameters': {'partial_rotary_factor': 0.5}}, 'partial_rotary_factor = 0.5 is not supported'),
    ('llama', {'attention_bias': 'yes'}, "field attention_bias is 'yes'; it must be true or false"),
    ('llama', {'head_dim': 7}, '7 of the 7 dimensions of a head .* even'),
    ('mistral', {'sliding_window': 0}, 'field sliding_window is 0; it must be above 0'),
    ('mistral', {'layer_types': ['full_attention'] * 3}, 'field layer_types = .* is not supported for'),
    ('mistral', {'num_hidden_layers': 10**12, 'sliding_window': 8}, 'num_hidden_layers is 1000000000000; it must be'),
    ('qwen2', {'layer_types': ['sliding_attention'] * 3}, 'layer_types has sliding_attention, but use_sliding_window'),
    ('qwen2', {'layer_types': ['full_attention'] * 2}, 'field layer_types is .*; it must be a list with 3 entries'),
    ('qwen3', {'layer_types': ['chunked_attention'] * 3}, "field layer_types has an entry 'chunked_attention'; only"),
    ('gemma2', {'query_pre_attn_scalar': 0}, 'field query_pre_attn_scalar is 0.0; it must be above 0'),
    ('gemma2', {'use_bidirectional_attention': True}, "field use_bidirectional_attention = 'True' is not supported"),
    ('gemma3_text', {'attn_logit_softcapping': 5.0}, "field attn_logit_softcapping = '5.0' is not supported for"),
    ('gemma3_text', {'sliding_window_pattern': 0}, 'field sliding_window_pattern is 0; it must be at least 1'),
    (
      'gemma3_text',
      {'rope_parameters': {'sliding_attention': {'rope_type': 'linear', 'factor': 2}}},
      'field rope_parameters: sliding_attention = .* is not supported',
    ),
    ('smollm3', {'no_rope_layers': [2, 1, 1]}, "field no_rope_layers has an entry '2'; only 0, 1"),
    ('phi3', {'rope_scaling': {'type': 'longrope'}}, "rope scaling 'longrope' is not supported"),
    ('qwen3_moe', {'mlp_only_layers': [1]}, r"field mlp_only_layers = '\[1\]' is not supported for"),
    ('qwen3_moe', {'decoder_sparse_step': 2}, "field decoder_sparse_step = '2' is not supported for"),
    (
      'qwen3_moe',
      {'num_experts': 2, 'num_experts_per_tok': 3, 'moe_intermediate_size': 8},
      '3 experts per token of 2; it cannot choose more than are',
    ),
    ('mixtral', {'num_local_experts': None}, 'field num_local_experts is missing; is this a complete checkpoint'),
  ],
)
def test_what_is_not_handled_is_refused_by_name(family, changes, said):
  with pytest.raises(UserError, match=said) as error:
    from_hf(SIZES | {'model_type': family} | changes, 'm/config.json')
  assert str(error.value).startswith('m/config.json: ') and '\n' not in str(error.value)


def test_configs_of_old_and_of_now_say_the_same():
  old = SIZES | {'model_type': 'gemma3_text', 'head_dim': 8, 'sliding_window_pattern': 2, 'sliding_window': 5}
  old |= {'rope_theta': 1e5, 'rope_local_base_freq': 50, 'rope_scaling': {'rope_type': 'linear', 'factor': 8}}
  now = SIZES | {'model_type': 'gemma3_text', 'head_dim': 8, 'sliding_window': 5}
  now |= {
    'layer_types': ['sliding_attention', 'full_attention', 'sliding_attention'],
    'rope_parameters': {
      'sliding_attention': {'rope_type': 'default', 'rope_theta': 50},
      'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e5},
    },
  }
  found = from_hf(old, 'x')
  assert found == from_hf(now, 'x')
  assert (found.windows, found.rope_factors, found.local_rope_theta) == ((5, 0, 5), (0.125,) * 4, 50)
  # A window that is not said is the family's own, one that is null is none.
  assert from_hf(SIZES | {'model_type': 'mistral'}, 'x').windows == (4096,) * 3
  assert from_hf(SIZES | {'model_type': 'mistral', 'sliding_window': None}, 'x').windows == ()


# ---- tensors ----


def written(tmp_path, family='phi3', title='window 6', **changes):
  torch = pytest.importorskip('torch')
  peer = parity.make_peer(family, parity.CASES[family][title] | changes)
  return peer, parity.write(peer.to(torch.bfloat16), tmp_path)


def test_tensors_are_read_one_at_a_time_in_the_type_asked_for(tmp_path):
  peer, checkpoint = written(tmp_path)
  theirs = {name: value.detach().float().numpy() for name, value in peer.state_dict().items()}
  fused = theirs['model.layers.1.self_attn.qkv_proj.weight']
  np.testing.assert_array_equal(checkpoint.tensors['blocks.k'][1].reshape(32, -1), fused[32:48].T)
  half = checkpoint.tensors.read('blocks.k', jnp.bfloat16)
  assert half.dtype == jnp.bfloat16 and checkpoint.tensors['blocks.k'].dtype == np.float32
  np.testing.assert_array_equal(half.astype(np.float32), checkpoint.tensors['blocks.k'])
  fused = theirs['model.layers.0.mlp.gate_up_proj.weight']
  np.testing.assert_array_equal(checkpoint.tensors['blocks.up'][0], fused[48:].T)
  decoder = make_decoder(checkpoint.config, checkpoint.tensors, jnp.bfloat16, Runtime())
  assert decoder.blocks.up[...].dtype == jnp.bfloat16
  np.testing.assert_array_equal(decoder.head[...].astype(np.float32), theirs['lm_head.weight'].T)


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (
      lambda t: [t.pop(f'model.layers.{i}.mlp.experts.2.up_proj.weight') for i in (0, 1)],
      r'm: tensor model.layers.0.mlp.experts.2.up_proj.weight is missing, '
      r'tensor model.layers.1.mlp.experts.2.up_proj.weight is missing; is this a complete qwen3_moe checkpoint\?',
    ),
    (
      lambda t: [t.update({f'model.layers.{i}.mlp.gate.weight': np.zeros((7, 32), np.float32)}) for i in (0, 1)],
      r'tensor model.layers.0.mlp.gate.weight has shape \(7, 32\), but its config says \(8, 32\), tensor .*layers.1',
    ),
    (
      lambda t: t.update({f'model.layers.0.mlp.experts.{i}.bias': np.zeros(3, np.float32) for i in range(9)}),
      r"m: more than 8 tensors, among them tensor 'model.layers.0.mlp.experts.0.bias' has no place in a qwen3_moe dec",
    ),
    (
      lambda t: [t.pop(name) for name in list(t) if 'experts' in name],
      r'm: more than 8 tensors, among them tensor model.layers.0.mlp.experts.0.gate_proj.weight is missing, tensor',
    ),
  ],
)
def test_tensors_that_do_not_fit_are_listed(tmp_path, change, said):
  folder = tmp_path / 'm'
  written(folder, 'qwen3_moe', 'two of eight experts')
  tensors = load_file(folder / 'model.safetensors')
  change(tensors)
  save_file(tensors, folder / 'model.safetensors')
  with pytest.raises(UserError, match=said) as error:
    checkpoint_source.load(str(folder))
  assert '\n' not in str(error.value)


def test_a_config_without_a_feature_of_its_tensors_is_refused(tmp_path):
  written(tmp_path, 'qwen2', 'tied, yarn rope')
  raw = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(raw | {'model_type': 'llama', 'layer_types': None}))
  with pytest.raises(
    UserError, match=r"tensor 'model.layers.0.self_attn.k_proj.bias' has no place in a llama decoder, tensor"
  ):
    checkpoint_source.load(str(tmp_path))


def test_routing_takes_the_largest_of_a_softmax():
  from charjax.model.experts import mixture, route

  rng = np.random.default_rng(0)
  x, router = rng.normal(size=(7, 6)), rng.normal(size=(6, 5))
  weights = {name: rng.normal(size=(5, *((4, 6) if name == 'down' else (6, 4)))) for name in ('gate', 'up', 'down')}
  probability = softmax(x @ router)
  for renormalize in (True, False):
    config = dataclasses.replace(KINDS['experts'], num_experts=5, experts_per_token=3, renormalize_experts=renormalize)
    weight, chosen = route(jnp.asarray(x @ router), config)
    for m in range(7):
      best = np.argsort(-probability[m])[:3]
      expected = probability[m, best] / (probability[m, best].sum() if renormalize else 1)
      assert chosen[m].tolist() == best.tolist()
      np.testing.assert_allclose(weight[m], expected, rtol=1e-5)
    found = mixture(jnp.asarray(x, jnp.float32), jnp.asarray(x @ router), weights, config, jax.nn.silu, jnp.float32)
    for m in range(7):
      total = 0
      for share, expert in zip(weight[m], chosen[m], strict=True):
        gate, up, down = (weights[name][int(expert)] for name in ('gate', 'up', 'down'))
        total += float(share) * ((x[m] @ gate) / (1 + np.exp(-x[m] @ gate)) * (x[m] @ up)) @ down
      np.testing.assert_allclose(found[m], total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'windows': (1,)}, 'windows has 1 entries; it must have 2'),
    ({'rope_factors': (1.0,)}, 'rope_factors has 1 entries; it must have 4'),
    ({'activation': 'relu'}, "activation is 'relu'; choose from 'silu', 'gelu_tanh'"),
    ({'qk_norm': 'both'}, "qk_norm is 'both'; choose from"),
    ({'pre_norms': False}, 'neither pre_norms nor post_norms'),
    ({'num_experts': 2, 'experts_per_token': 0}, 'at least one expert per token'),
    ({'attention_softcap': float('nan')}, 'attention_softcap is nan'),
  ],
)
def test_a_shape_that_cannot_be_is_refused(change, said):
  with pytest.raises(UserError, match=said):
    tiny_config(**change)


# ---- GGUF ----

# By architecture: the family, what its checkpoint is, and metadata beyond its sizes.
GGUF = {
  'llama': ('llama', {'tie_word_embeddings': True, **parity._LLAMA3}, {}),
  'llama, a mixture': (
    'mixtral',
    {'num_local_experts': 3, 'num_experts_per_tok': 2},
    {'expert_count': 3, 'expert_used_count': 2},
  ),
  'qwen2': (
    'qwen2',
    {**parity._scaled('yarn', original_max_position_embeddings=16)},
    {'rope.scaling.type': 'yarn', 'rope.scaling.factor': 4.0, 'rope.scaling.original_context_length': 16},
  ),
  'qwen3': ('qwen3', {'head_dim': 16}, {}),
  'qwen3moe': (
    'qwen3_moe',
    {'head_dim': 8, 'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 24, 'norm_topk_prob': True},
    {'expert_count': 4, 'expert_used_count': 2, 'expert_feed_forward_length': 24},
  ),
  'gemma2': (
    'gemma2',
    {'tie_word_embeddings': True, 'head_dim': 16, 'query_pre_attn_scalar': 16, 'sliding_window': 6},
    {'attention.sliding_window': 6, 'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0},
  ),
  'gemma3': (
    'gemma3_text',
    {
      **{'tie_word_embeddings': True, 'head_dim': 16, 'query_pre_attn_scalar': 16, 'sliding_window': 6},
      **{'num_hidden_layers': 6, 'rope_scaling': {'rope_type': 'linear', 'factor': 4.0}, 'rope_theta': 50.0},
    },
    {'attention.sliding_window': 6, 'rope.scaling.type': 'linear', 'rope.scaling.factor': 4.0},
  ),
  'smollm3': ('smollm3', {'num_hidden_layers': 4, 'rope_theta': 50.0}, {}),
  'olmo2': ('olmo2', {}, {}),
  'phi3': (
    'phi3',
    {'sliding_window': 6, 'partial_rotary_factor': 0.5},
    {'attention.sliding_window': 6, 'rope.dimension_count': 4},
  ),
}


@pytest.mark.parametrize('case', GGUF)
def test_a_gguf_says_what_the_directory_does_that_it_was_made_of(case, tmp_path):
  pytest.importorskip('torch')
  family, changes, metadata = GGUF[case]
  sizes = {'vocab_size': 300, 'rms_norm_eps': 2**-17}
  checkpoint = parity.write(parity.make_peer(family, sizes | changes), tmp_path / 'hf')
  path, architecture = tmp_path / 'm.gguf', case.split(',')[0]
  write_gguf_of(path, architecture, checkpoint.config, load_file(tmp_path / 'hf' / 'model.safetensors'), metadata)
  found = checkpoint_source.load(str(path))
  gemma = 'gemma' in family
  np.testing.assert_allclose(found.config.rope_factors, checkpoint.config.rope_factors, rtol=1e-6)
  alike = {'norm_offset': float(gemma), 'rope_factors': checkpoint.config.rope_factors}
  assert dataclasses.replace(found.config, **alike) == checkpoint.config
  for name, value in checkpoint.tensors.items():
    expected = value + 1 if gemma and name.endswith('norm') else value
    np.testing.assert_array_equal(found.tensors[name], expected, err_msg=name)


def write_gguf_of(path, architecture, config, tensors, metadata):
  """A GGUF file of a Hugging Face directory's tensors, under the names that gguf's own table has for them."""
  writer = gguf.GGUFWriter(path, architecture)
  sizes = {
    'block_count': config.num_layers,
    'context_length': config.max_length,
    'embedding_length': config.embed_dim,
    'feed_forward_length': 48,
    'attention.head_count': config.num_heads,
    'attention.head_count_kv': config.num_kv_heads,
    'attention.key_length': config.head_dim,
    'attention.layer_norm_rms_epsilon': config.norm_eps,
    'rope.freq_base': config.rope_theta,
  }
  for key, value in (sizes | metadata).items():
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
    add(f'{architecture}.{key}', value)
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('smollm')
  writer.add_token_list(TOKENS)
  writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
  writer.add_token_merges(['t h'])
  writer.add_eos_token_id(1)
  writer.add_chat_template(TEMPLATE)
  if config.rope_factors and 'rope.scaling.type' not in metadata:
    writer.add_tensor('rope_freqs.weight', (1 / np.array(config.rope_factors)).astype(np.float32))
  key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
  table = gguf.get_tensor_name_map(key, config.num_layers)
  stacked = {}
  for name, stored in tensors.items():
    value = stored + 1 if architecture.startswith('gemma') and name.endswith('norm.weight') else stored
    if architecture in ('llama', 'smollm3') and re.search(r'self_attn.[qk]_proj.weight', name):
      pairs = stored.reshape(-1, 2, config.head_dim // 2, stored.shape[-1])
      value = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(stored.shape))
    if expert := re.fullmatch(r'(.*\.experts)\.\d+(\..*)', name):
      stacked.setdefault(''.join(expert.groups()), []).append((int(name.split('.')[-3]), value))
    else:
      writer.add_tensor(table.get_name(name, ('.weight', '.bias')), value)
  for name, experts in stacked.items():
    value = np.stack([value for _, value in sorted(experts, key=lambda pair: pair[0])])
    writer.add_tensor(table.get_name(name, ('.weight',)), value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
