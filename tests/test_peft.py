"""Adapters go out to PEFT and come in from it with equal logits; what is not plain LoRA is refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx
from llama_reference import tiny_config
from safetensors.numpy import load_file, save_file

from charjax.errors import UserError
from charjax.model import lora, peft
from charjax.model.decoder import Runtime, forward, logits
from charjax.model.weights import make_decoder

# Tied and untied, layers that are fused, softcaps and windows, experts beside dense attention.
CASES = [
  ('llama', 'tied, llama3 rope'),
  ('phi3', 'window 6'),
  ('qwen3', 'wide heads, yarn rope'),
  ('gemma2', 'tied, window 6, softcaps'),
  ('qwen3_moe', 'two of eight experts'),
]
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 11))


@pytest.fixture(params=CASES, ids=[family for family, _ in CASES])
def model(request, tmp_path):
  """transformers' model, the same as a checkpoint, and the folder where it lies."""
  pytest.importorskip('peft')
  family, title = request.param
  peer = parity.make_peer(family, parity.CASES[family][title])
  return peer, parity.write(peer, tmp_path / 'model'), tmp_path / 'model'


@jax.jit
def compute(decoder, adapter=None):
  hidden, _ = forward(decoder, TOKENS, jnp.arange(TOKENS.shape[1])[None], adapter=adapter)
  return logits(decoder, hidden)


def theirs(peer):
  import torch

  with torch.no_grad():
    return peer(torch.tensor(TOKENS), use_cache=False).logits.numpy()


def random_adapter(config, targets=(), ranks=(3, 2), seed=0):
  """Of two ranks in turn, as is seen where projections share a layer."""
  adapter = lora.Adapter(config, 1, rngs=nnx.Rngs(0), targets=targets)
  rng = np.random.default_rng(seed)
  for i, (name, (inputs, outputs)) in enumerate(lora.sizes(config).items()):
    if name in adapter.arrays():
      pair, rank = getattr(adapter, name), ranks[i % len(ranks)]
      a = rng.normal(size=(config.num_layers, inputs, rank)) * inputs**-0.5
      b = rng.normal(size=(config.num_layers, rank, outputs))
      for part, value in (('a', a), ('b', b)):
        pair[part] = pair[part].replace(jnp.asarray(value, jnp.float32))
  return adapter


def changes(arrays):
  """What an adapter adds to each weight, [L, I, O] in float64."""
  return {name: np.float64(pair['a']) @ np.float64(pair['b']) for name, pair in arrays.items()}


def decoder_of(checkpoint, adapters=()):
  return make_decoder(checkpoint.config, lora.add(checkpoint.tensors, adapters), jnp.float32, Runtime())


@pytest.mark.parametrize('targets', [(), ('k', 'o', 'up')], ids=['all', 'some'])
def test_peft_computes_what_we_do_with_an_adapter_of_ours(model, tmp_path, targets):
  from peft import PeftModel

  peer, checkpoint, path = model
  targets = [target for target in targets if target in checkpoint.config.dense_projections]
  adapter = random_adapter(checkpoint.config, targets)
  peft.write(adapter.arrays(), checkpoint.config, checkpoint.family, tmp_path / 'out', str(path))
  decoder = decoder_of(checkpoint)
  found = compute(decoder, adapter)
  assert np.abs(found - compute(decoder)).max() > 0.1
  loaded = PeftModel.from_pretrained(peer, tmp_path / 'out')
  np.testing.assert_allclose(theirs(loaded), found, atol=1e-4)
  # What was added to each weight comes back: in other factors where layers are fused.
  back, sent = changes(peft.read(tmp_path / 'out', checkpoint.config, checkpoint.family)), changes(adapter.arrays())
  assert all(np.abs(back[name]).max() == 0 for name in back.keys() - sent.keys())
  for name, change in sent.items():
    np.testing.assert_allclose(back[name], change, atol=1e-6)


@pytest.mark.parametrize('rslora', [False, True])
def test_we_compute_what_peft_does_with_an_adapter_of_its_own(model, tmp_path, rslora):
  import torch
  from peft import LoraConfig, get_peft_model

  peer, checkpoint, _ = model
  names = {module.name.rpartition('.')[2] for module in peft._modules(checkpoint.config, checkpoint.family)}
  first = sorted(names - {'k_proj', 'o_proj'})[0]
  settings = LoraConfig(
    r=3,
    lora_alpha=5,
    lora_dropout=0.1,
    use_rslora=rslora,
    target_modules=sorted(names - {'k_proj'}),
    rank_pattern={first: 2, r'^model.layers.1.self_attn.o_proj': 4},
    alpha_pattern={'model.layers.1.self_attn.o_proj': 7},
    # Random b as well.
    init_lora_weights=False,
    **({'layers_to_transform': [1]} if rslora else {}),
  )
  with torch.random.fork_rng():
    torch.manual_seed(0)
    theirs_adapted = get_peft_model(peer, settings).eval()
  theirs_adapted.save_pretrained(tmp_path / 'in')
  arrays = peft.read(tmp_path / 'in', checkpoint.config, checkpoint.family)
  assert ('k' in arrays) == (checkpoint.family == 'phi3')
  assert rslora == (np.abs(changes(arrays)['o'][0]).max() == 0)
  found = compute(decoder_of(checkpoint, [(1.0, arrays)]))
  assert np.abs(found - compute(decoder_of(checkpoint))).max() > 0.1
  np.testing.assert_allclose(theirs(theirs_adapted), found, atol=1e-4)


# ---- what is refused ----

CONFIG = tiny_config()


def say(**fields):
  def change(folder):
    path = folder / 'adapter_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))

  return change


def tensors(change):
  def apply(folder):
    path = folder / 'adapter_model.safetensors'
    found = load_file(path)
    change(found)
    save_file(found, path)

  return apply


Q = 'base_model.model.model.layers.1.self_attn.q_proj'


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (say(peft_type='IA3'), "config.json: field peft_type is 'IA3'; only 'LORA' is supported"),
    (say(use_dora=True), "config.json: field use_dora = 'True' is not supported; only plain LoRA is read"),
    (say(bias='all'), "field bias = 'all' is not"),
    (say(lora_bias=True), 'field lora_bias'),
    (say(fan_in_fan_out=True), 'field fan_in_fan_out'),
    (say(modules_to_save=['lm_head']), r"field modules_to_save = \"\['lm_head'\]\""),
    (say(trainable_token_indices=[3]), 'field trainable_token_indices'),
    (say(layer_replication=[[0, 2]]), 'field layer_replication'),
    (say(target_parameters=['mlp.experts.down_proj']), 'field target_parameters'),
    (say(alora_invocation_tokens=[1, 2]), 'field alora_invocation_tokens'),
    (say(field_of_a_version_to_come={'a': 1}), 'field field_of_a_version_to_come'),
    (say(init_lora_weights='pissa'), "field init_lora_weights is 'pissa', which changes the weights of the base"),
    (say(r='many'), "field r says 'many'; it must be a number above 0"),
    (say(lora_alpha=float('nan')), "field lora_alpha says 'nan'"),
    (say(rank_pattern=[1]), 'field rank_pattern is .*; it must be an object'),
    (say(alpha_pattern={'(.*)+q_proj': 3}), r"field alpha_pattern has an expression '\(\.\*\)\+q_proj'; only names"),
    (say(alpha_pattern={'(q_proj': 3}), r"field alpha_pattern has '\(q_proj', which is no expression"),
    (say(use_rslora='yes'), "field use_rslora is 'yes'; it must be true or false"),
    (
      say(r=4),
      r'layers.0.mlp.down_proj: lora_A has shape \(3, 64\), but adapter_config.json and the model say \(4,',
    ),
    (
      lambda folder: (folder / 'adapter_config.json').unlink(),
      'adapter_config.json: No such file or directory; is this',
    ),
    (lambda folder: (folder / 'adapter_config.json').write_text('{'), 'adapter_config.json: not valid JSON'),
    (lambda folder: (folder / 'adapter_config.json').write_text('[]'), 'adapter_config.json: a JSON object is'),
    (
      lambda folder: (folder / 'adapter_model.safetensors').rename(folder / 'adapter_model.bin'),
      'adapter_model.bin: pickled weights are not read; save the adapter as safetensors',
    ),
    (
      lambda folder: (folder / 'adapter_model.safetensors').write_bytes(b'x'),
      'adapter_model.safetensors: missing or dam',
    ),
    (tensors(lambda t: t.clear()), 'adapter_model.safetensors: it holds no adapter'),
    (tensors(lambda t: t.pop(f'{Q}.lora_B.weight')), 'layers.1.self_attn.q_proj: tensor lora_B is missing'),
    (tensors(lambda t: t.update({f'{Q}.lora_B.weight': np.zeros((5, 3), np.float32)})), r'lora_B has shape \(5, 3\)'),
    (
      tensors(lambda t: t.update({f'{Q}.lora_A.weight': np.zeros((3, 32), np.int8)})),
      'is I8; only F64, F32, F16, BF16',
    ),
    (
      tensors(lambda t: t.update({'base_model.model.lm_head.lora_A.weight': np.zeros((3, 32), np.float32)})),
      "tensor 'base_model.model.lm_head.lora_A.weight' is no adapter of a projection that a llama decoder",
    ),
    (
      tensors(
        lambda t: t.update({'base_model.model.model.embed_tokens.lora_embedding_A': np.zeros((3, 9), np.float32)})
      ),
      'embed_tokens.lora_embedding_A.* is no adapter of a projection',
    ),
    (
      tensors(lambda t: t.update({Q.replace('1', '2') + '.lora_A.weight': np.zeros((3, 32), np.float32)})),
      'layers.2.self_attn.q_proj.lora_A.weight.* is no adapter of a projection that a llama decoder of this shape',
    ),
  ],
)
def test_what_is_not_plain_lora_of_this_model_is_refused(tmp_path, change, said):
  peft.write(random_adapter(CONFIG, ranks=(3,)).arrays(), CONFIG, 'llama', tmp_path, 'base')
  peft.read(tmp_path, CONFIG, 'llama')
  change(tmp_path)
  with pytest.raises(UserError, match=said) as error:
    peft.read(tmp_path, CONFIG, 'llama')
  assert '\n' not in str(error.value)
