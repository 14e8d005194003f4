"""Every field of a run's config, at values meant for 8B and up. Small configs change what they must."""

import math

from ml_collections import ConfigDict

from charjax.errors import UserError


def get_config() -> ConfigDict:
  """The defaults of the recipe."""
  config = ConfigDict()
  config.seed = 0
  config.mesh = (-1, 1, 1)  # data, fsdp, tensor; -1 takes the devices that are left

  config.model = ConfigDict()
  config.model.path = 'smollm2-135m-instruct'  # or a .gguf file, or a Hugging Face directory
  config.model.dtype = 'bfloat16'  # of the starting weights; what is trained is float32
  config.model.compute_dtype = 'bfloat16'  # of the operands of matrix products
  config.model.scan_layers = True
  config.model.remat = True

  config.character = ConfigDict()
  config.character.path = 'assistant'  # a shipped character, or a .toml file; or several, as in 'stoic+poet'
  config.character.traits = ()  # empty: all; 'honesty:2' gives a trait another weight than the file does

  config.messages = ConfigDict()
  config.messages.train_per_trait = 450
  config.messages.heldout_per_trait = 50
  config.messages.train_neutral = 450
  config.messages.heldout_neutral = 50
  config.messages.seeds_shown = 4  # seed messages before each request for a new one
  config.messages.opening_words = 3  # a new message begins with up to so many words of an authored one; 0: with none
  config.messages.temperature = 0.8
  config.messages.top_p = 0.95
  config.messages.max_new_tokens = 96
  config.messages.near_duplicate = 0.5  # share of word pairs two messages may have in common
  config.messages.batch_size = 128
  config.messages.prompt_width = 256  # prompts are padded to at least this many tokens

  config.replies = ConfigDict()
  config.replies.shown = 4
  config.replies.plain = 2
  config.replies.opposed = 1
  config.replies.show = 'trait'  # or 'character': all traits at once
  config.replies.examples = 4
  config.replies.temperature = 0.8
  config.replies.top_p = 0.95
  config.replies.max_new_tokens = 512
  config.replies.batch_size = 128
  config.replies.prompt_width = 64

  config.rankings = ConfigDict()
  config.rankings.ranker = 'auto'  # likelihood, pairwise, pointwise, or the best of them on the choosing pairs
  config.rankings.examples = 4
  config.rankings.label_low = 0.05
  config.rankings.label_high = 0.95
  config.rankings.minimum_accuracy = 0.55  # lower 95% bound on the choosing pairs under which the run stops
  config.rankings.length_limit = 0.2  # |r| of score and length above which the effect of length is taken out
  config.rankings.skipped_replies = 20  # replies whose score is not finite are left out; more stop the run
  config.rankings.triples = 4  # messages a trait on which the pairwise ranker's transitivity is measured
  config.rankings.messages_per_chunk = 16
  config.rankings.batch_size = 32

  config.preference = ConfigDict()
  config.preference.labels = 'soft'  # or 'hard': the likelier of two replies is better for sure; ties stay ties
  config.preference.loss = 'bradley_terry'  # or 'margin', or 'plackett_luce': of whole rankings, without probabilities
  config.preference.head_steps = 60  # of fitting the heads to the starting weights, before anything else is trained
  config.preference.head_decay = 0.1
  config.preference.head_plain = 0.05  # share of the penalty on what varies among plain replies, where no trait speaks
  config.preference.depth = 1.0  # share of the layers that the heads read through
  config.preference.lora_rank = 0  # 0 trains all parameters
  config.preference.learning_rate = 3e-6
  config.preference.epochs = 1.0  # 0 leaves the weights as they are: the heads alone are trained
  config.preference.messages_per_batch = 16
  config.preference.warmup = 10
  config.preference.weight_decay = 0.01
  config.preference.max_gradient = 1.0
  config.preference.skipped_steps = 5  # as in the policy
  config.preference.save_every = 20
  config.preference.measured_messages = 500  # of those the other model was trained on, for the report's figures

  config.policy = ConfigDict()
  config.policy.lora_rank = 0
  config.policy.learning_rate = 1e-6
  config.policy.steps = 200
  config.policy.prompts_per_step = 64
  config.policy.replies_per_prompt = 8
  # Of the ranked replies to the same message, preferred among each other: shown, opposed and plain in turn.
  config.policy.ranked_replies = 0
  config.policy.ranked_labels = 0.0  # share of the rankings in what is preferred; the rest is the preference model's
  config.policy.ranked_weight = 1.0  # of that preference loss, beside the policy gradient on drawn replies
  config.policy.ranked_beta = 0.1  # of that preference loss; the higher, the sooner a gain is enough
  config.policy.ranked_temperature = 1.0  # of the log-probs in it
  config.policy.ranked_likelihood = 0.0  # weight of the log-prob a token of the best ranked reply to each message
  config.policy.temperature = 1.0
  config.policy.max_new_tokens = 512
  config.policy.prompt_width = 64
  config.policy.kl = 0.04
  config.policy.clip = 0.2
  config.policy.trace = 1.0  # lambda of generalised advantages; below 1 a critic stands in for what is far off
  config.policy.other_traits = 0.0  # what a reply earns by all other traits together, beside 1 by its own
  config.policy.neutral_weight = 1.0  # of the exact KL on neutral messages
  config.policy.warmup = 5
  config.policy.weight_decay = 0.0
  config.policy.max_gradient = 1.0
  config.policy.skipped_steps = 5  # steps whose loss or gradient is not finite are skipped; so many stop the run
  config.policy.keep_unproven_traits = False  # also reward traits that the preference model cannot tell from chance
  config.policy.save_every = 20
  config.policy.samples_every = 10

  config.evaluation = ConfigDict()
  config.evaluation.examples = 4
  config.evaluation.samples = 1  # replies to a message by the starting and by the trained model; one where prompted
  config.evaluation.temperature = 0.8
  config.evaluation.top_p = 0.95
  config.evaluation.max_new_tokens = 512
  config.evaluation.batch_size = 128
  config.evaluation.prompt_width = 64
  config.evaluation.probes = ''  # JSON Lines: trait, message, consistent, inconsistent
  config.evaluation.neutral = ''  # JSON Lines: message, reference, expect (regex or null)
  return config


# The least and the most that a number may be.
_COUNT, _SIZE, _AMOUNT, _SHARE = (0, math.inf), (1, math.inf), (0.0, math.inf), (0.0, 1.0)
_LIMITS: dict[str, dict[str, tuple[float, float]]] = {
  '': {'seed': (0, 2**31 - 1)},
  'messages': {
    'train_per_trait': _SIZE, 'heldout_per_trait': _COUNT, 'train_neutral': _SIZE, 'heldout_neutral': _COUNT,
    'seeds_shown': _COUNT, 'opening_words': _COUNT, 'temperature': _AMOUNT, 'top_p': _SHARE, 'max_new_tokens': _SIZE,
    'near_duplicate': _SHARE, 'batch_size': _SIZE, 'prompt_width': _SIZE,
  },
  'replies': {
    'shown': _COUNT, 'plain': _COUNT, 'opposed': _COUNT, 'examples': _COUNT, 'temperature': _AMOUNT, 'top_p': _SHARE,
    'max_new_tokens': _SIZE, 'batch_size': _SIZE, 'prompt_width': _SIZE,
  },
  'rankings': {
    'examples': _COUNT, 'label_low': _SHARE, 'label_high': _SHARE, 'minimum_accuracy': _SHARE, 'length_limit': _AMOUNT,
    'skipped_replies': _COUNT, 'triples': _COUNT, 'messages_per_chunk': _SIZE, 'batch_size': _SIZE,
  },
  'preference': {
    'head_steps': _COUNT, 'head_decay': _AMOUNT, 'lora_rank': _COUNT, 'learning_rate': _AMOUNT, 'epochs': _AMOUNT,
    'messages_per_batch': _SIZE, 'warmup': _COUNT, 'weight_decay': _AMOUNT, 'max_gradient': _AMOUNT,
    'skipped_steps': _SIZE, 'save_every': _SIZE, 'measured_messages': _COUNT,
  },
  'policy': {
    'lora_rank': _COUNT, 'learning_rate': _AMOUNT, 'steps': _SIZE, 'prompts_per_step': _SIZE,
    'replies_per_prompt': (2, math.inf), 'ranked_replies': _COUNT, 'ranked_labels': _SHARE, 'ranked_weight': _AMOUNT,
    'ranked_beta': _AMOUNT, 'ranked_temperature': _AMOUNT, 'ranked_likelihood': _AMOUNT, 'temperature': _AMOUNT,
    'max_new_tokens': _SIZE, 'prompt_width': _SIZE, 'kl': _AMOUNT, 'clip': _AMOUNT, 'trace': _SHARE,
    'other_traits': _AMOUNT, 'neutral_weight': _AMOUNT, 'warmup': _COUNT, 'weight_decay': _AMOUNT,
    'max_gradient': _AMOUNT, 'skipped_steps': _SIZE, 'save_every': _SIZE, 'samples_every': _SIZE,
  },
  'evaluation': {
    'examples': _COUNT, 'samples': _SIZE, 'temperature': _AMOUNT, 'top_p': _SHARE, 'max_new_tokens': _SIZE,
    'batch_size': _SIZE, 'prompt_width': _SIZE,
  },
}  # fmt: skip
_ABOVE_ZERO = (
  'messages.top_p', 'replies.top_p', 'evaluation.top_p', 'preference.max_gradient', 'policy.max_gradient',
  'policy.temperature', 'policy.ranked_beta', 'policy.ranked_temperature',
)  # fmt: skip
CHOICES = {
  'model.dtype': ('float32', 'bfloat16'),
  'model.compute_dtype': ('float32', 'bfloat16'),
  'replies.show': ('trait', 'character'),
  'rankings.ranker': ('auto', 'likelihood', 'pairwise', 'pointwise'),
  'preference.labels': ('soft', 'hard'),
  'preference.loss': ('bradley_terry', 'margin', 'plackett_luce'),
}


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
      raise UserError(f'config.{name} is {config[section][field]!r}; choose from {", ".join(choices)}')
  if config.rankings.label_low > config.rankings.label_high:
    raise UserError(
      f'config.rankings.label_low is {config.rankings.label_low}; it must not be above label_high, which is '
      f'{config.rankings.label_high}'
    )
  policy, preference, replies = config.policy, config.preference, config.replies
  ranked = replies.shown + replies.plain + replies.opposed
  if ranked < 2:
    raise UserError(
      f'config.replies: shown, plain and opposed are {ranked} together; a ranking takes 2 replies to a message or more'
    )
  if policy.ranked_replies == 1 or policy.ranked_replies > ranked:
    raise UserError(
      f'config.policy.ranked_replies is {policy.ranked_replies}, and {ranked} a message are ranked; set it to 0, or '
      'from 2 to that number'
    )
  if not 0 < preference.depth <= 1:
    raise UserError(f'config.preference.depth is {preference.depth}; it must be above 0 and at most 1')
  if not 0 <= preference.head_plain < 1:
    raise UserError(f'config.preference.head_plain is {preference.head_plain}; it must be at least 0 and below 1')
  if policy.trace < 1 and replies.plain < 1:
    raise UserError(
      f'config.policy.trace is {policy.trace}, whose critic learns from plain replies; set config.replies.plain to 1 '
      'or more, or the trace to 1'
    )
  if policy.max_new_tokens > replies.max_new_tokens and (policy.trace < 1 or policy.ranked_replies):
    raise UserError(
      f'config.policy.max_new_tokens is {policy.max_new_tokens}, and the ranked replies that the policy learns from '
      f'have at most {replies.max_new_tokens} tokens; lower it, or raise config.replies.max_new_tokens'
    )
