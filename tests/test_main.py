"""What a person types: mistakes end in one line before any work, settings arrive where they should."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from llama_reference import tiny_config

from charjax import config_file, defaults, files, limits, start
from charjax import main as command_line
from charjax import workdir as workdirs
from charjax.main import main
from charjax.workdir import Stage

QUICKSTART = str(Path(__file__).parent.parent / 'configs' / 'quickstart.py')

CONFIG = """
from charjax import defaults

def get_config(name='plain'):
  config = defaults.get_config()
  config.model.path = 'random'
  config.seed = 7
  config.policy.trace = 0.9
  if name == 'seeded':
    config.seed = 8
  return config
"""


@pytest.mark.parametrize('path', sorted(Path(QUICKSTART).parent.glob('*.py')), ids=lambda path: path.name)
def test_every_shipped_config_is_one_that_a_run_takes(path):
  config = config_file.read_config(str(path), ())
  limits.check(config)
  if shape := limits.told_shape(config):
    limits.check_model(config, shape)


@pytest.fixture
def config(tmp_path):
  path = tmp_path / 'config.py'
  path.write_text(CONFIG)
  return str(path)


@pytest.fixture
def toy_stages(monkeypatch):
  """Two stages that need no model, in place of the loop's."""

  def write(name):
    def run(session):
      files.write_text(session.folder(name) / 'seed.txt', str(session.config.seed))
      return {}

    return run

  # `report` last, as a run that ends without one reports nothing.
  stages = (
    Stage('messages', write('messages'), (), ('seed',), ('seed.txt',)),
    Stage('replies', write('replies'), ('messages',), ('seed',), ('seed.txt',)),
  )
  for module in (command_line, start):
    monkeypatch.setattr(module, 'STAGES', stages)
  monkeypatch.setattr(workdirs.Session, 'checkpoint', types.SimpleNamespace(config=tiny_config()))


def mistake(capsys, *arguments: str) -> str:
  """The one line that a command ends in."""
  assert main(list(arguments)) == 2
  captured = capsys.readouterr()
  assert captured.out == ''
  assert captured.err.count('\n') == 1 and captured.err.startswith('charjax: ')
  return captured.err


def test_help_does_not_wait_for_jax():
  program = "import sys; from charjax.main import main; main(['--help']); sys.exit('jax' in sys.modules)"
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, check=True, text=True)
  assert 'charjax run --config=FILE.py' in done.stdout


def test_a_cpu_run_keeps_the_memory_that_its_programs_work_in():
  program = """
import resource
import jax, jax.numpy as jnp
from charjax import defaults, start
with start.devices(defaults.get_config()):
  fill = jax.jit(lambda x: jnp.full((64, 2**20), x))
  for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(fill(1.0))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
  environment = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'} | {'XLA_FLAGS': ''}
  command = [sys.executable, '-c', program]
  done = subprocess.run(command, capture_output=True, check=True, text=True, env=environment)
  # Of 256 MiB in pages of 4 KiB.
  assert int(done.stdout) < 2**16 / 10


def test_who_reads_no_further_sees_no_trace(tmp_path):
  """The reader is gone before anything is printed."""
  read, write = os.pipe()
  os.close(read)
  command = [sys.executable, '-m', 'charjax.main', 'character', 'diff', 'stoic', 'poet']
  done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
  os.close(write)
  assert (done.returncode, done.stderr) == (141, '')


def test_a_pipe_that_is_not_what_is_printed_into_is_no_reader_gone(monkeypatch):
  def broken(_):
    raise BrokenPipeError(32, 'Broken pipe')

  monkeypatch.setattr(command_line, '_command', broken)
  with pytest.raises(BrokenPipeError):
    main(['run'])


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    ([], 'no command given'),
    (['rum'], 'there is no command rum; did you mean run?'),
    (['run'], 'run needs --config=FILE.py'),
    (['run', '--config={config}'], 'run needs --workdir=DIR'),
    (['run', '--confg={config}'], "Unknown command line flag 'confg'"),
    (['run', 'again', '--config={config}'], 'unexpected argument again'),
    (['run', '--config={tmp}/none.py', '--workdir={tmp}/run'], 'none.py: cannot be read (No such file'),
    (['run', '--config={tmp}', '--workdir={tmp}/run'], 'not a Python file'),
    (['run', '--config={config}:plain,seed', '--workdir={tmp}/run'], 'seed is no field=value'),
    (['run', '--config={config},sed=1', '--workdir={tmp}/run'], 'no config field sed; did you mean seed?'),
    (
      ['run', '--config={config},replies.shown=0,replies.opposed=0,replies.plain=1', '--workdir={tmp}/run'],
      'config.replies: shown, plain and opposed are 1 together',
    ),
    (['character', 'chek', 'assistant'], 'charjax character takes `check FILE` or `diff A B`'),
    (['character', 'check', '{tmp}/none.toml'], 'cannot read this character'),
  ],
)
def test_a_mistake_ends_in_one_line(tmp_path, config, capsys, arguments, expected):
  arguments = [argument.format(tmp=tmp_path, config=config) for argument in arguments]
  assert expected in mistake(capsys, *arguments)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('change', 'expected'),
  [
    ('--config.sede=1', 'no config field sede; did you mean seed?'),
    ('--config.evaluation.probs=x', 'no config field evaluation.probs; did you mean probes?'),
    ('--config.seed.deep=1', 'no config field seed.deep'),
    ('--config.evaluation={}', 'evaluation is a section; set one of its fields'),
    ('--config.seed=many', 'seed'),
    ('--config.seed', 'has no value'),
    ('--config.mesh=(1', "mesh: ('(1',) is not like"),
    ('--config.mesh=1,2,x', "mesh: (1, 2, 'x') is not like"),
    ('--config.mesh=(3,1,1)', 'config.mesh'),
    ('--config.model.path={tmp}/none.gguf', 'none.gguf: no such file'),
    ('--config.character.path={tmp}/none.toml', 'cannot read this character'),
    ("--config.character.traits=('humility',)", 'humility'),
    ('--config.evaluation.probes={tmp}/none.jsonl', 'none.jsonl'),
    ('--config.preference.depth=1.5', 'preference.depth is 1.5; it must be above 0 and at most 1'),
    ('--config.preference.head_plain=1.0', 'preference.head_plain is 1.0; it must be at least 0 and below 1'),
    ('--config.policy.trace=-0.5', 'policy.trace is -0.5; it must be from 0 to 1'),
    ('--config.replies.plain=0', 'whose critic learns from plain replies; set config.replies.plain to 1'),
    ('--config.messages.train_neutral=0', 'messages.train_neutral is 0; it must be at least 1'),
    ('--config.policy.kl=-1.0', 'policy.kl is -1.0; it must be at least 0'),
    ('--config.replies.show=all', "replies.show is 'all'; choose from trait, character"),
    ('--config.preference.labels=sure', "preference.labels is 'sure'; choose from soft, hard"),
    ('--config.preference.loss=hinge', "preference.loss is 'hinge'; choose from bradley_terry, margin, plackett_luce"),
    ('--config.replies.examples=-1', 'replies.examples is -1; it must be at least 0'),
    ('--config.rankings.examples=-2', 'rankings.examples is -2; it must be at least 0'),
    ('--config.evaluation.examples=-4', 'evaluation.examples is -4; it must be at least 0'),
    ('--config.rankings.ranker=best', "rankings.ranker is 'best'; choose from auto"),
    ('--config.policy.replies_per_prompt=1', 'policy.replies_per_prompt is 1, and a reply is judged'),
    ('--config.policy.ranked_replies=99', 'ranked_replies is 99, and 7 a message are ranked; set it to 0, or from 2'),
    (
      '--config.policy.replies_per_prompt=0',
      'ranked_replies and shown_replies are all 0, or have no weight, so there is nothing to',
    ),
    ('--config.policy.shown_replies=9', 'shown_replies is 9, and config.replies.shown is 4; lower'),
    ('--config.policy.advantages=dpo', "policy.advantages is 'dpo'; choose from grpo, rloo, ppo"),
    ('--config.policy.ranked_temperature=0.0', 'policy.ranked_temperature is 0.0; it must be above 0'),
    ('--config.policy.max_new_tokens=600', 'policy.max_new_tokens is 600, and the ranked replies'),
    ('--config.policy.microbatches=24', 'policy.microbatches is 24, into which config.policy.prompts_per_step=64 does'),
    ('--config.policy.lora_targets=q,w', "policy.lora_targets names 'w'; choose from q, k, v, o, gate, up, down"),
    (
      '--config.policy.traits=honesty,humility',
      "policy.traits: 'humility' is no trait of this run; choose from perspectives",
    ),
    ('--config.preference.lora_targets=(1,)', 'preference.lora_targets names 1; choose from q, k'),
  ],
)
def test_a_wrong_setting_ends_in_one_line(tmp_path, config, capsys, change, expected):
  change = change.replace('{tmp}', str(tmp_path))
  assert expected in mistake(capsys, 'run', f'--config={config}', f'--workdir={tmp_path / "run"}', change)
  assert not (tmp_path / 'run' / 'messages').exists()


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('def get_config(:\n', 'config.py:1: invalid syntax'),
    ('import nowhere\n', "config.py:1: ModuleNotFoundError: No module named 'nowhere'"),
    ('\nraise SystemExit\n', 'config.py:2: SystemExit'),
    (CONFIG.replace('config.seed = 7', 'config.sede = 7'), 'sede'),
    (CONFIG.replace('= 7', '= "seven"'), 'config.py:7: TypeError'),
    (CONFIG.replace('= 7', '= None'), 'config field seed is None; give a int'),
    (CONFIG.replace('return config', 'pass'), 'get_config returned NoneType'),
    ('x = 1\n', 'has no function get_config'),
    ('from ml_collections import *\nget_config = lambda: ConfigDict({"sed": 1})', 'no config field sed;'),
    ('from ml_collections import *\nget_config = lambda: ConfigDict({"seed": "x"})', 'give a int'),
  ],
)
def test_a_broken_config_file_is_named_with_its_line(tmp_path, capsys, text, expected):
  (tmp_path / 'config.py').write_text(text)
  assert expected in mistake(capsys, 'run', f'--config={tmp_path}/config.py', f'--workdir={tmp_path}/run')
  assert not (tmp_path / 'run').exists()


def test_flags_come_before_the_spec_and_the_spec_before_the_file(config):
  read = config_file.read_config
  assert read(config, []).seed == 7
  assert read(f'{config}:seeded', []).seed == 8
  assert read(f'{config}:seeded,seed=9,mesh=(1,2,4)', []).mesh == (1, 2, 4)
  assert read(f'{config}:seeded,seed=9', []).seed == 9
  assert read(f'{config}:seed=9', ['--config.seed=10', '--config.seed=11']).seed == 11
  assert read(f'{config}:mesh=(1,2,4)', ['--config.mesh=8,1,1']).mesh == (8, 1, 1)
  for traits in ('honesty,curiosity', "('honesty', 'curiosity')"):
    changed = read(config, [f'--config.character.traits={traits}'])
    assert changed.character.traits == ('honesty', 'curiosity')


def test_values_may_stand_apart_and_anywhere(tmp_path, config):
  names, spec, workdir, changes, chat = command_line._parse(
    ['--config.seed', '3', 'run', '--config', config, '--workdir', str(tmp_path), '--noconfig.some.switch']
  )
  assert (names, spec, workdir, chat) == (['run'], config, [str(tmp_path)], {})
  assert changes == ['--config.seed=3', '--noconfig.some.switch']


def test_a_run_records_what_it_was_started_with_and_goes_on(tmp_path, config, capsys, toy_stages):
  arguments = ['run', f'--config={config}', f'--workdir={tmp_path / "run"}', '--config.seed=5']
  assert main(arguments) == 0
  record = json.loads((tmp_path / 'run/config.json').read_text())
  assert record['seed'] == record['config']['seed'] == 5 and record['versions']['jax']
  assert (tmp_path / 'run/character.toml').read_text().count('[[traits]]') > 0
  assert (tmp_path / 'run/replies/seed.txt').read_text() == '5'
  capsys.readouterr()
  assert main(arguments) == 0
  assert capsys.readouterr().out.count('done already') == 2


def test_one_stage_needs_the_earlier_ones_up_to_date(tmp_path, config, capsys, toy_stages):
  place = (f'--config={config}', f'--workdir={tmp_path / "run"}')
  line = mistake(capsys, 'replies', *place)
  assert 'messages: missing, and replies builds on it; run messages first' in line
  assert main(['messages', *place]) == 0
  capsys.readouterr()
  line = mistake(capsys, 'replies', *place, '--config.seed=1')
  assert 'config field seed changed from 7 to 1, and replies builds on it' in line
  assert main(['replies', *place]) == 0


def test_a_second_process_is_refused_in_one_line(tmp_path, config, capsys, toy_stages):
  with workdirs.lock(command_line.epath.Path(tmp_path / 'run')):
    assert 'is working in it' in mistake(capsys, 'run', f'--config={config}', f'--workdir={tmp_path / "run"}')


def test_an_unexpected_error_keeps_its_trace(monkeypatch):
  def fail(arguments):
    raise RuntimeError('a bug')

  monkeypatch.setattr(command_line, '_command', fail)
  with pytest.raises(RuntimeError, match='a bug'):
    main(['run'])


def test_another_character_brings_all_its_traits():
  def traits(*changes):
    return config_file.read_config(QUICKSTART, changes).character.traits

  assert len(traits()) == 4
  assert traits('--config.character.path=stoic') == ()
  assert traits('--config.character.path=stoic', '--config.character.traits=duty') == ('duty',)
  assert traits('--config.character.traits=') == ()
  assert len(traits('--config.character.path=assistant')) == 4  # the file's own


def test_a_character_whose_ranker_can_never_be_found_good_enough_is_refused_at_once(tmp_path, capsys):
  code = main(['run', f'--config={QUICKSTART}', f'--workdir={tmp_path / "run"}',
               '--config.character.traits=honesty', '--config.rankings.minimum_accuracy=0.99'])  # fmt: skip
  assert code == 2 and re.search(r'only 12 with use = "choosing".*as bad as 0\.76', capsys.readouterr().err)
  assert not (tmp_path / 'run').exists()


def test_a_run_is_opened_on_another_machine_than_it_was_trained_on(tmp_path):
  config = defaults.get_config()
  config.mesh, config.model.attention, config.seed = (2, -1, 1), 'tpu', 5
  (tmp_path / 'config.json').write_text(json.dumps({'config': config.to_dict()}))
  found, is_run = command_line._at(tmp_path, True, ['--config.mesh=(1,1,-1)'])
  assert is_run and (found.seed, found.mesh, found.model.attention) == (5, (1, 1, -1), 'auto')
