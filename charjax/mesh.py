"""How arrays are laid out over devices: one mesh, one table from logical axes to mesh axes."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from charjax.errors import UserError

AXES = ('data', 'fsdp', 'tensor')

# Logical axis -> mesh axes. Parameters are split over fsdp along `embed` and over tensor along the others;
# activations are split along `batch`. An axis that is not named here is not split.
RULES: dict[str, tuple[str, ...]] = {
  'batch': ('data', 'fsdp'),
  'embed': ('fsdp',),
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'mlp': ('tensor',),
  'experts': ('tensor',),
  'vocab': ('tensor',),
}


# A decorator for whatever steps, draws or scores: each array that it works on must have been put on the devices by name
# (`shard_batch`, `replicate`), and an array of the host, a Python number or an array on other devices is an error where
# it would otherwise be copied anew at every call, unseen. On the CPU it catches all that on its way to a device, as
# elsewhere; on the way back (`np.asarray`, `float`) nothing there, since the host reads a CPU device's memory where it
# lies. Results are therefore fetched by `jax.device_get`, which says so.
no_silent_transfers = jax.transfer_guard('disallow')


# Whether arrays are described and not put on devices.
_describing = contextvars.ContextVar('describing', default=False)


@contextlib.contextmanager
def described() -> Iterator[None]:
  """Within, `shard_batch` and `replicate` give shapes, dtypes and shardings: of devices that are not there."""
  token = _describing.set(True)
  try:
    yield
  finally:
    _describing.reset(token)


def _put(array: Any, sharding: NamedSharding) -> Any:
  if _describing.get():
    dtype = array.dtype if hasattr(array, 'dtype') else np.asarray(array).dtype
    return jax.ShapeDtypeStruct(np.shape(array), dtype, sharding=sharding)
  return jax.device_put(array, sharding)


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A (data, fsdp, tensor) mesh of all devices, or of those given; one size may be -1 and takes what is left.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  sizes = list(shape)
  count = jax.device_count() if devices is None else len(devices)
  whole = all(isinstance(size, int) and (size > 0 or size == -1) for size in sizes)
  if len(sizes) != len(AXES) or sizes.count(-1) > 1 or not whole:
    raise UserError(f'config.mesh is {tuple(shape)}; it takes three sizes (data, fsdp, tensor), one of them may be -1')
  if -1 in sizes:
    sizes[sizes.index(-1)] = count // max(1, -math.prod(sizes))
  if math.prod(sizes) != count:
    raise UserError(f'config.mesh {tuple(shape)} does not fit the {count} devices here; use e.g. (1, -1, 1)')
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Any) -> PartitionSpec:
  """The PartitionSpec of an array with these logical axes. A dimension that does not divide is not split."""
  entries: list[tuple[str, ...] | None] = []
  used: set[str] = set()
  for size, axis in zip(shape, axes, strict=True):
    names = tuple(name for name in RULES.get(axis or '', ()) if mesh.shape[name] > 1)
    if used & set(names):
      raise ValueError(f'logical axes {tuple(axes)} use mesh axis {used & set(names)} twice')
    if names and size % int(np.prod([mesh.shape[name] for name in names])) == 0:
      used |= set(names)
      entries.append(names)
    else:
      entries.append(None)
  return PartitionSpec(*entries)


def constrain(array: jax.Array, *axes: str | None) -> jax.Array:
  """Pins an activation's layout inside a jitted function; without a mesh it changes nothing."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return array
  return jax.lax.with_sharding_constraint(array, spec(array.shape, axes, mesh))


def batch_parts() -> int:
  """Into how many parts a batch is split: one without a mesh."""
  mesh = jax.sharding.get_mesh()
  return 1 if mesh.empty else int(np.prod([mesh.shape[name] for name in RULES['batch']]))


def shardings(tree: Any) -> Any:
  """The NamedSharding of every array of `tree`, from the logical `axes` of its nnx.Param (none: replicated).

  Call it under `jax.set_mesh`.
  """
  mesh = jax.sharding.get_mesh()

  def one(node: Any) -> Any:
    if not isinstance(node, nnx.Variable):
      return NamedSharding(mesh, PartitionSpec())
    axes = node.get_metadata().get('axes') or (None,) * node.ndim
    return node.replace(NamedSharding(mesh, spec(node.shape, axes, mesh)))

  return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def lay_out(tree: Any) -> Any:
  """Parameters as `shardings` says; while arrays are only described, as they are."""
  if _describing.get() or jax.sharding.get_mesh().empty:
    return tree
  return jax.device_put(tree, shardings(tree))


def describe(tree: Any) -> Any:
  """Abstract arrays of parameters with the shardings of `shardings`."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree))


def shard_batch(tree: Any, axis: int = 0) -> Any:
  """Puts host arrays on the mesh, split along one axis (numbers: whole); without a mesh, on the one device."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return jax.device_put(tree)

  def put(array: np.ndarray) -> jax.Array:
    axes = (*(None,) * axis, 'batch', *(None,) * np.ndim(array))[: np.ndim(array)]
    return _put(array, NamedSharding(mesh, spec(np.shape(array), axes, mesh)))

  return jax.tree.map(put, tree)


def replicate(tree: Any) -> Any:
  """Puts host arrays and numbers on every device of the mesh, whole; without a mesh, on the one device."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return jax.device_put(tree)
  return jax.tree.map(lambda array: _put(array, NamedSharding(mesh, PartitionSpec())), tree)
