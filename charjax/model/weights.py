"""Weights in: arrays by name become a Decoder, each put straight into its shards."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from charjax.errors import UserError
from charjax.mesh import spec
from charjax.model import quantized
from charjax.model.checkpoint_source import read_tensor
from charjax.model.config import ModelConfig
from charjax.model.decoder import Decoder, Runtime, block_parameters


def abstract_decoder(config: ModelConfig, dtype: Any, runtime: Runtime) -> Decoder:
  """A Decoder of shapes and dtypes only."""
  return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, runtime=runtime))


def make_decoder(config: ModelConfig, tensors: Mapping[str, np.ndarray], dtype: Any, runtime: Runtime) -> Decoder:
  """A Decoder with the given weights, sharded by the rules of charjax.mesh over the current mesh.

  Args:
    config: the model's shape.
    tensors: arrays by name ('embed', 'blocks.q', ...), stacked over layers; those of a file are read one at a time,
      each let go once it is on its devices.
    dtype: of the parameters.
    runtime: how it computes.

  Raises:
    UserError: a tensor is missing, unknown or of the wrong shape.
  """
  abstract, dtype = abstract_decoder(config, dtype, runtime), jnp.dtype(dtype)
  graph, state = nnx.split(abstract)
  mesh = jax.sharding.get_mesh()
  flat = {'.'.join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
  parameters = block_parameters(config)
  small = {f'blocks.{name}': parameters[name].inputs for name in config.dense_projections if runtime.quantize}
  unknown = sorted(set(tensors) - set(flat))
  if unknown:
    raise UserError(f'checkpoint: tensor {unknown[0]} is not part of this model; is its config right?')
  loaded = {}

  def put(name: str, host: np.ndarray) -> None:
    leaf = flat[name]
    if not mesh.empty:
      host = jax.device_put(host, NamedSharding(mesh, spec(leaf.shape, leaf.get_metadata()['axes'], mesh)))
    # Copied before the next is read, so that no two of the host are there at a time.
    loaded[tuple(name.split('.'))] = leaf.replace(jax.block_until_ready(jnp.asarray(host)))

  for name, leaf in flat.items():
    if name.removesuffix('_scale') in small and name not in small:
      continue
    if name not in tensors:
      raise UserError(f'checkpoint: tensor {name} is missing; is the checkpoint complete?')
    host = read_tensor(tensors, name, np.float32 if name in small else dtype)
    if host.shape != leaf.shape:
      raise UserError(f'checkpoint: tensor {name} has shape {host.shape}, the config says {leaf.shape}')
    if name in small:
      # Only now smaller: of all weights, those of one tensor are here in full at a time.
      host, scale = quantized.quantize_host(host, small[name], runtime.quantize)
      put(f'{name}_scale', scale)
    put(name, host)
  return nnx.merge(graph, nnx.from_flat_state(list(loaded.items())))


def dequantized(decoder: Decoder) -> Decoder:
  """The decoder whose weights, float32, are those that a quantised one computes with; others stay as they are."""
  if not decoder.runtime.quantize:
    return decoder
  runtime = dataclasses.replace(decoder.runtime, quantize='')
  graph, _ = nnx.split(abstract_decoder(decoder.config, jnp.float32, runtime))
  flat = dict(nnx.to_flat_state(nnx.state(decoder)))
  for path in [path for path in flat if path[-1].endswith('_scale')]:
    scale, whole = flat.pop(path), (*path[:-1], path[-1].removesuffix('_scale'))
    flat[whole] = flat[whole].replace(quantized.dequantize(flat[whole][...], scale[...]))
  return nnx.merge(graph, nnx.from_flat_state(list(flat.items())))
