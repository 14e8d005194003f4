"""What a decoder needs to know of itself before its weights are read."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from charjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The shape of a llama-family decoder (pre-norm, rotary positions, grouped heads, gated MLP)."""

  num_layers: int
  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_dim: int
  vocab_size: int
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5
  tied_embeddings: bool = True
  max_length: int = 2048

  def __post_init__(self) -> None:
    for field in ('num_layers', 'embed_dim', 'num_heads', 'num_kv_heads', 'head_dim', 'mlp_dim', 'vocab_size'):
      value = getattr(self, field)
      if not isinstance(value, int) or value < 1:
        raise UserError(f'model shape: {field} is {value!r}; it must be a positive whole number')
    if self.max_length < 1:
      raise UserError(f'model shape: max_length is {self.max_length}; it must be a positive whole number')
    for field, value in (('rope_theta', self.rope_theta), ('norm_eps', self.norm_eps)):
      if not (math.isfinite(value) and value > 0):
        raise UserError(f'model shape: {field} is {value!r}; it must be a number above 0')
    if self.num_heads % self.num_kv_heads:
      raise UserError(f'model shape: num_heads ({self.num_heads}) is no multiple of num_kv_heads ({self.num_kv_heads})')


_TYPES = {int: 'a whole number', float: 'a number', bool: 'true or false'}

# Fields of a Hugging Face llama config.json that leave the mathematics as it is at these values only.
_NEUTRAL_HF_FIELDS = {
  'hidden_act': 'silu',
  'attention_bias': False,
  'mlp_bias': False,
  'rope_scaling': None,
}


def from_hf(config: Mapping[str, Any], where: str) -> ModelConfig:
  """A Hugging Face llama config.json as a ModelConfig.

  Args:
    config: the parsed JSON.
    where: the file's path, for error messages.

  Raises:
    UserError: an unsupported model_type, or a field that changes the mathematics and is not handled.
  """
  if config.get('model_type') != 'llama':
    raise UserError(f'{where}: model_type {config.get("model_type")!r} is not supported; use a llama checkpoint')
  for field, neutral in _NEUTRAL_HF_FIELDS.items():
    if config.get(field, neutral) != neutral:
      raise UserError(f'{where}: {field} = {config[field]!r} is not supported; only {neutral!r} is')
  # transformers 5 writes rope_parameters where earlier versions wrote rope_theta.
  rope = config.get('rope_parameters') or {}
  if not isinstance(rope, Mapping) or rope.get('rope_type', 'default') != 'default':
    raise UserError(f'{where}: rope_parameters = {str(rope)[:80]} is not supported; only rope_type "default" is')
  config = {**config, 'rope_theta': rope.get('rope_theta', config.get('rope_theta'))}

  def read(name: str, kind: type, default: Any = None) -> Any:
    value = config.get(name)
    value = default if value is None else value
    if value is None:
      raise UserError(f'{where}: field {name} is missing; is this a complete checkpoint?')
    right = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if not right or not -(2**63) < value < 2**63:  # no number in a model is larger, and NaN is neither
      found = str(value)[:40]
      raise UserError(f'{where}: field {name} is {found!r}; it must be {_TYPES[kind]}')
    return kind(value)

  heads, embed_dim = read('num_attention_heads', int), read('hidden_size', int)
  fields = {
    'num_layers': read('num_hidden_layers', int),
    'embed_dim': embed_dim,
    'num_heads': heads,
    'num_kv_heads': read('num_key_value_heads', int, heads),
    'head_dim': read('head_dim', int, embed_dim // max(heads, 1)),
    'mlp_dim': read('intermediate_size', int),
    'vocab_size': read('vocab_size', int),
    'rope_theta': read('rope_theta', float, 10_000.0),
    'norm_eps': read('rms_norm_eps', float, 1e-6),
    'tied_embeddings': read('tie_word_embeddings', bool, False),
    'max_length': read('max_position_embeddings', int, 2048),
  }
  try:
    return ModelConfig(**fields)
  except UserError as error:
    raise UserError(f'{where}: {error}') from error
