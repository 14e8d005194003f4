"""`hf://org/name`: fetched by the hub's own client, once, and no more than is read; what goes wrong is told in a line.

The client is the real one. The hub is a stand-in: a small server on this machine that answers the few requests that the
client makes, as the hub does.
"""

import contextlib
import hashlib
import io
import json
import os
import signal
import sys
import threading
import time
import types
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from test_checkpoints import CONFIG, random_tensors, write_hf
from test_main import mistake

from charjax import files
from charjax import main as command_line
from charjax import workdir as workdirs
from charjax.main import main
from charjax.model import checkpoint_source
from charjax.workdir import Stage

pytest.importorskip('huggingface_hub')
# Beside what is read, models often have these.
OTHERS = ('README.md', 'pytorch_model.bin', 'consolidated.safetensors', 'onnx/model.onnx', 'model-q4.gguf')


class Hub(ThreadingHTTPServer):
  """Models by name, each with branches and tags that name the hash of a commit, and the folder of each commit.

  Attributes:
    files: the paths of the files that were fetched.
    refuses: a model's name to status and X-Error-Code, for its files alone or ('*') for all.
    ends: of a file that is cut off, after how many bytes; from then on there is none.
    slow: set once a file of a gigabyte, which comes in pieces, was asked for.
    pieces: how many of those 1024 were sent.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.models, self.files, self.refuses, self.ends = {}, [], {}, {}
    self.slow, self.pieces = threading.Event(), 0

  def add(self, name: str, folder: Path, revision: str = 'main') -> str:
    commit = hashlib.sha1(f'{name} {folder}'.encode()).hexdigest()
    self.models.setdefault(name, {})[revision] = commit
    self.models[name][commit] = folder
    return commit


class _Handler(BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def log_message(self, *arguments):
    pass

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    match urllib.parse.unquote(urllib.parse.urlparse(self.path).path).split('/')[1:]:
      case ['api', 'models', owner, name, *rest] if rest[:1] in ([], ['revision'], ['tree']):
        self.about(f'{owner}/{name}', rest)
      case [owner, name, 'resolve', commit, *path]:
        self.file(f'{owner}/{name}', commit, '/'.join(path))
      case _:
        self.answer(404)

  def about(self, name: str, rest: list[str]) -> None:
    revisions = self.server.models.get(name)
    if (name, '*') in self.server.refuses:
      self.answer(*self.server.refuses[name, '*'])
    elif revisions is None:
      self.answer(404, 'RepoNotFound')
    elif (revision := '/'.join(rest[1:]) or 'main') not in revisions:
      self.answer(404, 'RevisionNotFound')
    elif rest[:1] == ['tree']:
      folder = revisions[revision]
      files = [path for path in sorted(folder.rglob('*')) if path.is_file()]
      listed = [{'type': 'file', 'path': str(p.relative_to(folder)), 'size': p.stat().st_size} for p in files]
      self.answer(content=json.dumps([{**file, 'oid': file['path']} for file in listed]).encode())
    else:
      self.answer(content=json.dumps({'id': name, 'sha': revisions[revision], 'siblings': []}).encode())

  def file(self, name: str, commit: str, path: str) -> None:
    if name in self.server.refuses:
      self.answer(*self.server.refuses[name])
      return
    file = self.server.models[name][commit] / path
    tag = hashlib.sha1(str(file).encode()).hexdigest()
    headers = {'X-Repo-Commit': commit, 'ETag': f'"{tag}"'}
    if self.command == 'GET':
      self.server.files.append(path)
    if name == 'org/slow' and path == 'model.safetensors':
      self.trickle(headers)
    elif path in self.server.ends and self.command == 'GET':
      self.cut(file.read_bytes(), path, headers)
    else:
      self.answer(content=file.read_bytes(), **headers)

  def cut(self, content: bytes, path: str, headers: dict[str, str]) -> None:
    if end := self.server.ends[path]:
      self.server.ends[path] = 0
      self.answer(content=content[:end], length=len(content), **headers)
      self.close_connection = True
    else:
      self.answer(500)

  def trickle(self, headers: dict[str, str]) -> None:
    self.answer(length=2**30, **headers)
    if self.command == 'GET':
      self.server.slow.set()
      with contextlib.suppress(OSError):
        while self.server.pieces < 1024:
          self.wfile.write(bytes(2**20))
          self.server.pieces += 1
          time.sleep(0.01)

  def answer(self, status: int = 200, code: str = '', content: bytes = b'', length: int | None = None, **headers):
    self.send_response(status)
    for key, value in {'X-Error-Code': code, **headers}.items():
      if value:
        self.send_header(key, value)
    self.send_header('Content-Length', str(len(content) if length is None else length))
    self.end_headers()
    if self.command == 'GET':
      self.wfile.write(content)


class Served(NamedTuple):
  hub: Hub
  folder: Path
  commit: str


@pytest.fixture(scope='module')
def hub():
  server = Hub()
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  yield server
  server.shutdown()


@pytest.fixture(scope='module')
def client(hub, tmp_path_factory):
  """The client, as one that is imported with this environment; others may have imported it with theirs."""

  def imported() -> dict[str, object]:
    return {name: sys.modules[name] for name in list(sys.modules) if name.split('.')[0] == 'huggingface_hub'}

  before = imported()
  for name in before:
    del sys.modules[name]
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{hub.server_port}')
    patch.setenv('HF_HOME', str(tmp_path_factory.mktemp('home')))
    patch.setenv('NO_PROXY', '127.0.0.1')
    for name in ('HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE', 'HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_TOKEN'):
      patch.delenv(name, raising=False)
    import huggingface_hub
    from huggingface_hub import constants, hf_api  # noqa: F401  (so that they are its attributes)

    yield huggingface_hub
  for name in imported():
    del sys.modules[name]
  sys.modules.update(before)


@pytest.fixture
def tiny(hub, client, tmp_path, monkeypatch) -> Served:
  """A model on the hub, org/tiny, and an empty cache."""
  monkeypatch.setattr(client.constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
  hub.files.clear()
  hub.refuses.clear()
  hub.ends.clear()
  hub.models.clear()
  folder = tmp_path / 'tiny'
  write_hf(folder, random_tensors(CONFIG), shards=3)
  for name in OTHERS:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b'much')
  return Served(hub, folder, hub.add('org/tiny', folder))


def offline(client, monkeypatch) -> None:
  monkeypatch.setattr(client.constants, 'HF_HUB_OFFLINE', True)


def load(address: str) -> dict[str, np.ndarray]:
  return dict(checkpoint_source.load(address).tensors)


def refusal(capsys, address: str, code: int = 2) -> str:
  """The line that a conversation with such a model ends in; the client may have said more before."""
  assert main(['chat', address]) == code
  line = capsys.readouterr().err.split('\n')[-2]
  assert line.startswith(f'charjax: {address}'), line
  return line


# ---- what is fetched ----


def test_a_model_is_fetched_whole_and_once_and_nothing_else_of_its_files(tiny):
  found, wanted = load('hf://org/tiny'), load(str(tiny.folder))
  for name, value in wanted.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  fetched = sorted(tiny.hub.files)
  assert fetched == sorted(path.name for path in tiny.folder.iterdir() if path.name not in (*OTHERS, 'onnx'))
  load(f'hf://org/tiny@{tiny.commit}')
  assert sorted(tiny.hub.files) == fetched


def test_a_model_in_one_file_is_fetched(tiny, tmp_path):
  tiny.hub.add('org/one', Path(write_hf(tmp_path / 'one', random_tensors(CONFIG))))
  np.testing.assert_array_equal(load('hf://org/one')['embed'], load(str(tiny.folder))['embed'])


def test_a_branch_and_a_tag_are_what_they_name(tiny, tmp_path):
  tensors = random_tensors(CONFIG)
  write_hf(tmp_path / 'old', {**tensors, 'embed': tensors['embed'] + 1})
  tiny.hub.add('org/tiny', tmp_path / 'old', 'v1.0/a')
  np.testing.assert_array_equal(load('hf://org/tiny@v1.0/a')['embed'], tensors['embed'] + 1)
  np.testing.assert_array_equal(load('hf://org/tiny@main')['embed'], tensors['embed'])


def test_what_is_not_supported_is_refused_before_its_weights_are_fetched(tiny, capsys):
  config = json.loads((tiny.folder / 'config.json').read_text())
  (tiny.folder / 'config.json').write_text(json.dumps({**config, 'model_type': 'mamba'}))
  assert main(['chat', 'hf://org/tiny']) == 2
  assert "model_type 'mamba' is not supported" in capsys.readouterr().err
  assert tiny.hub.files and not any(path.endswith('.safetensors') for path in tiny.hub.files)


def test_a_conversation_begins_with_a_model_of_the_hub(tiny, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'stdin', io.StringIO(''))
  assert main(['chat', 'hf://org/tiny']) == 0
  assert 'reading hf://org/tiny' in capsys.readouterr().err


# ---- a run keeps to the commit that it was begun with ----


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
  """Runs one stage that needs no model, and gives what it printed and the path that was recorded."""

  def work(session):
    files.write_text(session.folder('messages') / 'path.txt', session.config.model.path)
    return {}

  stages = (Stage('messages', work, (), ('model.path',), ('path.txt',)),)
  monkeypatch.setattr(command_line, 'STAGES', stages)
  monkeypatch.setattr(workdirs.Session, 'checkpoint', types.SimpleNamespace(config=CONFIG))
  (tmp_path / 'config.py').write_text('from charjax import defaults\nget_config = defaults.get_config\n')

  def start(path: str, folder: str = 'run') -> tuple[str, str]:
    workdir = tmp_path / folder
    assert (
      main(['run', f'--config={tmp_path / "config.py"}', f'--workdir={workdir}', f'--config.model.path={path}']) == 0
    )
    return capsys.readouterr().out, json.loads((workdir / 'config.json').read_text())['config']['model']['path']

  return start


def test_a_run_keeps_to_the_commit_that_it_was_begun_with(tiny, run, tmp_path, client, monkeypatch):
  first = f'hf://org/tiny@{tiny.commit}'
  out, path = run('hf://org/tiny')
  assert path == first == (tmp_path / 'run/messages/path.txt').read_text() and f'model: {first}' in out
  later = tiny.hub.add('org/tiny', tiny.folder / 'onnx')
  out, path = run('hf://org/tiny')
  assert path == first and 'messages: done already' in out
  assert run('hf://org/tiny', 'other')[1] == f'hf://org/tiny@{later}'
  # A revision that is named counts. One that was met before is known where nobody can be asked.
  offline(client, monkeypatch)
  out, path = run('hf://org/tiny@main')
  assert path == f'hf://org/tiny@{later}' and f"model.path changed from '{first}' to '{path}'" in out


def test_a_run_is_refused_before_anything_is_fetched(tiny, tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  (tmp_path / 'config.py').write_text('from charjax import defaults\nget_config = defaults.get_config\n')
  arguments = ('run', f'--config={tmp_path / "config.py"}', f'--workdir={tmp_path / "run"}')
  line = mistake(capsys, *arguments, '--config.model.path=hf://org/tiny')
  assert line.startswith("charjax: hf://org/tiny: needs the client of the Hugging Face Hub; run: pip install 'hugg")
  assert 'not the address of a model; give hf://ORG/NAME' in mistake(
    capsys, *arguments, '--config.model.path=hf://tiny'
  )
  assert not (tmp_path / 'run').exists() and not tiny.hub.files


# ---- what goes wrong ----


@pytest.mark.parametrize(
  'address', ['hf://', 'hf://tiny', 'hf://org/tiny@', 'hf://a/b/c', 'hf://org/../x', 'hf://org/a--b', 'hf://o/n@a b']
)
def test_what_is_no_address_is_told(address, capsys):
  assert f'{address}: not the address of a model; give hf://ORG/NAME' in mistake(capsys, 'chat', address)


@pytest.mark.parametrize('command', ['chat', 'run'])
def test_a_name_that_is_no_path_may_be_one_of_the_hub(tmp_path, capsys, command):
  (tmp_path / 'config.py').write_text('from charjax import defaults\nget_config = defaults.get_config\n')
  arguments = [f'--config={tmp_path / "config.py"}', f'--workdir={tmp_path / "run"}', '--config.model.path=org/tiny']
  line = mistake(capsys, command, *(arguments if command == 'run' else ['org/tiny']))
  assert 'if it is a model of the Hugging Face Hub, give hf://org/tiny' in line
  assert 'Hub,' not in mistake(capsys, 'chat', './org/tiny')


def test_a_client_that_is_not_installed_is_told(capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  assert 'needs the client of the Hugging Face Hub; run: pip install' in mistake(capsys, 'chat', 'hf://org/tiny')


def test_a_client_that_is_too_old_is_told(client, capsys, monkeypatch):
  monkeypatch.delattr(client.hf_api, 'resolve_revision')
  assert 'needs the client of the Hugging Face Hub; run: pip install' in refusal(capsys, 'hf://org/tiny')


def test_a_model_that_is_not_there_is_told(tiny, capsys):
  assert 'no such model, or a private one; check the name at http' in refusal(capsys, 'hf://org/none')
  assert 'it has no revision v9; choose from those at http' in refusal(capsys, 'hf://org/tiny@v9')


@pytest.mark.parametrize(
  ('name', 'answer', 'expected'),
  [
    (('org/tiny', '*'), (401,), 'no such model, or a private one; check the name at http'),
    ('org/tiny', (401,), 'no such model, or a private one; check the name at http'),
    ('org/tiny', (403, 'GatedRepo'), 'its owners ask who uses it; accept at http'),
  ],
)
def test_a_model_that_not_everyone_may_see_is_told(tiny, capsys, name, answer, expected):
  tiny.hub.refuses[name] = answer
  line = refusal(capsys, 'hf://org/tiny')
  assert expected in line and 'hf auth login' in line


def test_a_file_that_breaks_off_is_told_and_fetched_again(tiny, capsys):
  shard = next(path.name for path in tiny.folder.iterdir() if path.suffix == '.safetensors')
  tiny.hub.ends[shard] = 100
  assert 'cannot be fetched (' in (line := refusal(capsys, 'hf://org/tiny', 75)) and 'the same command again' in line
  tiny.hub.ends.clear()
  tiny.hub.files.clear()
  load('hf://org/tiny')
  assert tiny.hub.files.count(shard) == 1 and 'config.json' not in tiny.hub.files


def test_without_a_connection_the_cache_serves_what_it_has_whole(tiny, client, capsys, monkeypatch):
  with monkeypatch.context() as patch:
    offline(client, patch)
    assert 'the hub cannot be reached (HF_HUB_OFFLINE is set); connect' in refusal(capsys, 'hf://org/tiny')
  wanted = load('hf://org/tiny')
  offline(client, monkeypatch)
  tiny.hub.files.clear()
  np.testing.assert_array_equal(load('hf://org/tiny')['embed'], wanted['embed'])
  snapshot = next(Path(client.constants.HF_HUB_CACHE).glob('*/snapshots/*'))
  next(snapshot.glob('*.safetensors')).unlink()
  assert 'not whole in the cache' in refusal(capsys, f'hf://org/tiny@{tiny.commit}')
  assert not tiny.hub.files


def test_a_hub_that_does_not_answer_is_told(tiny, client, capsys, monkeypatch):
  monkeypatch.setattr(client.hf_api.api, 'endpoint', 'http://127.0.0.1:1')
  assert 'the hub cannot be reached (' in refusal(capsys, 'hf://org/tiny', 75)


def test_ctrl_c_ends_a_download_without_waiting_for_its_files(tiny, client, tmp_path, capsys):
  folder = Path(write_hf(tmp_path / 'slow', random_tensors(CONFIG)))
  tiny.hub.add('org/slow', folder)
  tiny.hub.slow.clear()

  def interrupt() -> None:
    tiny.hub.slow.wait(60)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGINT)

  threading.Thread(target=interrupt).start()
  assert main(['chat', 'hf://org/slow']) == 130
  err = capsys.readouterr().err
  assert err.split('\n')[-2].startswith('charjax: hf://org/slow@') and 'give the same command again' in err
  assert tiny.hub.pieces < 1024
  # What had come of the file was let go.
  assert not list(Path(client.constants.HF_HUB_CACHE).rglob('*.incomplete'))
