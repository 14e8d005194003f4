"""The one train step: loss, gradient, clipped AdamW, as a pure function over pytrees, compiled once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from charjax.mesh import no_silent_transfers, shardings

# (trainable, frozen, batch) -> (loss, metrics)
Loss = Callable[[Any, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]


def make_optimizer(
  learning_rate: float, warmup: int, steps: int, weight_decay: float, max_gradient: float
) -> optax.GradientTransformation:
  """AdamW with a linear warm-up, a cosine decay to a tenth, and gradients clipped to a global norm."""
  schedule = optax.warmup_cosine_decay_schedule(
    learning_rate / max(warmup, 1), learning_rate, warmup, max(steps, warmup + 1), learning_rate / 10
  )
  return optax.chain(optax.clip_by_global_norm(max_gradient), optax.adamw(schedule, b2=0.99, weight_decay=weight_decay))


def init_optimizer(optimizer: optax.GradientTransformation, trainable: Any) -> tuple[Any, Any]:
  """The optimizer's state, born in its shards, and those shardings.

  Scalars of the state that start unsharded would have the step compiled twice, and moments that start whole on
  one device are what runs out of memory first.
  """
  if jax.sharding.get_mesh().empty:
    return jax.jit(optimizer.init)(trainable), None
  abstract = jax.eval_shape(optimizer.init, trainable)
  replicated = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
  layout = optax.tree_map_params(
    optimizer, lambda _, sharding: sharding, abstract, shardings(trainable), transform_non_params=lambda _: replicated
  )
  return jax.jit(optimizer.init, out_shardings=layout)(trainable), layout


def make_step(loss: Loss, optimizer: optax.GradientTransformation, trainable: Any, layout: Any) -> Callable[..., Any]:
  """step(trainable, state, frozen, batch) -> (trainable, state, metrics), jitted; the first two are given up.

  All that it is given must be on the devices already (mesh.shard_batch, mesh.replicate).
  A step whose loss or gradient is not finite changes nothing and says so in metrics['skipped'].
  """

  def step(trainable: Any, state: Any, frozen: Any, batch: Any) -> tuple[Any, Any, dict[str, jax.Array]]:
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, batch)
    norm = optax.tree.norm(gradient)
    updates, new_state = optimizer.update(gradient, state, trainable)
    updated = optax.apply_updates(trainable, updates)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    trainable, state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), (updated, new_state), (trainable, state)
    )
    return trainable, state, metrics | {'loss': value, 'grad_norm': norm, 'skipped': ~finite}

  layouts = None if layout is None else (shardings(trainable), layout, None)
  return no_silent_transfers(jax.jit(step, donate_argnums=(0, 1), out_shardings=layouts))
