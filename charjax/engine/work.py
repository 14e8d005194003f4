"""How much work the model did in this process: tokens, the FLOPs that they take, and the seconds of compiling.

FLOPs are the model's (Chowdhery et al. 2022, appendix B): what its real tokens need, whatever was padded or computed
twice. A weight takes 2 a token, and a pair of tokens that attend to each other 4 N H a layer.

Letters: B texts, N query heads, H head size, D width, V vocabulary.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from charjax import chips
from charjax.model.blocks import block_parameters
from charjax.model.config import ModelConfig


@dataclasses.dataclass
class Work:
  """What was done.

  Attributes:
    tokens: that went through the model; in training, once a step.
    flops: of the model.
    compile_seconds: in which programs were compiled, or fetched from the cache of compiled programs.
  """

  tokens: int = 0
  flops: float = 0.0
  compile_seconds: float = 0.0

  def since(self, before: 'Work') -> 'Work':
    return Work(self.tokens - before.tokens, self.flops - before.flops, self.compile_seconds - before.compile_seconds)


_total = Work()
_told: list[Callable[[str], None]] = []


def done() -> Work:
  """All since the process began."""
  return dataclasses.replace(_total)


def watch_compilation() -> None:
  """Counts the seconds of compiling from now on, and tells of it those who asked. Call it once."""

  def heard(event: str, duration_secs: float, **more: Any) -> None:
    # JAX tells of what has ended: when a program has been lowered, its compilation begins.
    if event == '/jax/core/compile/jaxpr_to_mlir_module_duration':
      _tell(str(more.get('fun_name', 'a program')))
    elif event == '/jax/core/compile/backend_compile_duration':
      _total.compile_seconds += duration_secs
      _tell('')

  jax.monitoring.register_event_duration_secs_listener(heard)


def tell_of_compilation(tell: Callable[[str], None]) -> Callable[[], None]:
  """From now on calls `tell` with a program's name when its compilation begins, and with '' when it has ended.

  Returns:
    what ends it.
  """
  _told.append(tell)
  return lambda: _told.remove(tell)


def _tell(name: str) -> None:
  for tell in _told:
    tell(name)


def count(config: ModelConfig, before_b: Any, length_b: Any, *, times: float = 1, predicted: float = 0) -> None:
  """Counts texts that went through the model.

  Args:
    config: the model's.
    before_b: how many tokens each attends to that stand before it.
    length_b: how many tokens of its own it has.
    times: how often each was computed; a backward pass is two, or one where the weights are frozen.
    predicted: how many distributions over the vocabulary were computed of them.
  """
  before_b, length_b = np.broadcast_arrays(np.asarray(before_b, np.float64), np.asarray(length_b, np.float64))
  tokens = int(length_b.sum())
  pairs = 0.0
  for window, layers in Counter(kind.window or math.inf for kind in config.layer_kinds()).items():
    # The first tokens, which attend to less than a whole window, and the others.
    growing_b = np.clip(window - before_b, 0, length_b)
    whole = np.where(growing_b < length_b, (length_b - growing_b) * min(window, 2**62), 0)
    pairs += layers * (growing_b * before_b + growing_b * (growing_b + 1) / 2 + whole).sum()
  attention = 4 * config.num_heads * config.head_dim * pairs
  head = 2 * config.embed_dim * config.vocab_size * predicted
  _total.tokens += tokens
  _total.flops += float(times * (tokens * _token_flops(config) + attention) + head)


def count_rows(config: ModelConfig, rows: Any, before: int, *, times: float = 1, heads: float = 0) -> None:
  """Counts an `engine.score.Rows` of the host: each prompt once, and all replies.

  Args:
    config: the model's.
    rows: what went through it.
    before: how many tokens stand before all prompts.
    times: as in `count`.
    heads: how often the distribution of each reply token was computed.
  """
  each = len(rows.lengths) // len(rows.prompt_lengths)
  lengths = np.asarray(rows.lengths)
  count(config, before, rows.prompt_lengths, times=times)
  count(
    config, before + np.repeat(rows.prompt_lengths, each), lengths, times=times,
    predicted=heads * np.maximum(lengths - 1, 0).sum(),
  )  # fmt: skip


def _token_flops(config: ModelConfig) -> float:
  """Of the weights that a token goes through in all layers."""
  total = 0.0
  for parameter in block_parameters(config).values():
    if parameter.inputs:
      used = config.experts_per_token / config.num_experts if parameter.axes[1] == 'experts' else 1
      total += 2 * math.prod(parameter.shape) * used
  return total


def rates(work: Work, seconds: float) -> dict[str, float]:
  """Tokens and model FLOPs a second, and of the devices' peak, where that is known, the share that was used."""
  if not work.tokens or seconds <= 0:
    return {}
  out = {'tokens_per_second': work.tokens / seconds, 'model_flops_per_second': work.flops / seconds}
  if peak := chips.peak(jax.devices()[0].device_kind):
    out['utilisation'] = out['model_flops_per_second'] / (peak * jax.device_count())
  return out
