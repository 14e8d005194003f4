"""`charjax chat` as a person meets it: in a terminal, through a pipe, and when something is wrong."""

import dataclasses
import itertools
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import smoke
import tokenizers
from test_checkpoints import CONFIG, TEMPLATE, TOKENS, random_tensors, write_hf
from tokenizer_kinds import texts

from charjax import chat
from charjax.main import main
from charjax.model import checkpoint_source, language_model
from charjax.model.language_model import LanguageModel

# Escape and bell, as byte-level tokenizers spell them.
_CONTROLS = (chr(0x100 + 0x1B), chr(0x100 + 0x07))
SETTINGS = chat.Settings(temperature=0.0, top_p=1.0, max_new_tokens=16)


@pytest.fixture(scope='module')
def endless(tmp_path_factory) -> str:
  """A model that never ends a reply at temperature 0, and whose replies would like to clear the screen."""
  config = dataclasses.replace(CONFIG, max_length=4096, tied_embeddings=False)
  tensors = random_tensors(config)
  # The byte-level letters of ASCII; all other tokens have logit 0, and the highest of so many is above that.
  letter = [len(token) == 1 and (33 <= ord(token) < 127 or token in _CONTROLS) for token in TOKENS]
  tensors['head'] *= np.array(letter)
  tensors['head'] *= np.where([token in _CONTROLS for token in TOKENS], 1.5, 1)
  path = write_hf(tmp_path_factory.mktemp('endless') / 'model', tensors, config)
  file = Path(path, 'tokenizer.json')
  backend = tokenizers.Tokenizer.from_file(str(file))
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.save(str(file))
  return path


@pytest.fixture(scope='module')
def small_model() -> LanguageModel:
  settings = {
    'dtype': 'float32',
    'compute_dtype': 'float32',
    'scan_layers': True,
    'remat': False,
    'quantize': '',
    'attention': 'auto',
  }
  return language_model.build(checkpoint_source.load('random'), _Fields(settings))


class _Fields(dict):
  __getattr__ = dict.__getitem__


class Terminal:
  """A process of the command line in a terminal of its own."""

  def __init__(self, *arguments: str, columns: int = 100):
    environment = smoke.environment() | {'TERM': 'dumb', 'NO_COLOR': '1', 'COLUMNS': str(columns), 'LINES': '30'}
    command = [sys.executable, '-m', 'charjax.main', 'chat', *arguments]
    self.pid, self._file = pty.fork()
    if not self.pid:
      # Ignored in whatever a shell runs in the background, the tests among it.
      signal.signal(signal.SIGINT, signal.SIG_DFL)
      os.execve(sys.executable, command, environment)
    self.seen = ''
    self._raw, self._at = b'', 0

  def wait_for(self, pattern: str) -> str:
    """Reads on until a pattern was written after what was last waited for; all that was written meanwhile."""
    end = time.monotonic() + 300
    while not (found := re.search(pattern, self.seen[self._at :])):
      assert time.monotonic() < end and self._read(), self.seen[-2000:]
    start, self._at = self._at, self._at + found.end()
    return self.seen[start : self._at]

  def type(self, text: str) -> None:
    os.write(self._file, text.encode())

  def end(self, key: str = '') -> int:
    """Reads to the end, and types a key now and then; the exit code."""
    if key:
      self.type(key)
    # A signal between readline's prompt and its wait for a key is seen with the next one.
    while self._read(10 if key else 300, key):
      pass
    os.close(self._file)
    return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

  def _read(self, seconds: float = 300, key: str = '') -> bool:
    end = time.monotonic() + 300
    try:
      while not select.select([self._file], [], [], seconds)[0]:
        assert key and time.monotonic() < end, self.seen[-2000:]
        self.type(key)
      found = os.read(self._file, 65536)
    except OSError:  # Linux's way to say that the other end was closed.
      found = b''
    self._raw += found
    self.seen = self._raw.decode(errors='replace')
    return bool(found)


# ---- in a terminal ----


def test_ctrl_c_stops_a_reply_and_ctrl_d_ends(endless):
  terminal = Terminal(endless, '--temperature=0', '--max_new_tokens=2000')
  terminal.wait_for('Ctrl-D ends')
  terminal.wait_for('> ')
  terminal.type('Hello\n')
  terminal.wait_for('compiling')
  terminal.wait_for('\r +\r[!-~]')
  terminal.type('\x03')
  terminal.wait_for('stopped')
  terminal.wait_for('\n> ')
  # The conversation goes on, and can begin anew.
  terminal.type('And now?\n')
  terminal.wait_for('And now[?]\r*\n+[^\n]*[!-~]{4}')
  terminal.type('\x03')
  terminal.wait_for('stopped')
  terminal.wait_for('\n> ')
  terminal.type('/new\n')
  terminal.wait_for('\n> ')
  assert terminal.end('\x04') == 0
  assert not re.search('[\x1b\x07]', terminal.seen)


def test_three_speakers_stand_side_by_side(smoke_run):
  workdir, _ = smoke_run
  before = {path: path.stat().st_mtime_ns for path in sorted(workdir.rglob('*'))}
  terminal = Terminal(f'--workdir={workdir}', '--side_by_side', '--trait=honesty', columns=110)
  terminal.wait_for('> ')
  terminal.type('What do you know of me?\n')
  seen = terminal.wait_for('\n> ')
  header = next(line for line in seen.splitlines() if line.startswith('base '))
  assert re.fullmatch(r'base +│ prompted +│ trained +', header)
  rows = [line.rpartition('\r')[2] for line in re.split(r'\r*\n', seen.partition(header)[2])]
  rows = [row for row in rows if '│' in row]
  assert rows and {len(row) for row in rows} == {len(header)} and len(header) < 110
  columns = [' '.join(' '.join(cells).split()) for cells in zip(*(row.split(' │ ') for row in rows), strict=True)]
  assert all(columns) and columns[0] != columns[1]
  assert terminal.end('\x03') == 0, terminal.seen[-2000:]
  # A conversation leaves a run as it was.
  assert {path: path.stat().st_mtime_ns for path in sorted(workdir.rglob('*'))} == before


# ---- through a pipe ----


def piped(said: str, *arguments: str, **settings) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, '-m', 'charjax.main', 'chat', *arguments]
  return subprocess.run(
    command, env=smoke.environment(), input=said, capture_output=True, text=True, timeout=300, check=False, **settings
  )


def test_lines_of_a_pipe_are_answered_in_turn(smoke_run):
  workdir, _ = smoke_run
  both = piped('What do you know?\n\nAnd what more?', str(workdir), '--side_by_side', '--seed=3')
  assert both.returncode == 0, both.stderr
  assert re.fullmatch(r'(base:\n.*\nprompted:\n.*\ntrained:\n.*\n){2}', both.stdout)
  assert 'compiling...\n' in both.stderr and '\x1b' not in both.stdout + both.stderr
  # The same seed gives the same replies, and the policy is the same alone.
  alone = piped('What do you know?\nAnd what more?\n', str(workdir), '--seed=3')
  assert alone.stdout.splitlines() == both.stdout.splitlines()[5::6]


def test_nobody_reads_the_replies(endless):
  command = f"yes | '{sys.executable}' -m charjax.main chat '{endless}' --temperature=0 --max_new_tokens=8 | head -n 1"
  done = subprocess.run(
    command, shell=True, env=smoke.environment(), capture_output=True, text=True, timeout=300, check=False
  )
  assert 'Traceback' not in done.stderr and 'Broken' not in done.stderr


# ---- a conversation ----


def test_a_history_is_what_was_said_and_the_next_prompt_holds_it(small_model):
  speaker = chat.Speaker('base', [], small_model.decoder)
  met: set = set()
  for turn, message in enumerate(('the time', 'all of it')):
    shown = [speaker.text for _ in speaker.answer(small_model, message, turn, SETTINGS, met)]
    assert shown and all(text.startswith(before) for before, text in itertools.pairwise(['', *shown]))
    assert speaker.ended and speaker.history[-2:] == [
      {'role': 'user', 'content': message},
      {'role': 'assistant', 'content': speaker.text},
    ]
  assert len(speaker.history) == 4


def test_a_stopped_reply_stays_as_far_as_it_came_and_one_unsaid_is_forgotten(small_model):
  speaker = chat.Speaker('base', [], small_model.decoder)
  answer = speaker.answer(small_model, 'the time', 0, SETTINGS, set())
  assert speaker.history == []
  next(answer)
  assert len(speaker.history) == 2 and speaker.history[1]['content'] == speaker.text != ''


def test_the_oldest_turns_are_left_out_when_the_context_is_full(small_model):
  speaker = chat.Speaker('base', [{'role': 'system', 'content': 'they say'}], small_model.decoder)
  limit = small_model.decoder.config.max_length
  said = ' '.join(['time'] * (limit // 5))
  notes = []
  for turn in range(6):
    for _ in speaker.answer(small_model, said, turn, SETTINGS, set()):
      break
    notes.append(speaker.note)
    read = small_model.prompt([*speaker.before, *speaker.history[:-1]])
    assert len(read) + SETTINGS.max_new_tokens <= limit
  assert not any(notes[:4]) and all(f'no more than {limit} tokens are read: the oldest 2' in note for note in notes[4:])
  assert speaker.history[0]['role'] == 'user' and len(speaker.history) % 2 == 0
  # One message alone may be too long.
  history = speaker.history
  assert not list(speaker.answer(small_model, ' '.join(['time'] * limit), 9, SETTINGS, set()))
  assert 'shorten the message' in speaker.note and speaker.ended and speaker.history == history


def test_text_is_shown_when_its_characters_are_whole(small_model, monkeypatch):
  smol = checkpoint_source.load(checkpoint_source.EMBEDDED)
  model = dataclasses.replace(small_model, tokenizer=smol.tokenizer, template=smol.template)
  said = '  né 🎉👩‍👩‍👧‍👦 你好\n\n\x1b[31mred\x07\u202e \u2028end\r\n '
  tokens = [*smol.tokenizer.encode(said), smol.tokenizer.eos_ids[0]]
  monkeypatch.setattr(chat, 'stream', lambda *_, **__: iter([[token] for token in tokens]))
  settings = dataclasses.replace(SETTINGS, max_new_tokens=500)
  speaker = chat.Speaker('base', [], model.decoder)
  shown = [speaker.text for _ in speaker.answer(model, 'Hi', 0, settings, set())]
  assert shown[-1] == 'né 🎉👩‍👩‍👧‍👦 你好\n\n[31mred end'
  assert not any('\ufffd' in text for text in shown) and len(set(shown)) > 10
  assert all(text.startswith(before) for before, text in itertools.pairwise(shown))


def test_an_interrupt_is_held_until_the_step_is_done():
  before = signal.getsignal(signal.SIGINT)
  with chat._stoppable(True) as stop:
    assert not stop
    os.kill(os.getpid(), signal.SIGINT)
    assert stop
  assert signal.getsignal(signal.SIGINT) is before


# ---- what is seen ----


def test_nothing_that_drives_a_terminal_is_printable():
  shown = chat.printable(''.join(map(chr, [*range(0x500), *range(0x2000, 0x2070), 0xFEFF, 0xD800, 0x1F389])))
  assert not re.search('[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800]', shown)
  assert '\n' in shown and '🎉' in shown and 'Ж' in shown and chat.printable('a\tb') == 'a    b'


def test_lines_fit_and_stay_when_more_is_said():
  for text in map(chat.printable, texts(300)):
    lines = chat.wrap(text, 12)
    assert all(chat.cells(line) <= 12 for line in lines)
    assert ''.join(''.join(lines).split()) == ''.join(text.split())
    for cut in range(len(text)):
      some = chat.wrap(text[:cut], 12)
      assert some[:-1] == lines[: len(some) - 1]
  assert chat.wrap('one two  three\n\nfour', 8) == ['one two', 'three', '', 'four']
  assert chat.wrap('你好世界', 5) == ['你好', '世界'] and chat.cells('e\u0301你') == 3


# ---- mistakes ----


def write_model(folder: Path, **changes) -> str:
  """A model that cannot be talked to."""
  path = write_hf(folder / 'model', random_tensors(CONFIG))
  file = Path(path, 'tokenizer_config.json')
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  return path


def unfinished(folder: Path, run: Path) -> str:
  shutil.copytree(run, folder / 'run')
  (folder / 'run/policy/stage.json').unlink()
  return str(folder / 'run')


def damaged(folder: Path, text: str) -> str:
  (folder / 'run').mkdir()
  (folder / 'run/config.json').write_text(text)
  return str(folder / 'run')


def misfit(folder: Path, run: Path) -> str:
  path = write_model(folder)
  file = Path(path, 'tokenizer.json')
  content = json.loads(file.read_text())
  content['added_tokens'].append(content['added_tokens'][0] | {'id': 999, 'content': '<far>'})
  file.write_text(json.dumps(content))
  return path


LOOP = '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}'


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    ((), 'takes a model or a run folder, or --config=FILE.py: one of them'),
    (('random', '--workdir={run}'), 'one of them'),
    (('{tmp}/nowhere',), 'nowhere: no such file or directory; give smollm2-135m-instruct, a .gguf file, a Hugg'),
    (('--workdir={tmp}',), 'no run was begun there'),
    (('{tmp}',), 'neither a model nor a run folder'),
    (('--config={tmp}/none.py',), 'none.py: cannot be read'),
    (('random', '--temperature=-1'), 'temperature'),
    (('random', '--temperature=nan'), 'temperature'),
    (('random', '--max_new_tokens=0'), 'max_new_tokens'),
    (('random', '--seed=x'), 'seed'),
    (('random', '--config.sed=1'), 'no config field sed; did you mean seed?'),
    (('random', '--trait=honesty'), '--trait goes with --side_by_side'),
    (('{run}', '--side_by_side', '--trait=humility'), 'there is no such trait; choose from honesty, ai_nature'),
    ((unfinished,), 'its policy is not trained to the end; run charjax policy'),
    ((lambda folder, _: damaged(folder, '{'),), 'config.json: not valid JSON'),
    ((lambda folder, _: damaged(folder, '{"config": {"sede": 1}}'),), 'no config field sede; did you mean seed?'),
    ((misfit,), '260 tokens, but 259 embeddings'),
    ((lambda folder, _: write_model(folder, chat_template=LOOP + TEMPLATE),), 'did not come to an end within 1 s'),
    ((lambda folder, _: write_model(folder, chat_template="{{ ''.__class__.__mro__ }}"),), '__class__'),
  ],
)
def test_a_mistake_ends_in_one_line(tmp_path, smoke_run, capsys, arguments, expected):
  run, _ = smoke_run
  arguments = [a.format(tmp=tmp_path, run=run) if isinstance(a, str) else a(tmp_path, run) for a in arguments]
  assert main(['chat', *arguments]) == 2
  captured = capsys.readouterr()
  lines = [line for line in captured.err.splitlines() if not line.startswith('reading ')]
  assert captured.out == '' and len(lines) == 1 and lines[0].startswith('charjax: ') and expected in lines[0], lines


def test_flags_of_a_conversation_are_no_others_flags(tmp_path, capsys):
  assert main(['run', '--config=x.py', f'--workdir={tmp_path}', '--temperature=1']) == 2
  assert '--temperature is a flag of charjax chat' in capsys.readouterr().err
