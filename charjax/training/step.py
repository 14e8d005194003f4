"""The one train step: loss, gradient, clipped AdamW, as a pure function over pytrees, compiled once.

A batch may go through the model in parts, one after the other, whose gradients are added up: then the activations of
one part at a time are kept.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from charjax.mesh import no_silent_transfers, replicate, shard_batch, shardings

# (trainable, frozen, batch) -> (loss, metrics). A batch is a part of a step's batch, and loss and metrics are what it
# adds to them: where they are means, the sums are divided by counts of the whole, which stand in every part.
Loss = Callable[[Any, Any, Any], tuple[jax.Array, dict[str, jax.Array]]]


class Batch(NamedTuple):
  """What one step learns from, on the devices; the loss finds both as one dict.

  Attributes:
    whole: what is the same in all parts.
    parts: arrays whose first axis are the parts that go through the model one after the other, [parts, rows of one,
      ...].
  """

  whole: Mapping[str, Any]
  parts: Mapping[str, Any]


def make_batch(whole: Mapping[str, Any], rows: Mapping[str, Any], microbatches: int = 1) -> Batch:
  """Puts a batch on the devices: `rows`, arrays that are divided along their first axis, in `microbatches` parts."""
  parts = jax.tree.map(lambda array: array.reshape(microbatches, -1, *array.shape[1:]), rows)
  return Batch(replicate(whole), shard_batch(parts, axis=1))


def make_optimizer(
  learning_rate: float, warmup: int, steps: int, weight_decay: float, max_gradient: float, apart: str = ''
) -> optax.GradientTransformation:
  """AdamW with a linear warm-up, of at most a quarter of the steps, a cosine decay to a tenth, and gradients clipped to
  a global norm.

  `apart` names an entry of what is trained that is clipped by a norm of its own: else how far the rest moves would hang
  on the errors of what shares no gradient with it.
  """
  warmup = min(warmup, steps // 4)
  schedule = optax.warmup_cosine_decay_schedule(
    learning_rate / max(warmup, 1), learning_rate, warmup, max(steps, warmup + 1), learning_rate / 10
  )
  clip = optax.clip_by_global_norm(max_gradient)

  def by_part(gradient: Any, _: Any) -> Any:
    rest = {name: some for name, some in gradient.items() if name != apart}
    return clip.update(rest, ())[0] | clip.update({apart: gradient[apart]}, ())[0]

  return optax.chain(
    optax.stateless(by_part) if apart else clip, optax.adamw(schedule, b2=0.99, weight_decay=weight_decay)
  )


def init_optimizer(optimizer: optax.GradientTransformation, trainable: Any) -> tuple[Any, Any]:
  """The optimizer's state, born in its shards, and those shardings.

  Scalars of the state that start unsharded would have the step compiled twice, and moments that start whole on
  one device are what runs out of memory first.
  """
  if jax.sharding.get_mesh().empty:
    return jax.jit(optimizer.init)(trainable), None
  _, layout = describe_optimizer(optimizer, trainable)
  return jax.jit(optimizer.init, out_shardings=layout)(trainable), layout


def describe_optimizer(optimizer: optax.GradientTransformation, trainable: Any) -> tuple[Any, Any]:
  """What `init_optimizer` returns, as shapes and dtypes only, and the shardings."""
  abstract = jax.eval_shape(optimizer.init, trainable)
  replicated = NamedSharding(jax.sharding.get_mesh(), PartitionSpec())
  layout = optax.tree_map_params(
    # Of no parameters, without making arrays of its numbers.
    lambda nothing: jax.eval_shape(optimizer.init, nothing),
    lambda _, sharding: sharding,
    abstract,
    shardings(trainable),
    transform_non_params=lambda _: replicated,
  )
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout), layout


def make_step(loss: Loss, optimizer: optax.GradientTransformation, trainable: Any, layout: Any) -> Any:
  """step(trainable, state, frozen, Batch) -> (trainable, state, metrics), jitted; the first two are given up.

  All that it is given must be on the devices already (mesh.shard_batch, mesh.replicate).
  A step whose loss or gradient is not finite changes nothing and says so in metrics['skipped'].
  """

  layouts = None if layout is None else (shardings(trainable), layout, None)

  def step(trainable: Any, state: Any, frozen: Any, batch: Batch) -> tuple[Any, Any, dict[str, jax.Array]]:
    (value, metrics), gradient = _add_up(loss, trainable, frozen, batch, layouts and layouts[0])
    norm = optax.tree.norm(gradient)
    updates, new_state = optimizer.update(gradient, state, trainable)
    updated = optax.apply_updates(trainable, updates)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    trainable, state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), (updated, new_state), (trainable, state)
    )
    return trainable, state, metrics | {'loss': value, 'grad_norm': norm, 'skipped': ~finite}

  return no_silent_transfers(jax.jit(step, donate_argnums=(0, 1), out_shardings=layouts))


def _add_up(loss: Loss, trainable: Any, frozen: Any, batch: Batch, layout: Any) -> Any:
  """((loss, metrics), gradient), each the sum over the parts of a batch, in float32 and laid out as the parameters."""

  def of_part(part: Any) -> Callable[[Any], Any]:
    return lambda trainable: loss(trainable, frozen, {**batch.whole, **part})

  first = jax.tree.map(lambda array: array[0], batch.parts)
  if len(jax.tree.leaves(batch.parts)[0]) == 1:
    return jax.value_and_grad(of_part(first), has_aux=True)(trainable)
  zeros = partial(jax.tree.map, lambda x: jnp.zeros(x.shape, jnp.float32))
  gradient = zeros(trainable)
  if layout is not None:
    # Else each device might hold all of the sum.
    gradient = jax.lax.with_sharding_constraint(gradient, layout)
  # Each layer's gradient is added where the sum lies: that of a part never stands beside it as a whole.
  sums = jax.tree.map(jax.new_ref, gradient)

  def add(total: Any, part: Any) -> tuple[Any, None]:
    value, backward, metrics = jax.vjp(of_part(part), trainable, has_aux=True)
    backward.with_refs(sums)(jnp.ones_like(value))  # type: ignore[attr-defined]  # A VJP, which jax.vjp hides.
    return jax.tree.map(jnp.add, total, (value, metrics)), None

  total, _ = jax.lax.scan(add, zeros(jax.eval_shape(of_part(first), trainable)), batch.parts)
  return total, jax.tree.map(lambda ref: ref[...], sums)
