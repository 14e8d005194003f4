"""All traits of the shipped character on SmolLM2-135M-Instruct, with enough messages for narrow intervals.

  charjax run --config=configs/study.py --workdir=runs/study

Hours on a CPU, and meant for minutes on a GPU; neither has been timed yet.
"""

from ml_collections import ConfigDict

from charjax import defaults


def get_config() -> ConfigDict:
  config = defaults.get_config()

  config.messages.train_per_trait = 200
  config.messages.heldout_per_trait = 80
  config.messages.opening_words = 4
  config.messages.train_neutral = 200
  config.messages.heldout_neutral = 80

  config.replies.shown = 3
  config.replies.plain = 1
  config.replies.opposed = 3
  config.replies.max_new_tokens = 96
  # Heads on the starting weights, at two thirds of their depth, and what ranked replies teach, as in the quickstart;
  # with six times its steps, at a third of its learning rate.
  config.preference.epochs = 0.0
  config.preference.depth = 0.67

  config.policy.lora_rank = 16
  config.policy.learning_rate = 5e-4
  config.policy.steps = 200
  config.policy.temperature = 0.8
  config.policy.trace = 0.9
  config.policy.other_traits = 0.3
  config.policy.clip = 0.5
  config.policy.neutral_weight = 2.5
  config.policy.keep_unproven_traits = True
  config.policy.ranked_replies = 6
  config.policy.ranked_labels = 1.0
  config.policy.ranked_weight = 2.0
  config.policy.ranked_beta = 0.15
  config.policy.ranked_temperature = 1.5
  config.policy.ranked_likelihood = 0.1
  # The held-out judge chooses among the policies after 50, 100, 150 and 200 steps.
  config.policy.candidates = 4
  config.policy.prompts_per_step = 16
  config.policy.max_new_tokens = 96

  config.evaluation.max_new_tokens = 96
  return config
