"""A run in a bucket: an emulator of Google Cloud Storage on loopback, and the clients by which a real bucket is used.

The emulator, fake-gcs-server, keeps to the conditions of writes. It does not to those of deletes.
"""

import json
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bucket_emulator import serve
from etils import epath
from google.api_core import exceptions as answers
from test_workdir import make_session, make_stages

from charjax import files, hosts, storage, watch
from charjax import workdir as workdirs
from charjax.chunks import chunks
from charjax.main import main
from charjax.mesh import make_mesh
from charjax.progress import Progress
from charjax.storage import Locked
from charjax.training import data, loop
from charjax.training.checkpoint import Checkpoints, read_trained
from charjax.training.step import make_batch
from charjax.workdir import Stage


@pytest.fixture(scope='module')
def bucket():
  with pytest.MonkeyPatch.context() as patch, serve() as environment:
    for name, value in environment.items():
      patch.setenv(name, value)
    yield 'gs://tests'
  storage._bucket.cache_clear()


@pytest.fixture
def place(bucket, request) -> epath.Path:
  return storage.place(f'{bucket}/{request.node.name}')


@pytest.fixture
def short_lease(monkeypatch):
  monkeypatch.setattr(storage, 'LEASE', 3.0)


# ---- text ----


def test_finished_stages_are_found_again_in_a_bucket(place, capsys):
  calls: list[str] = []
  stages = make_stages(calls)
  session = make_session(place)
  workdirs.execute(stages, session)
  workdirs.execute(stages, session)
  assert calls == ['first', 'second'] and capsys.readouterr().out.count('done already') == 2
  workdirs.execute(stages, make_session(place, **{'first.count': 4}))
  assert calls == ['first', 'second'] * 2
  assert (place / 'second/count.txt').read_text() == '4'
  for folder, product in (('first', 'rows.jsonl'), ('second', 'count.txt')):
    assert sorted(path.name for path in (place / folder).iterdir()) == [product, 'stage.json']


def test_what_another_process_wrote_is_not_written_over(place):
  files.write_text(place / 'stage.json', '{"a": "ü"}', new=True)
  files.write_text(place / 'stage.json', '{"a": "ü"}', new=True)  # tried again, since an answer was lost
  with pytest.raises(Locked, match=r'stage.json: another process wrote it; give the same command again'):
    files.write_text(place / 'stage.json', '{"a": "o"}', new=True)
  assert json.loads((place / 'stage.json').read_bytes()) == {'a': 'ü'}
  files.write_text(place / 'stage.json', '{}')
  assert (place / 'stage.json').read_text() == '{}'


# ---- training ----


def train(folder: epath.Path, until: int = 100) -> dict[str, jax.Array]:
  """Four steps, of which every second is saved; a kill is played by an error in step `until`."""

  def loss(trainable, frozen, batch):
    error = jnp.sum((trainable['w'] - batch['x']) ** 2)
    return error, {'error': error}

  def next_batch(step, numbers, trainable):
    if step == until:
      raise ZeroDivisionError
    return make_batch({}, {'x': np.float32(numbers)[:, None]}), {}

  with (
    jax.set_mesh(make_mesh((1, 1, 1), jax.devices()[:1])),
    Checkpoints(folder / 'checkpoints', 0) as checkpoints,
    Progress('steps', 4) as bar,
  ):
    return loop.train(
      folder,
      checkpoints,
      loss,
      optax.sgd(0.1, momentum=0.9),
      {'w': jnp.zeros(3)},
      {},
      data.batches(range(8), 2, 0),
      next_batch,
      steps=4,
      save_every=2,
      skipped_steps=3,
      bar=bar,
      note=lambda values: '',
    )


def test_training_in_a_bucket_goes_on_as_in_a_folder(place, tmp_path, monkeypatch):
  expected = train(epath.Path(tmp_path))
  with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
    patch.setattr(storage.Lines, 'flush', dying(storage.Lines.flush))
    train(place, until=4)
  assert [row['step'] for row in files.read_jsonl(place / 'metrics.jsonl')] == [1, 2]
  trained = train(place)
  np.testing.assert_array_equal(trained['w'], expected['w'])
  np.testing.assert_array_equal(read_trained(place / 'checkpoints')['w'], expected['w'])
  assert (place / 'metrics.jsonl').read_text() == (tmp_path / 'metrics.jsonl').read_text()


def dying(flush):
  """Nothing is written while an error passes, as after a kill."""
  return lambda lines: sys.exc_info()[0] or flush(lines)


# ---- the lock ----

_PROGRAM = 'import sys; sys.path.insert(0, sys.argv[1]); import test_storage; test_storage.make_rows(sys.argv[2], 60)'


def make_rows(name: str, seconds: float) -> None:
  """A run of one stage, of five chunks, the third of which takes so long."""

  def make(items, index):
    print(f'chunk {index}', flush=True)
    if index == 2:
      time.sleep(seconds)
    return [{'id': item} for item in items]

  def run(session):
    folder = session.folder('slow')
    files.write_jsonl(folder / 'rows.jsonl', chunks(session, 'slow', 'rows', range(10), 2, make))
    return {}

  session = make_session(storage.place(name))
  storage.LEASE = 3.0
  with workdirs.lock(session.workdir):
    workdirs.execute([Stage('slow', run, (), ('first',), ('rows.jsonl',), keeps=True)], session)


def test_who_was_killed_is_followed_once_the_lock_was_not_renewed(place, short_lease, capsys):
  tests = str(pathlib.Path(__file__).parent)
  first = subprocess.Popen([sys.executable, '-c', _PROGRAM, tests, str(place)], stdout=subprocess.PIPE, text=True)
  assert first.stdout is not None and any(line == 'chunk 2\n' for line in first.stdout)
  with pytest.raises(Locked, match=f'process {first.pid} on .* is working in it'):
    make_rows(str(place), 0)
  first.kill()
  first.wait()
  capsys.readouterr()
  (place / 'slow/chunks/of-an-earlier-character.jsonl').write_text('')
  begun = time.monotonic()
  make_rows(str(place), 0)
  assert time.monotonic() - begun > 3.0
  waited, *lines = capsys.readouterr().out.split('\n')
  assert f'process {first.pid} on ' in waited and 'waiting up to 3 s' in waited
  assert lines[0] == 'slow: going on where it was cut off' and lines[1:-2] == ['chunk 2', 'chunk 3', 'chunk 4']
  assert files.read_jsonl(place / 'slow/rows.jsonl') == [{'id': i} for i in range(10)]
  kept = [path.name for path in (place / 'slow/chunks').iterdir()]
  assert len(kept) == 5 and all(name.startswith('rows-') for name in kept)
  assert not (place / '.lock').exists()


@pytest.mark.parametrize('how', ['taken', 'no answer'])
def test_who_loses_the_lock_ends_all_processes(place, short_lease, monkeypatch, how):
  told: list[tuple[int, str]] = []
  monkeypatch.setattr(watch, 'end_now', lambda code, line: told.append((code, line)))

  def silent(*_):
    raise answers.ServiceUnavailable('asleep')

  with workdirs.lock(place):
    if how == 'taken':
      (place / '.lock').write_text('{"process": "7 on mars"}')
    else:
      monkeypatch.setattr(storage, '_claim', silent)
    deadline = time.monotonic() + 20
    while not told and time.monotonic() < deadline:
      time.sleep(0.05)
  reason = (
    'was not renewed in time, and another process took it' if how == 'taken' else 'cannot be renewed (503 asleep)'
  )
  again = 'give the same command again to go on from what was saved'
  assert told == [(hosts.LOST, f'{place}/.lock: this lock {reason}; {again}')]
  assert (place / '.lock').exists() == (how == 'taken')  # The other's stays.


# ---- mistakes ----


def line_of(capsys, *arguments: str, code: int = 2) -> str:
  assert main(arguments) == code
  error = capsys.readouterr().err
  assert error.count('\n') == 1
  return error


@pytest.mark.parametrize(
  ('command', 'wanted'),
  [
    ('run --workdir=gs://nowhere/run', 'gs://nowhere/run: there is no bucket nowhere; make it: gcloud storage buckets'),
    ('run --workdir=gs://tests', 'gs://tests: neither a folder nor gs://BUCKET/FOLDER'),
    ('run --workdir=s3://tests/run', 's3://tests/run: neither a folder nor gs://BUCKET/FOLDER'),
    ('run --workdir=gs://tests/run --config.profile=True', 'config.profile: traces are written to this machine'),
    (
      'run --workdir=gs://tests/run --config.model.path=gs://tests/x',
      'model.path=gs://tests/x: no run was begun there',
    ),
    ('chat gs://tests/none', 'gs://tests/none: no run was begun there'),
    ('compare gs://tests/a gs://tests/b', 'gs://tests/a: no run was begun there'),
    ('export random --output=gs://tests/out', '--output=gs://tests/out: charjax export writes to this machine'),
    ('review --workdir=gs://tests/run', '--workdir=gs://tests/run: charjax review needs a folder of this machine'),
  ],
)
def test_what_a_bucket_cannot_do_is_told_in_a_line(bucket, capsys, command, wanted):
  arguments = command.split()
  if arguments[0] == 'run':
    arguments.append('--config=configs/smoke.py')
  assert wanted in line_of(capsys, *arguments)


@pytest.mark.parametrize(
  ('error', 'code', 'wanted'),
  [
    (answers.Forbidden('no buckets.get'), 2, 'not allowed (403 no buckets.get); ask for roles/storage.objectUser and'),
    (answers.ServiceUnavailable('asleep'), 75, '503 asleep; give the same command again once the bucket answers'),
    (ConnectionError('refused'), 75, 'refused; give the same command again once the bucket answers'),
    (OSError('Project was not passed'), 2, 'no project of Google Cloud is known here; set GOOGLE_CLOUD_PROJECT'),
  ],
)
def test_what_google_may_answer_is_told_in_a_line(bucket, capsys, monkeypatch, error, code, wanted):
  """These are not to be had from the emulator."""

  def answer(name):
    raise error

  monkeypatch.setattr(storage, '_bucket', answer)
  line = line_of(capsys, 'run', '--config=configs/smoke.py', '--workdir=gs://tests/run', code=code)
  assert f'gs://tests/run: {wanted}' in line


def test_without_credentials_or_clients_a_line_says_what_to_do(bucket, capsys, monkeypatch, tmp_path):
  command = ('run', '--config=configs/smoke.py', '--workdir=gs://tests/run')
  with monkeypatch.context() as patch:
    patch.delenv('STORAGE_EMULATOR_HOST')
    patch.setenv('CLOUDSDK_CONFIG', str(tmp_path))
    patch.setenv('NO_GCE_CHECK', 'true')
    patch.delenv('GOOGLE_APPLICATION_CREDENTIALS', raising=False)
    patch.setattr(storage, '_bucket', storage._bucket.__wrapped__)
    line = line_of(capsys, *command)
  assert 'no credentials for Google Cloud Storage' in line and 'run: gcloud auth application-default login' in line
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  assert "needs the clients of Google Cloud Storage; run: pip install 'charjax[gcs]'" in line_of(capsys, *command)
