"""A decoder with its tokenizer and chat template: what a stage means by "the model"."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from charjax import mesh
from charjax.errors import UserError
from charjax.model.attention import choose
from charjax.model.chat import ChatTemplate, encode_prompt, encode_reply
from charjax.model.checkpoint_source import Checkpoint
from charjax.model.config import ModelConfig
from charjax.model.decoder import Decoder, Runtime
from charjax.model.tokenizer import Tokenizer
from charjax.model.weights import abstract_decoder, make_decoder

_DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """Starting weights, and how text becomes their tokens."""

  decoder: Decoder
  tokenizer: Tokenizer
  template: ChatTemplate

  @property
  def eos_ids(self) -> tuple[int, ...]:
    return self.tokenizer.eos_ids

  def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation, up to where the assistant's next reply begins."""
    return encode_prompt(self.template, self.tokenizer, messages)

  def reply(self, text: str, ended: bool = True) -> list[int]:
    """Token ids of a reply, with the end-of-turn id unless it was cut off (then at least one token)."""
    ids = encode_reply(self.template, self.tokenizer, text)
    return ids if ended or len(ids) == 1 else ids[:-1]

  def text(self, tokens: Sequence[int]) -> str:
    """The text of drawn tokens, without surrounding white space."""
    return self.tokenizer.decode(tokens).strip()


def build(checkpoint: Checkpoint, config: Any) -> LanguageModel:
  """Puts a checkpoint on the current mesh as `config.model` says.

  Raises:
    UserError: an unknown dtype, attention that this platform has not, or tensors that do not fit.
  """
  for field in ('dtype', 'compute_dtype'):
    if config[field] not in _DTYPES:
      raise UserError(f'config.model.{field} is {config[field]!r}; choose from {", ".join(_DTYPES)}')
  runtime = make_runtime(config, jax.default_backend())
  decoder = make_decoder(checkpoint.config, checkpoint.tensors, _DTYPES[config.dtype], runtime)
  return LanguageModel(decoder, checkpoint.tokenizer, checkpoint.template)


def make_runtime(config: Any, platform: str) -> Runtime:
  """How a decoder computes on devices of a platform, as `config.model` says."""
  compute = _DTYPES[config.compute_dtype]
  return Runtime(
    compute_dtype=compute,
    widen=platform == 'cpu' and compute != jnp.float32 and not _multiplies_bfloat16(),
    attention_dtype=jnp.float32 if platform == 'cpu' else compute,
    attention=choose(config.attention, platform),
    scan_layers=config.scan_layers,
    remat=config.remat,
    quantize=config.quantize,
  )


def _multiplies_bfloat16() -> bool:
  """Whether this machine's processor has products of bfloat16, as far as Linux tells: x86's or Arm's."""
  with contextlib.suppress(OSError), open('/proc/cpuinfo', encoding='utf-8') as file:
    return bool({'avx512_bf16', 'amx_bf16', 'bf16'} & set(file.read().split()))
  return True


def describe(shape: ModelConfig, config: Any, platform: str) -> Decoder:
  """The decoder that `build` would make of a checkpoint of this shape on such devices: shapes, dtypes, shardings."""
  return mesh.describe(abstract_decoder(shape, _DTYPES[config.dtype], make_runtime(config, platform)))
