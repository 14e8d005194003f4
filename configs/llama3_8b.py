"""Llama 3.1 8B Instruct, all parameters trained, on a slice of 16 v5e chips or more.

charjax plan --config=configs/llama3_8b.py --topology=v5e:4x4
charjax run --config=configs/llama3_8b.py --workdir=gs://BUCKET/llama3_8b --config.model.path=PATH

The latter on each host, with charjax[gcs] installed there.
"""

from pathlib import Path

from ml_collections import ConfigDict

from charjax.config_file import read_config


def get_config() -> ConfigDict:
  config = read_config(str(Path(__file__).with_name('pod.py')), ())
  config.model.path = 'hf://meta-llama/Llama-3.1-8B-Instruct'
  config.model.shape.num_layers = 32
  config.model.shape.embed_dim = 4096
  config.model.shape.num_heads = 32
  config.model.shape.num_kv_heads = 8
  config.model.shape.head_dim = 128
  config.model.shape.mlp_dim = 14336
  config.model.shape.vocab_size = 128256
  config.model.shape.tied_embeddings = False

  # A chip of v5e has 15.75 GiB: no attention scores are kept, and a step goes through the model in more parts. On GPUs
  # --config.model.attention=auto.
  config.model.attention = 'tpu'
  config.policy.microbatches = 32
  return config
