"""A run survives kills, moves, edits and second processes."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import ml_collections
import pytest
from etils import epath

from charjax import defaults, files
from charjax import workdir as workdirs
from charjax.character import Character, Trait
from charjax.chunks import chunks
from charjax.errors import UserError
from charjax.progress import Metrics
from charjax.stages import STAGES
from charjax.workdir import Session, Stage

TRAIT = Trait(id='honesty', statement='I am honest.', opposites={'flattering': 'I flatter.'}, seeds=(), pairs=())


def make_session(path: pathlib.Path, **changes) -> Session:
  config = ml_collections.ConfigDict(
    {
      'seed': 0,
      'profile': False,
      'first': {'count': 3, 'steps': 0},
      'second': {'steps': 30},
      'evaluation': {'probes': ''},
      'character': {'path': 'assistant', 'traits': ()},
    }
  )
  config.update_from_flattened_dict(changes)
  character = Character(name='assistant', description='kind', traits=(TRAIT,))
  return Session(config=config, character=character, workdir=epath.Path(path))


def make_stages(calls: list[str]) -> tuple[Stage, Stage]:
  """`first` writes as many rows as the config says, `second` counts them."""

  def first(session: Session) -> dict:
    calls.append('first')
    rows = [{'id': i} for i in range(session.config.first.count)]
    files.write_jsonl(session.folder('first') / 'rows.jsonl', rows)
    return {'rows': len(rows)}

  def second(session: Session) -> dict:
    calls.append('second')
    rows = files.read_jsonl(session.folder('first') / 'rows.jsonl')
    files.write_text(session.folder('second') / 'count.txt', str(len(rows)))
    return {'rows': len(rows)}

  return (
    Stage('first', first, (), ('seed', 'character', 'first'), ('rows.jsonl',)),
    Stage(
      name='second',
      run=second,
      reads=('first',),
      fields=('second.steps', 'evaluation'),
      products=('count.txt',),
      files=('evaluation.probes',),
    ),
  )


# ---- files ----


def test_json_lines_keep_what_models_write(tmp_path):
  rows = [{'text': 'a\u2028b\x85c\n\r\x0bd', 'z': 1, 'a': None}, {'text': '漢字'}, {'text': '\ud83d alone'}]
  files.write_jsonl(tmp_path / 'rows.jsonl', rows)
  assert files.read_jsonl(tmp_path / 'rows.jsonl') == rows
  assert (tmp_path / 'rows.jsonl').read_bytes().count(b'\n') == 3
  assert '漢字' in (tmp_path / 'rows.jsonl').read_text()
  assert os.listdir(tmp_path) == ['rows.jsonl']


@pytest.mark.parametrize(
  ('content', 'expected'),
  [
    (b'{"a": 1}\n{"a": \n', ':2: not JSON'),
    (b'{"a": 1}\n\n[1]\n', ':3: list found'),
    (b'{"a": 1}\n{"a": "\xff"}\n', ':2: not UTF-8'),
    (b'[' * 100_000, ':1: not JSON'),
  ],
)
def test_a_broken_line_is_named(tmp_path, content, expected):
  (tmp_path / 'rows.jsonl').write_bytes(content)
  with pytest.raises(UserError, match='rows.jsonl' + expected):
    files.read_jsonl(tmp_path / 'rows.jsonl')


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(UserError, match=r'none.jsonl: cannot be read \(No such file'):
    files.read_jsonl(tmp_path / 'none.jsonl')


def test_metrics_are_cut_where_a_resume_begins(tmp_path):
  with Metrics(epath.Path(tmp_path)) as metrics:
    for step in range(5):
      metrics.write(step, {'loss': 1.0 / (step + 1), 'kl': float('nan')})
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 5, "lo')
  with Metrics(epath.Path(tmp_path)) as metrics:
    metrics.truncate_after(2)
    metrics.write(3, {'loss': 9.0})
  rows = files.read_jsonl(tmp_path / 'metrics.jsonl')
  assert [row['step'] for row in rows] == [0, 1, 2, 3]
  assert rows[0] == {'step': 0, 'loss': 1.0, 'kl': None} and rows[3]['loss'] == 9.0
  assert any((tmp_path / 'tensorboard').iterdir())


# ---- what is finished ----


def test_a_finished_stage_is_skipped_also_after_a_move(tmp_path, capsys):
  calls: list[str] = []
  stages = make_stages(calls)
  workdirs.execute(stages, make_session(tmp_path / 'run'))
  assert calls == ['first', 'second']
  record = json.loads((tmp_path / 'run/second/stage.json').read_text())
  assert record['counts'] == {'rows': 3} and record['stage'] == 'second' and not record['resumed']
  assert str(tmp_path) not in json.dumps(record)
  assert sorted(os.listdir(tmp_path / 'run/second')) == ['count.txt', 'stage.json']

  shutil.copytree(tmp_path / 'run', tmp_path / 'copy')
  shutil.move(tmp_path / 'run', tmp_path / 'moved')
  for name in ('copy', 'moved'):
    workdirs.execute(stages, make_session(tmp_path / name, **{'character.path': '/elsewhere/assistant.toml'}))
  assert calls == ['first', 'second']
  assert 'second: done already' in capsys.readouterr().out


def test_a_changed_field_is_named_and_only_what_depends_on_it_is_made_anew(tmp_path, capsys):
  calls: list[str] = []
  stages = make_stages(calls)
  workdirs.execute(stages, make_session(tmp_path))
  calls.clear()
  workdirs.execute(stages, make_session(tmp_path, **{'second.steps': 60}))
  assert calls == ['second']
  assert 'second: made anew, since config field second.steps changed from 30 to 60' in capsys.readouterr().out

  calls.clear()
  workdirs.execute(stages, make_session(tmp_path, **{'second.steps': 60, 'first.count': 4}))
  assert calls == ['first', 'second']
  assert 'second: made anew, since first changed' in capsys.readouterr().out
  assert (tmp_path / 'second/count.txt').read_text() == '4'


def test_of_a_link_to_another_disk_only_the_link_goes(tmp_path):
  stages = make_stages([])
  workdirs.execute(stages, make_session(tmp_path / 'run'))
  (tmp_path / 'disk').mkdir()
  (tmp_path / 'disk' / 'old').write_text('')
  (tmp_path / 'run' / 'second' / 'checkpoints').symlink_to(tmp_path / 'disk')
  workdirs.execute(stages, make_session(tmp_path / 'run', **{'second.steps': 60}))
  assert sorted(os.listdir(tmp_path / 'run/second')) == ['count.txt', 'stage.json']
  assert (tmp_path / 'disk' / 'old').exists()


def test_a_field_that_is_new_and_empty_leaves_what_was_made(tmp_path):
  calls: list[str] = []
  stages = make_stages(calls)
  workdirs.execute(stages, make_session(tmp_path))
  first = dataclasses.replace(stages[0], fields=(*stages[0].fields, 'targets', 'wishes'))
  assert workdirs.status(first, make_session(tmp_path, targets=(), wishes='')) == 'done'
  for value in (('q',), 0, False):
    said = workdirs.status(first, make_session(tmp_path, targets=value, wishes=''))
    assert said == 'config field targets was added'


def test_the_same_result_from_another_setting_spares_what_depends_on_it(tmp_path):
  calls: list[str] = []
  stages = make_stages(calls)
  workdirs.execute(stages, make_session(tmp_path))
  calls.clear()
  workdirs.execute(stages, make_session(tmp_path, seed=1))
  assert calls == ['first']


def test_what_people_add_is_read_where_it_is_there(tmp_path):
  calls: list[str] = []
  first, second = make_stages(calls)
  stages, session = (first, dataclasses.replace(second, added=('notes',))), make_session(tmp_path)
  workdirs.execute((first, second), session)  # as it was before there was such a folder
  calls.clear()
  workdirs.execute(stages, session)
  assert not calls
  for change in ('one', 'another', None):
    path = tmp_path / 'notes' / 'ann.jsonl'
    path.parent.mkdir(exist_ok=True)
    path.write_text(change) if change else path.unlink()
    assert workdirs.status(stages[1], session) == 'notes changed'
    workdirs.execute(stages, session)
    assert workdirs.status(stages[1], session) == 'done'
  assert calls == ['second'] * 3


def test_a_reworded_trait_is_named(tmp_path):
  calls: list[str] = []
  stages = make_stages(calls)
  session = make_session(tmp_path)
  workdirs.execute(stages, session)
  session.character = dataclasses.replace(
    session.character, traits=(dataclasses.replace(TRAIT, statement='I am frank.'),)
  )
  assert workdirs.status(stages[0], session) == 'character trait honesty changed'


def test_an_edited_product_is_kept_and_what_reads_it_is_made_anew(tmp_path, capsys):
  calls: list[str] = []
  stages = make_stages(calls)
  session = make_session(tmp_path)
  workdirs.execute(stages, session)
  calls.clear()
  with (tmp_path / 'first/rows.jsonl').open('a') as file:
    file.write('{"id": 99}\n')
  workdirs.execute(stages, session)
  assert calls == ['second'] and (tmp_path / 'second/count.txt').read_text() == '4'
  assert 'first: done already (rows.jsonl edited since)' in capsys.readouterr().out
  (tmp_path / 'second/count.txt').unlink()
  assert workdirs.status(stages[1], session) == 'count.txt is gone'


def test_a_probe_file_counts_by_its_contents(tmp_path):
  calls: list[str] = []
  stages = make_stages(calls)
  (tmp_path / 'a').write_text('probe')
  (tmp_path / 'b').write_text('probe')
  workdirs.execute(stages, make_session(tmp_path / 'run', **{'evaluation.probes': str(tmp_path / 'a')}))
  session = make_session(tmp_path / 'run', **{'evaluation.probes': str(tmp_path / 'b')})
  assert workdirs.status(stages[1], session) == 'done'
  (tmp_path / 'b').write_text('another')
  assert 'config field evaluation.probes changed' in workdirs.status(stages[1], session)


def test_what_no_run_wrote_is_never_deleted(tmp_path):
  (tmp_path / 'first').mkdir()
  (tmp_path / 'first/thesis.txt').write_text('years of work')
  with pytest.raises(UserError, match='holds files that no run wrote'):
    workdirs.execute(make_stages([]), make_session(tmp_path))
  assert (tmp_path / 'first/thesis.txt').read_text() == 'years of work'


def test_a_stage_without_what_it_reads_is_refused(tmp_path):
  with pytest.raises(UserError, match='stage first is not finished and second reads it; run first'):
    workdirs.execute(make_stages([])[1:], make_session(tmp_path))


# ---- kills ----

# A stage of five chunks that says so as each begins, and takes its time over the third.
_PROGRAM = """
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without one
sys.path.insert(0, {tests!r})
from charjax.chunks import chunks
from test_workdir import Stage, files, make_session, workdirs
slow, count = sys.argv[2] == 'slow', int(sys.argv[3])

def run(session):
  def make(items, index):
    print(f'chunk {{index}}', flush=True)
    if slow and index == 2:
      time.sleep(60)
    return [{{'id': item}} for item in items]
  rows = chunks(session, 'slow', 'rows', range(10), 2, make)
  files.write_jsonl(session.folder('slow') / 'rows.jsonl', rows)
  return {{'rows': len(rows)}}

session = make_session(pathlib.Path(sys.argv[1]), **{{'first.count': count}})
with workdirs.lock(session.workdir):
  workdirs.execute([Stage('slow', run, (), ('first',), ('rows.jsonl',))], session)
"""


def start(path: pathlib.Path, speed: str, count: int = 3) -> subprocess.Popen:
  program = textwrap.dedent(_PROGRAM).format(tests=str(pathlib.Path(__file__).parent))
  return subprocess.Popen(
    [sys.executable, '-c', program, str(path), speed, str(count)], stdout=subprocess.PIPE, text=True
  )


def wait_for_third_chunk(process: subprocess.Popen) -> None:
  assert process.stdout is not None
  for line in process.stdout:
    if line == 'chunk 2\n':
      return
  raise AssertionError('the stage ended early')


def test_a_killed_stage_goes_on_with_the_chunk_it_was_at(tmp_path):
  process = start(tmp_path, 'slow')
  wait_for_third_chunk(process)
  process.kill()
  process.wait()
  assert len(os.listdir(tmp_path / 'slow/chunks')) == 2

  output, _ = start(tmp_path, 'fast').communicate(timeout=60)
  assert 'slow: going on where it was cut off' in output
  assert output.split('\n')[1:-2] == ['chunk 2', 'chunk 3', 'chunk 4']
  assert files.read_jsonl(tmp_path / 'slow/rows.jsonl') == [{'id': i} for i in range(10)]
  assert sorted(os.listdir(tmp_path / 'slow')) == ['rows.jsonl', 'stage.json']
  assert json.loads((tmp_path / 'slow/stage.json').read_text())['resumed']


def test_a_killed_stage_with_other_settings_begins_anew(tmp_path):
  process = start(tmp_path, 'slow')
  wait_for_third_chunk(process)
  process.kill()
  process.wait()
  output, _ = start(tmp_path, 'fast', count=4).communicate(timeout=60)
  assert 'made anew, since config field first.count changed from 3 to 4' in output
  assert output.count('chunk') == 5


@pytest.mark.parametrize(('field', 'made_anew'), [('count', 0), ('steps', 2)])
def test_chunks_outlive_a_change_of_what_none_is_made_from(tmp_path, field, made_anew):
  made = []

  def make(items, index):
    made.append(index)
    return [{'id': item} for item in items]

  def run(session: Session) -> dict:
    files.write_jsonl(session.folder('first') / 'rows.jsonl', chunks(session, 'first', 'rows', range(4), 2, make))
    return {}

  stage = Stage('first', run, (), ('first',), ('rows.jsonl',), keeps=True, after=('count',))
  workdirs.execute([stage], make_session(tmp_path, **{'first.steps': 1}))
  assert made == [0, 1]
  workdirs.execute([stage], make_session(tmp_path, **{'first.steps': 1} | {f'first.{field}': 9}))
  assert len(made) == 2 + made_anew


def test_what_a_kill_leaves_of_a_first_file_is_no_work_of_others(tmp_path):
  (tmp_path / 'first').mkdir()
  (tmp_path / 'first' / '.unfinished.json.17.tmp').write_text('{"sta')
  workdirs.check(make_stages([])[:1], make_session(tmp_path))
  (tmp_path / 'first' / 'thesis.txt').write_text('mine')
  with pytest.raises(UserError, match='holds files that no run wrote'):
    workdirs.check(make_stages([])[:1], make_session(tmp_path))


@pytest.mark.parametrize(('sent', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_says_how_to_go_on(tmp_path, sent, code):
  process = start(tmp_path, 'slow')
  wait_for_third_chunk(process)
  process.send_signal(sent)
  output, _ = process.communicate(timeout=60)
  assert process.returncode == code
  assert output.strip() == 'slow: interrupted; give the same command again to go on from here'


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
  process = start(tmp_path, 'slow')
  wait_for_third_chunk(process)
  path = epath.Path(tmp_path)
  with pytest.raises(UserError, match=f'process {process.pid} is working in it'), workdirs.lock(path):
    pass
  process.kill()
  process.wait()
  time.sleep(0.05)
  with workdirs.lock(path):
    pass


def test_a_weight_concerns_those_that_learn_by_it_and_how_a_result_is_reached_concerns_nobody(tmp_path):
  def told(weight=1.0, **changes):
    config = defaults.get_config()
    config.model.path = 'random'
    config.update_from_flattened_dict(changes)
    character = Character('assistant', 'kind', (dataclasses.replace(TRAIT, weight=weight),))
    session = Session(config=config, character=character, workdir=epath.Path(tmp_path))
    return {stage.name: workdirs.relevant_config(stage, session) for stage in STAGES}

  def changed(*arguments, **changes):
    return {name for name, values in told(*arguments, **changes).items() if values != told()[name]}

  assert changed(2.0) == {'preference', 'policy', 'report'}
  assert changed(**{'model.remat': False, 'policy.save_every': 7, 'policy.microbatches': 4, 'profile': True}) == set()
  assert changed(**{'rankings.label_high': 0.9}) == {'rankings', 'policy'}
  assert changed(**{'model.compute_dtype': 'float32'}) == {stage.name for stage in STAGES}
