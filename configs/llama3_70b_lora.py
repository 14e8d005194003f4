"""Llama 3.1 70B Instruct, trained through LoRA on weights that stay bfloat16, on a slice of eight v5p chips or more.

charjax plan --config=configs/llama3_70b_lora.py --topology=v5p:2x2x2
"""

from pathlib import Path

from ml_collections import ConfigDict

from charjax.config_file import read_config


def get_config() -> ConfigDict:
  config = read_config(str(Path(__file__).with_name('pod.py')), ())
  config.model.path = 'hf://meta-llama/Llama-3.1-70B-Instruct'
  config.model.shape.num_layers = 80
  config.model.shape.embed_dim = 8192
  config.model.shape.num_heads = 64
  config.model.shape.num_kv_heads = 8
  config.model.shape.head_dim = 128
  config.model.shape.mlp_dim = 28672
  config.model.shape.vocab_size = 128256
  config.model.shape.tied_embeddings = False

  config.preference.lora_rank = 64
  config.preference.learning_rate = 1e-4
  config.preference.microbatches = 32

  config.policy.lora_rank = 64
  config.policy.learning_rate = 3e-5
  config.policy.microbatches = 64
  return config
