"""Weights in: arrays by name become a Decoder, each put straight into its shards."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from charjax.errors import UserError
from charjax.mesh import spec
from charjax.model.config import ModelConfig
from charjax.model.decoder import Decoder, Runtime


def abstract_decoder(config: ModelConfig, dtype: Any, runtime: Runtime) -> Decoder:
  """A Decoder of shapes and dtypes only."""
  return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, runtime=runtime))


def make_decoder(config: ModelConfig, tensors: Mapping[str, np.ndarray], dtype: Any, runtime: Runtime) -> Decoder:
  """A Decoder with the given weights, sharded by the rules of charjax.mesh over the current mesh.

  Args:
    config: the model's shape.
    tensors: float32 arrays by name ('embed', 'blocks.q', ...), stacked over layers.
    dtype: of the parameters.
    runtime: how it computes.

  Raises:
    UserError: a tensor is missing, unknown or of the wrong shape.
  """
  abstract = abstract_decoder(config, dtype, runtime)
  graph, state = nnx.split(abstract)
  mesh = jax.sharding.get_mesh()
  flat = {'.'.join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
  unknown = sorted(set(tensors) - set(flat))
  if unknown:
    raise UserError(f'checkpoint: tensor {unknown[0]} is not part of this model; is its config right?')
  loaded = {}
  for name, leaf in flat.items():
    if name not in tensors:
      raise UserError(f'checkpoint: tensor {name} is missing; is the checkpoint complete?')
    value = tensors[name]
    if value.shape != leaf.shape:
      raise UserError(f'checkpoint: tensor {name} has shape {value.shape}, the config says {leaf.shape}')
    host = np.asarray(value, jnp.dtype(dtype))
    if not mesh.empty:
      host = jax.device_put(host, NamedSharding(mesh, spec(leaf.shape, leaf.get_metadata()['axes'], mesh)))
    loaded[tuple(name.split('.'))] = leaf.replace(jnp.asarray(host))
  return nnx.merge(graph, nnx.from_flat_state(list(loaded.items())))
