"""Gemma 2 9B it, all parameters trained, on a slice of 16 v6e chips or more.

charjax plan --config=configs/gemma2_9b.py --topology=v6e:4x4
"""

from pathlib import Path

from ml_collections import ConfigDict

from charjax.config_file import read_config


def get_config() -> ConfigDict:
  config = read_config(str(Path(__file__).with_name('pod.py')), ())
  config.model.path = 'hf://google/gemma-2-9b-it'
  config.model.shape.num_layers = 42
  config.model.shape.embed_dim = 3584
  config.model.shape.num_heads = 16
  config.model.shape.num_kv_heads = 8
  config.model.shape.head_dim = 256
  config.model.shape.mlp_dim = 14336
  config.model.shape.vocab_size = 256000
  config.model.shape.windows = (4096, 0) * 21
  config.model.shape.post_norms = True
  config.model.shape.norm_offset = 1.0
  config.model.shape.attention_softcap = 50.0
  config.model.shape.logit_softcap = 30.0
  config.model.shape.activation = 'gelu_tanh'
  return config
