"""What the fields of a config may be, beyond the type that charjax/defaults.py gives them."""

import math

from ml_collections import ConfigDict

from charjax.errors import UserError
from charjax.model.config import ATTENTION, PROJECTIONS, ModelConfig

# The least and the most that a number may be.
_COUNT, _SIZE, _AMOUNT, _SHARE = (0, math.inf), (1, math.inf), (0.0, math.inf), (0.0, 1.0)
_LIMITS: dict[str, dict[str, tuple[float, float]]] = {
  '': {'seed': (0, 2**31 - 1)},
  # JAX itself gives up a silent process after 100 seconds.
  'faults': {'grace_seconds': _AMOUNT, 'lost_seconds': (5.0, 90.0), 'stuck_seconds': (5.0, math.inf)},
  'messages': {
    'train_per_trait': _SIZE, 'heldout_per_trait': _COUNT, 'train_neutral': _SIZE, 'heldout_neutral': _COUNT,
    'seeds_shown': _COUNT, 'opening_words': _COUNT, 'temperature': _AMOUNT, 'top_p': _SHARE, 'top_k': _COUNT,
    'max_new_tokens': _SIZE, 'near_duplicate': _SHARE, 'batch_size': _SIZE, 'prompt_width': _SIZE,
  },
  'replies': {
    'shown': _COUNT, 'plain': _COUNT, 'opposed': _COUNT, 'examples': _COUNT, 'temperature': _AMOUNT, 'top_p': _SHARE,
    'top_k': _COUNT, 'max_new_tokens': _SIZE, 'batch_size': _SIZE, 'prompt_width': _SIZE,
  },
  'rankings': {
    'examples': _COUNT, 'label_low': _SHARE, 'label_high': _SHARE, 'minimum_accuracy': _SHARE, 'length_limit': _AMOUNT,
    'skipped_replies': _COUNT, 'triples': _COUNT, 'messages_per_chunk': _SIZE, 'batch_size': _SIZE,
  },
  'preference': {
    'head_steps': _COUNT, 'head_decay': _AMOUNT, 'lora_rank': _COUNT, 'learning_rate': _AMOUNT, 'epochs': _AMOUNT,
    'messages_per_batch': _SIZE, 'microbatches': _SIZE, 'warmup': _COUNT, 'weight_decay': _AMOUNT,
    'max_gradient': _AMOUNT, 'skipped_steps': _SIZE, 'save_every': _SIZE, 'measured_messages': _SIZE,
    'length_limit': _AMOUNT,
  },
  'policy': {
    'seed': (0, 2**31 - 1), 'lora_rank': _COUNT, 'learning_rate': _AMOUNT, 'steps': _SIZE, 'prompts_per_step': _SIZE,
    'microbatches': _SIZE, 'replies_per_prompt': _COUNT, 'batch_size': _SIZE, 'ranked_replies': _COUNT,
    'ranked_labels': _SHARE, 'ranked_weight': _AMOUNT, 'ranked_beta': _AMOUNT, 'ranked_temperature': _AMOUNT,
    'ranked_likelihood': _AMOUNT, 'shown_replies': _COUNT, 'shown_weight': _AMOUNT, 'temperature': _AMOUNT,
    'max_new_tokens': _SIZE, 'prompt_width': _SIZE, 'kl': _AMOUNT, 'kl_target': _AMOUNT, 'clip': _AMOUNT,
    'trace': _SHARE, 'other_traits': _AMOUNT, 'neutral_weight': _AMOUNT, 'warmup': _COUNT, 'weight_decay': _AMOUNT,
    'max_gradient': _AMOUNT, 'skipped_steps': _SIZE, 'save_every': _SIZE, 'samples_every': _SIZE,
    'candidates': _SIZE, 'candidate_messages': _SIZE,
  },
  'behaviour': {
    'messages': _SIZE, 'prompts': _SIZE, 'conversations': _SIZE, 'turns': _SIZE, 'comparisons': _SIZE,
  },
  'evaluation': {
    'examples': _COUNT, 'samples': _SIZE, 'temperature': _AMOUNT, 'top_p': _SHARE, 'top_k': _COUNT,
    'max_new_tokens': _SIZE, 'batch_size': _SIZE, 'prompt_width': _SIZE,
  },
}  # fmt: skip
_ABOVE_ZERO = (
  'messages.top_p', 'replies.top_p', 'evaluation.top_p', 'preference.max_gradient', 'policy.max_gradient',
  'policy.temperature', 'policy.ranked_beta', 'policy.ranked_temperature',
)  # fmt: skip
_SETS = ('likelihood', 'rigidity', 'robustness', 'side_effects', 'preference')  # of the behaviour stage
CHOICES = {
  'model.dtype': ('float32', 'bfloat16'),
  'model.compute_dtype': ('float32', 'bfloat16'),
  'model.quantize': ('', 'int8', 'int4'),
  'model.attention': ATTENTION,
  'replies.show': ('trait', 'character'),
  'rankings.ranker': ('auto', 'likelihood', 'pairwise', 'pointwise'),
  'preference.labels': ('soft', 'hard'),
  'preference.loss': ('bradley_terry', 'margin', 'plackett_luce'),
  'policy.advantages': ('grpo', 'rloo', 'ppo'),
}


def ranked_to_message(replies: ConfigDict) -> int:
  """How many replies to a training message are made, and ranked, by `config.replies`."""
  return replies.shown + replies.plain + replies.opposed


def in_parts(count: int, most: int) -> tuple[int, int]:
  """So many, or a few more, in equal parts of at most `most`: how many, and in how many parts."""
  parts = -(-count // max(1, most))
  return parts * -(-count // parts), parts


def check(config: ConfigDict) -> None:
  """What the types of fields cannot say.

  Raises:
    UserError: naming the field and what it may be.
  """
  for section, fields in _LIMITS.items():
    for field, (least, most) in fields.items():
      name, value = f'{section}.{field}'.lstrip('.'), (config[section] if section else config)[field]
      if not least <= value <= most or value == math.inf:  # a NaN fails all comparisons
        limits = f'at least {least:g}' if most == math.inf else f'from {least:g} to {most:.10g}'
        raise UserError(f'config.{name} is {value}; it must be {limits}')
      if name in _ABOVE_ZERO and value == 0:
        raise UserError(f'config.{name} is {value}; it must be above 0')
  for name, choices in CHOICES.items():
    section, field = name.split('.')
    if config[section][field] not in choices:
      known = ', '.join(choice or "''" for choice in choices)
      raise UserError(f'config.{name} is {config[section][field]!r}; choose from {known}')
  low, high = config.rankings.label_low, config.rankings.label_high
  if low > 0.5 or not math.isclose(low + high, 1.0, abs_tol=1e-6):
    raise UserError(
      f'config.rankings.label_low is {low} and label_high {high}; the first must be at most 0.5, and the second 1 less '
      'the first: which of two replies stands first is chance'
    )
  for section, field in (('preference', 'messages_per_batch'), ('policy', 'prompts_per_step')):
    targets, parts, size = config[section].lora_targets, config[section].microbatches, config[section][field]
    if size % parts:
      raise UserError(
        f'config.{section}.microbatches is {parts}, into which config.{section}.{field}={size} does not divide; choose '
        'a divisor of it'
      )
    if wrong := [target for target in targets if target not in PROJECTIONS]:
      raise UserError(f'config.{section}.lora_targets names {wrong[0]!r}; choose from {", ".join(PROJECTIONS)}')
    if targets and not config[section].lora_rank:
      raise UserError(
        f'config.{section}.lora_targets names projections, but lora_rank is 0, which trains all parameters; give a '
        'rank, or no targets'
      )
  if wrong := [name for name in config.behaviour.sets if name not in _SETS]:
    raise UserError(f'config.behaviour.sets names {wrong[0]!r}; choose from {", ".join(_SETS)}')
  policy, preference, replies = config.policy, config.preference, config.replies
  ranked = ranked_to_message(replies)
  if ranked < 2:
    raise UserError(
      f'config.replies: shown, plain and opposed are {ranked} together; a ranking takes 2 replies to a message or more'
    )
  if policy.replies_per_prompt == 1 and policy.advantages != 'ppo':
    raise UserError(
      'config.policy.replies_per_prompt is 1, and a reply is judged beside the others; set it to 2 or more, to 0 to '
      "draw none, or config.policy.advantages to 'ppo'"
    )
  ranked_teach = policy.ranked_replies and (policy.ranked_weight or policy.ranked_likelihood)
  if not (policy.replies_per_prompt or ranked_teach or (policy.shown_replies and policy.shown_weight)):
    raise UserError(
      'config.policy.replies_per_prompt, ranked_replies and shown_replies are all 0, or have no weight, so there is '
      'nothing to learn from; raise one of them, and with it ranked_weight or ranked_likelihood, or shown_weight'
    )
  if policy.shown_replies > replies.shown:
    raise UserError(
      f'config.policy.shown_replies is {policy.shown_replies}, and config.replies.shown is {replies.shown}; lower the '
      'first or raise the second'
    )
  if policy.kl_target and not (policy.kl and policy.replies_per_prompt):
    raise UserError(
      f'config.policy.kl_target is {policy.kl_target}, and there is no penalty to adapt to it; raise config.policy.kl '
      'and replies_per_prompt above 0, or set the target to 0'
    )
  if policy.ranked_replies == 1 or policy.ranked_replies > ranked:
    raise UserError(
      f'config.policy.ranked_replies is {policy.ranked_replies}, and {ranked} a message are ranked; set it to 0, or '
      'from 2 to that number'
    )
  if not (preference.epochs or preference.head_steps):
    raise UserError(
      'config.preference.epochs and head_steps are both 0, so that no preference model is trained; raise one of them'
    )
  if not 0 < preference.depth <= 1:
    raise UserError(f'config.preference.depth is {preference.depth}; it must be above 0 and at most 1')
  if not 0 <= preference.head_plain < 1:
    raise UserError(f'config.preference.head_plain is {preference.head_plain}; it must be at least 0 and below 1')
  leans = policy.trace < 1 and policy.advantages == 'grpo' and policy.replies_per_prompt > 0
  if leans and replies.plain < 1:
    raise UserError(
      f'config.policy.trace is {policy.trace}, whose critic learns from plain replies; set config.replies.plain to 1 '
      'or more, or the trace to 1'
    )
  if policy.max_new_tokens > replies.max_new_tokens and (leans or policy.ranked_replies or policy.shown_replies):
    raise UserError(
      f'config.policy.max_new_tokens is {policy.max_new_tokens}, and the ranked replies that the policy learns from '
      f'have at most {replies.max_new_tokens} tokens; lower it, or raise config.replies.max_new_tokens'
    )


def told_shape(config: ConfigDict) -> ModelConfig | None:
  """The shape of the model as config.model.shape tells it; None where it does not.

  Raises:
    UserError: there is no such decoder.
  """
  told = config.model.shape.to_dict()
  return ModelConfig(**told) if told['num_layers'] else None


def check_model(config: ConfigDict, model: ModelConfig) -> None:
  """What depends on the shape of the model, before it is trained.

  Raises:
    UserError: naming the field and what it may be.
  """
  told = told_shape(config)
  for field in ('num_layers', 'embed_dim', 'num_heads', 'num_kv_heads', 'head_dim', 'mlp_dim', 'vocab_size'):
    if told and getattr(told, field) != getattr(model, field):
      raise UserError(
        f'config.model.shape.{field} is {getattr(told, field)}, and the model has {getattr(model, field)}; is '
        'config.model.path another model?'
      )
  for section in ('preference', 'policy'):
    model.check_targets(config[section].lora_targets, f'config.{section}.lora_targets:')
    trains = section == 'policy' or config.preference.epochs > 0
    if config.model.quantize and trains and not config[section].lora_rank:
      raise UserError(
        f'config.{section}.lora_rank is 0, which trains all parameters, and those of config.model.quantize='
        f'{config.model.quantize} are frozen; give a rank, or leave quantize empty'
      )
