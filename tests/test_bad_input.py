"""A hundred mistakes, of people and of the files they were given: each ends in one line, and nothing is lost.

Every case runs the command line on a copy of a finished run and gives it one thing that is wrong.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from test_character import OPPOSITES, SEEDS, VALID
from test_checkpoints import CONFIG, PADDED, TOKENS, random_tensors, write_gguf, write_hf, write_sentencepiece

from charjax import files, start
from charjax import main as command_line
from charjax import workdir as workdirs
from charjax.config_file import read_config
from charjax.main import main
from charjax.model import chat, checkpoint_source
from charjax.stages import STAGES

FILE = """
from charjax import defaults

def get_config():
  config = defaults.get_config()
  config.model.path = 'random'
  config.character.traits = ('ai_nature', 'honesty')
  return config
"""
MESSAGES = [
  {'id': 'honesty-0000', 'trait': 'honesty', 'split': 'train', 'text': 'Would you lie to me?'},
  {'id': 'honesty-0001', 'trait': 'honesty', 'split': 'heldout', 'text': 'Is my plan good?'},
  {'id': 'neutral-0000', 'trait': None, 'split': 'train', 'text': 'How long do eggs boil?'},
]
REPLIES = [
  {'id': f'honesty-0000/shown/{k}', 'message': 'honesty-0000', 'condition': 'shown', 'text': text, 'tokens': 2}
  | {'finish': 'stop'}
  for k, text in enumerate(('I would not.', 'No.'))
]
RANKINGS = [
  {'message': 'honesty-0000', 'replies': [row['id'] for row in REPLIES], 'probabilities': [[0.5, 0.7], [0.3, 0.5]]}
]
ROWS = {'messages.jsonl': MESSAGES, 'replies.jsonl': REPLIES, 'rankings.jsonl': RANKINGS}


class Place:
  """Where a case is set up: a folder for its files, and a finished run."""

  def __init__(self, folder: Path, run: Path, stack: contextlib.ExitStack):
    self.folder, self.run, self.stack = folder, run, stack
    self.config = folder / 'config.py'
    self.config.write_text(FILE)
    self.command = 'run'

  def write(self, name: str, content: str | bytes) -> Path:
    path = self.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path

  def mount(self, *arguments: str) -> None:
    """Mounts a file system until the case is over."""
    done = subprocess.run(['mount', *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
      pytest.skip(f'no right to mount here: {done.stderr.strip()}')
    self.stack.callback(subprocess.run, ['umount', '--lazy', arguments[-1]], check=True)


Arrange = Callable[[Place], str | list[str]]


def stand_in(stage: workdirs.Stage, session: workdirs.Session) -> dict:
  """Writes what a stage would, and little."""
  for name in stage.products:
    rows = ROWS.get(name, [{'made': stage.name}])
    text = ''.join(json.dumps(row) + '\n' for row in rows) if name.endswith('l') else json.dumps({'of': stage.name})
    files.write_text(session.folder(stage.name) / name, text)
  return {}


def too_much(stage: workdirs.Stage, session: workdirs.Session) -> dict:
  files.write_text(session.folder(stage.name) / stage.products[0], 'x' * 1_000_000)
  return {}


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> Path:
  """A run whose stages are all done, by stand-ins."""
  folder = tmp_path_factory.mktemp('finished')
  (folder / 'config.py').write_text(FILE)
  session = start.prepare(read_config(str(folder / 'config.py'), []), epath.Path(folder / 'run'))

  start.record(session)
  stages = [dataclasses.replace(stage, run=functools.partial(stand_in, stage)) for stage in STAGES]
  workdirs.execute(stages, session)
  return folder / 'run'


def contents(folder: Path) -> dict[str, bytes]:
  found = sorted(path for path in folder.rglob('*') if path.name != '.lock')
  # A link that leads nowhere, or a pipe, is only there.
  return {str(p): p.read_bytes() if stat.S_ISREG(p.lstat().st_mode) else b'' for p in found}


def endless(path: Path) -> None:
  path.unlink()
  path.symlink_to('/dev/zero')


def config(text: str | bytes) -> Arrange:
  def arrange(place: Place) -> list[str]:
    place.write('config.py', text)
    return []

  return arrange


def line(text: str) -> Arrange:
  """The config with one more line."""
  return config(FILE.replace('  return', f'  {text}\n  return'))


def flag(*texts: str) -> Arrange:
  return lambda place: list(texts)


# ---- characters ----


def character(content: str | bytes, *flags: str) -> Arrange:
  return lambda place: [f'--config.character.path={place.write("c.toml", content)}', *flags]


def changed(old: str, new: str) -> Arrange:
  assert VALID.count(old) == 1
  return character(VALID.replace(old, new))


def no_traits(place: Place) -> list[str]:
  return [f'--config.character.path={place.write("c.toml", VALID)}', '--config.character.traits=()']


CHARACTERS = {
  'a list for a trait': (
    character('name = "n"\ndescription = "d"\ntraits = [[]]\n'),
    r'line 3: traits\[0\]: \[\] must be',
  ),
  'a table for the name': (
    changed('name = "small"', 'name = {a = 1}'),
    r'c.toml, line 1: name: .* must be text in quotes',
  ),
  'a date for a statement': (
    changed('"I stay calm."', '1979-05-27'),
    r'line 5: traits\[0\].statement: .* must be text',
  ),
  'numbers for opposites': (
    changed(OPPOSITES, 'opposites = [1, 2]\n'),
    r'line 7: traits\[0\].opposites: must be a table',
  ),
  'no statement': (changed('statement = "I stay calm."\n', ''), r'traits\[0\].statement: the field is missing; add it'),
  'no seeds': (changed(SEEDS, ''), r'traits\[0\].seeds: the field is missing; add it'),
  'no reply out of character': (
    changed('out_of_character = "Now, now, now."\n', ''),
    r'line 9: traits\[0\].pairs\[0\].out_of_character: the field is missing; add it',
  ),
  'an id twice': (
    character(VALID + 3 * VALID.partition('description = "For tests."\n')[2]),
    r"line 16: traits\[1\].id: 'calm' is also the id of traits\[0\]; rename one",
  ),
  'a key twice': (changed('id = "calm"', 'id = "calm"\nid = "cool"'), r'line 5: this is not valid TOML: .*; mend'),
  'an opposite twice': (changed('hasty = "I rush."', 'hasty = "a"\nhasty = "b"'), r'not valid TOML: .*; mend the line'),
  'no pair that is shown': (changed('"shown"', '"choosing"'), r'traits\[0\].pairs: none has use = "shown"; mark four'),
  'no pair that chooses': (no_traits, r'c.toml: traits.pairs: none has use = "choosing", .*; write twelve'),
  'a pair of an opposite that is not': (
    changed('opposite = "hasty"', 'opposite = "calm"'),
    r"line 11: traits\[0\].pairs\[0\].opposite: 'calm' is unknown; use hasty",
  ),
  'a string of 10 MB': (changed('"I rush."', f'"{"x" * 10_000_000}"'), r'the file has 10,000,\d+ bytes; shorten it'),
  'a string of 4 MB': (changed('"I rush."', f'"{"x" * 4_000_000}"'), r'opposites.hasty: has 4,000,000 .* shorten it'),
  'a key of 4 MB': (changed('hasty =', f'{"x" * 4_000_000} ='), r'opposites.*is no simple name; use a-z'),
  'UTF-16': (character(VALID.encode('utf-16')), r'c.toml, line 1: broken UTF-8; save the file with UTF-8'),
  'half a UTF-8 character': (character(VALID.encode() + b'# \xe6\xbc'), r'line 15: broken UTF-8; save the file'),
  'a surrogate': (changed('Hurry?', '\\ud800'), r'line 12: this is not valid TOML: .*; mend the line'),
  'a null byte': (changed('Hurry?', '\0'), r'c.toml, line 12: this is not valid TOML: .*; mend the line'),
  'a device': (lambda place: '--config.character.path=/dev/zero', r"'/dev/zero': .*not a file.*give the path"),
  'a folder': (lambda place: f'--config.character.path={place.folder}', r'cannot read this character .*give the path'),
  'a trait that is a number': (line('config.character.traits = (1, 2)'), r'traits: 1 is no text; choose from'),
  'a word for a weight': (lambda place: '--config.character.traits=honesty:x', r"'honesty:x': the weight must be a"),
}


# ---- configs ----


CONFIGS = {
  'an unclosed bracket': (
    config('def get_config():\n  return ('),
    r"config.py:2: '\(' was never closed; mend the line",
  ),
  'tabs and spaces': (config('def get_config():\n  if 1:\n\treturn 1\n'), r'config.py:3: .*; mend the line'),
  'not UTF-8': (config(b'# \xff\n'), r"config.py: cannot be read \('utf-8' codec.*\); check the path"),
  'a null byte in it': (config(FILE + '\0'), r'config.py:1: .*null bytes; mend the line'),
  'one that raises': (line('config.policy.steps = 1 // 0'), r'config.py:8: ZeroDivisionError: '),
  'one without end': (config('def get_config():\n  return get_config()'), r'config.py:2: RecursionError: '),
  'one that leaves': (config('import sys\nsys.exit("no")'), r'config.py:2: SystemExit: no'),
  'an error of many lines': (config('raise ValueError("a\\nb" * 999)'), r'config.py:1: ValueError: a b.{,220}$'),
  'a dict': (config('get_config = dict'), r'config.py: get_config returned dict; it must return a ConfigDict'),
  'a function that is none': (config('get_config = 3'), r'config.py: has no function get_config; see configs/'),
  'an argument that is wanted': (config('def get_config(x): ...'), r'get_config needs an argument, --config=FILE.py:'),
  'an argument that is not': (
    lambda place: ['run', f'--config={place.config}:big', f'--workdir={place.run}'],
    r'config.py: get_config takes no argument',
  ),
  'a field that is not': (
    line('config.policy.stpes = 3'),
    r'config.py: .*no config field policy.stpes; did you mean steps',
  ),
  'text for a number': (line('config.policy.steps = "3"'), r'config.py:8: TypeError: .*steps'),
  'a number for a section': (
    config('from ml_collections import *\nget_config = lambda: ConfigDict({"policy": 3})'),
    r'config.py: config field policy is 3; give a ConfigDict',
  ),
  'a list of traits': (
    config('from ml_collections import *\nget_config = lambda: ConfigDict({"character": {"traits": "honesty"}})'),
    r"config.py: config field character.traits is 'honesty'; give a tuple",
  ),
  'a folder named as a file': (
    lambda place: [place.config.unlink(), place.config.mkdir(), []][2],
    r'--config=.*config.py: cannot be read \(Is a directory\); check the path',
  ),
  'a mesh of zeros': (flag('--config.mesh=(0,1,1)'), r'config.mesh is \(0, 1, 1\); it takes three sizes'),
  'a mesh of two': (flag('--config.mesh=(1,1)'), r'config.mesh is \(1, 1\); it takes three sizes'),
  'a mesh of words': (line("config.mesh = ('a', 1, 1)"), r"config.mesh is \('a', 1, 1\); it takes three sizes"),
  'a mesh beyond all devices': (
    flag(f'--config.mesh=({2**62},{2**62},1)'),
    r'config.mesh .*does not fit the 8 devices',
  ),
  'steps that are negative': (flag('--config.policy.steps=-3'), r'config.policy.steps is -3; it must be at least 1'),
  'a rate that is no number': (flag('--config.policy.learning_rate=nan'), r'policy.learning_rate is nan; it must be'),
  'an infinite penalty': (flag('--config.policy.kl=inf'), r'config.policy.kl is inf; it must be at least 0'),
  'a rank below zero': (flag('--config.policy.lora_rank=-1'), r'config.policy.lora_rank is -1; it must be at least 0'),
  'a probability above one': (flag('--config.replies.top_p=1.5'), r'replies.top_p is 1.5; it must be from 0 to 1'),
  'labels that cross': (
    flag('--config.rankings.label_low=0.99', '--config.rankings.label_high=0.01'),
    r'label_low is 0.99 and label_high 0.01; the first must be at most 0.5',
  ),
  'labels by which reply stands first': (
    flag('--config.rankings.label_low=0.1'),
    r'label_low is 0.1 and label_high 0.95; .* the second 1 less the first',
  ),
  'ranked replies without a weight': (
    flag(
      '--config.policy.replies_per_prompt=0',
      '--config.policy.ranked_replies=2',
      '--config.policy.ranked_weight=0.0',
      '--config.policy.ranked_likelihood=0.0',
    ),
    r'or have no weight, so there is nothing to learn from',
  ),
  'a preference model that is not trained': (
    flag('--config.preference.epochs=0.0', '--config.preference.head_steps=0'),
    r'epochs and head_steps are both 0, so that no preference model is trained',
  ),
  'a seed of 400 digits': (flag(f'--config.seed=1{"0" * 400}'), r'config.seed is 10+; it must be from 0 to 2147483647'),
  'a dtype that is none': (flag('--config.model.dtype=float23'), r"model.dtype is 'float23'; choose from float32, bfl"),
}


# ---- GGUF ----


def gguf(**changes) -> Arrange:
  return lambda place: f'--config.model.path={write_gguf(place.folder / "m.gguf", random_tensors(CONFIG), **changes)}'


def damaged_gguf(damage: Callable[[bytes], bytes]) -> Arrange:
  def arrange(place: Place) -> str:
    path = Path(write_gguf(place.folder / 'm.gguf', random_tensors(CONFIG)))
    path.write_bytes(damage(path.read_bytes()))
    return f'--config.model.path={path}'

  return arrange


def one_field(kind: int, value: bytes, tensors: int = 0) -> Arrange:
  """A GGUF of one field 'a'."""
  header = b'GGUF' + struct.pack('<IQQQ', 3, tensors, 1, 1) + b'a' + struct.pack('<I', kind) + value
  return lambda place: f'--config.model.path={place.write("m.gguf", header)}'


def of_kind(name: str, kind: int) -> Callable[[bytes], bytes]:
  """Says that a matrix of float32 is of another type, whose elements are not larger."""

  def damage(content: bytes) -> bytes:
    place = content.index(name.encode()) + len(name)
    dims = struct.unpack_from('<I', content, place)[0]
    return content[: place + 4 + 8 * dims] + struct.pack('<I', kind) + content[place + 8 + 8 * dims :]

  return damage


GGUF_END = r'm.gguf: not a GGUF file, truncated or damaged \({}.*\); fetch it again'
GGUF = {
  'no GGUF': (damaged_gguf(lambda c: b'PK\3\4' + c), GGUF_END.format('it does not start with GGUF')),
  'of version 1': (damaged_gguf(lambda c: c[:4] + b'\1' + c[5:]), GGUF_END.format('version 1, where 2 and 3')),
  'of the other byte order': (damaged_gguf(lambda c: c[:4] + b'\0\0\0\3' + c[8:]), GGUF_END.format('version')),
  'cut off in its fields': (damaged_gguf(lambda c: c[:1000]), GGUF_END.format('it ends after 1000 bytes')),
  'cut off in its weights': (
    damaged_gguf(lambda c: c[:-5000]),
    GGUF_END.format('it ends after .* before the end of tens'),
  ),
  'of 2**60 tensors': (one_field(4, bytes(4), tensors=2**60), GGUF_END.format('it ends after')),
  'of 2**60 fields': (damaged_gguf(lambda c: c[:16] + struct.pack('<Q', 2**60) + c[24:]), GGUF_END.format('')),
  'with arrays of arrays': (
    one_field(9, struct.pack('<IQ', 9, 2**20) * 9),
    GGUF_END.format('an array of value type 9'),
  ),
  'with a field of no type': (one_field(77, bytes(8)), GGUF_END.format('unknown value type 77')),
  'with text that is none': (one_field(8, struct.pack('<Q', 2) + b'\xff\xff'), GGUF_END.format(".*can't decode")),
  'aligned to nothing': (
    gguf(metadata={'general.alignment': 0}),
    GGUF_END.format('general.alignment is 0'),
  ),
  'aligned otherwise': (
    damaged_gguf(lambda c: c.replace(b'llama.context_length', b'general.alignment\0\0\0', 1)),
    r'm.gguf: field llama.context_length is missing; is this a complete file\?',
  ),
  'of a type that is not read': (
    damaged_gguf(of_kind('blk.0.attn_q.weight', 26)),
    r'm.gguf: tensor blk.0.attn_q.weight is of type I32, which is not read; use Q4_K, Q8_0 or F16',
  ),
  'of a type that there is not': (damaged_gguf(of_kind('blk.0.attn_q.weight', 999)), GGUF_END.format('999')),
  'with tensors upon each other': (
    damaged_gguf(lambda c: c[: (end := c.index(b'blk.1.attn_q.weight') + 19 + 24)] + bytes(8) + c[end + 8 :]),
    GGUF_END.format('tensor .* begins before the end of another'),
  ),
  'of another width': (gguf(metadata={'llama.feed_forward_length': 65}), r'ffn_gate.weight has shape \(64, 32\), but'),
  'of heads that do not divide': (
    gguf(metadata={'llama.attention.head_count_kv': 3}),
    r'm.gguf: .*num_heads \(4\) is no',
  ),
  'of a base below zero, and divisors of Llama 3': (
    gguf(
      metadata={'llama.rope.freq_base': -1.0},
      extra={'rope_freqs.weight': np.array([1, 1, 2, 4, 8, 8, 8, 8], np.float32)},
    ),
    r"m.gguf: field llama.rope.freq_base is '-1.0', which is not supported; it must be a number above 0",
  ),
  'with an endless context': (
    gguf(metadata={'llama.rope.freq_base': float('inf')}),
    r"m.gguf: field llama.rope.freq_base is 'inf', which is not supported; it must be a number above 0",
  ),
  'that is a folder': (
    lambda place: [(place.folder / 'm.gguf').mkdir(), f'--config.model.path={place.folder / "m.gguf"}'][1],
    r'm.gguf: neither a model nor a run folder; give smollm2-135m-instruct, a .gguf file, a Hugging Face directory or',
  ),
  'that is a device': (lambda place: '--config.model.path=/dev/zero', r'/dev/zero: not a .gguf file; give a'),
}


# ---- Hugging Face directories ----


def directory(change: Callable[[Path], object] = lambda folder: None, **fields) -> Arrange:
  def arrange(place: Place) -> str:
    write_hf(place.folder / 'm', random_tensors(CONFIG), **fields)
    change(place.folder / 'm')
    return f'--config.model.path={place.folder / "m"}'

  return arrange


def header(change: Callable[[dict], object]) -> Callable[[Path], object]:
  """Changes what a safetensors file says of its tensors."""

  def damage(folder: Path) -> None:
    content = (folder / 'model.safetensors').read_bytes()
    size = struct.unpack('<Q', content[:8])[0]
    said = json.loads(content[8 : 8 + size])
    change(said)
    text = json.dumps(said).encode()
    (folder / 'model.safetensors').write_bytes(struct.pack('<Q', len(text)) + text + content[8 + size :])

  return damage


def weights(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
  return lambda folder: (folder / 'model.safetensors').write_bytes(change((folder / 'model.safetensors').read_bytes()))


def index(weight_map: object) -> Callable[[Path], object]:
  def damage(folder: Path) -> None:
    (folder / 'model.safetensors').rename(folder / 'a.safetensors')
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))

  return damage


def linked(name: str) -> Callable[[Path], object]:
  """A file becomes a link to itself."""
  return lambda folder: [(folder / name).unlink(missing_ok=True), (folder / name).symlink_to(name)]


Q = 'model.layers.0.self_attn.q_proj.weight'
SAFETENSORS = r'm/model.safetensors: missing or damaged \(.+\); fetch it again'
DIRECTORIES = {
  'a header without end': (directory(weights(lambda c: b'\xff' * 7 + b'\x7f' + c[8:])), SAFETENSORS),
  'a header past the end': (directory(weights(lambda c: struct.pack('<Q', len(c)) + c[8:])), SAFETENSORS),
  'a header that is cut off': (directory(weights(lambda c: c[:100])), SAFETENSORS),
  'offsets that overlap': (directory(header(lambda said: said[Q].update(data_offsets=[0, 4096]))), SAFETENSORS),
  'offsets out of range': (
    directory(header(lambda said: said[Q].update(data_offsets=[2**62, 2**62 + 4096]))),
    SAFETENSORS,
  ),
  'offsets below zero': (directory(header(lambda said: said[Q].update(data_offsets=[-4096, 0]))), SAFETENSORS),
  'a shape that lies': (directory(header(lambda said: said[Q].update(shape=[2**40, 2**40]))), SAFETENSORS),
  'a shape that is turned': (
    directory(header(lambda said: said[Q].update(shape=[16, 64]))),
    rf'm: tensor {Q} has shape \(16, 64\), but its config says \(32, 32\)',
  ),
  'a type that is none': (directory(header(lambda said: said[Q].update(dtype='Q4'))), SAFETENSORS),
  'weights of 8 bits': (directory(header(lambda said: said[Q].update(dtype='I32'))), rf"tensor '{Q}' is I32; only F64"),
  'a missing tensor': (
    directory(header(lambda said: said.update({'x': said.pop(Q)}))),
    rf'm: tensor {Q} is missing; is this a complete llama checkpoint\?',
  ),
  'a tensor too many': (
    directory(header(lambda said: said.update({'x': said.pop(Q), Q: said[Q.replace('layers.0', 'layers.1')]}))),
    SAFETENSORS,
  ),
  'weights that are a folder': (
    directory(lambda folder: [(folder / 'model.safetensors').unlink(), (folder / 'model.safetensors').mkdir()]),
    SAFETENSORS,
  ),
  'weights that are a link to themselves': (
    directory(linked('model.safetensors')),
    r'm/model.safetensors: .*; (fetch|conv)',
  ),
  'an index of files that are not there': (
    directory(index({Q: 'b.safetensors'})),
    r'm/b.safetensors: missing or .*fetch',
  ),
  'an index of itself': (
    directory(index({Q: 'model.safetensors.index.json'})),
    r'm/model.safetensors.index.json: missing or damaged \(.+\); fetch it again',
  ),
  'an index that leads outside': (
    directory(index({Q: '/etc/passwd'})),
    r"shard '/etc/passwd' is not a plain file name",
  ),
  'an index that leads above': (
    directory(index({Q: '..'})),
    r"m/model.safetensors.index.json: shard '..' is not a plain",
  ),
  'an index of numbers': (directory(index({Q: 3})), r"index.json: shard '3' is not a plain file name; fetch"),
  'an index of nothing': (directory(index([])), r'm/model.safetensors.index.json: field weight_map is missing; fetch'),
  'a config that is a link to itself': (
    directory(linked('config.json')),
    r'm/config.json: .*symbolic links; is this a',
  ),
  'a config of deep lists': (
    directory(lambda folder: (folder / 'config.json').write_text('[' * 100_000)),
    r'm/config.json: not valid JSON \(.+\); fetch it again',
  ),
  'a config of 10**12 layers': (
    directory(num_hidden_layers=10**12),
    r'tensor model.layers.2.input_.* is missing; is this',
  ),
  'a config of 10**12 embeddings': (
    directory(vocab_size=10**12),
    r'embed_tokens.weight has shape .*, but its config says',
  ),
  'a width of 10**400': (
    directory(hidden_size=10**400),
    r"m/config.json: field hidden_size is '1000.*; it must be a whole",
  ),
  'no heads': (directory(num_attention_heads=0), r'm/config.json: model shape: num_heads is 0; it must be a positive'),
  'half a layer': (
    directory(num_hidden_layers=2.5),
    r"m/config.json: field num_hidden_layers is '2.5'; it must be a whole",
  ),
  'layers in words': (
    directory(num_hidden_layers='two'),
    r"m/config.json: field num_hidden_layers is 'two'; it must be",
  ),
  'an infinite base': (directory(rope_theta=float('inf')), r'm/config.json: .*rope_theta is .*; it must be a number'),
  'a config.json without an end': (
    directory(lambda folder: endless(folder / 'config.json')),
    r'm/config.json: not a file; is this a Hugging Face checkpoint directory',
  ),
  'a tokenizer.json without an end': (
    directory(lambda folder: endless(folder / 'tokenizer.json')),
    r'm/tokenizer.json: not a tokenizer.json .*not a file.*; fetch it again',
  ),
  'a head that would fill memory': (
    directory(head_dim=10**12, rope_scaling={'rope_type': 'linear', 'factor': 2}),
    r'm/config.json: 1000000000000 dimensions of a head are rotated; it must be at most 65536',
  ),
  'a window beyond what is counted to': (
    directory(model_type='mistral', sliding_window=2**31),
    r'm/config.json: model shape: windows must be between 0, which is none, and 2\*\*31 - 1',
  ),
  'an end of text that drives a terminal': (
    directory(
      lambda folder: [(folder / 'generation_config.json').unlink(), set_text(folder, eos_token=None)],
      eos_token_id='\x1b]52;c;AAAA\x07',
    ),
    r'm: eos_token_id is \]52;c;AAAA; it must be a token id',
  ),
  'a list for a base': (directory(rope_theta=[1]), r"m/config.json: field rope_theta is '\[1\]'; it must be a number"),
  'an end of text below zero': (
    directory(
      lambda folder: [(folder / 'generation_config.json').unlink(), set_text(folder, eos_token=None)], eos_token_id=-1
    ),
    r'm/tokenizer.json: end-of-text ids .*-1.* wrong file\?',
  ),
}


# ---- tokenizers ----


def set_text(folder: Path, **changes) -> None:
  path = folder / 'tokenizer_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tokenizer(change: Callable[[dict], object], **fields) -> Arrange:
  def damage(folder: Path) -> None:
    described = json.loads((folder / 'tokenizer.json').read_text())
    change(described)
    (folder / 'tokenizer.json').write_text(json.dumps(described))

  return directory(damage, **fields)


def no_end(folder: Path) -> None:
  (folder / 'generation_config.json').unlink()
  set_text(folder, eos_token=None, chat_template=TEMPLATE.replace('<end>', ''))


def pieces(**settings) -> Arrange:
  return lambda place: f'--config.model.path={write_sentencepiece(place.folder / "m", PADDED, **settings)}'


TEMPLATE = '{% for m in messages %}{{ m.role }}{{ m.content }}<end>{% endfor %}'
NO_TOKENIZER = r'm/tokenizer.json: not a tokenizer.json \(.+\); fetch it again'
DAMAGED = r'm.gguf: the tokenizer in it is damaged \(.+\); fetch it again'
TOKENIZERS = {
  'more tokens than embeddings': (
    tokenizer(lambda t: t['model']['vocab'].update(more=999)),
    r'm/tokenizer.json: 1000 tokens, but \d+ embeddings \(field vocab_size of config.json\); wrong file\? Fetch',
  ),
  'merges that are numbers': (tokenizer(lambda t: t['model'].update(merges=[1, 2])), NO_TOKENIZER),
  'merges of tokens that are not': (tokenizer(lambda t: t['model'].update(merges=[['q', 'zz']])), NO_TOKENIZER),
  'ids twice': (
    tokenizer(lambda t: t['model']['vocab'].update(a=70, b=70)),
    r"m/tokenizer.json: tokens '.' and '.' both have id 70; fetch it again",
  ),
  'ids below zero': (tokenizer(lambda t: t['model']['vocab'].update(a=-1)), NO_TOKENIZER),
  'a kind that is none': (tokenizer(lambda t: t['model'].update(type='Morse')), NO_TOKENIZER),
  'a normaliser of a broken pattern': (
    tokenizer(lambda t: t.update(normalizer={'type': 'Replace', 'pattern': {'Regex': '(('}, 'content': ''})),
    NO_TOKENIZER,
  ),
  'no end of text': (directory(no_end, eos_token_id=None), r'm/tokenizer.json: end-of-text ids \[\] .*wrong file\?'),
  'words that are control': (
    tokenizer(
      lambda t: (
        t.update(model={'type': 'WordLevel', 'vocab': t['model']['vocab'], 'unk_token': '<end>'})
        or t.update(pre_tokenizer=None, added_tokens=[])
      )
    ),
    r'm/tokenizer.json: text that reads .* would be control; use a BPE tokenizer',
  ),
  'a tokenizer that is a folder': (
    directory(lambda folder: [(folder / 'tokenizer.json').unlink(), (folder / 'tokenizer.json').mkdir()]),
    NO_TOKENIZER,
  ),
  'pieces with an id beyond all': (pieces(added_tokens_decoder={str(10**30): {'content': '<x>'}}), r'm/tokenizer'),
  'a GGUF of tokens that are numbers': (gguf(metadata={'tokenizer.ggml.tokens': [1, 2, 3]}), DAMAGED),
  'a GGUF of merges that are numbers': (gguf(metadata={'tokenizer.ggml.merges': [1, 2]}), DAMAGED),
  'a GGUF of one word': (gguf(metadata={'tokenizer.ggml.tokens': 'token'}), DAMAGED),
  'a GGUF with a token twice': (gguf(metadata={'tokenizer.ggml.tokens': [*TOKENS[:-1], 'a']}), DAMAGED),
  'a GGUF of more tokens': (
    gguf(
      metadata={'tokenizer.ggml.tokens': [*TOKENS, 'x1'], 'tokenizer.ggml.token_type': [3, 3, *[1] * (len(TOKENS) - 1)]}
    ),
    r'm.gguf: \d+ tokens for \d+ embeddings; wrong file\?',
  ),
}


# ---- templates ----


def template(source: object) -> Arrange:
  return directory(lambda folder: set_text(folder, chat_template=source))


RENDERS = r'm/tokenizer_config.json: chat template: it cannot render this conversation \({}.*\); use the template'
TOO_LONG = RENDERS.format('it did not come to an end within 1 s and 512 MB')
TEMPLATES = {
  'loops in loops': (
    template('{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}' + TEMPLATE),
    TOO_LONG,
  ),
  'a macro that doubles': (
    template('{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}' + TEMPLATE),
    TOO_LONG,
  ),
  'a macro without end': (
    template('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}' + TEMPLATE),
    RENDERS.format('maximum recursion depth'),
  ),
  'a power without end': (
    template('{% set x = 3 ** (10 ** 9) %}' + TEMPLATE),
    r'chat template: not a valid template \(it did not come to an end .*; use an instruct model',
  ),
  'a text of 10 GB': (template("{{ 'x' * 10 ** 10 }}" + TEMPLATE), TOO_LONG),
  'a text of 20 MB': (template("{{ 'x' * 20000000 }}" + TEMPLATE), RENDERS.format('it writes 20,000,\\d+ characters')),
  'a text that doubles': (
    template("{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}" + TEMPLATE),
    TOO_LONG,
  ),
  'a way to the interpreter': (template("{{ ''.__class__.__mro__[1] }}" + TEMPLATE), RENDERS.format('.*__class__')),
  'a way through a function': (
    template('{{ cycler.__init__.__globals__.os.getpid() }}' + TEMPLATE),
    RENDERS.format(".*'__init__' .*unsafe"),
  ),
  'a format string': (template("{{ '{0.__class__.__mro__}'.format(1) }}" + TEMPLATE), RENDERS.format('.*__class__')),
  'a file to include': (template("{% include '/etc/passwd' %}" + TEMPLATE), RENDERS.format('no loader')),
  'a change to the messages': (template('{{ messages.clear() }}' + TEMPLATE), RENDERS.format('.*clear')),
  'brackets without end': (
    template('{{ ' + '(' * 99_999),
    r'chat template: not a valid template \(.+\); use an instruct',
  ),
  'a tag that is left open': (
    template('{% for m in messages %}'),
    r'chat template: not a valid template \(Unexpected end',
  ),
  'a template that is a number': (template(3), r'm/tokenizer_config.json: no chat template here, .*; use an instruct'),
  'templates without names': (
    template([1, {'template': 'x'}]),
    r'm/tokenizer_config.json: no chat template here, .*; use',
  ),
  'a template that says nothing': (
    template('{{ bos_token }}'),
    r'it leaves out what the assistant says; use a template',
  ),
}


# ---- probe files and neutral files ----


def probes(content: str | bytes) -> Arrange:
  return lambda place: f'--config.evaluation.probes={place.write("p.jsonl", content)}'


def neutral(**fields) -> Arrange:
  row = json.dumps({'message': 'What is 2 + 2?', 'reference': 'It is 4.', 'expect': '4', **fields})
  return lambda place: f'--config.evaluation.neutral={place.write("n.jsonl", row)}'


PROBE = '{"trait": "honesty", "message": "m", "consistent": "c", "inconsistent": "i"}\n'
FILES = {
  'no rows': (probes('\n\n'), r'p.jsonl: the file is empty; write one JSON object a line'),
  'half a row': (probes(PROBE + PROBE[:40]), r'p.jsonl:2: not JSON \(.+\); each line must be one JSON object'),
  'two rows on a line': (probes(PROBE.strip() + PROBE), r'p.jsonl:1: not JSON \(Extra data\); each line must be'),
  'a row that is a word': (probes(f'\n{PROBE}"honesty"\n'), r'p.jsonl:3: str found; each line must be one JSON object'),
  'a row without a trait': (
    probes(PROBE.replace('trait', 'trite')),
    r'p.jsonl:1: field trait is missing or no text; give',
  ),
  'a message that is a list': (
    probes(PROBE.replace('"m"', '[]')),
    r'p.jsonl:1: field message is missing or no text; give',
  ),
  'an empty answer': (
    probes('\n' + PROBE.replace('"i"', '" "')),
    r'p.jsonl:2: field inconsistent is missing or no text',
  ),
  'Latin-1': (
    probes(PROBE.replace('"c"', '"é"').encode('latin-1')),
    r'p.jsonl:1: not UTF-8 text; save the file as UTF-8',
  ),
  'a number of 9999 digits': (
    probes(PROBE.replace('"c"', '9' * 9999)),
    r'p.jsonl:1: not JSON \(ValueError\); each line',
  ),
  'a folder of probes': (
    lambda place: f'--config.evaluation.probes={place.folder}',
    r': cannot be read .Is a directory.; check the path',
  ),
  'a device of probes': (
    flag('--config.evaluation.probes=/dev/zero'),
    r'/dev/zero: cannot be read .not a file.; check the path',
  ),
  'half a character in a probe': (
    probes(PROBE.replace('"m"', r'"\ud83d"')),
    r'p.jsonl:1: field message holds half a character, \\ud83d; write it anew',
  ),
  'half a character in a pattern': (
    neutral(expect='4\udc00'),
    r'n.jsonl:1: field expect holds half a character, \\udc00; write it anew',
  ),
  'a broken pattern': (
    neutral(expect='(4'),
    r'n.jsonl:1: expect is no regular expression \(.+\); mend it or write null',
  ),
  'a pattern that is a list': (neutral(expect=[4]), r'n.jsonl:1: expect is no regular expression \(.+\); mend it or'),
  'a pattern that goes back': (neutral(expect='(a+)+$'), r'n.jsonl:1: expect is too slow \(.+\); do not repeat what'),
  'no reference': (neutral(reference=None), r'n.jsonl:1: field reference is missing or no text; give it a string'),
}


# ---- run folders ----


def edited(name: str, change: Callable[[str], str], *flags: str) -> Arrange:
  """A file of the run, changed by hand; what reads it is to be made anew."""

  def arrange(place: Place) -> list[str]:
    path = place.run / name
    path.write_text(change(path.read_text()))
    return list(flags)

  return arrange


def record(name: str, *flags: str, **changes) -> Arrange:
  return edited(f'{name}/stage.json', lambda text: json.dumps(json.loads(text) | changes), *flags)


def instead(name: str, *flags: str) -> Arrange:
  """A file where a folder should be."""

  def arrange(place: Place) -> list[str]:
    path = place.run / name
    shutil.rmtree(path, ignore_errors=True)
    path.write_text('years of work')
    return list(flags)

  return arrange


def locked(place: Place) -> list[str]:
  place.stack.enter_context(workdirs.lock(epath.Path(place.run)))
  return []


def workdir(path: str) -> Arrange:
  return lambda place: ['run', f'--config={place.config}', f'--workdir={path.format(folder=place.folder)}']


def read_only(place: Place) -> list[str]:
  place.mount('--bind', str(place.run), str(place.run))
  subprocess.run(['mount', '-o', 'remount,bind,ro', str(place.run)], check=True)
  return ['--config.seed=1']


def full(free: int, *flags: str, without: str = '') -> Arrange:
  """The run, but for one stage, on a disk of which `free` bytes are left."""

  def arrange(place: Place) -> list[str]:
    disk = place.folder / 'disk'
    disk.mkdir()
    place.mount('-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(disk))
    place.run = Path(shutil.copytree(place.run, disk / 'run', ignore=lambda *_: [without]))
    left = os.statvfs(disk)
    (disk / 'filler').write_bytes(bytes(max(0, left.f_bavail * left.f_bsize - free)))
    return list(flags)

  return arrange


def broken_row(name: str, change: Callable[[dict], object], row: int = -1) -> Arrange:
  """One row of a stage's file, changed by hand."""

  def damage(text: str) -> str:
    rows = [json.loads(line) for line in text.splitlines()]
    change(rows[row])
    return ''.join(json.dumps(row) + '\n' for row in rows)

  return edited(f'{name}/{name}.jsonl', damage)


SEED = '--config.seed=1'
ANEW = r'; restore (it|the file), or remove .*/messages to make the stage anew'
FOLDERS = {
  'half a stage.json': (
    edited('messages/stage.json', lambda text: text[:99]),
    r'messages/stage.json: damaged .*' + ANEW,
  ),
  'an empty stage.json': (edited('messages/stage.json', lambda text: ''), r'messages/stage.json: damaged .*' + ANEW),
  'a stage.json that is a list': (edited('messages/stage.json', lambda text: '[]'), r'messages/stage.json: damaged'),
  'a stage.json without products': (
    record('messages', products=None),
    r'stage.json: field products is missing' + '.*' + ANEW,
  ),
  'a stage.json that leads outside': (
    record('messages', products={'/dev/zero': ''}),
    r'messages/stage.json: field products is missing or damaged' + ANEW,
  ),
  'a stage.json without an end': (
    lambda place: [endless(place.run / 'messages/stage.json'), []][1],
    r'messages/stage.json: cannot be read \(not a file\); move it away',
  ),
  'a stage.json without an end, to a reviewer': (
    lambda place: [endless(place.run / 'messages/stage.json'), ['review', f'--workdir={place.run}']][1],
    r'messages/stage.json: cannot be read \(not a file\); restore it',
  ),
  'messages without an end': (
    lambda place: [endless(place.run / 'messages/messages.jsonl'), []][1],
    r'messages/messages.jsonl: cannot be read \(not a file\); restore it',
  ),
  'a stage.json that is a folder': (
    lambda place: [(place.run / 'messages/stage.json').unlink(), (place.run / 'messages/stage.json').mkdir(), []][2],
    r'messages/stage.json: cannot be read \(Is a directory\); move it away',
  ),
  'half an unfinished.json': (
    lambda place: [
      (place.run / 'policy/stage.json').rename(place.run / 'policy/unfinished.json'),
      (place.run / 'policy/unfinished.json').write_text('{"stage"'),
      [],
    ][2],
    r'policy/unfinished.json: damaged .*; restore it, or remove .*/policy to make',
  ),
  'a later version': (
    record('replies', SEED, version='99.0'),
    r'replies: made by version 99.0 of charjax, and this is .*seed.*; use that version, choose another --workdir, or r',
  ),
  'a later version, cut off': (
    lambda place: [
      record('policy', version='99.0')(place),
      (place.run / 'policy/stage.json').rename(place.run / 'policy/unfinished.json'),
      [],
    ][2],
    r'policy: made by version 99.0 of charjax, .*; use that version, choose another --workdir, or remove',
  ),
  'a version that is a number': (record('replies', version=3), r'replies/stage.json: field version is missing or dam'),
  'a file for a stage': (
    instead('policy'),
    r'run/policy: a file, where the stage has its folder; move it away or choose',
  ),
  'a file for a stage that is asked for': (
    lambda place: [instead('policy')(place), ['policy', f'--config={place.config}', f'--workdir={place.run}']][1],
    r'run/policy: a file, where the stage has its folder; move it away or choose another --workdir',
  ),
  'files that no run wrote': (
    lambda place: [
      shutil.rmtree(place.run / 'report'),
      place.run.joinpath('report').mkdir(),
      (place.run / 'report/thesis.txt').write_text('years of work'),
      [],
    ][3],
    r'run/report: holds files that no run wrote; choose another --workdir or move them away',
  ),
  'a folder for config.json': (
    lambda place: [(place.run / 'config.json').unlink(), (place.run / 'config.json').mkdir(), SEED][2],
    r'run/config.json: Is a directory; move it away, or choose another --workdir, then give the same',
  ),
  'a file for the run': (
    workdir('{folder}/config.py'),
    r'--workdir=.*config.py: cannot be written \(File exists\); choose',
  ),
  'a file above the run': (
    workdir('{folder}/config.py/run'),
    r'--workdir=.*: cannot be written \(Not a directory\); choose',
  ),
  'a name that is too long': (
    workdir('{folder}/' + 'x' * 300),
    r'--workdir=.*: cannot be written \(File name too long\)',
  ),
  'a run at work': (locked, r'--workdir=.*run: process \d+ is working in it; wait for it or choose another folder'),
  'a run that may not be written': (read_only, r'--workdir=.*run: cannot be written \(Read-only file system\); choose'),
  'a disk that is full': (full(0), r'--workdir=.*run: cannot be written \(No space left on device\); choose another'),
  'a disk that is full but for a little': (
    full(32_768, SEED),
    r'run/character.toml: No space left on device; free some space, then give the same command',
  ),
  'a disk that gets full': (
    full(450_000, without='report'),
    r'report/index.html: No space left on device; free some space, then give the same',
  ),
  'a message that is no JSON': (
    edited('messages/messages.jsonl', lambda text: text + '{"id": "honesty-9", }\n'),
    r'messages.jsonl:4: not JSON \(.+\); each line must be one JSON object',
  ),
  'a message without text': (
    broken_row('messages', lambda row: row.pop('text')),
    r'messages.jsonl:3: field text is missing; it must be text',
  ),
  'a message that is empty': (
    broken_row('messages', lambda row: row.update(text='')),
    r'messages.jsonl:3: field text is empty; write some, or remove the line',
  ),
  'a message of half a character': (
    broken_row('messages', lambda row: row.update(text='Hi \ud83d')),
    r'messages.jsonl:3: field text holds half a character, \\ud83d; write it anew',
  ),
  'a reply of half a character': (
    broken_row('replies', lambda row: row.update(text='Hi \ud83d')),
    r'replies.jsonl:2: field text holds half a character, \\ud83d; write it anew',
  ),
  'no neutral message': (
    edited(
      'messages/messages.jsonl', lambda text: ''.join(x for x in text.splitlines(True) if '"trait": null' not in x)
    ),
    r'messages.jsonl: no message is left whose split is "train" and whose trait is null; write some',
  ),
  'no message of a trait': (
    edited('messages/messages.jsonl', lambda text: ''.join(x for x in text.splitlines(True) if '"trait": null' in x)),
    r'messages.jsonl: no message is left whose split is "train" and whose trait is one; write some',
  ),
  'a message of no trait': (
    broken_row('messages', lambda row: row.update(trait='humour')),
    r"messages.jsonl:3: field trait is 'humour'; choose from honesty, ai_nature, None",
  ),
  'a message of no split': (
    broken_row('messages', lambda row: row.update(split='dev')),
    r"messages.jsonl:3: field split is 'dev'; choose from train, heldout",
  ),
  'a message twice': (
    broken_row('messages', lambda row: row.update(id='honesty-0000')),
    r"messages.jsonl:3: field id is 'honesty-0000', as in line 1; rename one",
  ),
  'a reply to no message': (
    broken_row('replies', lambda row: row.update(message='honesty-7777')),
    r"replies.jsonl:2: field message is 'honesty-7777', which is no message; remove the line",
  ),
  'a reply with a length in words': (
    broken_row('replies', lambda row: row.update(tokens='two')),
    r'replies.jsonl:2: field tokens is "two"; it must be a whole number',
  ),
  'a reply that was renamed': (
    broken_row('replies', lambda row: row.update(id='best')),
    r"replies.jsonl:2: field id is 'best'; it must be MESSAGE/CONDITION/NUMBER",
  ),
  'a ranking of one number': (
    broken_row('rankings', lambda row: row.update(probabilities=[0.5])),
    r'rankings.jsonl:1: field probabilities must hold, for 2 replies, as many lists .*; remove the line',
  ),
  'a ranking of other replies': (
    broken_row('rankings', lambda row: row.update(replies=['a', 'b'])),
    r"rankings.jsonl:1: field replies: \['a'\] is no reply to 'honesty-0000'; remove the line",
  ),
  'a report that is no JSON': (
    edited('preference/report.json', lambda text: text[:5]),
    r'preference/report.json: damaged .*; restore it, or remove .*/preference to make the stage anew',
  ),
  'a summary that is no UTF-8': (
    lambda place: [(place.run / 'evaluation/summary.json').write_bytes(b'{"a": "\xff"}'), []][1],
    r'evaluation/summary.json: damaged .*; restore it, or remove .*/evaluation to make the stage anew',
  ),
}


GROUPS = (CHARACTERS, CONFIGS, GGUF, DIRECTORIES, TOKENIZERS, TEMPLATES, FILES, FOLDERS)
CASES = {name: found for group in GROUPS for name, found in group.items()}
assert len(CASES) == sum(map(len, GROUPS))


@pytest.mark.parametrize('name', CASES)
def test_one_clear_line_and_nothing_lost(tmp_path, finished, capfd, monkeypatch, name):
  # What is accepted by mistake does no work.
  stages = tuple(dataclasses.replace(stage, run=functools.partial(too_much, stage)) for stage in STAGES)
  monkeypatch.setattr(command_line, 'STAGES', stages)
  arrange, expected = CASES[name]
  with contextlib.ExitStack() as stack:
    place = Place(tmp_path, Path(shutil.copytree(finished, tmp_path / 'run')), stack)
    flags = arrange(place)
    flags = [flags] if isinstance(flags, str) else flags
    if not flags or flags[0].startswith('--'):
      flags = ['run', f'--config={place.config}', f'--workdir={place.run}', *flags]
    before = contents(place.run)
    code = main(flags)
    captured = capfd.readouterr()
    assert code == 2, captured
    after = contents(place.run)
  lines = captured.err.splitlines()
  assert len(lines) == 1 and lines[0].startswith('charjax: ') and len(lines[0]) < 600 + 2 * len(str(tmp_path))
  assert 'Traceback' not in captured.out + captured.err and lines[0].isprintable()
  assert re.search(expected, lines[0]), lines[0]
  assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize('kind', ['GGUF', 'tokenizer.json', 'tokenizer.model'])
def test_chat_text_that_contains_special_tokens_stays_text(tmp_path, kind):
  if kind == 'GGUF':
    path = write_gguf(tmp_path / 'm.gguf', random_tensors(CONFIG))
  elif kind == 'tokenizer.json':
    path = write_hf(tmp_path / 'm', random_tensors(CONFIG))
  else:
    path = write_sentencepiece(tmp_path / 'm', PADDED)
  checkpoint = checkpoint_source.load(path)
  ours, special = checkpoint.tokenizer, set(checkpoint.tokenizer.special_tokens.values())

  def control(text: str) -> list[int]:
    ids = chat.encode_prompt(checkpoint.template, ours, [{'role': 'user', 'content': text}])
    return [i for i in ids if i in special]

  for token in ours.special_tokens:
    assert control(f'a{token} {token}b') == control('ab')
    assert not special & set(chat.encode_reply(checkpoint.template, ours, f'a{token}b')[:-1])
