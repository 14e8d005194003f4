"""How each family of Hugging Face models tells its shape in config.json and names its tensors.

Fields are those of transformers' config class of the family. One that changes the mathematics is either read here, or
refused unless it is neutral. What is left changes nothing of what a trained model computes: how weights were drawn and
are kept (initializer_range, dtype), dropout and the noise and losses of routers in training (attention_dropout,
embd_pdrop, resid_pdrop, router_jitter_noise, router_aux_loss_coef), special tokens, use_cache and pretraining_tp.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from charjax.errors import UserError
from charjax.model.config import ModelConfig
from charjax.model.rope import scaling

_TYPES = {int: 'a whole number', float: 'a number', bool: 'true or false'}
_ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'gelu_pytorch_tanh': 'gelu_tanh'}
_MOST_LAYERS = 10_000  # a config that says more is damaged, and lists of its layers would not fit in memory

# Fields that change the mathematics in some family, and the values at which they do not. A family that does not read
# one is refused at others.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  'attention_bias': (None, False),
  'attn_logit_softcapping': (None,),
  'clip_qkv': (None,),
  'decoder_sparse_step': (None, 1),
  'final_logit_softcapping': (None,),
  'layer_types': (None,),
  'mlp_bias': (None, False),
  'mlp_only_layers': (None, []),
  'no_rope_layers': (None,),
  'num_experts': (None, 0),
  'num_local_experts': (None, 0),
  'partial_rotary_factor': (None, 1),
  'query_pre_attn_scalar': (None,),
  'rope_local_base_freq': (None,),
  'sliding_window': (None,),
  'use_bidirectional_attention': (None, False),
  'use_sliding_window': (None, False),
}

# Our tensors by their names in a file, with {layer} and {expert} filled in. Where two have the same name, that tensor
# holds the rows of both, in the order of ours.
_NAMES = {
  'embed': 'model.embed_tokens.weight',
  'final_norm': 'model.norm.weight',
  'head': 'lm_head.weight',
  'blocks.attn_norm': 'model.layers.{layer}.input_layernorm.weight',
  'blocks.q': 'model.layers.{layer}.self_attn.q_proj.weight',
  'blocks.k': 'model.layers.{layer}.self_attn.k_proj.weight',
  'blocks.v': 'model.layers.{layer}.self_attn.v_proj.weight',
  'blocks.o': 'model.layers.{layer}.self_attn.o_proj.weight',
  'blocks.q_bias': 'model.layers.{layer}.self_attn.q_proj.bias',
  'blocks.k_bias': 'model.layers.{layer}.self_attn.k_proj.bias',
  'blocks.v_bias': 'model.layers.{layer}.self_attn.v_proj.bias',
  'blocks.o_bias': 'model.layers.{layer}.self_attn.o_proj.bias',
  'blocks.q_norm': 'model.layers.{layer}.self_attn.q_norm.weight',
  'blocks.k_norm': 'model.layers.{layer}.self_attn.k_norm.weight',
  'blocks.mlp_norm': 'model.layers.{layer}.post_attention_layernorm.weight',
  'blocks.gate': 'model.layers.{layer}.mlp.gate_proj.weight',
  'blocks.up': 'model.layers.{layer}.mlp.up_proj.weight',
  'blocks.down': 'model.layers.{layer}.mlp.down_proj.weight',
  'blocks.gate_bias': 'model.layers.{layer}.mlp.gate_proj.bias',
  'blocks.up_bias': 'model.layers.{layer}.mlp.up_proj.bias',
  'blocks.down_bias': 'model.layers.{layer}.mlp.down_proj.bias',
}
_NORMS_BEFORE_AND_AFTER = {
  'blocks.attn_post_norm': 'model.layers.{layer}.post_attention_layernorm.weight',
  'blocks.mlp_norm': 'model.layers.{layer}.pre_feedforward_layernorm.weight',
  'blocks.mlp_post_norm': 'model.layers.{layer}.post_feedforward_layernorm.weight',
}
_FUSED = {
  **{f'blocks.{name}': 'model.layers.{layer}.self_attn.qkv_proj.weight' for name in 'qkv'},
  **{f'blocks.{name}': 'model.layers.{layer}.mlp.gate_up_proj.weight' for name in ('gate', 'up')},
}
_QWEN_EXPERTS = {
  'blocks.router': 'model.layers.{layer}.mlp.gate.weight',
  **{
    f'blocks.{name}': 'model.layers.{layer}.mlp.experts.{expert}.' + f'{name}_proj.weight'
    for name in ('gate', 'up', 'down')
  },
}
_MIXTRAL_EXPERTS = {
  'blocks.router': 'model.layers.{layer}.block_sparse_moe.gate.weight',
  **{
    f'blocks.{ours}': 'model.layers.{layer}.block_sparse_moe.experts.{expert}.' + f'{theirs}.weight'
    for ours, theirs in (('gate', 'w1'), ('up', 'w3'), ('down', 'w2'))
  },
}


class _Said:
  """A config.json, read field by field; where one is missing or null, the family's own default counts."""

  def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str):
    # transformers tells a field that is missing from one that is null, which for a window means none.
    self._config, self.where = {**defaults, **config}, where

  def raw(self, name: str) -> Any:
    return self._config.get(name)

  def read(self, name: str, kind: type, default: Any = None) -> Any:
    value = self._config.get(name)
    value = default if value is None else value
    if value is None:
      raise UserError(f'{self.where}: field {name} is missing; is this a complete checkpoint?')
    right = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if not right or not -(2**63) < value < 2**63:  # no number in a model is larger, and NaN is neither
      found = str(value)[:40]
      raise UserError(f'{self.where}: field {name} is {found!r}; it must be {_TYPES[kind]}')
    return kind(value)

  def positive(self, name: str, kind: type) -> Any:
    value = self.read(name, kind)
    if value <= 0:
      raise UserError(f'{self.where}: field {name} is {value}; it must be above 0')
    return value

  def layers(self) -> int:
    """The number of layers, where each is told by itself."""
    count = self.read('num_hidden_layers', int)
    if not 0 < count <= _MOST_LAYERS:
      raise UserError(f'{self.where}: field num_hidden_layers is {count}; it must be between 1 and {_MOST_LAYERS}')
    return count

  def per_layer(self, name: str, choices: Mapping[Any, Any]) -> list[Any] | None:
    """A list with an entry a layer, each one of `choices` and read as that says; None where there is none."""
    value = self.raw(name)
    if value is None:
      return None
    count = self.layers()
    if not isinstance(value, list) or len(value) != count:
      raise UserError(f'{self.where}: field {name} is {str(value)[:40]!r}; it must be a list with {count} entries')
    for entry in value:
      if not isinstance(entry, (str, int)) or entry not in choices:
        known = ', '.join(map(repr, choices))
        raise UserError(f'{self.where}: field {name} has an entry {str(entry)[:40]!r}; only {known} are supported')
    return [choices[entry] for entry in value]


def _window_everywhere(said: _Said) -> dict[str, Any]:
  if said.raw('sliding_window') is None:
    return {}
  return {'windows': (said.positive('sliding_window', int),) * said.layers()}


def _window_by_layer(said: _Said, slides: Callable[[int], bool], used: bool = True) -> dict[str, Any]:
  """Windows of the layers that `layer_types` names or, where it is missing and they are used, that `slides` picks."""
  types = said.per_layer('layer_types', {'full_attention': False, 'sliding_attention': True})
  if types is None:
    types = [slides(layer) for layer in range(said.layers())] if used else []
  if not any(types):
    return {}
  if not used:
    raise UserError(f'{said.where}: field layer_types has sliding_attention, but use_sliding_window is not true')
  window = said.positive('sliding_window', int)
  return {'windows': tuple(window if slide else 0 for slide in types)}


def _uses_window(said: _Said) -> bool:
  return said.read('use_sliding_window', bool, False) and said.raw('sliding_window') is not None


def _window_of_qwen(said: _Said) -> dict[str, Any]:
  first = said.read('max_window_layers', int, 28)
  return _window_by_layer(said, lambda layer: layer >= first, _uses_window(said))


def _gemma(said: _Said, pattern: int) -> dict[str, Any]:
  return {
    'embed_scale': said.positive('hidden_size', int) ** 0.5,
    'query_scale': said.positive('query_pre_attn_scalar', float) ** -0.5,
    'norm_offset': 1.0,
    'post_norms': True,
    'logit_softcap': said.read('final_logit_softcapping', float, 0),
    **_window_by_layer(said, lambda layer: (layer + 1) % pattern != 0),
  }


def _gemma2(said: _Said) -> dict[str, Any]:
  return {**_gemma(said, 2), 'attention_softcap': said.read('attn_logit_softcapping', float, 0)}


def _gemma3(said: _Said) -> dict[str, Any]:
  pattern = said.read('sliding_window_pattern', int, said.read('_sliding_window_pattern', int, 6))
  if pattern < 1:
    raise UserError(f'{said.where}: field sliding_window_pattern is {pattern}; it must be at least 1')
  return {**_gemma(said, pattern), 'qk_norm': 'head'}


def _smollm3(said: _Said) -> dict[str, Any]:
  every = said.read('no_rope_layer_interval', int, 4)
  if every < 1:
    raise UserError(f'{said.where}: field no_rope_layer_interval is {every}; it must be at least 1')
  # Despite its name, the list says 1 where there are rotary positions.
  rotated = said.per_layer('no_rope_layers', {0: False, 1: True})
  if rotated is None:
    rotated = [(layer + 1) % every != 0 for layer in range(said.layers())]
  windows = _window_by_layer(said, lambda layer: not rotated[layer], _uses_window(said))
  return {'rope_layers': () if all(rotated) else tuple(rotated), **windows}


def _biases(said: _Said) -> dict[str, Any]:
  biased = said.read('attention_bias', bool, False)
  return {'qkv_bias': biased, 'o_bias': biased}


def _mixture(said: _Said, width: str, renormalize: bool) -> dict[str, Any]:
  # transformers 5 writes the latter for families that had the former.
  count = 'num_local_experts' if said.raw('num_experts') is None else 'num_experts'
  return {
    'num_experts': said.positive(count, int),
    'experts_per_token': said.positive('num_experts_per_tok', int),
    'mlp_dim': said.read(width, int),
    'renormalize_experts': renormalize,
  }


class _Family(NamedTuple):
  """What a family says beyond what llama does.

  Attributes:
    fields: fields of ModelConfig, read from a config.json.
    reads: the fields of _NEUTRAL that this and `rope` read.
    defaults: of fields that may be missing, where they are not llama's.
    names: of tensors, where they are not llama's.
  """

  fields: Callable[[_Said], dict[str, Any]]
  reads: Collection[str] = ()
  defaults: Mapping[str, Any] = {}
  names: Mapping[str, str] = {}


_SLIDING = ('sliding_window', 'use_sliding_window', 'layer_types')
_GEMMA_READS = (
  *('attention_bias', 'sliding_window', 'layer_types'),
  *('query_pre_attn_scalar', 'final_logit_softcapping'),
)
_GEMMA_DEFAULTS = {
  'head_dim': 256,
  'num_key_value_heads': 4,
  'query_pre_attn_scalar': 256,
  'sliding_window': 4096,
  'tie_word_embeddings': True,
  'hidden_activation': 'gelu_pytorch_tanh',
}

_FAMILIES: dict[str, _Family] = {
  'llama': _Family(
    lambda said: {**_biases(said), 'mlp_bias': said.read('mlp_bias', bool, False)}, ('attention_bias', 'mlp_bias')
  ),
  'mistral': _Family(
    _window_everywhere, ('sliding_window',), defaults={'sliding_window': 4096, 'num_key_value_heads': 8}
  ),
  'qwen2': _Family(
    lambda said: {'qkv_bias': True, **_window_of_qwen(said)},
    _SLIDING,
    defaults={'num_key_value_heads': 32, 'sliding_window': 4096},
  ),
  'qwen3': _Family(
    lambda said: {'qk_norm': 'head', **_biases(said), **_window_of_qwen(said)},
    ('attention_bias', *_SLIDING),
    defaults={'head_dim': 128, 'num_key_value_heads': 32, 'sliding_window': 4096},
  ),
  'gemma2': _Family(
    lambda said: {**_biases(said), **_gemma2(said)},
    (*_GEMMA_READS, 'attn_logit_softcapping'),
    defaults={**_GEMMA_DEFAULTS, 'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0},
    names=_NORMS_BEFORE_AND_AFTER,
  ),
  'gemma3_text': _Family(
    lambda said: {**_biases(said), **_gemma3(said)},
    (*_GEMMA_READS, 'rope_local_base_freq'),
    defaults={**_GEMMA_DEFAULTS, 'rope_theta': 1e6, 'rope_local_base_freq': 1e4},
    names=_NORMS_BEFORE_AND_AFTER,
  ),
  'smollm3': _Family(
    lambda said: {**_biases(said), 'mlp_bias': said.read('mlp_bias', bool, False), **_smollm3(said)},
    ('attention_bias', 'mlp_bias', 'no_rope_layers', *_SLIDING),
    defaults={'num_key_value_heads': 4, 'rope_theta': 2e6, 'tie_word_embeddings': True},
  ),
  'olmo2': _Family(
    lambda said: {**_biases(said), 'qk_norm': 'all', 'pre_norms': False, 'post_norms': True},
    ('attention_bias',),
    defaults={'rms_norm_eps': 1e-5},
    names=_NORMS_BEFORE_AND_AFTER,
  ),
  'phi3': _Family(
    _window_everywhere,
    ('sliding_window', 'partial_rotary_factor'),
    defaults={'rms_norm_eps': 1e-5},
    names=_FUSED,
  ),
  'qwen3_moe': _Family(
    lambda said: {
      'qk_norm': 'head',
      **_biases(said),
      **(_window_everywhere(said) if _uses_window(said) else {}),
      **_mixture(said, 'moe_intermediate_size', said.read('norm_topk_prob', bool, False)),
    },
    ('attention_bias', 'sliding_window', 'use_sliding_window', 'num_experts', 'num_local_experts'),
    defaults={'num_key_value_heads': 4, 'sliding_window': 4096},
    names=_QWEN_EXPERTS,
  ),
  'mixtral': _Family(
    lambda said: {**_window_everywhere(said), **_mixture(said, 'intermediate_size', True)},
    ('sliding_window', 'num_local_experts', 'num_experts'),
    defaults={'num_key_value_heads': 8, 'rope_theta': 1e6, 'rms_norm_eps': 1e-5},
    names=_MIXTRAL_EXPERTS,
  ),
}
SUPPORTED: Sequence[str] = tuple(_FAMILIES)


def tensor_names(model_type: str) -> dict[str, str]:
  """What our tensors are called in a file of this family, with {layer} and {expert}; see `assemble`."""
  return {**_NAMES, **_FAMILIES[model_type].names}


def from_hf(config: Mapping[str, Any], where: str) -> ModelConfig:
  """A Hugging Face config.json as a ModelConfig.

  Args:
    config: the parsed JSON.
    where: the file's path, for error messages.

  Raises:
    UserError: an unsupported model_type, or a field that changes the mathematics and is not handled.
  """
  model_type = config.get('model_type')
  family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
  if family is None:
    raise UserError(f'{where}: model_type {str(model_type)[:40]!r} is not supported; use one of {", ".join(SUPPORTED)}')
  said = _Said(config, family.defaults, where)
  for field, neutral in _NEUTRAL.items():
    if field not in family.reads and config.get(field) not in neutral:
      raise UserError(
        f'{where}: field {field} = {str(config[field])[:40]!r} is not supported for model_type {model_type!r}; '
        f'only {neutral[-1]!r} is'
      )
  heads, embed_dim = said.read('num_attention_heads', int), said.read('hidden_size', int)
  fields = {
    'num_layers': said.read('num_hidden_layers', int),
    'embed_dim': embed_dim,
    'num_heads': heads,
    'num_kv_heads': said.read('num_key_value_heads', int, heads),
    'head_dim': said.read('head_dim', int, embed_dim // max(heads, 1)),
    'mlp_dim': said.read('intermediate_size', int),
    'vocab_size': said.read('vocab_size', int),
    'norm_eps': said.read('rms_norm_eps', float, 1e-6),
    'tied_embeddings': said.read('tie_word_embeddings', bool, False),
    'max_length': said.read('max_position_embeddings', int, 2048),
    'activation': _activation(said),
  }
  fields |= family.fields(said)
  fields |= _rope(
    said, fields['head_dim'], 'rope_local_base_freq' in family.reads, 'partial_rotary_factor' in family.reads
  )
  try:
    return ModelConfig(**fields)
  except UserError as error:
    raise UserError(f'{where}: {error}') from error


def _activation(said: _Said) -> str:
  # Where a family has both, transformers reads the second and keeps the first for old checkpoints.
  field = 'hidden_act' if said.raw('hidden_activation') is None else 'hidden_activation'
  value = said.raw(field) or 'silu'
  if not isinstance(value, str) or value not in _ACTIVATIONS:
    known = ', '.join(map(repr, _ACTIVATIONS))
    raise UserError(f'{said.where}: field {field} = {str(value)[:40]!r} is not supported; only {known} are')
  return _ACTIVATIONS[value]


def _rope(said: _Said, head_dim: int, local: bool, partial: bool) -> dict[str, Any]:
  """The fields of rotary positions: as transformers 5 writes them, in rope_parameters, or as earlier versions did.

  Args:
    said: the config.json.
    head_dim: of the model.
    local: whether layers with a window have a base of their own.
    partial: whether a part of each head may be left unrotated.
  """
  where, field = said.where, 'rope_scaling' if said.raw('rope_scaling') else 'rope_parameters'
  rope = said.raw(field) or {}
  if not isinstance(rope, Mapping):
    raise UserError(f'{where}: field {field} is {str(rope)[:40]!r}; it must be an object')
  fields: dict[str, Any] = {}
  if local:
    sliding, full = (rope.get(kind) or {} for kind in ('sliding_attention', 'full_attention'))
    nested = isinstance(sliding, Mapping) and isinstance(full, Mapping)
    if not nested or sliding.get('rope_type', 'default') != 'default':
      raise UserError(f'{where}: field {field}: sliding_attention = {str(sliding)[:40]!r} is not supported')
    fields['local_rope_theta'] = _Said(sliding, {}, where).read(
      'rope_theta', float, said.read('rope_local_base_freq', float)
    )
    rope = full if field == 'rope_parameters' else rope
  kind = rope.get('rope_type') or rope.get('type') or 'default'
  # Phi's own fields come first there, as in transformers.
  original = said.raw('original_max_position_embeddings') or rope.get('original_max_position_embeddings')
  scaled = {**rope, 'original_max_position_embeddings': original or said.read('max_position_embeddings', int, 2048)}
  theta = _Said(rope, {}, where).read('rope_theta', float, said.read('rope_theta', float, 10_000.0))
  part = _Said(rope, {}, where).read('partial_rotary_factor', float, said.read('partial_rotary_factor', float, 1))
  rotated = int(head_dim * part) if 0 < part <= 1 else -1
  if rotated < 2 or (rotated != head_dim and not partial):
    raise UserError(f'{where}: field partial_rotary_factor = {part} is not supported; only 1 is')
  if not (math.isfinite(theta) and theta > 0):
    raise UserError(f'{where}: field rope_theta is {theta}; it must be a number above 0')
  factors, gain = scaling(kind, scaled, rotated, theta, where)
  fields |= {'rope_theta': theta, 'rope_factors': factors, 'rope_gain': gain}
  return fields | ({'rotary_dim': rotated} if rotated != head_dim else {})
