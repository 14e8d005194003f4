"""Llama 3.1 8B Instruct, all parameters trained, on a slice of 16 v5e chips or more.

charjax plan --config=configs/llama3_8b.py --topology=v5e:4x4
charjax run --config=configs/llama3_8b.py --workdir=gs://BUCKET/llama3_8b --config.model.path=PATH

The latter on each host, with charjax[gcs] installed there.
"""

from ml_collections import ConfigDict

from charjax import defaults


def get_config() -> ConfigDict:
  config = defaults.get_config()
  config.model.path = 'hf://meta-llama/Llama-3.1-8B-Instruct'
  config.model.shape.num_layers = 32
  config.model.shape.embed_dim = 4096
  config.model.shape.num_heads = 32
  config.model.shape.num_kv_heads = 8
  config.model.shape.head_dim = 128
  config.model.shape.mlp_dim = 14336
  config.model.shape.vocab_size = 128256
  config.model.shape.tied_embeddings = False

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
