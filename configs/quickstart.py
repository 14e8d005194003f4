"""The whole loop on SmolLM2-135M-Instruct with four traits, on two CPU cores.

charjax run --config=configs/quickstart.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from charjax import defaults


def get_config() -> ConfigDict:
  config = defaults.get_config()
  config.character.traits = ('ai_nature', 'curiosity', 'perspectives', 'honesty')

  config.messages.train_per_trait = 28
  config.messages.heldout_per_trait = 40
  config.messages.train_neutral = 32
  config.messages.heldout_neutral = 24
  config.messages.seeds_shown = 6
  config.messages.temperature = 0.7
  config.messages.top_p = 0.9
  config.messages.max_new_tokens = 32
  config.messages.prompt_width = 32
  config.messages.batch_size = 64

  config.replies.shown = 3
  config.replies.max_new_tokens = 40
  config.replies.temperature = 0.7
  config.replies.batch_size = 64

  config.rankings.triples = 1

  config.preference.epochs = 0.0
  config.preference.messages_per_batch = 8

  config.policy.lora_rank = 16
  config.policy.learning_rate = 1.5e-3
  config.policy.steps = 24
  config.policy.warmup = 3
  config.policy.save_every = 8
  config.policy.prompts_per_step = 4
  config.policy.temperature = 0.8
  config.policy.max_new_tokens = 40
  config.policy.samples_every = 4

  config.evaluation.max_new_tokens = 40
  config.evaluation.temperature = 0.7
  config.evaluation.batch_size = 40
  return config
