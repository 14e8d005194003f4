"""Training stages on eight devices beside one: the same numbers, arrays in their parts, activations split.

`scripts/verify_mesh.py` does the same for every stage and more shapes, in minutes.
"""

import shutil
from collections import Counter

import jax
import pytest
import verify_mesh
from test_mesh import constraints, whole

from charjax import workdir
from charjax.stages import policy, preference

SHAPE = (2, 2, 2)
STAGES = ('preference', 'policy')
# Messages, replies to each that are read together, and their tokens with one before and padding.
MESSAGES, EACH, WIDTH = 8, 7, 24


@pytest.fixture(scope='module')
def compared(smoke_run, tmp_path_factory):
  """What `verify_mesh.verify` found, on the messages, replies and rankings of the smoke run."""
  top = tmp_path_factory.mktemp('meshes')
  for name in ('messages', 'replies', 'rankings'):
    shutil.copytree(smoke_run[0] / name, top / 'one' / name)
  said, expected = verify_mesh.reference(top / 'one', STAGES)
  return verify_mesh.verify(top / 'one', said, expected, SHAPE, top / 'many', STAGES)


def test_log_probs_rewards_and_ten_losses_are_those_of_one_device(compared):
  far, *_ = compared
  assert set(far) == {
    *(f'forced {name}' for name in ('log_probs', *preference.MODELS)),
    'preference losses',
    'policy losses',
    'first rollout',
  }
  assert {name: distance for name, distance in far.items() if distance > 1e-4} == {}


def test_what_is_trained_and_its_moments_lie_in_their_parts_at_all_times(compared):
  _, _, problems, _ = compared
  assert problems == []


@pytest.mark.parametrize('stage', range(len(STAGES)), ids=STAGES)
def test_the_activations_of_a_train_step_are_split(compared, stage):
  step, arguments = compared[3][stage].functions[0]
  rows = MESSAGES * EACH
  with jax.set_mesh(verify_mesh.mesh.make_mesh(SHAPE)):
    program = step.__wrapped__.lower(*arguments)
  asked, batch = constraints(program), 'data+fsdp'
  # Outside attention the tokens of all texts lie end to end, a row of them on each of the devices.
  streams = {shape[:2] for shape, axes in asked if axes == f'{batch},-,-' and shape[2:] == (32,) and shape[0] == 4}
  tokens = max(streams)
  # Between blocks, queries, keys and values, inside the MLP: of the pass forward, and of its gradient.
  assert asked[(*tokens, 32), f'{batch},-,-'] >= 3
  heads = Counter({lead: asked[(*lead, 4, 8), f'{batch},-,tensor,-'] for lead in {tokens, (rows, WIDTH)}})
  assert heads.total() >= 4 and min(heads.values()) >= 2
  assert asked[(rows, 2, WIDTH, 8), f'{batch},tensor,-,-'] >= 2
  assert asked[(rows, 2, 8, WIDTH), f'{batch},tensor,-,-'] >= 2
  assert asked[(*tokens, 64), f'{batch},-,tensor'] >= 2
  assert not whole(program.compile(), rows, WIDTH)


class Told(Exception):
  pass


@pytest.mark.parametrize(
  ('stage', 'field', 'size', 'said'),
  [
    (preference, 'preference.messages_per_batch', 3, True),  # of seven replies: 21 rows
    (policy, 'policy.prompts_per_step', 3, True),  # of six
    (policy, 'policy.prompts_per_step', 6, False),  # 36 rows; six neutral ones are made up to eight
    (preference, 'preference.messages_per_batch', 4, False),
  ],
)
def test_batches_that_the_devices_do_not_divide_are_told_of_at_the_start(
  smoke_run, monkeypatch, stage, field, size, said
):
  lines = []

  def tell(_, line):
    lines.append(line)
    raise Told

  def work(*_, **__):
    raise Told

  monkeypatch.setattr(workdir.Session, 'log', tell)
  monkeypatch.setattr(preference, 'trunk', work)  # where the work begins
  with jax.set_mesh(verify_mesh.mesh.make_mesh(SHAPE)), pytest.raises(Told):
    stage.run(verify_mesh.begin(smoke_run[0], [f'{field}={size}']))
  expected = [f'config.{field} is {size}, whose batches do not divide into the 4 parts of config.mesh']
  assert [line[: len(expected[0])] for line in lines] == expected * said
