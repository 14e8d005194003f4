"""How each architecture of GGUF files tells its shape in metadata and names its tensors.

The files are those of llama.cpp's converter, which computes with what the metadata leaves unsaid as it does: see
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-model.cpp.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from charjax.errors import UserError
from charjax.model.config import ModelConfig
from charjax.model.rope import llama3_scaling, scaling

_NAMES = {
  'embed': 'token_embd.weight',
  'final_norm': 'output_norm.weight',
  'head': 'output.weight',
  'blocks.attn_norm': 'blk.{layer}.attn_norm.weight',
  'blocks.q': 'blk.{layer}.attn_q.weight',
  'blocks.k': 'blk.{layer}.attn_k.weight',
  'blocks.v': 'blk.{layer}.attn_v.weight',
  'blocks.o': 'blk.{layer}.attn_output.weight',
  'blocks.q_bias': 'blk.{layer}.attn_q.bias',
  'blocks.k_bias': 'blk.{layer}.attn_k.bias',
  'blocks.v_bias': 'blk.{layer}.attn_v.bias',
  'blocks.q_norm': 'blk.{layer}.attn_q_norm.weight',
  'blocks.k_norm': 'blk.{layer}.attn_k_norm.weight',
  'blocks.attn_post_norm': 'blk.{layer}.post_attention_norm.weight',
  'blocks.mlp_norm': 'blk.{layer}.ffn_norm.weight',
  'blocks.gate': 'blk.{layer}.ffn_gate.weight',
  'blocks.up': 'blk.{layer}.ffn_up.weight',
  'blocks.down': 'blk.{layer}.ffn_down.weight',
  'blocks.mlp_post_norm': 'blk.{layer}.post_ffw_norm.weight',
}
_FUSED = {
  **{f'blocks.{name}': 'blk.{layer}.attn_qkv.weight' for name in 'qkv'},
  **{f'blocks.{name}': 'blk.{layer}.ffn_up.weight' for name in ('gate', 'up')},
}
_EXPERTS = {
  'blocks.router': 'blk.{layer}.ffn_gate_inp.weight',
  **{f'blocks.{name}': 'blk.{layer}.' + f'ffn_{name}_exps.weight' for name in ('gate', 'up', 'down')},
}
_ROPE_DIVISORS = 'rope_freqs.weight'


class GGUFFamily(NamedTuple):
  """What a file's metadata says.

  Attributes:
    architecture: its name.
    family: that of Hugging Face: its model_type.
    config: the shape.
    names: of tensors; see `charjax.model.checkpoint_source.assemble`.
    interleaved: whether the pairs of a head that are rotated together lie next to each other.
    ignored: tensors that are part of the config.
    rope: how the directory it was made of tells the scaling of its rotary frequencies, in rope_scaling.
  """

  architecture: str
  family: str
  config: ModelConfig
  names: Mapping[str, str]
  interleaved: bool
  ignored: Collection[str]
  rope: Mapping[str, Any]


class _Metadata:
  """Fields of one architecture."""

  def __init__(self, fields: Mapping[str, Any], where: str):
    architecture = fields.get('general.architecture')
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
      raise UserError(
        f'{where}: architecture {str(architecture)[:40]!r} is not supported; use one of {", ".join(_ARCHITECTURES)}'
      )
    self.architecture, self.where, self._fields = architecture, where, fields

  def raw(self, key: str) -> Any:
    return self._fields.get(f'{self.architecture}.{key}')

  def read(self, key: str, default: Any, kind: type = int) -> Any:
    value = self.raw(key)
    value = default if value is None else value
    if value is None:
      raise UserError(f'{self.where}: field {self.architecture}.{key} is missing; is this a complete file?')
    if isinstance(value, bool) or not isinstance(value, kind):
      raise self.refused(key, value)
    return value

  def refused(self, key: str, value: Any, only: str = '') -> UserError:
    return UserError(
      f'{self.where}: field {self.architecture}.{key} is {str(value)[:40]!r}, which is not supported{only}'
    )

  def layers(self) -> int:
    count = self.read('block_count', None)
    if not 0 < count <= 10_000:
      raise self.refused('block_count', count)
    return count


def _gemma(
  said: _Metadata, every: int, largest: int, attention_softcap: float = 0.0, logit_softcap: float = 0.0
) -> dict[str, Any]:
  """What both have; the largest model of either, known by its number of layers, scales queries by its width."""
  layers, width, window = said.layers(), said.read('embedding_length', None), said.read('attention.sliding_window', 0)
  heads, head_dim = said.read('attention.head_count', None), said.read('attention.key_length', None)
  scaled_by = width / max(heads, 1) if layers == largest else head_dim
  return {
    'post_norms': True,
    'activation': 'gelu_tanh',
    'embed_scale': max(width, 1) ** 0.5,
    'query_scale': max(scaled_by, 1) ** -0.5,
    'attention_softcap': said.read('attn_logit_softcapping', attention_softcap, float),
    'logit_softcap': said.read('final_logit_softcapping', logit_softcap, float),
    'windows': tuple(window if (layer + 1) % every else 0 for layer in range(layers)) if window else (),
  }


def _gemma3(said: _Metadata) -> dict[str, Any]:
  local = said.read('rope.freq_base_swa', 10_000.0, float)
  return {**_gemma(said, 6, 62), 'qk_norm': 'head', 'local_rope_theta': local}


def _experts(said: _Metadata) -> dict[str, Any]:
  return {
    'num_experts': said.read('expert_count', None),
    'experts_per_token': said.read('expert_used_count', None),
    'mlp_dim': said.read('expert_feed_forward_length', said.raw('feed_forward_length')),
  }


def _phi3(said: _Metadata) -> dict[str, Any]:
  window = said.read('attention.sliding_window', 0)
  return {'windows': (window,) * said.layers() if window else ()}


class _Architecture(NamedTuple):
  """What an architecture has beyond llama's: fields of ModelConfig, names, how pairs of a head lie, what it reads."""

  fields: Callable[[_Metadata], dict[str, Any]]
  names: Mapping[str, str] = {}
  interleaved: bool = False
  reads: Collection[str] = ()


_ARCHITECTURES = {
  'llama': _Architecture(lambda said: _experts(said) if said.raw('expert_count') else {}, interleaved=True),
  'qwen2': _Architecture(lambda said: {'qkv_bias': True}),
  'qwen3': _Architecture(lambda said: {'qk_norm': 'head'}),
  'qwen3moe': _Architecture(lambda said: {'qk_norm': 'head', **_experts(said)}),
  'gemma2': _Architecture(lambda said: _gemma(said, 2, 46, 50.0, 30.0), reads=('attention.sliding_window',)),
  'gemma3': _Architecture(_gemma3, reads=('attention.sliding_window',)),
  'smollm3': _Architecture(
    lambda said: {'rope_layers': tuple((layer + 1) % 4 != 0 for layer in range(said.layers()))}, interleaved=True
  ),
  'olmo2': _Architecture(lambda said: {'qk_norm': 'all', 'pre_norms': False, 'post_norms': True}),
  'phi3': _Architecture(_phi3, _FUSED, reads=('attention.sliding_window', 'rope.dimension_count')),
}

_FAMILIES = {'qwen3moe': 'qwen3_moe', 'gemma3': 'gemma3_text'}  # where Hugging Face calls it otherwise


def from_gguf(
  metadata: Mapping[str, Any],
  shapes: Mapping[str, tuple[int, ...]],
  tensor: Callable[[str], np.ndarray],
  where: str,
) -> GGUFFamily:
  """What the metadata of a GGUF file say of its shape and its tensors.

  Args:
    metadata: the file's key-value pairs.
    shapes: of its tensors.
    tensor: reads one of them.
    where: the file's path, for error messages.

  Raises:
    UserError: an unsupported architecture, or a field that changes the mathematics and is not handled.
  """
  said = _Metadata(metadata, where)
  family = _ARCHITECTURES[said.architecture]
  heads, embed_dim = said.read('attention.head_count', None), said.read('embedding_length', None)
  head_dim = said.read('attention.key_length', embed_dim // max(heads, 1))
  rotated = said.read('rope.dimension_count', head_dim)
  neutral_fields = {
    'attention.value_length': head_dim,
    'attention.clamp_kqv': 0.0,
    'rope.scale_linear': 1.0,
    'rope.scaling.attn_factor': 1.0,
    'expert_shared_count': 0,
    'expert_weights_norm': True,
    'rope.dimension_count': head_dim,
    'attention.sliding_window': 0,
  }
  for key, neutral in neutral_fields.items():
    if key in family.reads:
      continue
    if said.raw(key) not in (None, neutral):
      raise said.refused(key, said.raw(key), f'; only {neutral!r} is')
  if head_dim % 2:
    raise UserError(
      f'{where}: field {said.architecture}.attention.key_length is {head_dim}; rotary positions need it even'
    )
  names = {**_NAMES, **family.names}
  embed = shapes.get(names['embed'])
  if not embed:
    raise UserError(f'{where}: tensor {names["embed"]} is missing; is this a complete {said.architecture} checkpoint?')
  theta = said.read('rope.freq_base', 1e6 if said.architecture == 'gemma3' else 10_000.0, float)
  if not (math.isfinite(theta) and theta > 0):
    raise said.refused('rope.freq_base', theta, '; it must be a number above 0')
  fields = {
    'num_layers': said.read('block_count', None),
    'embed_dim': embed_dim,
    'num_heads': heads,
    'num_kv_heads': said.read('attention.head_count_kv', heads),
    'head_dim': head_dim,
    'mlp_dim': said.read('feed_forward_length', None),
    'vocab_size': embed[0],
    'tied_embeddings': names['head'] not in shapes,
    'norm_eps': said.read('attention.layer_norm_rms_epsilon', None, float),
    'max_length': said.read('context_length', None),
    'rope_theta': theta,
    'rotary_dim': rotated if rotated != head_dim else 0,
  }
  rope, factors, gain = _rope(said, rotated, theta)
  ignored = []
  if _ROPE_DIVISORS in shapes:
    if factors or shapes[_ROPE_DIVISORS] != (rotated // 2,):
      raise UserError(
        f'{where}: tensor {_ROPE_DIVISORS} has shape {shapes[_ROPE_DIVISORS]}; it must be ({rotated // 2},), in a file '
        f'without other rope scaling'
      )
    # How Llama 3's scaling is written.
    divisors = tensor(_ROPE_DIVISORS).astype(np.float64)
    if not (np.isfinite(divisors) & (divisors > 0)).all():
      raise UserError(f'{where}: tensor {_ROPE_DIVISORS} holds a number that is not above 0; fetch it again')
    factors = tuple((1 / divisors).tolist())
    rope = llama3_scaling(factors, rotated, theta)
    ignored.append(_ROPE_DIVISORS)
  fields |= {'rope_factors': factors, 'rope_gain': gain} | family.fields(said)
  if fields.get('num_experts'):
    names |= _EXPERTS
  try:
    config = ModelConfig(**fields)
  except UserError as error:
    raise UserError(f'{where}: {error}') from error
  # The architecture of both, and of Mistral, which computes as llama does.
  mixture = said.architecture == 'llama' and config.num_experts
  name = 'mixtral' if mixture else _FAMILIES.get(said.architecture, said.architecture)
  return GGUFFamily(said.architecture, name, config, names, family.interleaved, ignored, rope)


def _rope(said: _Metadata, rotated: int, theta: float) -> tuple[Mapping[str, Any], tuple[float, ...], float]:
  """What rope_scaling says, and the factors and the gain that follow from it."""
  kind = said.read('rope.scaling.type', 'none', str)
  if kind not in ('none', 'linear', 'yarn'):
    raise said.refused('rope.scaling.type', kind)
  if kind == 'none':
    return {}, (), 1.0
  rope = {
    'rope_type': kind,
    'factor': said.raw('rope.scaling.factor'),
    'original_max_position_embeddings': said.raw('rope.scaling.original_context_length'),
  }
  rope = {key: value for key, value in rope.items() if value is not None}
  return rope, *scaling(kind, rope, rotated, theta, said.where)
