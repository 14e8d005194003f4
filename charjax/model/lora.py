"""Low-rank adapters (Hu et al. 2021, LoRA): W x + (alpha / r) B A x, with W untouched.

Letters: L layers, I inputs, O outputs, R rank.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from charjax.errors import UserError
from charjax.model.config import PROJECTIONS, ModelConfig
from charjax.model.decoder import Decoder, block_shapes


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
    shapes = block_shapes(config)
    # In one order, so that the first values are the same in whatever order the targets are named.
    for name in config.dense_projections:
      if targets and name not in targets:
        continue
      layers, *dims = shapes[name]
      inputs = 2 if name == 'o' else 1
      in_dim, out_dim = int(np.prod(dims[:inputs])), int(np.prod(dims[inputs:]))
      a = jax.random.normal(rngs.params(), (layers, in_dim, rank)) * in_dim**-0.5
      pair = {
        'a': nnx.Param(a, axes=(None, 'embed' if name not in ('o', 'down') else None, None)),
        'b': nnx.Param(jnp.zeros((layers, rank, out_dim)), axes=(None, None, None)),
      }
      setattr(self, name, nnx.Dict(pair))

  def arrays(self) -> dict[str, dict[str, Any]]:
    return {
      name: {'a': getattr(self, name)['a'][...], 'b': getattr(self, name)['b'][...]}
      for name in PROJECTIONS
      if hasattr(self, name)
    }


def merge(decoder: Decoder, adapter: Adapter) -> Decoder:
  """The weights with the adapter in them, float32 and laid out as they were: W + B A, the product in float32."""
  merged = jax.tree.map(lambda x: x.astype(jnp.float32), decoder)
  for name, pair in adapter.arrays().items():
    weight = getattr(merged.blocks, name)
    change = jnp.einsum('lir,lro->lio', pair['a'], pair['b'], precision='highest')
    weight[...] += change.reshape(weight.shape)
  return merged
