"""Judging by people: who is asked what, that no verdict is lost, and that no one else gets to the page."""

import collections
import concurrent.futures
import dataclasses
import errno
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath
from review_run import asked_of, lines, serving, write_replies
from smoke import ROOT

from charjax.errors import UserError
from charjax.main import main
from charjax.report.read import read_run
from charjax.review import server, verdicts
from charjax.review.pairs import pairs


@pytest.fixture
def folder(tmp_path) -> Path:
  return write_replies(tmp_path / 'run')


# ---- pairs ----


def test_every_message_once_before_any_twice_and_never_the_same_reply_twice(folder):
  asked = asked_of(folder)
  assert len(asked) == 32 == len({pair.id for pair in asked})
  first, second = asked[:16], asked[16:]
  assert len({pair.message for pair in first}) == len({pair.message for pair in second}) == 16
  assert len({pair.trained.text for pair in asked}) == 32
  # Wherever a reviewer stops, traits and opponents are about equally many.
  for stretch in range(0, 32, 4):
    assert len({pair.trait for pair in asked[stretch : stretch + 4]}) == 4
  assert collections.Counter(pair.against for pair in first) == {'base': 8, 'prompted': 8}
  for pair in asked:
    assert pair.trained.text.startswith('trained') and pair.other.text.startswith(f'{pair.against} says 0')


def test_with_one_reply_of_the_trained_model_a_message_comes_once(folder):
  run = read_run(folder)
  rows = [row for row in run.evaluation_replies if not row['sample']]
  asked = pairs(dataclasses.replace(run, evaluation_replies=rows))
  assert len(asked) == 16 == len({pair.message for pair in asked}) and {p.against for p in asked} == {
    'base',
    'prompted',
  }
  rows = [row for row in rows if not row['condition'].startswith('prompted')]
  assert {p.against for p in pairs(dataclasses.replace(run, evaluation_replies=rows))} == {'base'}


def test_sides_are_drawn_for_each_reviewer_and_tell_nothing(tmp_path):
  asked = asked_of(write_replies(tmp_path / 'run', messages=60))
  left = {name: [pair.sides(name)[0] == 'trained' for pair in asked] for name in ('ann', 'bob')}
  for name, sides in left.items():
    assert 0.42 < sum(sides) / len(sides) < 0.58  # of 480; standard error 0.023
    assert sides == [pair.sides(name)[0] == 'trained' for pair in asked]
  assert 0.42 < sum(a == b for a, b in zip(*left.values(), strict=True)) / len(asked) < 0.58
  # The pair's name is the same whichever of the two is the trained model's.
  run = read_run(tmp_path / 'run')
  swapped = {'trained': 'base', 'base': 'trained'}
  rows = [row | {'condition': swapped.get(row['condition'], row['condition'])} for row in run.evaluation_replies]
  rows = [row for row in rows if row['condition'] in swapped and not row['sample']]
  before = [row for row in run.evaluation_replies if row['condition'] in swapped and not row['sample']]
  names = [{p.id for p in pairs(dataclasses.replace(run, evaluation_replies=some))} for some in (before, rows)]
  assert names[0] == names[1] and len(names[0]) == 240


def test_what_the_page_receives_does_not_say_whose_a_reply_is(tmp_path):
  def texts(ours: str, theirs: str):
    found = {(f'{t}-{i}', c, s): f'{s}{i}' for t in ('honesty',) for i in range(4) for c in ('base',) for s in range(2)}
    return found | {('honesty-1', 'trained', 0): ours, ('honesty-1', 'base', 0): theirs}

  seen = []
  for name, (ours, theirs) in {'one': ('x', 'y'), 'two': ('y', 'x')}.items():
    folder = write_replies(tmp_path / name, texts(ours, theirs))
    pair = next(pair for pair in asked_of(folder) if {pair.trained.text, pair.other.text} == {'x', 'y'})
    with verdicts.opened(folder, 'ann') as file:
      shown = server.Review([pair], file, 'ann', 'run').state()['pair']
    assert {shown['left']['text'], shown['right']['text']} == {'x', 'y'}
    assert set(shown) == {'id', 'trait', 'statement', 'prompt', 'left', 'right', 'note'}
    assert set(shown['left']) == {'text', 'cut_off'}
    seen.append((pair.id, {key: value for key, value in shown.items() if key not in ('left', 'right')}))
  assert seen[0] == seen[1]


# ---- verdicts ----


def give(folder: Path, count: int, reviewer: str = 'ann') -> list[str]:
  """Judges the first pairs; returns their names."""
  asked = asked_of(folder)[:count]
  with verdicts.opened(folder, reviewer) as file:
    for pair in asked:
      file.give(reviewer, pair, 'left', 'a note \ud800 \u2028 of mine')
  return [pair.id for pair in asked]


def test_a_line_that_was_cut_short_is_dropped_wherever_it_was_cut(folder):
  given = give(folder, 3)
  path = verdicts.path_of(folder, 'ann')
  data = path.read_bytes()
  start = data[:-1].rfind(b'\n') + 1
  for end in [*range(start, len(data), 7), len(data) - 1]:
    path.write_bytes(data[:end])
    assert [row['pair'] for row in verdicts.read_all(folder)] == given[:2]  # what the report reads meanwhile
    with verdicts.opened(folder, 'ann') as file:
      assert list(file.standing) == given[:2] and file.dropped == (end > start)
      file.give('ann', asked_of(folder)[2], 'tie')
    assert [row['verdict'] for row in lines(folder)] == ['left', 'left', 'tie']


def test_what_was_taken_back_does_not_stand_and_what_is_given_again_is_last(folder):
  give(folder, 3)
  first, second, third = asked_of(folder)[:3]
  with verdicts.opened(folder, 'ann') as file:
    file.give('ann', first, None)
    file.give('ann', third, None)
    file.give('ann', first, 'right')
  assert len(lines(folder)) == 6  # Nothing is ever rewritten.
  with verdicts.opened(folder, 'ann') as file:
    assert list(file.standing) == [second.id, first.id] and file.standing[first.id]['verdict'] == 'right'


@pytest.mark.parametrize(
  ('line', 'expected'),
  [
    ('{"pair": "x"', 'ann.jsonl:2: not JSON'),
    ('[]', 'ann.jsonl:2: list found'),
    ('{"pair": "x"}', 'ann.jsonl:2: field reviewer is missing'),
    ('{"verdict": "up"}', "ann.jsonl:2: field verdict is 'up'; it must be one of left, right, tie, skip, null"),
    ('{"left": "prompted_examples"}', "field left is 'prompted_examples'; it must be one of trained, base, prompted"),
    ('{"note": 3}', 'field note is 3; it must be text'),
  ],
)
def test_a_damaged_file_is_one_line(folder, capsys, line, expected):
  give(folder, 1)
  path = verdicts.path_of(folder, 'ann')
  whole = lines(folder)[0] | json.loads(line) if line.startswith('{"') and line.endswith('}') else None
  bare = line if whole is None or 'pair' in line else json.dumps(whole)
  path.write_text(path.read_text() + bare + '\n')
  for reader in (verdicts.read_all, lambda folder: main(['review', f'--workdir={folder}', '--reviewer=ann'])):
    try:
      assert reader(folder) == 2
      told = capsys.readouterr().err
    except UserError as error:
      told = str(error)
    assert expected in told and '\n' not in told.strip()
  assert path.read_text().endswith(bare + '\n')


@pytest.mark.parametrize('call', ['write', 'fsync'])
def test_a_full_disk_loses_no_verdict_and_leaves_no_half_one(folder, monkeypatch, call):
  give(folder, 1)
  write, path = os.write, verdicts.path_of(folder, 'ann')
  before = path.read_bytes()

  def full(file, data=b''):
    if len(data) < 60:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(file, data[: len(data) // 2])  # Then the disk is full.

  with serving(folder) as serves:
    pair = serves.review.state()['pair']['id']
    monkeypatch.setattr(os, call, full)
    status, answer = post(serves, 'verdict', {'pair': pair, 'verdict': 'left'})
    assert (status, answer) == (507, {'error': 'the verdict cannot be written: No space left on device'})
    assert path.read_bytes() == before and serves.review.state()['pair']['id'] == pair
    monkeypatch.undo()
    assert post(serves, 'verdict', {'pair': pair, 'verdict': 'left'})[0] == 200
  assert path.read_bytes().startswith(before) and len(lines(folder)) == 2


def test_a_long_line_is_written_whole_though_the_disk_takes_it_in_pieces(folder, monkeypatch):
  write = os.write
  monkeypatch.setattr(os, 'write', lambda file, data: write(file, data[:50]))
  give(folder, 2)
  assert len(lines(folder)) == 2


# ---- the server ----


def request(serves, method: str, path: str, body: bytes = b'', **headers: str | None):
  """Status, headers and body of a request; a header that is None is left out."""
  connection = http.client.HTTPConnection('127.0.0.1', serves.server_port, timeout=60)
  connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
  usual = {'Host': f'127.0.0.1:{serves.server_port}', 'Content-Type': 'application/json'}
  usual |= {'Content-Length': str(len(body))} if method == 'POST' else {}
  for name, value in (usual | {key.replace('_', '-'): value for key, value in headers.items()}).items():
    if value is not None:
      connection.putheader(name, value)
  connection.endheaders(body or None)
  response = connection.getresponse()
  found = response.status, dict(response.getheaders()), response.read()
  connection.close()
  return found


def post(serves, name: str, body) -> tuple[int, dict]:
  status, _, answer = request(serves, 'POST', f'/{serves.token}/{name}', json.dumps(body).encode())
  return status, json.loads(answer)


def test_it_listens_to_this_machine_alone_and_locks_the_page_down(folder):
  with serving(folder) as serves:
    assert serves.server_address[0] == '127.0.0.1' and len(serves.token) >= 22
    for name, kind in {'': 'html', 'page.css': 'css', 'page.js': 'javascript', 'state': 'json'}.items():
      status, headers, body = request(serves, 'GET', f'/{serves.token}/{name}')
      assert status == 200 and body and kind in headers['Content-Type']
      policy = headers['Content-Security-Policy']
      assert "default-src 'none'" in policy and 'unsafe' not in policy and "frame-ancestors 'none'" in policy
      assert headers['Cache-Control'] == 'no-store' and headers['Referrer-Policy'] == 'no-referrer'
      assert not {'Access-Control-Allow-Origin', 'Set-Cookie'} & set(headers) and 'Python' not in headers['Server']
      assert b'http' not in body or kind == 'json'
    assert request(serves, 'GET', f'/{serves.token}/', Host=f'localhost:{serves.server_port}')[0] == 200
    assert request(serves, 'GET', f'/{serves.token}/', Origin=f'http://127.0.0.1:{serves.server_port}')[0] == 200


# Body, status, path below the secret, headers.
REFUSED = {
  'no secret': (b'{}', 404, '/verdict', {}),
  'another secret': (b'{}', 404, '/' + 'A' * 22 + '/verdict', {}),
  'half the secret': (b'{}', 404, '/{half}/verdict', {}),
  'another name': (b'{}', 403, '/{token}/verdict', {'Host': 'evil.example'}),
  'another name, our port': (b'{}', 403, '/{token}/verdict', {'Host': 'evil.example:{port}'}),
  'no name': (b'{}', 403, '/{token}/verdict', {'Host': None}),
  'another page': (b'{}', 403, '/{token}/verdict', {'Origin': 'http://evil.example'}),
  'a page without a name': (b'{}', 403, '/{token}/undo', {'Origin': 'null'}),
  'a form': (b'{}', 415, '/{token}/verdict', {'Content_Type': 'text/plain'}),
  'no length': (b'', 411, '/{token}/verdict', {'Content_Length': None}),
  'a length below zero': (b'', 411, '/{token}/verdict', {'Content_Length': '-1'}),
  'too large': (b'', 413, '/{token}/verdict', {'Content_Length': '65537'}),
  'far too large': (b'', 413, '/{token}/verdict', {'Content_Length': '9' * 5000}),
  'no JSON': (b'{', 400, '/{token}/verdict', {}),
  'not UTF-8': (b'"\xff"', 400, '/{token}/verdict', {}),
  'no object': (b'[]', 400, '/{token}/verdict', {}),
  'deep': (b'[' * 60000, 400, '/{token}/verdict', {}),
  'an unknown pair': (b'{"pair": "0123456789abcdef", "verdict": "left"}', 404, '/{token}/verdict', {}),
  'no pair': (b'{"verdict": "left"}', 404, '/{token}/verdict', {}),
  'a pair that is no text': (b'{"pair": [1], "verdict": "left"}', 404, '/{token}/verdict', {}),
  'no verdict': (b'{"pair": "{pair}"}', 400, '/{token}/verdict', {}),
  'an unknown verdict': (b'{"pair": "{pair}", "verdict": "trained"}', 400, '/{token}/verdict', {}),
  'a verdict that is no text': (b'{"pair": "{pair}", "verdict": {}}', 400, '/{token}/verdict', {}),
  'a note that is no text': (b'{"pair": "{pair}", "verdict": "left", "note": 1}', 400, '/{token}/verdict', {}),
  'a long note': (b'{"pair": "{pair}", "verdict": "left", "note": "%s"}' % (b'x' * 2001), 400, '/{token}/verdict', {}),
  'nothing to undo': (b'{}', 409, '/{token}/undo', {}),
  'what is only read': (b'{}', 404, '/{token}/state', {}),
  'a folder above': (b'{}', 404, '/{token}/../verdicts.py', {}),
}


def test_what_it_refuses_leaves_no_trace(folder, capfd):
  with serving(folder) as serves:
    names = {'token': serves.token, 'half': serves.token[:11], 'port': str(serves.server_port)}
    pair = serves.review.state()['pair']['id']
    for what, (body, expected, path, headers) in REFUSED.items():
      given = {key: value and value.format(**names) for key, value in headers.items()}
      found = request(serves, 'POST', path.format(**names), body.replace(b'{pair}', pair.encode()), **given)
      assert found[0] == expected, what
      assert set(json.loads(found[2])) == {'error'} and 'Content-Security-Policy' in found[1], what
      assert serves.token.encode() not in found[2], what
    for path in (
      '/',
      f'/{serves.token}',
      f'/{serves.token}/page.html',
      f'/{serves.token}/..%2fpairs.py',
      '/favicon.ico',
    ):
      assert request(serves, 'GET', path)[0] == 404, path
    assert request(serves, 'GET', f'/{serves.token}/state', Host='evil.example')[0] == 403
    for method in ('PUT', 'DELETE', 'OPTIONS', 'HEAD', 'PATCH', 'x<script>'):
      assert request(serves, method, f'/{serves.token}/verdict')[0] == 405, method
    with socket.create_connection(serves.server_address) as raw:
      raw.sendall(b'\x16\x03\x01 nonsense\r\n\r\n')
      assert b'error' in raw.recv(1000)
    assert serves.review.state()['done'] == 0
  assert verdicts.path_of(folder, 'ann').read_bytes() == b''
  assert capfd.readouterr() == ('', '')


def test_judge_undo_and_judge_again(folder):
  with serving(folder) as serves:
    before = serves.review.state()
    assert (before['done'], before['total'], before['can_undo']) == (0, 32, False)
    pair = before['pair']['id']
    status, after = post(serves, 'verdict', {'pair': pair, 'verdict': 'right', 'note': ' why \ud83d\ude00 \ud800 '})
    assert status == 200 and after['done'] == 1 and after['pair']['id'] != pair
    assert post(serves, 'verdict', {'pair': pair, 'verdict': 'left'})[0] == 409
    status, back = post(serves, 'undo', {})
    assert status == 200 and back['pair'] == before['pair'] | {'note': 'why \U0001f600 \ud800'}
    assert (back['done'], back['can_undo']) == (0, False)
    assert post(serves, 'verdict', {'pair': pair, 'verdict': 'skip'})[0] == 200
  rows = lines(folder)
  assert [(row['pair'] == pair, row['verdict'], row['note']) for row in rows] == [
    (True, 'right', 'why \U0001f600 \ud800'), (True, None, ''), (True, 'skip', ''),
  ]  # fmt: skip
  assert {rows[0]['left'], rows[0]['right']} in ({'trained', 'base'}, {'trained', 'prompted'})
  with serving(folder) as serves:  # started again
    assert serves.review.state()['done'] == 1 and serves.review.state()['pair']['id'] == after['pair']['id']


def test_of_many_answers_to_one_pair_one_is_kept(folder):
  with serving(folder) as serves, concurrent.futures.ThreadPoolExecutor(8) as pool:
    names = [pair.id for pair in asked_of(folder)[:6]]
    sent = [pool.submit(post, serves, 'verdict', {'pair': name, 'verdict': 'tie'}) for name in names for _ in range(5)]
    assert collections.Counter(answer.result()[0] for answer in sent) == {200: 6, 409: 24}
  assert sorted(row['pair'] for row in lines(folder)) == sorted(names)


def test_two_reviewers_at_once_and_none_of_them_twice(folder):
  with serving(folder, 'ann') as ann, serving(folder, 'bob') as bob:
    assert ann.review.state()['pair']['id'] == bob.review.state()['pair']['id']  # All are asked the same.
    for serves in (ann, bob, ann):
      assert post(serves, 'verdict', {'pair': serves.review.state()['pair']['id'], 'verdict': 'left'})[0] == 200
    assert request(ann, 'GET', f'/{bob.token}/state')[0] == 404
    with pytest.raises(UserError, match='ann is judging in another process'), verdicts.opened(folder, 'ann'):
      pass
  assert [row['reviewer'] for row in verdicts.read_all(folder)] == ['ann', 'ann', 'bob']


# ---- the command ----


PROGRAM = """
import signal, sys
from charjax.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without one
sys.exit(main(sys.argv[1:]))
"""


def start(folder: Path) -> tuple[subprocess.Popen, list[str], str]:
  command = [sys.executable, '-c', PROGRAM, 'review', f'--workdir={folder}', '--reviewer=ann']
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
  said: list[str] = []
  assert process.stdout
  for line in process.stdout:
    said.append(line.strip())
    if line.startswith('http://'):
      return process, said, line.strip()
  raise AssertionError(process.communicate())


def test_the_command_is_killed_goes_on_and_ends_with_a_word(folder):
  def judge(address: str) -> None:
    host, token = address.removeprefix('http://').strip('/').split('/')
    connection = http.client.HTTPConnection(host, timeout=60)
    connection.request('GET', f'/{token}/state')
    pair = json.load(connection.getresponse())['pair']['id']
    body = json.dumps({'pair': pair, 'verdict': 'left'})
    connection.request('POST', f'/{token}/verdict', body, {'Content-Type': 'application/json'})
    assert connection.getresponse().status == 200

  process, said, address = start(folder)
  assert said[0] == 'ann has judged 0 of 32 pairs. Ctrl-C ends; the same command goes on.'
  judge(address)
  process.kill()
  process.communicate()
  path = verdicts.path_of(folder, 'ann')
  with path.open('a') as file:
    file.write('{"pair": "half')
  process, said, another = start(folder)
  assert said[:2] == [
    f'{path}: its last line was cut short, and is dropped',
    'ann has judged 1 of 32 pairs. Ctrl-C ends; the same command goes on.',
  ]
  assert another != address
  judge(another)
  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=60)
  assert (process.returncode, out.strip(), err) == (0, f'2 verdicts of ann stand in {path}', '')
  assert len(lines(folder)) == 2


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    ([], 'charjax review needs --workdir=DIR'),
    (['--workdir={run}/none'], 'none: no such run folder'),
    (['--workdir=gs://bucket/run'], 'needs a folder of this machine'),
    (['{run}'], 'unexpected argument'),
    (['--workdir={run}', '--config=configs/smoke.py'], 'charjax review takes no config (configs/smoke.py)'),
    (['--workdir={run}', '--config.seed=1'], 'charjax review takes no config (--config.seed=1)'),
    (['--workdir={run}', '--port=65536'], 'port'),
    (['--workdir={run}', '--port={taken}', '--reviewer=ann'], '--port={taken}: Address already in use; give another'),
    (['--workdir={run}', '--reviewer=../ann'], "--reviewer='../ann': give at most 40 letters"),
    (['--workdir={run}', '--reviewer=' + 'x' * 41], 'give at most 40 letters'),
    (['--workdir={run}', '--seed=1'], '--seed is a flag of charjax chat'),
  ],
)
def test_a_mistake_ends_in_one_line(folder, capsys, arguments, expected):
  with socket.create_server(('127.0.0.1', 0)) as taken:
    names = {'run': str(folder), 'taken': str(taken.getsockname()[1])}
    assert main(['review', *(argument.format(**names) for argument in arguments)]) == 2
  said = capsys.readouterr()
  assert said.out == '' and said.err.count('\n') == 1 and expected.format(**names) in said.err


@pytest.mark.parametrize(
  ('spoil', 'expected'),
  [
    (lambda run: (run / 'evaluation' / 'stage.json').unlink(), 'its evaluation is not finished'),
    (lambda run: (run / 'evaluation' / 'replies.jsonl').write_text(''), 'holds no reply of the trained model'),
    (lambda run: (run / 'evaluation' / 'replies.jsonl').write_text('{'), 'replies.jsonl:1: not JSON'),
    (lambda run: (run / 'character.toml').unlink(), 'character.toml: trait ai_nature has no statement'),
    (lambda run: (run / 'review').write_text(''), 'ann.jsonl: cannot be written'),
  ],
)
def test_a_run_that_cannot_be_judged_is_one_line(folder, capsys, spoil, expected):
  spoil(folder)
  assert main(['review', f'--workdir={folder}', '--reviewer=ann']) == 2
  said = capsys.readouterr()
  assert said.out == '' and said.err.count('\n') == 1 and expected in said.err


def test_a_reviewer_may_have_any_name_that_people_have(folder):
  assert verdicts.reviewer_name('Zoe\u0308') == 'Zo\u00eb' and verdicts.reviewer_name('\u674e.2')
  with verdicts.opened(epath.Path(folder), 'Zo\u00eb'):
    assert verdicts.path_of(folder, 'Zo\u00eb').exists()


def test_judging_does_not_wait_for_jax(folder):
  program = 'import sys; from charjax.review import server; sys.exit("jax" in sys.modules)'
  subprocess.run([sys.executable, '-c', program], check=True, cwd=ROOT)
