"""What a decoder needs to know of itself before its weights are read."""

import dataclasses
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
    if self.num_heads % self.num_kv_heads:
      raise UserError(f'model shape: num_heads ({self.num_heads}) is no multiple of num_kv_heads ({self.num_kv_heads})')


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
    raise UserError(f'{where}: rope_parameters = {rope!r} is not supported; only rope_type "default" is')
  try:
    heads = int(config['num_attention_heads'])
    return ModelConfig(
      num_layers=int(config['num_hidden_layers']),
      embed_dim=int(config['hidden_size']),
      num_heads=heads,
      num_kv_heads=int(config.get('num_key_value_heads') or heads),
      head_dim=int(config.get('head_dim') or config['hidden_size'] // heads),
      mlp_dim=int(config['intermediate_size']),
      vocab_size=int(config['vocab_size']),
      rope_theta=float(rope.get('rope_theta', config.get('rope_theta', 10_000.0))),
      norm_eps=float(config.get('rms_norm_eps', 1e-6)),
      tied_embeddings=bool(config.get('tie_word_embeddings', False)),
      max_length=int(config.get('max_position_embeddings', 2048)),
    )
  except KeyError as error:
    raise UserError(f'{where}: field {error.args[0]} is missing; is this a complete checkpoint?') from error
  except (TypeError, ValueError) as error:
    raise UserError(f'{where}: a field has the wrong type ({error})') from error
  except UserError as error:
    raise UserError(f'{where}: {error}') from error
