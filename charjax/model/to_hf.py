"""A ModelConfig as the config.json of a Hugging Face family: the inverse of `families.from_hf`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from charjax.errors import UserError
from charjax.model.config import ModelConfig
from charjax.model.families import from_hf

_ACTIVATIONS = {'silu': 'silu', 'gelu_tanh': 'gelu_pytorch_tanh'}
_GPT_CLASSES = {
  'llama': 'Llama',
  'mistral': 'Mistral',
  'qwen2': 'Qwen2',
  'qwen3': 'Qwen3',
  'gemma2': 'Gemma2',
  'gemma3_text': 'Gemma3',
  'smollm3': 'SmolLM3',
  'olmo2': 'Olmo2',
  'phi3': 'Phi3',
  'qwen3_moe': 'Qwen3Moe',
  'mixtral': 'Mixtral',
}


def _window(c: ModelConfig) -> int | None:
  return max(c.windows, default=0) or None


def _window_everywhere(c: ModelConfig) -> dict[str, Any]:
  return {'sliding_window': _window(c)}


def _window_by_layer(c: ModelConfig) -> dict[str, Any]:
  windows = c.windows or (0,) * c.num_layers
  kinds = ['sliding_attention' if window else 'full_attention' for window in windows]
  return {'sliding_window': _window(c), 'layer_types': kinds}


def _window_if_used(c: ModelConfig) -> dict[str, Any]:
  return {'use_sliding_window': bool(_window(c)), **_window_by_layer(c)}


def _whole(value: float) -> float:
  """The number without what its root's rounding left of it, as an int where it is one."""
  value = round(value, 6)
  return int(value) if value == int(value) else value


def _gemma(c: ModelConfig) -> dict[str, Any]:
  return {
    'hidden_activation': _ACTIVATIONS[c.activation],
    'query_pre_attn_scalar': _whole(c.query_scale**-2 if c.query_scale else c.head_dim),
    'final_logit_softcapping': c.logit_softcap or None,
    'attention_bias': c.qkv_bias,
    **_window_by_layer(c),
  }


def _mixture(c: ModelConfig) -> dict[str, Any]:
  return {'num_experts_per_tok': c.experts_per_token}


# By model_type, what its config.json says beside what all do.
_FIELDS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
  'llama': lambda c: {'attention_bias': c.qkv_bias, 'mlp_bias': c.mlp_bias},
  'mistral': _window_everywhere,
  'qwen2': _window_if_used,
  'qwen3': lambda c: {'attention_bias': c.qkv_bias, **_window_if_used(c)},
  'gemma2': lambda c: {**_gemma(c), 'attn_logit_softcapping': c.attention_softcap or None},
  'gemma3_text': lambda c: {**_gemma(c), 'rope_local_base_freq': c.local_rope_theta},
  'smollm3': lambda c: {
    'attention_bias': c.qkv_bias,
    'mlp_bias': c.mlp_bias,
    # Despite its name, the list says 1 where there are rotary positions.
    'no_rope_layers': [int(rotated) for rotated in c.rope_layers or (True,) * c.num_layers],
    **_window_if_used(c),
  },
  'olmo2': lambda c: {'attention_bias': c.qkv_bias},
  'phi3': lambda c: {'partial_rotary_factor': c.rotated / c.head_dim, **_window_everywhere(c)},
  'qwen3_moe': lambda c: {
    'attention_bias': c.qkv_bias,
    'num_experts': c.num_experts,
    'moe_intermediate_size': c.mlp_dim,
    'norm_topk_prob': c.renormalize_experts,
    'use_sliding_window': bool(_window(c)),
    **_window_everywhere(c),
    **_mixture(c),
  },
  'mixtral': lambda c: {'num_local_experts': c.num_experts, **_window_everywhere(c), **_mixture(c)},
}


def class_name(family: str) -> str:
  """transformers' class of a causal language model of this family."""
  return f'{_GPT_CLASSES[family]}ForCausalLM'


def to_hf(config: ModelConfig, family: str, rope: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """The config.json of a model, in the older of two forms that all versions of transformers read.

  Args:
    config: the model. Its norm_offset may differ from the family's: see `norm_shift`.
    family: the model_type.
    rope: the rope_scaling that its rope_factors and rope_gain came from.

  Raises:
    UserError: a config.json of this family cannot say what the model is.
  """
  out = {
    'model_type': family,
    'architectures': [class_name(family)],
    'hidden_size': config.embed_dim,
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_dim,
    'intermediate_size': config.mlp_dim,
    'vocab_size': config.vocab_size,
    'rms_norm_eps': config.norm_eps,
    'tie_word_embeddings': config.tied_embeddings,
    'max_position_embeddings': config.max_length,
    'hidden_act': _ACTIVATIONS[config.activation],
    'rope_theta': config.rope_theta,
    'rope_scaling': dict(rope or {}) or None,
    **_FIELDS[family](config),
  }
  check_says(out, config, f'export: a config.json of model_type {family!r}')
  return out


def check_says(raw: Mapping[str, Any], config: ModelConfig, where: str) -> None:
  """Raises UserError unless a config.json says what the model is; its norm_offset may differ."""
  said = from_hf(raw, where)
  for field in dataclasses.fields(ModelConfig):
    one, other = (_plain(getattr(c, field.name)) for c in (said, config))
    # Where scaling was told by its factors, they were told in float32.
    same = one == other if field.name != 'rope_factors' else len(one) == len(other) and np.allclose(one, other, 1e-6, 0)
    if not same and field.name != 'norm_offset':
      raise UserError(f'{where} would say {field.name} = {str(one)[:60]}, but the model has {str(other)[:60]}')


def _plain(value: Any) -> Any:
  """A field with an entry a layer that says nothing as it is where nothing is said."""
  if isinstance(value, tuple) and (not any(value) or (all(value) and isinstance(value[0], bool))):
    return ()
  return value


def norm_shift(raw: Mapping[str, Any], config: ModelConfig) -> float:
  """What is added to the stored scales of norms to give those of a config.json: GGUF files keep Gemma's larger by 1."""
  return config.norm_offset - from_hf(raw, '').norm_offset
