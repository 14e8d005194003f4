"""A mixture of experts: each token goes through the few MLPs of a layer that a router chooses for it.

Letters: M tokens, D width, E experts, C experts that a token goes through, F width of an expert.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from charjax.model.config import ModelConfig


def route(logits_me: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
  """The experts [M, C] that tokens choose, and their weights [M, C] float32: the largest of a softmax over all."""
  weight, chosen = jax.lax.top_k(jax.nn.softmax(logits_me.astype(jnp.float32), -1), config.experts_per_token)
  if config.renormalize_experts:
    weight = weight / weight.sum(-1, keepdims=True)
  return weight, chosen


def mixture(
  x_md: jax.Array,
  logits_me: jax.Array,
  weights: Mapping[str, jax.Array],
  config: ModelConfig,
  activation: Callable[[jax.Array], jax.Array],
  dtype: Any,
) -> jax.Array:
  """The weighted sum of what the chosen experts say of each token (Shazeer et al. 2017, eq. 1), [M, D] float32.

  Exact: no expert has a capacity, no token is dropped. The M C pairs of token and expert are sorted by expert, so that
  each expert's are rows of one `ragged_dot`. XLA computes only those rows where the hardware has such a product; its
  CPU backend computes all experts for all rows and keeps what was asked for.

  Args:
    x_md: what the experts read.
    logits_me: the router's.
    weights: 'gate' and 'up' [E, D, F], 'down' [E, F, D].
    config: the model's.
    activation: of the gate.
    dtype: of the operands of products; they accumulate in float32.
  """
  weight, chosen = route(logits_me, config)
  order = jnp.argsort(chosen.reshape(-1), stable=True)
  counts = jnp.bincount(chosen.reshape(-1), length=config.num_experts).astype(jnp.int32)

  def product(rows: jax.Array, name: str) -> jax.Array:
    matrix = weights[name].astype(dtype)
    return jax.lax.ragged_dot(rows.astype(dtype), matrix, counts, preferred_element_type=jnp.float32)

  rows = x_md[order // config.experts_per_token]
  said = product(activation(product(rows, 'gate')) * product(rows, 'up'), 'down')
  # Sorted back rather than scattered: a sum in a fixed order gives the same bits each time.
  said = said[jnp.argsort(order)].reshape(*chosen.shape, -1)
  return (said * weight[..., None]).sum(1)
