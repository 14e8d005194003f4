"""The whole loop on a tiny random model: proves that every stage runs, teaches nothing. Under a minute on two cores.

charjax run --config=configs/smoke.py --workdir=/tmp/smoke
"""

from ml_collections import ConfigDict

from charjax import defaults


def get_config() -> ConfigDict:
  config = defaults.get_config()
  config.model.path = 'random'
  config.model.dtype = 'float32'
  config.model.compute_dtype = 'float32'
  config.model.remat = False
  config.character.traits = ('ai_nature', 'honesty')

  config.messages.train_per_trait = 8
  config.messages.heldout_per_trait = 4
  config.messages.train_neutral = 6
  config.messages.heldout_neutral = 4
  config.messages.near_duplicate = 0.9  # random words of a small vocabulary are all alike
  config.messages.max_new_tokens = 24
  config.messages.batch_size = 32

  config.replies.max_new_tokens = 16
  config.replies.batch_size = 32

  config.rankings.minimum_accuracy = 0.0  # a random model ranks at random
  config.rankings.triples = 1

  config.preference.depth = 0.5
  config.preference.lora_rank = 4
  config.preference.learning_rate = 1e-3
  config.preference.messages_per_batch = 4
  config.preference.save_every = 1

  config.policy.lora_rank = 4
  config.policy.learning_rate = 1e-3
  config.policy.steps = 4
  config.policy.prompts_per_step = 2
  config.policy.replies_per_prompt = 3
  config.policy.ranked_replies = 3
  config.policy.ranked_labels = 0.5
  config.policy.ranked_likelihood = 0.1
  config.policy.trace = 0.9
  config.policy.other_traits = 0.3
  config.policy.max_new_tokens = 16
  config.policy.keep_unproven_traits = True
  config.policy.save_every = 2
  config.policy.samples_every = 2

  config.evaluation.samples = 2
  config.evaluation.max_new_tokens = 16
  config.evaluation.batch_size = 32

  config.behaviour.messages = 1
  config.behaviour.prompts = 1
  config.behaviour.conversations = 1
  config.behaviour.turns = 2
  config.behaviour.comparisons = 4
  return config
