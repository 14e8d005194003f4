"""Low-rank adapters (Hu et al. 2021, LoRA): W x + (alpha / r) B A x, with W untouched.

Letters: L layers, I inputs, O outputs, R rank.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from charjax.errors import UserError
from charjax.model.blocks import block_parameters
from charjax.model.checkpoint_source import Tensors, read_tensor
from charjax.model.config import PROJECTIONS, ModelConfig
from charjax.model.decoder import Decoder
from charjax.model.weights import dequantized

# What an Adapter holds, by projection: 'a' [L, I, R] and 'b' [L, R, O], float32.
Arrays = Mapping[str, Mapping[str, Any]]


def sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
  """Inputs and outputs of each projection that an adapter can stand beside."""
  parameters, out = block_parameters(config), {}
  for name in config.dense_projections:
    _, *dims = parameters[name].shape
    inputs = math.prod(dims[: parameters[name].inputs])
    out[name] = inputs, math.prod(dims) // inputs
  return out


class Adapter(nnx.Module):
  """For each target weight [L, I..., O...]: a [L, I, R] (random) and b [L, R, O] (zero: it starts as no change).

  The scale alpha / r of the paper is folded into the initial a, so that there is no such field. Experts of a mixture,
  which see few tokens each, and their router have no adapters.

  Raises:
    UserError: the rank is below 1, or the decoder lacks a target.
  """

  def __init__(self, config: ModelConfig, rank: int, *, rngs: nnx.Rngs, targets: Sequence[str] = ()):
    if rank < 1:
      raise UserError(f'lora rank is {rank}; it must be at least 1')
    config.check_targets(targets, 'lora target')
    # In one order, so that the first values are the same in whatever order the targets are named.
    for name, (in_dim, out_dim) in sizes(config).items():
      if targets and name not in targets:
        continue
      a = jax.random.normal(rngs.params(), (config.num_layers, in_dim, rank)) * in_dim**-0.5
      pair = {
        'a': nnx.Param(a, axes=(None, 'embed' if name not in ('o', 'down') else None, None)),
        'b': nnx.Param(jnp.zeros((config.num_layers, rank, out_dim)), axes=(None, None, None)),
      }
      setattr(self, name, nnx.Dict(pair))

  def arrays(self) -> Arrays:
    return {
      name: {'a': getattr(self, name)['a'][...], 'b': getattr(self, name)['b'][...]}
      for name in PROJECTIONS
      if hasattr(self, name)
    }


def merge(decoder: Decoder, adapter: Adapter) -> Decoder:
  """The weights with the adapter in them, float32 and laid out as they were: W + B A, the product in float32."""
  merged = jax.tree.map(lambda x: x.astype(jnp.float32), dequantized(decoder))
  for name, pair in adapter.arrays().items():
    weight = getattr(merged.blocks, name)
    change = jnp.einsum('lir,lro->lio', pair['a'], pair['b'], precision='highest')
    weight[...] += change.reshape(weight.shape)
  return merged


def add(tensors: Mapping[str, np.ndarray], adapters: Sequence[tuple[float, Arrays]]) -> Tensors:
  """A checkpoint's tensors with the weighted sum of adapters in them: W + sum_i w_i B_i A_i.

  Products and sums are in float32, a layer at a time, when a tensor is asked for; then it is rounded to the type that
  is asked for.

  Args:
    tensors: the checkpoint's.
    adapters: weights w_i, and a [L, I, R_i] and b [L, R_i, O] by projection. Ranks may differ, and projections too.
  """

  def read(name: str, dtype: Any) -> np.ndarray:
    target = name.removeprefix('blocks.')
    found = [(np.float32(weight), arrays[target]) for weight, arrays in adapters if target in arrays]
    if not found:
      return read_tensor(tensors, name, dtype)
    start = tensors[name]
    out = np.empty(start.shape, dtype)
    for layer, place in enumerate(out):
      changes = (weight * (pair['a'][layer] @ pair['b'][layer]) for weight, pair in found)
      place[...] = start[layer] + sum(changes).reshape(place.shape)
    return out

  return Tensors(tensors.keys(), read)
