"""The quickstart's loop with fewer messages, steps and replies, for sweeps on two CPU cores: once messages, replies and
rankings are made, a policy takes a few minutes.

charjax sweep --config=configs/sweeps/methods.py:short --workdir=runs/methods
"""

from pathlib import Path

from ml_collections import ConfigDict

from charjax.config_file import read_config


def get_config() -> ConfigDict:
  config = read_config(str(Path(__file__).with_name('quickstart.py')), ())

  config.messages.train_per_trait = 48
  config.messages.heldout_per_trait = 40
  config.messages.train_neutral = 24
  config.messages.heldout_neutral = 20
  config.messages.batch_size = 44

  config.replies.batch_size = 84
  config.rankings.messages_per_chunk = 48
  config.rankings.batch_size = 48

  config.policy.steps = 10
  config.policy.warmup = 2
  config.policy.save_every = 5
  config.policy.samples_every = 5
  config.policy.prompts_per_step = 6
  config.policy.replies_per_prompt = 2
  config.policy.ranked_replies = 4

  config.evaluation.samples = 2
  return config
