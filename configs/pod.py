"""What the configs of large models share: the work of each step, for a slice of a TPU pod or a host of GPUs. No run of
its own.
"""

from ml_collections import ConfigDict

from charjax import defaults


def get_config() -> ConfigDict:
  config = defaults.get_config()
  config.replies.shown = 2
  config.replies.plain = 1
  config.replies.opposed = 1
  config.replies.max_new_tokens = 1024

  config.preference.messages_per_batch = 64
  config.preference.microbatches = 16

  config.policy.prompts_per_step = 64
  config.policy.replies_per_prompt = 8
  config.policy.batch_size = 128
  config.policy.microbatches = 16
  config.policy.max_new_tokens = 1024
  return config
