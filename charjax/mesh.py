"""How arrays are laid out over devices: one mesh, one table from logical axes to mesh axes."""

import contextlib
import contextvars
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from charjax.errors import UserError

AXES = ('data', 'fsdp', 'tensor')

# Logical axis -> mesh axes. Parameters are split over fsdp along `embed`, over tensor along the others, and over both
# along `spread`;
# activations are split along `batch`. An axis that is not named here is not split. Where several dimensions of an array
# could take a mesh axis, the one whose rule comes first has it.
RULES: dict[str, tuple[str, ...]] = {
  # The width of an embedding, the vocabulary of an output head, and heads and a dense MLP while decoding: activations
  # go to weights that stay where they lie.
  'spread': ('tensor', 'fsdp'),
  'batch': ('data', 'fsdp'),
  'rows': ('data',),  # of such a batch, on their way to such weights
  'embed': ('fsdp',),
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'mlp': ('tensor',),
  'experts': ('tensor',),
}


# A decorator for whatever steps, draws or scores: each array that it works on must have been put on the devices by name
# (`shard_batch`, `replicate`), and an array of the host, a Python number or an array on other devices is an error where
# it would otherwise be copied anew at every call, unseen. On the CPU it catches all that on its way to a device, as
# elsewhere; on the way back (`np.asarray`, `float`) nothing there, since the host reads a CPU device's memory where it
# lies. Results are therefore fetched by `fetch`, which says so.
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


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A (data, fsdp, tensor) mesh; one size may be -1 and takes the devices that are left.

  Its axes go from the slowest network to the fastest: along data lie the processes, or the slices of a TPU, which the
  network of a data centre joins.

  Args:
    shape: the three sizes.
    devices: all there are by default.

  Raises:
    UserError: the sizes do not multiply to the number of devices, or data is no multiple of the slices.
  """
  sizes = list(shape)
  devices = devices or jax.devices()
  count = len(devices)
  whole = all(isinstance(size, int) and (size > 0 or size == -1) for size in sizes)
  if len(sizes) != len(AXES) or sizes.count(-1) > 1 or not whole:
    raise UserError(f'config.mesh is {tuple(shape)}; it takes three sizes (data, fsdp, tensor), one of them may be -1')
  if -1 in sizes:
    sizes[sizes.index(-1)] = count // max(1, -math.prod(sizes))
  if math.prod(sizes) != count:
    raise UserError(f'config.mesh {tuple(shape)} does not fit the {count} devices here; use e.g. (1, -1, 1)')
  automatic = (AxisType.Auto,) * len(AXES)
  # Chips that are only compiled for say of no slice.
  slices = len({getattr(device, 'slice_index', 0) for device in devices}) if devices[0].platform == 'tpu' else 1
  if slices == 1:
    # An axis of the mesh may take a part of an axis of the network.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=automatic)
  data, fsdp, tensor = sizes
  if data % slices:
    raise UserError(
      f'config.mesh {tuple(shape)} does not fit the {slices} slices here, between which only data is split; its first '
      f'size must be a multiple of {slices}; use e.g. ({slices}, -1, 1)'
    )
  grid = mesh_utils.create_hybrid_device_mesh(
    (data // slices, fsdp, tensor), (slices, 1, 1), devices, allow_split_physical_axes=True
  )
  return Mesh(grid, AXES, axis_types=automatic)


def spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Any) -> PartitionSpec:
  """The PartitionSpec of an array with these logical axes: a dimension takes those mesh axes that divide it."""
  if len(axes) != len(shape):
    raise ValueError(f'{len(axes)} logical axes {tuple(axes)} of an array of shape {tuple(shape)}')
  entries: list[tuple[str, ...] | None] = [None] * len(shape)
  free = {name for name in AXES if mesh.shape[name] > 1}
  for rule, names in RULES.items():
    for place in [place for place, axis in enumerate(axes) if axis == rule]:
      taken, left = [], shape[place]
      for name in names:
        if name in free and left % mesh.shape[name] == 0:
          taken.append(name)
          left //= mesh.shape[name]
      free -= set(taken)
      entries[place] = tuple(taken) or None
  return PartitionSpec(*entries)


def constrain(array: jax.Array, *axes: str | None) -> jax.Array:
  """Pins an activation's layout inside a jitted function; without a mesh it changes nothing."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return array
  return jax.lax.with_sharding_constraint(array, spec(array.shape, axes, mesh))


def batch_parts() -> int:
  """Into how many parts a batch is split: one without a mesh."""
  return _batch_parts(jax.sharding.get_mesh())


def split_into() -> int:
  """`batch_parts` inside a jitted function."""
  return _batch_parts(jax.sharding.get_abstract_mesh())


def take(array: jax.Array, places: jax.Array) -> jax.Array:
  """What stands at these places of the first axis, inside a jitted function; they are counted within what each device
  has of a batch, and lie end to end, of all devices as many."""
  parts = split_into()
  # Left whole, all devices would have to gather it.
  found = jax.vmap(lambda own, at: own[at])(array.reshape(parts, -1, *array.shape[1:]), places.reshape(parts, -1))
  return found.reshape(-1, *array.shape[1:])


def _batch_parts(mesh: Any) -> int:
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
  return put(tree, shardings(tree))


def describe(tree: Any) -> Any:
  """Abstract arrays of parameters with the shardings of `shardings`."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree))


def shard_batch(tree: Any, axis: int = 0) -> Any:
  """Puts host arrays on the mesh, split along one axis (numbers: whole); without a mesh, on the one device.

  Where there are many processes, each puts what its own devices hold, of arrays that have those rows (`held_here`) and
  may have nothing in the others.
  """
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return jax.device_put(tree)

  def one(array: np.ndarray) -> jax.Array:
    axes = (*(None,) * axis, 'batch', *(None,) * np.ndim(array))[: np.ndim(array)]
    return _put(array, NamedSharding(mesh, spec(np.shape(array), axes, mesh)))

  return jax.tree.map(one, tree)


def held_here(count: int, parts: int = 1, each: Collection[int] = ()) -> np.ndarray:
  """[count] bool: of which examples rows lie on devices of this process, by `shard_batch` of [parts, count // parts].

  Args:
    count: examples in a batch.
    parts: in which it goes through the model.
    each: of how many rows an example has others: some arrays have one of it, some so many. Where fewer axes of the
      mesh divide the one than the other, they lie on other devices.
  """
  mesh, here = jax.sharding.get_mesh(), np.zeros(count, bool)
  if mesh.empty:
    return ~here
  for n in {1, *each} - {0}:
    rows = np.zeros((parts, count // parts * n), bool)
    sharding = NamedSharding(mesh, spec(rows.shape, (None, 'batch'), mesh))
    for some in sharding.addressable_devices_indices_map(rows.shape).values():
      rows[some] = True
    here |= rows.reshape(count, n).any(1)
  return here


def replicate(tree: Any) -> Any:
  """Puts host arrays and numbers on every device of the mesh, whole; without a mesh, on the one device."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return jax.device_put(tree)
  return put(tree, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree))


def put(tree: Any, layout: Any) -> Any:
  """Puts arrays that every process has, or that are there already, on the devices as a tree of shardings says."""
  return jax.tree.map(_put, tree, layout)


def _put(array: Any, sharding: NamedSharding) -> Any:
  if _describing.get():
    dtype = array.dtype if hasattr(array, 'dtype') else np.asarray(array).dtype
    return jax.ShapeDtypeStruct(np.shape(array), dtype, sharding=sharding)
  there = isinstance(array, jax.Array) and not array.is_fully_addressable
  if sharding.is_fully_addressable or there:
    return jax.device_put(array, sharding)
  # By device_put, all processes would be asked whether their arrays are the same, at each call.
  whole = np.asarray(jax.device_get(array))
  with jax.transfer_guard_host_to_device('allow'):  # it is one by name
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def fetch(tree: Any) -> Any:
  """Arrays from the devices as host arrays, whole in every process, whichever of them holds their parts."""
  leaves, structure = jax.tree.flatten(tree)
  apart = [i for i, leaf in enumerate(leaves) if is_apart(leaf)]
  if apart:
    whole = NamedSharding(leaves[apart[0]].sharding.mesh, PartitionSpec())
    for i, leaf in zip(apart, jax.jit(_same, out_shardings=whole)([leaves[i] for i in apart]), strict=True):
      leaves[i] = leaf
  return jax.device_get(jax.tree.unflatten(structure, leaves))


def is_apart(array: Any) -> bool:
  """Whether no one process has the whole of an array: to read it they all have to work together."""
  return isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated)


def _same(arrays: Any) -> Any:  # One function for all calls: else each would be compiled anew.
  return arrays
