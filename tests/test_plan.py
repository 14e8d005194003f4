"""What a run would take on chips that are not there: against the TPU compiler's own figures and closed forms."""

import dataclasses
import json
import re
from unittest import mock

import pytest

pytest.importorskip('libtpu', reason='needs the TPU compiler: pip install libtpu')

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from charjax import character as characters
from charjax import chips, defaults
from charjax.engine.sample import Sampling
from charjax.main import main
from charjax.mesh import make_mesh
from charjax.model.config import ModelConfig
from charjax.plan import estimate, programs
from charjax.plan.compiled import traffic
from charjax.stages import rollouts

pytestmark = pytest.mark.usefixtures('compiled_anew')

V, D, L, N, K, H, F = 1024, 256, 2, 4, 2, 128, 512
SHAPE = ModelConfig(
  num_layers=L, embed_dim=D, num_heads=N, num_kv_heads=K, head_dim=H, mlp_dim=F, vocab_size=V, tied_embeddings=False
)
MATRICES = 2 * V * D + L * (D * H * (2 * N + 2 * K) + 3 * D * F)
VECTORS = L * 2 * D + D


def small(**changes):
  config = defaults.get_config()
  config.mesh = (1, 2, 2)
  config.replies.update(shown=1, plain=1, opposed=0, max_new_tokens=64)
  config.preference.update(messages_per_batch=8, microbatches=2)
  config.policy.update(prompts_per_step=8, replies_per_prompt=2, microbatches=2, batch_size=8, max_new_tokens=64)
  config.update_from_flattened_dict(changes)
  return config


def plan(config, topology='v5e:2x2'):
  character = characters.load('stoic')
  return estimate.make(config, character, SHAPE, chips.find(topology))


@pytest.fixture(scope='module')
def compiled(compiled_anew):
  """A plan, and what the compiler made of each of its programs."""
  made, real = [], jax.stages.Lowered.compile

  def compile_and_keep(lowered):
    made.append(real(lowered))
    return made[-1]

  with mock.patch.object(jax.stages.Lowered, 'compile', compile_and_keep):
    return plan(small()), made


@pytest.fixture(scope='module')
def found(compiled):
  return compiled[0]


def test_all_that_lies_on_a_chip_is_counted(found):
  assert [one.name for one in found.programs] == ['prefill', 'decode', 'scoring', 'policy step', 'preference step']
  assert found.fits and not found.remedy
  step, preference = found.programs[3], found.programs[4]
  # Matrices are split over four chips, vectors lie on each.
  weights = MATRICES / 4 + VECTORS
  head = 4 * D
  assert step.residents['starting weights'] == 2 * weights
  assert step.residents['policy'] == 4 * weights
  assert step.residents['Adam moments'] == pytest.approx(8 * weights, abs=64)  # and some numbers
  # It only judges: its matrices are rounded, but for the embedding.
  assert step.residents['preference model'] == 4 * (weights + head) - 2 * (MATRICES - V * D) / 4
  assert step.residents['trunk'] == 0
  assert preference.residents['other preference model'] == 4 * (weights + head)
  # Eight rows of 64 tokens, keys and values in two layers, a row of a half and a head of a half on each chip.
  cache = 2 * L * 8 * K * H * 64 * 2 / 4 + 2 * 4 * 8 * 64 / 2
  assert found.programs[1].residents['cache'] == cache
  blocks = L * (D * H * (2 * N + 2 * K) + 3 * D * F) / 4
  assert found.programs[1].residents['sampling copy'] == pytest.approx(2 * blocks, rel=0.01)


def test_memory_is_what_the_compiler_says(compiled):
  found, memory = compiled[0].programs[4], compiled[1][4].memory_analysis()
  # All parameters are trained: the starting weights lie there, and are not read. The other preference model is no
  # argument, and the starting weights are the trunk.
  unread = found.residents['starting weights'] + found.residents['other preference model']
  assert memory.argument_size_in_bytes == pytest.approx(sum(found.residents.values()) - unread, rel=0.02)
  assert found.total == pytest.approx(
    memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    - memory.alias_size_in_bytes + unread, rel=0.02,
  )  # fmt: skip


def test_no_chip_has_the_vocabulary_whole(compiled):
  for made in compiled[1]:
    shapes = re.findall(r'\b(?:f32|bf16)\[([\d,]+)\]', made.as_text())
    whole = {shape for shape in shapes if {V, D} <= set(map(int, shape.split(',')))}
    assert shapes and not whole


def test_decoding_moves_no_weights(compiled):
  decode = compiled[0].programs[1]
  assert 0 < decode.sent / 64 < decode.residents['sampling copy'] / 4


def test_what_has_no_room_does_not_fit_and_has_its_figures(monkeypatch):
  make = programs.make
  # To lay out and compile the training of so many rows would take minutes.
  monkeypatch.setattr(programs, 'make', lambda *given: make(*given)[1:2])
  monkeypatch.setattr(rollouts, 'drawing', lambda config: Sampling(config.max_new_tokens, batch_size=2**20))
  monkeypatch.setattr(estimate, '_stages', lambda *_: {})
  found = plan(small())
  (decode,) = found.programs
  assert decode.name == 'decode' and decode.refused and not decode.fits and not found.fits
  assert decode.total > decode.limit
  assert decode.name in found.remedy


@pytest.mark.parametrize(
  ('topology', 'shape'), [('v6e:4x4', (2, 8, 1)), ('v5p:4x4x4', (1, 32, 2)), ('v6e:16x16', (1, 64, 4))]
)
def test_an_axis_of_the_mesh_may_be_a_part_of_one_of_the_network(topology, shape):
  assert make_mesh(shape, chips.find(topology).devices).devices.shape == shape


def test_collectives_are_counted_as_often_as_they_run():
  mesh = jax.make_mesh((4,), ('x',), devices=chips.find('v5e:2x2').devices, axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec('x'))

  def rounds(w, a):
    # Each needs all of what the one before left split.
    return jax.lax.scan(lambda a, _: (jax.lax.with_sharding_constraint(w @ a, split), None), a, length=5)[0]

  a = jax.ShapeDtypeStruct((1024, 512), 'float32', sharding=split)
  w = jax.ShapeDtypeStruct((1024, 1024), 'float32', sharding=split)
  text = jax.jit(rounds, out_shardings=split).lower(w, a).compile().as_text()
  assert traffic(text) == 5 * 1024 * 512 * 2 * 3 / 4  # in bfloat16, to which products round


def test_of_collectives_that_were_joined_all_are_counted():
  mesh = jax.make_mesh((4,), ('x',), devices=chips.find('v5e:2x2').devices, axis_types=(AxisType.Auto,))
  whole = NamedSharding(mesh, PartitionSpec())

  def products(a, ws):
    return [a @ w for w in ws]

  def split(shape, *axes):
    return jax.ShapeDtypeStruct(shape, 'bfloat16', sharding=NamedSharding(mesh, PartitionSpec(*axes)))

  ws = [split((512, 1024), 'x', None)] * 4
  text = jax.jit(products, out_shardings=[whole] * 4).lower(split((256, 512), None, 'x'), ws).compile().as_text()
  assert re.search(r'= \(.*\) all-reduce', text)
  assert traffic(text) == 4 * 256 * 1024 * 2 * 2 * 3 / 4


def test_of_what_is_under_way_the_results_are_counted():
  gathered = '((bf16[2,8]{1,0:T(8,128)(2,1)}, f32[4]{0}), (bf16[8,8]{1,0:T(8,128)(2,1)}, f32[16]{0})) all-gather-start('
  text = f'ENTRY %main (a: f32[2]) -> f32[2] {{\n  %x = {gathered}%a, %b), replica_groups=[1,4]<=[4]\n}}'
  assert traffic(text) == (64 * 2 + 16 * 4) * 3 / 4


def test_a_gpu_is_estimated_and_says_so():
  jax.config.update('jax_platforms', 'cpu')
  found = plan(small(), 'h100:4')
  assert found.fits and all(one.sent is None for one in found.programs)
  assert 'An estimate' in estimate.as_text(found)


@pytest.mark.parametrize(
  'way',
  [
    {'policy.advantages': 'ppo'},
    {'policy.replies_per_prompt': 0, 'policy.ranked_replies': 2, 'policy.ranked_weight': 1.0},
    {'policy.replies_per_prompt': 0, 'policy.shown_replies': 2, 'policy.lora_rank': 4},
  ],
  ids=['ppo', 'dpo', 'distillation'],
)
def test_every_way_to_train_a_policy_has_its_programs(way):
  jax.config.update('jax_platforms', 'cpu')
  found, usual = plan(small(**way), 'h100:4'), plan(small(), 'h100:4')
  by_name = {one.name: one for one in found.programs}
  assert ('value head' in by_name) == ('policy.advantages' in way)
  step, other = by_name['policy step'], usual.programs[3]
  if (
    'policy.shown_replies' in way
  ):  # What shows the trait goes through the model, too, and an adapter alone is trained.
    assert step.tokens > 1.5 * other.tokens and step.residents['policy'] < other.residents['policy'] / 10
  elif 'policy.replies_per_prompt' in way:
    assert step.tokens == other.tokens
    assert found.stages['policy'] < usual.stages['policy']  # nothing is drawn
  else:
    assert step.residents['policy'] > other.residents['policy'] and found.stages['policy'] > usual.stages['policy']


def test_rows_that_do_not_divide_make_it_no_sooner():
  jax.config.update('jax_platforms', 'cpu')
  config = small(**{'policy.batch_size': 7})
  with jax.set_mesh(make_mesh(config.mesh, jax.devices('cpu')[:4])):
    decode = programs.make(config, characters.load('stoic'), SHAPE, 'gpu')[1]
    # What fills up the sampler's rows is drawn for nobody; of three rows on two parts one is computed twice.
    assert decode.rows == 8 and decode.tokens == 7 * 64 and programs.busy(decode) == 1
    assert programs.busy(dataclasses.replace(decode, rows=3)) == 0.75


CONFIG = """
from charjax import defaults

def get_config():
  config = defaults.get_config()
  config.model.shape.update(
    num_layers=2, embed_dim=256, num_heads=4, num_kv_heads=2, head_dim=128, mlp_dim=512, vocab_size=1024
  )
  config.model.path = 'hf://nobody/nothing'
  config.replies.max_new_tokens = config.policy.max_new_tokens = 32
  config.policy.prompts_per_step = 4
  config.policy.batch_size = 8
  return config
"""


def test_json_holds_figures_alone(found, tmp_path, monkeypatch, capfd):
  (tmp_path / 'config.py').write_text(CONFIG)
  monkeypatch.setattr(estimate, 'make', lambda *_: found)  # compiled already
  assert main(['plan', f'--config={tmp_path}/config.py', '--topology=v5e:2x2', '--json']) == 0
  told = json.loads(capfd.readouterr().out)
  assert told.keys() == {'fits', 'chip_hours', 'programs'}
  assert told['fits'] is True and told['chip_hours'] > 0 and len(told['programs']) == 5
  for one in told['programs']:
    assert one.keys() == {'name', 'bytes_per_chip', 'limit_bytes', 'flops', 'seconds'}
    assert 0 < one['bytes_per_chip'] < one['limit_bytes'] and one['flops'] > 0 and one['seconds'] > 0


@pytest.mark.parametrize(
  ('name', 'said'),
  [
    ('v9:4x4', 'there is no such topology'),
    ('v5e:3x5', 'knows no such slice'),
    ('v5e:2x2x2', 'there is no such topology'),
    ('v5e:32x32', 'there is no such topology'),
    ('h100:9', 'give the number of GPUs'),
  ],
)
def test_a_wrong_topology_is_one_clear_line(tmp_path, capsys, name, said):
  (tmp_path / 'config.py').write_text(CONFIG)
  assert main(['plan', f'--config={tmp_path}/config.py', f'--topology={name}']) == 2
  out, err = capsys.readouterr()
  assert not out and err.count('\n') == 1 and f'--topology={name}' in err and said in err
