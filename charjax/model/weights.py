"""Weights in: arrays by name become a Decoder, each read straight into its shards."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from charjax.errors import UserError
from charjax.mesh import spec
from charjax.model.checkpoint_source import Index, Tensors, empty
from charjax.model.config import ModelConfig
from charjax.model.decoder import Decoder, Runtime


def abstract_decoder(config: ModelConfig, dtype: Any, runtime: Runtime) -> Decoder:
  """A Decoder of shapes and dtypes only."""
  return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, runtime=runtime))


def make_decoder(config: ModelConfig, tensors: Mapping[str, np.ndarray], dtype: Any, runtime: Runtime) -> Decoder:
  """A Decoder with the given weights, sharded by the rules of charjax.mesh over the current mesh.

  Args:
    config: the model's shape.
    tensors: arrays by name ('embed', 'blocks.q', ...), stacked over layers. Of those of a file no more is read than the
      devices of this host hold, a shard at a time, and a device that computes in the host's memory takes it over.
    dtype: of the parameters.
    runtime: how it computes.

  Raises:
    UserError: a tensor is missing, unknown or of the wrong shape.
  """
  abstract, dtype = abstract_decoder(config, dtype, runtime), jnp.dtype(dtype)
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
    read = _reader(tensors, name, dtype, leaf.shape)
    if mesh.empty:
      value = jax.device_put(read(None))
    else:
      value = _put(read, leaf.shape, NamedSharding(mesh, spec(leaf.shape, leaf.get_metadata()['axes'], mesh)))
    loaded[tuple(name.split('.'))] = leaf.replace(value)
  return nnx.merge(graph, nnx.from_flat_state(list(loaded.items())))


def _reader(
  tensors: Mapping[str, np.ndarray], name: str, dtype: Any, shape: tuple[int, ...]
) -> Callable[[Index | None], np.ndarray]:
  """What gives a part of a tensor, in memory that is given away with it."""
  if isinstance(tensors, Tensors):
    return lambda part: tensors.read(name, dtype, part)
  whole = np.asarray(tensors[name], dtype)
  if whole.shape != shape:
    raise UserError(f'checkpoint: tensor {name} has shape {whole.shape}, the config says {shape}')

  def copy(part: Index | None) -> np.ndarray:
    found = whole if part is None else whole[part]
    out = empty(found.shape, dtype)
    out[...] = found
    return out

  return copy


def _put(read: Callable[[Index], np.ndarray], shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
  """A tensor on the devices of this host, by shards: each is read once, and let go before the next."""
  holders: dict[tuple[tuple[int, int, int], ...], list[jax.Device]] = {}
  for device, part in sharding.addressable_devices_indices_map(shape).items():
    ranges = tuple(some.indices(size) for some, size in zip(part or (), shape, strict=True))
    holders.setdefault(ranges, []).append(device)
  arrays: list[jax.Array] = []
  for ranges, devices in holders.items():
    shard = read(tuple(slice(*some) for some in ranges))
    arrays += jax.block_until_ready([jax.device_put(shard, device) for device in devices])
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
