"""Texts of many lengths laid end to end, so that the products of a decoder are of real tokens alone.

Its products, norms and activations treat each token by itself and need no rows. Attention does: there alone the tokens
lie in rows that are padded to one width, which they are brought into and taken out of again.

Letters: N rows of T tokens; D parts, one to each of the devices that a batch is split over, of N / D rows that follow
one another; S tokens of a part, packed.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_WORTHWHILE = 0.92  # of the padded tokens: to pack more of them would save little


class Packing(NamedTuple):
  """Which token of padded rows stands where once they are packed.

  Attributes:
    slots: [D, S] the token of its part that stands there, counted row by row; -1: none.
    places: [N, T] where a token stands among those of its part; -1: padding.
  """

  slots: Any
  places: Any


def packed_size(tokens: float, rows: int, width: int, sizes: int) -> int:
  """The S that holds so many tokens of a part of `rows` rows of `width`, one of a few `sizes`, since each is a program
  to compile; 0: padded they take about as long."""
  step = -(-rows * width // sizes)
  size = max(1, math.ceil(tokens / step)) * step
  return size if size <= _WORTHWHILE * rows * width else 0


def make_packing(lengths: np.ndarray, width: int, size: int, parts: int = 1) -> Packing | None:
  """A packing of the first `lengths` [N] tokens of rows of `width`, in host arrays; None: S = `size` is 0, or too
  little for them.

  The number of parts divides that of rows.
  """
  lengths = np.asarray(lengths).reshape(parts, -1)
  if not size or lengths.sum(1).max() > size:
    return None
  real = np.arange(width) < lengths[..., None]
  places = np.where(real, np.cumsum(real.reshape(parts, -1), 1).reshape(real.shape) - 1, -1).astype(np.int32)
  slots = np.full((parts, size), -1, np.int32)
  for part, some in zip(slots, real, strict=True):
    found = np.flatnonzero(some)
    part[: len(found)] = found
  return Packing(slots, places.reshape(-1, width))


@jax.custom_vjp
def pack(rows: jax.Array, packing: Packing) -> jax.Array:
  """The real tokens of padded rows [N, T, ...], as [D, S, ...]; behind the last of them stands any other."""
  return _pack(rows, packing)


@jax.custom_vjp
def unpack(packed: jax.Array, packing: Packing) -> jax.Array:
  """Packed tokens [D, S, ...] in their rows, [N, T, ...]; in the padding stands any other."""
  return _unpack(packed, packing)


def _pack(rows: jax.Array, packing: Packing) -> jax.Array:
  return _take(rows.reshape(len(packing.slots), -1, *rows.shape[2:]), packing.slots)


def _unpack(packed: jax.Array, packing: Packing) -> jax.Array:
  taken = _take(packed, packing.places.reshape(len(packing.slots), -1))
  return taken.reshape(*packing.places.shape, *packed.shape[2:])


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
  return jax.vmap(lambda some, places: some.at[places].get(mode='clip'))(array, index)


def _real(array: jax.Array, index: jax.Array) -> jax.Array:
  return jnp.where(index.reshape(*index.shape, *(1,) * (array.ndim - index.ndim)) >= 0, array, 0)


# Each is the other's transpose, since every real token has one place: JAX's own would add up in scattered places. What
# stands in for no token has no gradient.
pack.defvjp(
  lambda rows, packing: (pack(rows, packing), packing),
  lambda packing, grad: (_real(_unpack(grad, packing), packing.places), None),
)
unpack.defvjp(
  lambda packed, packing: (unpack(packed, packing), packing),
  lambda packing, grad: (_real(_pack(grad, packing), packing.slots), None),
)
