"""The parameters of a decoder's blocks: which there are, of what shape, along which axes they may be split.

Letters: L layers, E experts.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from charjax.model import quantized
from charjax.model.config import ModelConfig


class BlockParameter(NamedTuple):
  """A parameter of all blocks, stacked over L.

  Attributes:
    shape: with L first; of experts' matrices E second.
    axes: the logical axis of each dimension (see charjax.mesh).
    inputs: of a matrix, how many of the dimensions after those are its inputs; 0: it is a vector.
  """

  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  inputs: int


def block_parameters(config: ModelConfig) -> dict[str, BlockParameter]:
  """The parameters that the blocks of such a decoder have, by name."""
  c = config
  out: dict[str, BlockParameter] = {}

  def add(name: str, *dims: tuple[int, str | None], inputs: int = 0) -> None:
    sizes, axes = zip((c.num_layers, None), *dims, strict=True)
    out[name] = BlockParameter(sizes, axes, inputs)

  embed, head = (c.embed_dim, 'embed'), (c.head_dim, None)
  mlp: tuple[int, str | None] = (c.mlp_dim, 'mlp')
  heads, kv_heads = (c.num_heads, 'heads'), (c.num_kv_heads, 'kv_heads')
  if c.pre_norms:
    add('attn_norm', (c.embed_dim, None))
  for name, some in (('q', heads), ('k', kv_heads), ('v', kv_heads)):
    add(name, embed, some, head, inputs=1)
    if c.qkv_bias:
      add(f'{name}_bias', some, head)
    if c.qk_norm and name != 'v':
      add(f'{name}_norm', head if c.qk_norm == 'head' else (some[0] * c.head_dim, None))
  add('o', heads, head, embed, inputs=2)
  if c.o_bias:
    add('o_bias', (c.embed_dim, None))
  if c.post_norms:
    add('attn_post_norm', (c.embed_dim, None))
  if c.pre_norms:
    add('mlp_norm', (c.embed_dim, None))
  expert: list[tuple[int, str | None]] = []
  if c.num_experts:
    # Experts are split among devices, not their widths: the two would share a mesh axis.
    expert, mlp = [(c.num_experts, 'experts')], (c.mlp_dim, None)
    add('router', embed, (c.num_experts, None), inputs=1)
  for name, dims in (('gate', (embed, mlp)), ('up', (embed, mlp)), ('down', (mlp, embed))):
    add(name, *expert, *dims, inputs=1)
    if c.mlp_bias:
      add(f'{name}_bias', (dims[1][0], None))
  if c.post_norms:
    add('mlp_post_norm', (c.embed_dim, None))
  return out


def matrices(config: ModelConfig) -> set[str]:
  """The names of the block parameters that are matrices of products, and are rounded for these: biases of heads are
  not, though they have two dimensions, nor scales of quantised ones."""
  return {name for name, parameter in block_parameters(config).items() if parameter.inputs}


def block_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shapes of the stacked block parameters."""
  return {name: parameter.shape for name, parameter in block_parameters(config).items()}


class Blocks(nnx.Module):
  """The parameters of all L blocks, each stacked along a first axis."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any, quantize: str = ''):
    parameters, names = block_parameters(config), []
    for name, (shape, axes, inputs) in parameters.items():
      if name.endswith('norm'):
        value = jnp.full(shape, 1 - config.norm_offset, dtype)
      elif not inputs:
        value = jnp.zeros(shape, dtype)
      else:
        first = 2 if axes[1] == 'experts' else 1
        fan_in = math.prod(shape[first : first + inputs])
        value = (jax.random.normal(rngs.params(), shape) * fan_in**-0.5).astype(dtype)
      if quantize and name in config.dense_projections:
        value, scale = quantized.quantize(value, inputs, quantize)
        setattr(self, f'{name}_scale', nnx.Param(scale, axes=axes))
        names.append(f'{name}_scale')
      setattr(self, name, nnx.Param(value, axes=axes))
      names.append(name)
    self.names = tuple(names)

  def arrays(self) -> dict[str, jax.Array]:
    return {name: getattr(self, name)[...] for name in self.names}
