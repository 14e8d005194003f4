"""Projections in 8 or 4 bits: whole numbers q and scales s, with W close to q s, made and read by qwix.

They are frozen, and LoRA is trained beside them (Dettmers et al. 2023, QLoRA). int8 has a scale for each output; int4
one for each output and tile of inputs. q has the shape of the weight, and s that of its scales, so that both are laid
out over devices as the weight would be.

Letters: L layers, I inputs, O outputs; either may be several dimensions.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Inputs that share a scale in int4; their greatest common divisor with this, where it does not divide them.
TILE = 32


def quantize(weight: jax.Array, inputs: int, kind: str) -> tuple[jax.Array, jax.Array]:
  """q and s of stacked weights [L, I..., O...], of which `inputs` dimensions are I; s is float32."""
  import qwix

  channels = {0, *range(1 + inputs, weight.ndim)}
  tiles = {}
  if kind == 'int4':
    channels |= set(range(1, inputs))
    tiles = {inputs: math.gcd(weight.shape[inputs], TILE)}
  made = qwix.quantize(weight.astype(jnp.float32), jnp.dtype(kind), channelwise_axes=sorted(channels), tiled_axes=tiles)
  return made.qvalue, made.scale


def dequantize(q: jax.Array, s: jax.Array) -> jax.Array:
  """The weights, float32, that q and s stand for."""
  import qwix

  return qwix.dequantize(qwix.QArray(q, s))


_quantize = jax.jit(quantize, static_argnums=(1, 2))


def quantize_host(weight: np.ndarray, inputs: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
  """`quantize` of an array of the host, of which one layer at a time is on a device."""
  layers = [jax.device_get(_quantize(weight[i : i + 1], inputs, kind)) for i in range(len(weight))]
  q, s = zip(*layers, strict=True)
  return np.concatenate(q), np.concatenate(s)


def rounded(weight: np.ndarray, inputs: int, kind: str) -> np.ndarray:
  """Weights [L, I..., O...] as they are once they were quantised, float32."""
  out = np.empty(weight.shape, np.float32)
  for i in range(len(weight)):
    out[i : i + 1] = _rounded(weight[i : i + 1], inputs, kind)
  return out


@partial(jax.jit, static_argnums=(1, 2))
def _rounded(weight: Any, inputs: int, kind: str) -> jax.Array:
  return dequantize(*quantize(weight, inputs, kind))
