"""Llama 3.1 70B Instruct, trained through LoRA on weights that stay bfloat16, on a slice of eight v5p chips or more.

charjax plan --config=configs/llama3_70b_lora.py --topology=v5p:2x2x2
"""

from ml_collections import ConfigDict

from charjax import defaults


def get_config() -> ConfigDict:
  config = defaults.get_config()
  config.model.path = 'hf://meta-llama/Llama-3.1-70B-Instruct'
  config.model.shape.num_layers = 80
  config.model.shape.embed_dim = 8192
  config.model.shape.num_heads = 64
  config.model.shape.num_kv_heads = 8
  config.model.shape.head_dim = 128
  config.model.shape.mlp_dim = 28672
  config.model.shape.vocab_size = 128256
  config.model.shape.tied_embeddings = False

  config.replies.shown = 2
  config.replies.plain = 1
  config.replies.opposed = 1
  config.replies.max_new_tokens = 1024

  config.preference.lora_rank = 64
  config.preference.learning_rate = 1e-4
  config.preference.messages_per_batch = 64
  config.preference.microbatches = 32

  config.policy.lora_rank = 64
  config.policy.learning_rate = 3e-5
  config.policy.prompts_per_step = 64
  config.policy.replies_per_prompt = 8
  config.policy.batch_size = 128
  config.policy.microbatches = 64
  config.policy.max_new_tokens = 1024
  return config
