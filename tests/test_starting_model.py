"""A run starts from a checkpoint or from what another run trained, with the true sum of adapters in its weights."""

import dataclasses
import io
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from llama_reference import random_tensors
from test_peft import changes, random_adapter

from charjax import defaults, start, starting_model
from charjax.config_file import read_config
from charjax.errors import UserError
from charjax.main import main
from charjax.model import checkpoint_source, lora, peft
from charjax.model.checkpoint_source import read_tensor
from charjax.model.decoder import Runtime
from charjax.model.weights import make_decoder
from charjax.stages import STAGES, policy
from charjax.training import checkpoint
from charjax.training.checkpoint import Checkpoints
from charjax.training.heads import bind, make_trainable
from charjax.workdir import relevant_config

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
    exact = read_tensor(found, name, dtype)
    assert exact.dtype == dtype
    np.testing.assert_allclose(exact.astype(np.float64), total, rtol=2**-8 if dtype != np.float32 else 0, atol=2e-6)
  assert sorted(touched) == ['down', 'o', 'o', 'q', 'q', 'up']


def test_a_run_stands_for_its_policy(smoke_run, adapters):
  """As a path for all its weights, as an adapter for its LoRA: those that the stages load."""
  run, _ = smoke_run
  session = start.prepare(read_config('configs/smoke.py', []), epath.Path(run))
  expected = lora.merge(*bind(session.model.decoder, policy.load(session)))
  one, _ = adapters
  for model, more in ((asked(run), {}), (asked('random', run, f'{one}:2'), adapters[one])):
    found = starting_model.load(model).tensors
    for name, value in found.items():
      *_, target = name.split('.')
      total = np.asarray(getattr(expected.blocks if '.' in name else expected, target)[...])
      if target in more:
        total = total + 2 * more[target].reshape(total.shape)
      np.testing.assert_allclose(value, total, atol=2e-6)
    assert max(np.abs(found[f'blocks.{name}'] - BASE.tensors[f'blocks.{name}']).max() for name in 'qkvo') > 1e-3


def trained_decoder(seed):
  return make_decoder(BASE.config, random_tensors(BASE.config, seed), jnp.float32, Runtime())


def test_runs_start_from_runs(tmp_path):
  """All parameters of the first; the LoRA of the second beside them, rounded as it was in training."""
  whole = make_trainable(trained_decoder(5), 0, 0)
  first = write_run(tmp_path / 'first', asked(), whole)
  adapter = random_adapter(BASE.config, ('v', 'gate'))
  second = write_run(tmp_path / 'second', asked(first, dtype='bfloat16'), {'adapter': adapter})
  found = starting_model.load(asked(first))
  assert found.template is not None and found.tokenizer.vocab_size == BASE.tokenizer.vocab_size
  for name, value in random_tensors(BASE.config, 5).items():
    np.testing.assert_array_equal(found.tensors[name], value)
    np.testing.assert_array_equal(read_tensor(found.tensors, name, jnp.bfloat16), value.astype(jnp.bfloat16))
  found = starting_model.load(asked(second))
  for name, value in random_tensors(BASE.config, 5).items():
    change = changes(adapter.arrays()).get(name.removeprefix('blocks.'), np.zeros(value.shape))
    np.testing.assert_allclose(
      found.tensors[name], value.astype(jnp.bfloat16).astype(np.float64) + change.reshape(value.shape), atol=2e-6
    )


def test_contents_count_and_places_do_not(tmp_path, adapters):
  one, two = adapters
  run = write_run(tmp_path / 'run', asked('random', two), {'adapter': random_adapter(BASE.config, ('v',))})
  before = starting_model.contents(asked(run, f'{one}:0.5', two))
  assert str(tmp_path) not in json.dumps(before) and 'random' not in json.dumps(before)
  for place in (run, one):
    shutil.copytree(place, tmp_path / 'moved' / place.name)
  moved = asked(tmp_path / 'moved/run', f'{tmp_path}/moved/one:0.5', two)
  assert starting_model.contents(moved) == before
  assert starting_model.contents(asked())['path'] == 'random'
  changed = [asked(run, f'{one}:0.25', two), asked(run, two, f'{one}:0.5'), asked('random', f'{one}:0.5', two)]
  assert all(starting_model.contents(model) != before for model in changed)
  (tmp_path / 'moved/run/policy/fingerprint.json').write_text('another')
  assert (
    starting_model.contents(moved) | {'path': 0} == before | {'path': 0} and starting_model.contents(moved) != before
  )
  # What a run started from counts as well.
  peft.write(random_adapter(BASE.config, ('q',)).arrays(), BASE.config, 'llama', two, 'random')
  assert starting_model.contents(asked(run))['path'] != before['path']


def test_every_stage_depends_on_the_contents(adapters):
  config = defaults.get_config()
  config.model = asked('random', *adapters)
  session = start.prepare(config, epath.Path('/nowhere'))
  for stage in STAGES:
    assert relevant_config(stage, session)['model.adapters'] == starting_model.contents(config.model)['adapters']


def two_in_a_circle(folder):
  made = {'adapter': random_adapter(BASE.config, ('v',))}
  one = write_run(folder / 'one', asked(folder / 'two'), made)
  write_run(folder / 'two', asked(one), made)
  with pytest.raises(UserError, match='starts from itself'):
    starting_model.contents(asked(one))
  return asked(one)


def misfit(folder):
  wider = dataclasses.replace(BASE.config, embed_dim=48)
  return asked('random', write_run(folder / 'run', asked(), {'adapter': random_adapter(wider, ('v',))}))


def damaged(folder):
  run = write_run(folder / 'run', asked(), {'adapter': random_adapter(BASE.config)})
  for path in (run / 'policy').rglob('*'):
    if path.is_file() and '/d/' in str(path):
      content = bytearray(path.read_bytes())
      content[len(content) // 2] ^= 1
      path.write_bytes(content)
  return asked(run)


def emptied(folder):
  run = write_run(folder / 'run', asked(), {'adapter': random_adapter(BASE.config)})
  shutil.rmtree(run / 'policy' / 'checkpoints')
  return asked(run)


@pytest.mark.parametrize(
  ('make', 'said'),
  [
    (
      lambda folder: asked('random', folder / 'none'),
      'model.adapters: .*none: neither a PEFT adapter nor a run',
    ),
    (lambda folder: asked('random', f'{folder}:nan'), 'config.model.adapters=.*:nan: the weight must be a number'),
    (lambda folder: asked('random', ''), "config.model.adapters names ''; give folders"),
    (lambda folder: asked(folder / 'none'), 'config.model.path=.*none: no such file or directory'),
    (asked, 'config.model.path=.*: neither a model nor a run folder'),
    (
      lambda folder: asked(write_run(folder / 'run', asked(), {'head': {'w': jnp.zeros(2)}}, finished=False)),
      'run: its policy is not trained to the end; run charjax policy',
    ),
    (
      lambda folder: asked('random', write_run(folder / 'run', asked(), make_trainable(trained_decoder(1), 0, 0))),
      r'run: this run trained all parameters and has no LoRA \(config.policy.lora_rank is 0\)',
    ),
    (
      lambda folder: asked(write_run(folder / 'run', asked(dtype='float8'), {'head': {'w': jnp.zeros(2)}})),
      r"run/config.json: field model.dtype is 'float8'; restore the file",
    ),
    (two_in_a_circle, r'one: the run starts from itself; set model.path in .*one/config.json'),
    (misfit, 'run: the LoRA of this run does not fit the model; it was trained beside another'),
    (damaged, r'policy/checkpoints/3: (cannot be read|the checkpoint is damaged)'),
    (emptied, r'policy/checkpoints: the checkpoint is gone; restore it, or train again'),
  ],
)
def test_what_cannot_be_started_from_ends_in_one_line(tmp_path, make, said):
  with pytest.raises(UserError, match=said) as error:
    model = make(tmp_path)
    starting_model.check(model)
    starting_model.load(model)
  assert '\n' not in str(error.value)


def test_a_checkpoint_whose_contents_changed_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, 'fingerprint', lambda _: 'of other contents')
  run = write_run(tmp_path / 'run', asked(), {'adapter': random_adapter(BASE.config)})
  with pytest.raises(UserError, match=r'policy/checkpoints/3: the checkpoint is damaged \(wrong fingerprint\)'):
    starting_model.load(asked(run))


def test_the_lora_of_a_policy_is_exported_for_peft(smoke_run, tmp_path, capsys):
  run, _ = smoke_run
  flags = ['export', str(run), '--model=adapter', f'--output={tmp_path / "out"}']
  assert main(flags) == 0
  assert "the policy's LoRA, which stands beside random" in capsys.readouterr().out
  for name, pair in peft.read(tmp_path / 'out', BASE.config, BASE.family).items():
    expected = starting_model.load(asked(run)).tensors[f'blocks.{name}'] - BASE.tensors[f'blocks.{name}']
    np.testing.assert_allclose((pair['a'] @ pair['b']).reshape(expected.shape), expected, atol=2e-6)
  assert main(flags) == 2
  assert 'something is there; choose another, or move it away' in capsys.readouterr().err


def test_a_run_leaves_what_it_starts_from(tmp_path, capsys, adapters):
  run = write_run(tmp_path / 'run', asked(), {'adapter': random_adapter(BASE.config)})
  for field in ('path', 'adapters'):
    flags = ['--config=configs/smoke.py', f'--workdir={run}', f'--config.model.{field}={run}']
    assert main(['run', *flags]) == 2
    assert 'a run cannot start from its own folder; choose another --workdir' in capsys.readouterr().err


def test_one_talks_to_a_combination_beside_the_original(adapters, monkeypatch, capsys):
  one, two = adapters
  monkeypatch.setattr('sys.stdin', io.StringIO('say it\n'))
  flags = ['--side_by_side', '--temperature=0', '--max_new_tokens=4', '--config.model.scan_layers=False']
  assert main(['chat', 'random', *flags, f'--config.model.adapters={one}:3,{two}']) == 0
  said = re.findall(r'^(\w+):\n(.*)$', capsys.readouterr().out, re.MULTILINE)
  assert [name for name, _ in said] == ['base', 'combined', 'prompted']
  assert said[0][1] != said[1][1]


def test_a_folder_may_be_called_by_a_number():
  entries = starting_model._entries(('2', '2:0.5', 'a:b', 'nan'))
  assert [(str(place), weight) for place, weight in entries] == [('2', 1.0), ('2', 0.5), ('a:b', 1.0), ('nan', 1.0)]
