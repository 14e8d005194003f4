"""A run starts from a checkpoint or from what another run trained, with the true sum of adapters in its weights."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from llama_reference import random_tensors
from test_peft import changes, random_adapter

from charjax import defaults, starting_model
from charjax import main as command_line
from charjax.errors import UserError
from charjax.main import main
from charjax.model import checkpoint_source, lora, peft
from charjax.model.decoder import Runtime
from charjax.model.weights import make_decoder
from charjax.training.checkpoint import Checkpoints
from charjax.training.heads import make_trainable
from charjax.workdir import relevant_config
from charjax.stages import STAGES, policy

BASE = checkpoint_source.load('random')


def asked(path='random', *adapters, **fields):
  model = defaults.get_config().model
  model.path, model.adapters = str(path), tuple(map(str, adapters))
  model.update(fields)
  return model


@pytest.fixture
def adapters(tmp_path):
  """Two in PEFT's format, of other ranks and other projections: their folders and what they add to each weight."""
  made = {}
  for seed, (name, targets, ranks) in enumerate((('one', ('q', 'o', 'down'), (3, 1)), ('two', ('q', 'up', 'o'), (2,)))):
    adapter = random_adapter(BASE.config, targets, ranks, seed).arrays()
    peft.write(adapter, BASE.config, 'llama', tmp_path / name, 'random')
    made[tmp_path / name] = changes(adapter)
  return made


def write_run(folder, model, trainable, finished=True):
  """A run that trained this, as far as others read it."""
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps({'config': {'model': model.to_dict()}}))
  with Checkpoints(epath.Path(folder) / 'policy' / 'checkpoints', 0) as checkpoints:
    checkpoints.save(3, trainable, {'steps': jnp.zeros(2)}, {})
  (folder / 'policy' / 'fingerprint.json').write_text(json.dumps(str(np.random.default_rng().integers(2**60))))
  if finished:
    (folder / 'policy' / 'stage.json').write_text('{}')
  return folder


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_adapters_add_up_with_their_weights(adapters, dtype):
  one, two = adapters
  found = starting_model.load(asked('random', f'{one}:0.75', two, f'{one}:-2')).tensors
  touched = []
  for name, value in BASE.tensors.items():
    target = name.removeprefix('blocks.')
    total = np.float64(value)
    for folder, weight in ((one, 0.75 - 2), (two, 1)):
      if target in adapters[folder]:
        total = total + weight * adapters[folder][target].reshape(value.shape)
        touched.append(target)
    exact = starting_model.checkpoint_read(found, name, dtype)
    assert exact.dtype == dtype
    np.testing.assert_allclose(exact.astype(np.float64), total, rtol=2**-8 if dtype != np.float32 else 0, atol=2e-6)
  assert sorted(touched) == ['down', 'o', 'o', 'q', 'q', 'up']


def test_a_run_stands_for_its_policy(smoke_run, adapters):
  """Of a path all its weights, of an adapter its LoRA; the same as the stages have them."""
  run, _ = smoke_run
  session = command_line._prepare(
    command_line._read_config('configs/smoke.py', []), epath.Path(run)
  )
  decoder, adapter = policy.bind(session.model.decoder, policy.load(session))
  expected = lora.merge(decoder, adapter)
  one, _ = adapters
  for model, more in ((asked(run, dtype='float32'), {}), (asked('random', run, f'{one}:2'), adapters[one])):
    found = starting_model.load(model).tensors
    for name, value in found.items():
      *_, target = name.split('.')
      part = getattr(expected.blocks, target) if name.startswith('blocks.') else getattr(expected, target)
      total = np.asarray(part[...]) + 2 * more.get(target, np.zeros(1)).reshape(-1, *part.shape[1:]) if target in more else part[...]
      np.testing.assert_allclose(value, total, atol=1e-6)
  assert any(np.abs(found[name] - value).max() > 1e-3 for name, value in BASE.tensors.items())
