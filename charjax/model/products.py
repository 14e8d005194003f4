"""Products of activations and weights, rounded as asked and summed in float32, and their gradients; norms.

Letters: D width, I inputs, O outputs.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from charjax.model import quantized


class Widened(NamedTuple):
  """Operands of products that are rounded to `narrow` and multiplied in float32: the same numbers, since each is one in
  float32, too, and the sums are kept there anyhow."""

  narrow: Any


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
  """An operand of a product: in `dtype`, or with a `Widened` in float32 and rounded."""
  if not isinstance(dtype, Widened):
    return x.astype(dtype)
  if x.dtype == dtype.narrow:
    return x.astype(jnp.float32)
  # Not by way of the narrow type: XLA may take two conversions that lead back for none.
  kind = jnp.finfo(dtype.narrow)
  return jax.lax.reduce_precision(x.astype(jnp.float32), kind.nexp, kind.nmant)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x: jax.Array, weight: jax.Array, dtype: Any, axis: int = 0) -> jax.Array:
  """x [..., I] @ weight [I, O] (or [O, I] with axis 1), operands `rounded`, accumulated and returned in float32.

  The backward pass rounds the cotangent too: JAX's own would multiply it in float32, at half the
  speed on hardware that has bfloat16 products. A weight is contracted where it lies: transposing the embedding
  first would cost four times the product.
  """
  return _dot(rounded(x, dtype), rounded(weight, dtype), (x.ndim - 1,), (axis,))


def _dot(a: jax.Array, b: jax.Array, a_axes: tuple[int, ...], b_axes: tuple[int, ...]) -> jax.Array:
  return jax.lax.dot_general(a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=jnp.float32)


def _matmul_forward(x: jax.Array, weight: jax.Array, dtype: Any, axis: int) -> tuple[jax.Array, Any]:
  kept = rounded(x, dtype).astype(dtype.narrow if isinstance(dtype, Widened) else dtype)
  return matmul(x, weight, dtype, axis), (kept, weight, jnp.zeros((), x.dtype))


def _matmul_backward(dtype: Any, axis: int, saved: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, weight, like = saved
  x, grad = rounded(x, dtype), rounded(grad, dtype)
  leading = tuple(range(x.ndim - 1))
  grad_x = _dot(grad, rounded(weight, dtype), (x.ndim - 1,), (1 - axis,)).astype(like.dtype)
  first, second = (x, grad) if axis == 0 else (grad, x)
  return grad_x, _dot(first, second, leading, leading).astype(weight.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def frozen_matmul(x: jax.Array, q: jax.Array, s: jax.Array, dtype: Any) -> jax.Array:
  """x [..., I] @ a quantised weight, as `matmul`; the weight has no gradient.

  The backward pass makes the weight anew from its few bits: else it would keep every one of them in full.
  """
  return matmul(x, quantized.dequantize(q, s).reshape(x.shape[-1], -1), dtype)


def _frozen_forward(x: jax.Array, q: jax.Array, s: jax.Array, dtype: Any) -> tuple[jax.Array, Any]:
  return frozen_matmul(x, q, s, dtype), (q, s, jnp.zeros((0, x.shape[-1]), x.dtype))


def _frozen_backward(dtype: Any, saved: Any, grad: jax.Array) -> tuple[jax.Array, None, None]:
  q, s, like = saved
  weight = quantized.dequantize(q, s).reshape(like.shape[-1], -1)
  return _dot(rounded(grad, dtype), rounded(weight, dtype), (grad.ndim - 1,), (1,)).astype(like.dtype), None, None


frozen_matmul.defvjp(_frozen_forward, _frozen_backward)


def rms_norm(x: jax.Array, scale_d: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
  """x / sqrt(mean(x^2) + eps) * (offset + scale), in float32 (Zhang and Sennrich 2019, eq. 4)."""
  x = x.astype(jnp.float32)
  normed, scale_d = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps), scale_d.astype(jnp.float32)
  return normed * (scale_d + offset if offset else scale_d)
