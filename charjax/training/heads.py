"""What can be trained on a decoder: its own weights or an adapter beside them, and a scalar head for rewards."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from charjax.engine.batch import Tokens
from charjax.engine.score import Rows, hidden_states, map_rows
from charjax.mesh import shardings
from charjax.model.decoder import Decoder, Prefix
from charjax.model.lora import Adapter


class ScalarHead(nnx.Module):
  """reward = w . h + b of a hidden state [D]; starts at zero, so that training starts from indifference."""

  def __init__(self, embed_dim: int):
    self.w = nnx.Param(jnp.zeros(embed_dim), axes=(None,))
    self.b = nnx.Param(jnp.zeros(()), axes=())


def make_trainable(decoder: Decoder, lora_rank: int, seed: int, with_head: bool) -> dict[str, Any]:
  """The pytree a train step changes: {'adapter'} or, with rank 0, {'decoder'} in float32; and {'head'} if asked."""
  trainable: dict[str, Any] = {}
  if lora_rank:
    trainable['adapter'] = Adapter(decoder.config, lora_rank, rngs=nnx.Rngs(seed))
  else:
    trainable['decoder'] = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), decoder)
  if with_head:
    trainable['head'] = ScalarHead(decoder.config.embed_dim)
  # Laid out as the step will return it: else the second step would be compiled anew.
  if not jax.sharding.get_mesh().empty:
    trainable = jax.device_put(trainable, shardings(trainable))
  return trainable


def bind(decoder: Decoder, trainable: Any) -> tuple[Decoder, Any]:
  """The (decoder, adapter) to compute with, from the starting weights and what is trained."""
  return trainable.get('decoder', decoder), trainable.get('adapter')


def last_token_rewards(decoder: Decoder, trainable: Any, rows: Rows, prefix: Prefix | None = None) -> jax.Array:
  """Rewards [B], read at each row's last real token: never on padding."""
  decoder, adapter = bind(decoder, trainable)
  hidden_btd = hidden_states(decoder, rows, adapter=adapter, prefix=prefix)
  last = jnp.maximum(rows.lengths - 1, 0)
  hidden_bd = jnp.take_along_axis(hidden_btd, last[:, None, None], 1)[:, 0]
  return hidden_bd @ trainable['head'].w[...] + trainable['head'].b[...]


_rewards = jax.jit(last_token_rewards)


def rewards(
  decoder: Decoder, trainable: Any, prompts: Sequence[Tokens], replies: Sequence[Tokens], batch_size: int = 32
) -> np.ndarray:
  """Rewards of replies after their prompts, [len(replies)] float32."""
  used, adapter = bind(decoder, trainable)
  run = partial(_rewards, decoder, trainable)
  out = map_rows(lambda prefix, rows: run(rows, prefix), used, prompts, replies, adapter=adapter, batch_size=batch_size)
  return np.array([float(value) for value in out], np.float32)
