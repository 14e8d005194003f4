"""Llama 3.1 8B Instruct, all parameters trained, on one host of eight GPUs of 80 GB; one process drives them all.

charjax plan --config=configs/llama3_8b_gpus.py --topology=h100:8
charjax run --config=configs/llama3_8b_gpus.py --workdir=runs/llama3_8b

No GPU has run it yet.
"""

from pathlib import Path

from ml_collections import ConfigDict

from charjax.config_file import read_config


def get_config() -> ConfigDict:
  config = read_config(str(Path(__file__).with_name('llama3_8b.py')), ())
  config.model.attention = 'auto'
  config.policy.microbatches = 16
  return config
