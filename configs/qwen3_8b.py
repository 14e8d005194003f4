"""Qwen3 8B, all parameters trained, on a slice of 16 v6e chips or more.

charjax plan --config=configs/qwen3_8b.py --topology=v6e:4x4
"""

from pathlib import Path

from ml_collections import ConfigDict

from charjax.config_file import read_config


def get_config() -> ConfigDict:
  config = read_config(str(Path(__file__).with_name('pod.py')), ())
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
  return config
