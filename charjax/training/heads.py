"""What can be trained on a decoder: its own weights or an adapter beside them, and a head that reads rewards.

Letters: B rows, T tokens, K replies a row, M messages, N traits, D width, P replies to all messages.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from charjax.engine.batch import Tokens
from charjax.engine.rows import Rows
from charjax.engine.score import hidden_states, in_rows, map_rows, mean_states
from charjax.mesh import lay_out
from charjax.model.blocks import matrices
from charjax.model.decoder import Decoder, Prefix
from charjax.model.lora import Adapter
from charjax.training.losses import preference_loss, right_pairs


class RewardHead(nnx.Module):
  """A direction for each trait: reward = w[trait] . h, of the mean hidden state h of a reply's tokens.

  The mean, because what ranks a reply is the sum of small evidence in all its words, which its last token does not
  hold: read there, a linear head had 54% of this project's kept pairs right, and 67% at the mean. A direction a
  trait, because what speaks for one trait speaks against another: 79% instead of 67%. There is no bias: only
  differences of rewards are ever learned.
  """

  def __init__(self, traits: int, embed_dim: int):
    self.w = nnx.Param(jnp.zeros((traits, embed_dim)), axes=(None, None))


def make_trainable(
  decoder: Decoder,
  lora_rank: int,
  seed: int,
  *,
  lora_targets: Sequence[str] = (),
  traits: int = 0,
  frozen: bool = False,
) -> dict[str, Any]:
  """The pytree a train step changes.

  Args:
    decoder: the starting weights.
    lora_rank: of the 'adapter'; 0 trains all parameters, the 'decoder' in float32.
    seed: of the adapter's first values.
    lora_targets: the projections that the adapter is for; () is all dense ones.
    traits: how many directions the 'head' has; 0 leaves it out.
    frozen: the head alone is trained.
  """
  trainable: dict[str, Any] = {}
  if lora_rank and not frozen:
    trainable['adapter'] = Adapter(decoder.config, lora_rank, rngs=nnx.Rngs(seed), targets=lora_targets)
  elif not frozen:
    trainable['decoder'] = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), decoder)
  if traits:
    trainable['head'] = RewardHead(traits, decoder.config.embed_dim)
  # Laid out as the step will return it: else the second step would be compiled anew.
  return lay_out(trainable)


def bind(decoder: Decoder, trainable: Any) -> tuple[Decoder, Any]:
  """The (decoder, adapter) to compute with, from the starting weights and what is trained; None: nothing is."""
  trainable = trainable or {}
  return trainable.get('decoder', decoder), trainable.get('adapter')


def read_only(trainable: Any) -> Any:
  """What is not trained any more, with its own matrices in the dtype that products round them to: the same figures from
  less memory. The embedding stays as it is, since it is looked up."""
  if 'decoder' not in trainable:
    return trainable
  graph, state = nnx.split(trainable['decoder'])
  dtype, names = trainable['decoder'].runtime.compute_dtype, matrices(trainable['decoder'].config)

  def narrow(path: Any, leaf: Any) -> Any:
    matrix = path[0] == 'head' or (path[0] == 'blocks' and path[-1] in names)
    return leaf.replace(leaf[...].astype(dtype)) if matrix else leaf

  return trainable | {'decoder': nnx.merge(graph, nnx.map_state(narrow, state), copy=True)}


def read_rewards(trainable: Any, states: Any) -> jax.Array:
  """Rewards [..., N] by each trait's direction, of mean states [..., D] of replies, or scores of tokens' states."""
  return jnp.asarray(states) @ trainable['head'].w[...].T


def read_expected(trainable: Any, hidden: jax.Array, rows: Rows) -> jax.Array:
  """What the value head expects before each reply token, [N, R], of the states that it is predicted from; they are not
  changed for its sake."""
  return read_rewards(trainable, jax.lax.stop_gradient(in_rows(hidden, rows))[:, :-1])[..., 0]


@jax.jit
def _mean_states(decoder: Decoder, adapter: Any, before: Sequence[Prefix], rows: Rows) -> jax.Array:
  return mean_states(hidden_states(decoder, rows, adapter=adapter, before=before), rows)


def reply_states(
  decoder: Decoder, trainable: Any, prompts: Sequence[Tokens], replies: Sequence[Tokens], batch_size: int = 32
) -> np.ndarray:
  """Mean hidden states of replies after their prompts, [len(replies), D] float32, as `read_rewards` takes them."""
  used, adapter = bind(decoder, trainable)
  found = map_rows(
    lambda before, rows: _mean_states(used, adapter, before, rows), used, prompts, replies,
    adapter=adapter, batch_size=batch_size,
  )  # fmt: skip
  return np.array(found, np.float32).reshape(len(replies), decoder.config.embed_dim)


_LBFGS = optax.lbfgs()


def _own_scores(v_nd: jax.Array, scaled_mkd: jax.Array, trait_m: jax.Array) -> jax.Array:
  """What each message's own direction says of its replies, [M, K]."""
  return jnp.einsum('mkd,md->mk', scaled_mkd, v_nd[trait_m])


def _fit_loss(v_nd: jax.Array, data: Any, labels: str, loss: str) -> tuple[jax.Array, dict[str, jax.Array]]:
  scaled_mkd, probability_mkk, real_mk, trait_m, weight_m, decay = data
  scores_mk = _own_scores(v_nd, scaled_mkd, trait_m)
  total, weight = preference_loss(scores_mk, probability_mkk, real_mk, weight_m, labels, loss)
  right, pairs = right_pairs(scores_mk, probability_mkk, real_mk)
  metrics = {'loss': total / weight, 'accuracy': right / jnp.maximum(pairs, 1)}
  return total + decay * jnp.square(v_nd).sum(), metrics


@partial(jax.jit, static_argnames=('labels', 'loss'))
def _fit_step(
  v_nd: jax.Array, state: Any, data: Any, labels: str, loss: str
) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
  def value(v_nd: jax.Array) -> jax.Array:
    return _fit_loss(v_nd, data, labels, loss)[0]

  found, gradient = optax.value_and_grad_from_state(value)(v_nd, state=state)
  updates, state = _LBFGS.update(gradient, state, v_nd, value=found, grad=gradient, value_fn=value)
  v_nd = optax.apply_updates(v_nd, updates)
  return v_nd, state, _fit_loss(v_nd, data, labels, loss)[1]


@partial(jax.jit, static_argnames=('traits', 'labels', 'loss'))
def _best_lengths(v_nd: jax.Array, data: Any, traits: int, labels: str, loss: str) -> jax.Array:
  """The factor [N] of each direction with the least loss on its own messages; convex, so that a grid is enough.

  Where hard labels or rankings are told apart without an error, the longer the better: the first factor that leaves
  no loss in float32 is taken, or the grid's last.
  """
  scaled_mkd, probability_mkk, real_mk, trait_m, weight_m, _ = data
  scores_mk = _own_scores(v_nd, scaled_mkd, trait_m)
  factors = jnp.geomspace(0.1, 1000, 161)

  def value(factor: jax.Array, trait: jax.Array) -> jax.Array:
    own_m = jnp.where(trait_m == trait, weight_m, 0.0)
    return preference_loss(scores_mk * factor, probability_mkk, real_mk, own_m, labels, loss)[0]

  losses = jax.vmap(lambda trait: jax.vmap(lambda factor: value(factor, trait))(factors))(jnp.arange(traits))
  return factors[losses.argmin(1)]


def _metric(plain_pd: np.ndarray, share: float) -> np.ndarray:
  """Of A = (1 - share) I + share C, with C the covariance of plain states at trace D: A^-1/2, symmetric, [D, D]."""
  dim = plain_pd.shape[1]
  covariance = plain_pd.T.astype(np.float64) @ plain_pd
  total = np.trace(covariance)
  mixed = (1 - share) * np.eye(dim) + share * covariance * dim / total if total > 0 else np.eye(dim)
  values, vectors = np.linalg.eigh(mixed)
  return (vectors * values**-0.5) @ vectors.T


def fit_head(
  states_mkd: np.ndarray,
  probability_mkk: np.ndarray,
  real_mk: np.ndarray,
  trait_m: np.ndarray,
  plain_pd: np.ndarray,
  traits: int,
  decay: float,
  plain_share: float,
  steps: int,
  labels: str = 'soft',
  loss: str = 'bradley_terry',
  on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> np.ndarray:
  """The directions [N, D] that fit the labels best while the states stay as they are, by L-BFGS.

  A head on a trunk that is not trained is a convex problem; trained from here, the trunk moves less and what it
  learns carries further (Kumar et al. 2022, arXiv 2202.10054). Minimises the mean over each trait's messages of the
  chosen loss, plus `decay` times a squared norm of each direction, in units in which each of the D states
  varies by 1 / sqrt(D) among the replies. The penalty is to choose directions and not to make all rewards small: in
  the end each direction has the length that fits its labels best.

  A `plain_share` of that norm is the variance of the reward among the model's own plain replies, as in Fisher's
  discriminant with a shrunk covariance (Friedman 1989, eq. 18). What varies there without any trait shown is topic
  and genre; directions that read it make traits fight: of this project's four, curiosity's reward spoke against AI
  nature's at r = -0.4 among plain replies, and at -0.1 with a twentieth of the norm spent so.

  Args:
    states_mkd: mean states of the replies.
    probability_mkk: that reply i is better than reply j.
    real_mk: which replies are there.
    trait_m: index of each message's trait.
    plain_pd: mean states of P plain replies, less their trait's mean; none leaves the whole norm to all directions.
    traits: N.
    decay: above 0.
    plain_share: from 0 to below 1.
    steps: of L-BFGS.
    labels: 'soft' or 'hard', as `preference_loss` takes them.
    loss: its name there; all of them are convex in the directions.
    on_step: called with each step's number, loss and accuracy.
  """
  spread_d = states_mkd[real_mk].std(0)
  scale_d = np.where(spread_d > 0, 1 / np.maximum(spread_d, 1e-12), 0) / np.sqrt(states_mkd.shape[-1])
  # In these coordinates the norm is the plain one, and the problem well conditioned.
  to_dd = scale_d[:, None] * _metric(plain_pd * scale_d, plain_share)
  scaled_mkd = jnp.asarray((states_mkd - states_mkd[real_mk].mean(0)) @ to_dd, jnp.float32)
  count = np.bincount(trait_m, minlength=traits)
  weight_m = jnp.asarray(1 / count[trait_m], jnp.float32)
  data = (scaled_mkd, jnp.asarray(probability_mkk), jnp.asarray(real_mk), jnp.asarray(trait_m), weight_m, decay)
  v_nd = jnp.zeros((traits, states_mkd.shape[-1]), jnp.float32)
  state = _LBFGS.init(v_nd)
  for number in range(1, steps + 1):
    v_nd, state, metrics = _fit_step(v_nd, state, data, labels, loss)
    on_step(number, {name: float(value) for name, value in metrics.items()})
  lengths_n = _best_lengths(v_nd, data, traits, labels, loss)
  return np.asarray((v_nd * lengths_n[:, None]) @ to_dd.T, np.float32)


class LengthControl(NamedTuple):
  """What `control_length` did.

  Attributes:
    w_nd: the directions [N, D], without what followed the length.
    guess_d: the direction [D] of the states' guess of it, in tokens.
    effect_n: what each direction gave for a token of it [N]; 0 where it was left alone.
    before_n: r of reward and length on each trait's own messages [N], as it was.
    after_n: as it is [N].
  """

  w_nd: np.ndarray
  guess_d: np.ndarray
  effect_n: np.ndarray
  before_n: np.ndarray
  after_n: np.ndarray


def _shrunk_covariance(x_pd: np.ndarray) -> np.ndarray:
  """Of rows with mean 0, [D, D]: drawn to a multiple of the identity, as far as it is chance what sets it apart."""
  covariance_dd, eye_dd = x_pd.T @ x_pd / len(x_pd), np.eye(x_pd.shape[1])
  target_dd = eye_dd * np.trace(covariance_dd) / len(eye_dd)
  if not target_dd.any():
    return eye_dd  # Of rows that never vary.
  apart = np.square(covariance_dd - target_dd).sum()
  chance = (np.square(np.square(x_pd).sum(1)).mean() - np.square(covariance_dd).sum()) / len(x_pd)
  # Two replies to one message are as far from their mean on either side: no chance is seen in them.
  share = min(1.0, max(chance / apart, 1e-3)) if apart > 0 else 1.0
  return share * target_dd + (1 - share) * covariance_dd


def control_length(
  w_nd: np.ndarray,
  states_mkd: np.ndarray,
  tokens_mk: np.ndarray,
  real_mk: np.ndarray,
  trait_m: np.ndarray,
  limit: float,
) -> LengthControl:
  """Takes the length of a reply out of the rewards that follow it, as far as the states know it.

  Length is compared among the replies to one message, token counts less their mean there, and so is each trait's reward
  of the replies to its own messages. Where their correlation exceeds the limit, the reward gives up so much of the
  states' best linear guess of the length that nothing is left: r - guess * (r . length) / (guess . length), which is
  again a direction in the states. That is least-squares concept erasure (Belrose et al. 2023, arXiv:2306.03819) of
  one concept, seen from a head that reads what was erased; the covariance in it is shrunk as by Ledoit and Wolf (2004,
  section 3.3), in units in which each state varies by 1, since there may be more states than replies.

  Args:
    w_nd: the directions.
    states_mkd: mean states of the replies.
    tokens_mk: their token counts.
    real_mk: which replies are there.
    trait_m: index of each message's trait.
    limit: |r| up to which a direction stays what it is.
  """
  each_m1 = np.maximum(real_mk.sum(1, keepdims=True), 1)
  states_mkd = states_mkd.astype(np.float64) * real_mk[..., None]
  centred_mkd = states_mkd - states_mkd.sum(1, keepdims=True) / each_m1[..., None]
  tokens_mk = np.where(real_mk, tokens_mk, 0.0)
  length_p = (tokens_mk - tokens_mk.sum(1, keepdims=True) / each_m1)[real_mk]
  x_pd, trait_p = centred_mkd[real_mk], np.broadcast_to(trait_m[:, None], real_mk.shape)[real_mk]
  scale_d = np.sqrt(np.square(x_pd).mean(0))
  scale_d = np.where(scale_d > 0, scale_d, 1.0)
  scaled_pd = x_pd / scale_d
  guess_d = np.linalg.solve(_shrunk_covariance(scaled_pd), scaled_pd.T @ length_p / len(x_pd)) / scale_d
  guess_p, effect_n = x_pd @ guess_d, np.zeros(len(w_nd))

  def follows(w_nd: np.ndarray) -> np.ndarray:
    """Each direction's correlation with the length, on its own messages; 0 where one of the two does not vary."""
    own_np = np.where(trait_p == np.arange(len(w_nd))[:, None], w_nd @ x_pd.T, 0.0)
    squares_n = np.square(own_np).sum(1) * np.array([np.square(length_p[trait_p == n]).sum() for n in range(len(w_nd))])
    return np.where(squares_n > 0, own_np @ length_p / np.sqrt(np.maximum(squares_n, 1e-300)), 0.0)

  before_n = follows(w_nd.astype(np.float64))
  for n in np.flatnonzero(np.abs(before_n) > limit):
    own = trait_p == n
    known = guess_p[own] @ length_p[own]
    if known > 0:
      effect_n[n] = x_pd[own] @ w_nd[n] @ length_p[own] / known
  controlled_nd = w_nd - effect_n[:, None] * guess_d
  return LengthControl(controlled_nd.astype(np.float32), guess_d, effect_n, before_n, follows(controlled_nd))
