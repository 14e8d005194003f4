"""What the policy minimises: a clipped policy gradient of drawn replies, preference among ranked ones, distillation of
what was said with the trait shown, and the KL that holds it on neutral replies.

A batch is made by stages/policy.py: `rows` are drawn and then ranked replies behind their prompts, `shown` those to be
distilled and `teacher` the same behind prompts that show the trait, `neutral` what the starting model said.
"""

from typing import Any

import jax
import jax.numpy as jnp

from charjax.engine.rows import Rows, reply_mask, take_replies
from charjax.engine.score import all_hidden_states, hidden_states, over_tokens, token_log_probs
from charjax.files import Row
from charjax.model.decoder import Decoder, logits, output_head
from charjax.training.heads import bind, read_expected
from charjax.training.losses import bradley_terry, kl_from_logits, policy_gradient, right_pairs, value_loss

States = tuple[Decoder, jax.Array]  # A model, and its hidden states.


def token_kl(reference: States, model: States, rows: Rows) -> jax.Array:
  """Exact KL(reference || model) at temperature 1 of the distribution of each reply token, [N, R]; anything in the
  padding."""
  (r_decoder, r_hidden), (p_decoder, p_hidden) = reference, model
  r_head, p_head = output_head(r_decoder), output_head(p_decoder)

  def one(r: jax.Array, p: jax.Array) -> jax.Array:
    return kl_from_logits(logits(r_decoder, r, r_head), logits(p_decoder, p, p_head))

  return over_tokens(one, rows, (r_hidden, p_hidden))


def policy_loss(trainable: Any, decoder: Any, batch: Row) -> tuple[jax.Array, dict[str, jax.Array]]:
  """What drawn, ranked and shown replies teach, as far as there are any; the exact KL a token on neutral replies."""
  used, adapter = bind(decoder, trainable)
  names = [name for name in ('rows', 'shown', 'neutral') if name in batch]
  found = all_hidden_states(used, [batch[name] for name in names], adapter=adapter, opening=batch['opening'])
  hidden = dict(zip(names, found, strict=True))
  loss, metrics = jnp.float32(0), dict[str, jax.Array]()
  if 'rows' in hidden:
    loss, metrics = _replies_loss(trainable, used, hidden['rows'], batch)

  def kl_to(start: jax.Array, name: str) -> jax.Array:
    """Of the policy from a model whose states these are, summed over the tokens of replies."""
    kl = token_kl((decoder, jax.lax.stop_gradient(start)), (used, hidden[name]), batch[name])
    return jnp.where(reply_mask(batch[name]), kl, 0.0).sum()

  if 'shown' in hidden:
    # Context distillation (Askell et al. 2021, section 2.2), of the whole distribution of each token.
    teacher = hidden_states(decoder, batch['teacher'], opening=batch['shown_opening'])
    taught = kl_to(teacher, 'shown') / batch['shown_tokens']
    loss, metrics = loss + batch['shown_weight'] * taught, metrics | {'shown_kl': taught}
  # In this very program, whose products round alike: the policy is all but at 0 before its first step.
  start = hidden_states(decoder, batch['neutral'], opening=batch['opening'])
  neutral_kl = kl_to(start, 'neutral') / batch['neutral_tokens']
  return loss + batch['neutral_weight'] * neutral_kl, metrics | {'neutral_kl': neutral_kl}


def _replies_loss(
  trainable: Any, used: Decoder, hidden: jax.Array, batch: Row
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The clipped policy gradient a token of drawn replies, and what ranked ones teach, from the states of both."""
  rows, drawn = batch['rows'], batch.get('drawn')
  every = token_log_probs(used, hidden, rows, batch['temperature'], batch['ends'], batch['going_on'])
  prompts = len(rows.prompts)
  each = len(drawn['before']) // prompts if drawn else 0
  loss, metrics = jnp.float32(0), dict[str, jax.Array]()
  if drawn:
    log_probs, mask = (take_replies(array, prompts, slice(each)) for array in (every, reply_mask(rows)))
    gradient, _, clipped = policy_gradient(log_probs, drawn['before'], drawn['advantages'], mask, batch['clip'])
    tokens = batch['drawn_tokens']
    gap = jnp.where(mask, jnp.abs(log_probs - drawn['before']), 0.0).sum() / tokens
    loss = gradient / tokens
    metrics = {'clip_fraction': clipped / tokens, 'logprob_gap': gap}
    if 'returns' in drawn:
      expected = take_replies(read_expected(trainable, hidden, rows), prompts, slice(each))
      error = value_loss(expected, drawn['returns'], mask) / tokens
      loss, metrics = loss + error, metrics | {'value_loss': error}
  if 'ranked' in batch:
    going_on = reply_mask(rows) & ~jnp.isin(rows.tokens[:, 1:], batch['ends'])
    ranked, going_on = (take_replies(array, prompts, slice(each, None)) for array in (every, going_on))
    taught, more = _ranked_loss(ranked, going_on, batch)
    loss, metrics = loss + taught, metrics | more
  return loss, metrics


def _ranked_loss(log_probs: jax.Array, mask: jax.Array, batch: Row) -> tuple[jax.Array, dict[str, jax.Array]]:
  """DPO (Rafailov et al. 2023, eq. 7) with soft labels over all pairs of a message, and the negative log-likelihood a
  token of its best reply (as Pang et al. 2024, eq. 1, add it); of log-probs at a temperature of their own and
  conditional on going on."""
  ranked, weight = batch['ranked'], batch['weight']
  gained = log_probs.reshape(ranked['before'].shape) - ranked['before']
  gained = jnp.where(mask.reshape(gained.shape), gained, 0.0).sum(2)
  preference, _ = bradley_terry(batch['ranked_beta'] * gained, ranked['preferred'], ranked['real'], weight)
  preference = preference / batch['prompts']
  mean = (jnp.where(mask, log_probs, 0.0).sum(1) / jnp.maximum(mask.sum(1), 1)).reshape(gained.shape)
  likelihood = -(jnp.take_along_axis(mean, ranked['best'][:, None], 1)[:, 0] * weight).sum() / batch['prompts']
  right, _ = right_pairs(gained, ranked['preferred'], ranked['real'])
  return (
    batch['ranked_weight'] * preference + batch['ranked_likelihood'] * likelihood,
    {'ranked_loss': preference, 'ranked_likelihood': -likelihood, 'ranked_accuracy': right / batch['ranked_pairs']},
  )
