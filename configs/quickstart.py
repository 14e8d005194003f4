"""The whole loop on SmolLM2-135M-Instruct with four traits, on two CPU cores. About 20 minutes.

charjax run --config=configs/quickstart.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from charjax import defaults


def get_config() -> ConfigDict:
  config = defaults.get_config()
  config.character.traits = ('ai_nature', 'curiosity', 'perspectives', 'honesty')

  config.messages.train_per_trait = 60
  config.messages.heldout_per_trait = 60
  config.messages.train_neutral = 32
  config.messages.heldout_neutral = 28
  config.messages.opening_words = 4
  config.messages.temperature = 0.7
  config.messages.top_p = 1.0
  config.messages.max_new_tokens = 40
  config.messages.prompt_width = 48
  config.messages.batch_size = 60

  # With the prompt's last token 40: rows that are scored are padded to whole eights.
  config.replies.shown = 3
  config.replies.plain = 1
  config.replies.opposed = 3
  config.replies.temperature = 0.7
  config.replies.top_p = 1.0
  config.replies.max_new_tokens = 39
  config.replies.prompt_width = 48
  config.replies.batch_size = 90

  config.rankings.triples = 1
  config.rankings.messages_per_chunk = 60
  config.rankings.batch_size = 60

  config.preference.epochs = 0.0
  config.preference.depth = 0.67
  # AI nature's reward follows length at r = 0.22. What it does to the traits to take that out has not been measured.
  config.preference.length_limit = 1.0

  config.policy.lora_rank = 16
  config.policy.learning_rate = 1.5e-3
  config.policy.steps = 32
  config.policy.warmup = 3
  config.policy.save_every = 11
  config.policy.prompts_per_step = 10
  config.policy.replies_per_prompt = 4
  config.policy.ranked_replies = 6
  config.policy.ranked_labels = 1.0
  config.policy.ranked_weight = 2.0
  config.policy.ranked_beta = 0.15
  config.policy.ranked_temperature = 1.5
  config.policy.ranked_likelihood = 0.1
  config.policy.temperature = 0.7
  config.policy.trace = 0.9
  config.policy.other_traits = 0.3
  config.policy.kl = 0.04
  config.policy.clip = 0.5
  config.policy.neutral_weight = 2.5
  # Rankings teach perspectives too, which the preference model hardly tells from chance on written pairs.
  config.policy.keep_unproven_traits = True
  # With the prompt's last token 32: rows of training are padded to that width.
  config.policy.max_new_tokens = 31
  config.policy.prompt_width = 48
  config.policy.samples_every = 6

  config.evaluation.samples = 4
  config.evaluation.temperature = 0.7
  config.evaluation.top_p = 1.0
  config.evaluation.max_new_tokens = 39
  config.evaluation.prompt_width = 48
  config.evaluation.batch_size = 60

  config.behaviour.sets = ()
  return config
