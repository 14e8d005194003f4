"""Qwen3 8B, all parameters trained, on a slice of 16 v6e chips or more.

charjax plan --config=configs/qwen3_8b.py --topology=v6e:4x4
"""

from ml_collections import ConfigDict

from charjax import defaults


def get_config() -> ConfigDict:
  config = defaults.get_config()
  config.model.path = 'hf://Qwen/Qwen3-8B'
  config.model.shape.num_layers = 36
  config.model.shape.embed_dim = 4096
  config.model.shape.num_heads = 32
  config.model.shape.num_kv_heads = 8
  config.model.shape.head_dim = 128
  config.model.shape.mlp_dim = 12288
  config.model.shape.vocab_size = 151936
  config.model.shape.tied_embeddings = False
  config.model.shape.qk_norm = 'head'

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
