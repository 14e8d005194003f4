"""Weights in: arrays by name become a Decoder, each read straight into its shards."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from charjax.errors import UserError
from charjax.mesh import spec
from charjax.model import quantized
from charjax.model.blocks import block_parameters
from charjax.model.checkpoint_source import Index, Tensors, empty, read_tensor
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
  parameters = block_parameters(config)
  small = {f'blocks.{name}': parameters[name].inputs for name in config.dense_projections if runtime.quantize}
  unknown = sorted(set(tensors) - set(flat))
  if unknown:
    raise UserError(f'checkpoint: tensor {unknown[0]} is not part of this model; is its config right?')
  loaded = {}

  def put(name: str, read: Callable[[Index | None], np.ndarray]) -> None:
    leaf = flat[name]
    if mesh.empty:
      value = jax.device_put(read(None))
    else:
      value = _put(read, leaf.shape, NamedSharding(mesh, spec(leaf.shape, leaf.get_metadata()['axes'], mesh)))
    loaded[tuple(name.split('.'))] = leaf.replace(value)

  for name, leaf in flat.items():
    if name.removesuffix('_scale') in small and name not in small:
      continue
    if name not in tensors:
      raise UserError(f'checkpoint: tensor {name} is missing; is the checkpoint complete?')
    if name not in small:
      put(name, _reader(tensors, name, dtype, leaf.shape))
      continue
    # Of all weights that are to be smaller, those of one tensor are here in full at a time.
    q, scale = quantized.quantize_host(_whole(tensors, name, np.float32, leaf.shape), small[name], runtime.quantize)
    put(name, _copies(q))
    put(f'{name}_scale', _copies(scale))
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


def _reader(
  tensors: Mapping[str, np.ndarray], name: str, dtype: Any, shape: tuple[int, ...]
) -> Callable[[Index | None], np.ndarray]:
  """What gives a part of a tensor, or all, in memory that is given away with it."""
  if not isinstance(tensors, Tensors) or tensors.read_part is None:
    return _copies(_whole(tensors, name, dtype, shape))
  read, read_part = tensors.read, tensors.read_part
  return lambda part: read(name, dtype) if part is None else read_part(name, dtype, part)


def _whole(tensors: Mapping[str, np.ndarray], name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
  found = read_tensor(tensors, name, dtype)
  if found.shape != shape:
    raise UserError(f'checkpoint: tensor {name} has shape {found.shape}, the config says {shape}')
  return found


def _copies(whole: np.ndarray) -> Callable[[Index | None], np.ndarray]:
  def copy(part: Index | None) -> np.ndarray:
    found = whole if part is None else whole[part]
    out = empty(found.shape, whole.dtype)
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
