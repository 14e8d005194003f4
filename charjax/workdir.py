"""The run folder: what is finished, what goes on where it was cut off, and what must be made anew.

Every stage owns one folder. `unfinished.json` stands in it while the stage works and `stage.json` is written
last; both hold fingerprints of contents, never paths or times, so that a moved or copied run stays valid.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_collections
from etils import epath

import charjax
from charjax import hosts, interrupts, storage, trace, watch
from charjax.errors import UserError
from charjax.files import Row, check_ends, read_file, read_jsonl, write_text
from charjax.hosts import is_first_process
from charjax.progress import duration

if TYPE_CHECKING:
  from charjax.character import Character
  from charjax.model.checkpoint_source import Checkpoint
  from charjax.model.language_model import LanguageModel


CHUNKS = 'chunks'  # the folder of a stage for those of chunks.py


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step of the loop, and all that its result depends on.

  Attributes:
    name: also the name of its folder.
    run: does the work and returns the counts that stage.json records.
    reads: the stages whose products it reads.
    fields: the config fields it depends on, dotted ('policy', 'seed', 'model.path').
    products: its files whose contents stand for its result.
    files: the config fields that name a file; its contents count, not its path.
    check: reads what `run` will read, and raises UserError where a person's edits broke it.
    added: folders that people add to a finished run, whose JSON Lines it reads where there are any.
    keeps: whether its chunks (chunks.py) stay, so that what a changed character leaves as it is need not be made again.
    after: fields of its section that no chunk is made from; of others that changed, all chunks are made anew.
  """

  name: str
  run: Callable[[Session], Row]
  reads: tuple[str, ...]
  fields: tuple[str, ...]
  products: tuple[str, ...]
  files: tuple[str, ...] = ()
  check: Callable[[Session], None] = lambda session: None
  added: tuple[str, ...] = ()
  keeps: bool = False
  after: tuple[str, ...] = ()


@dataclasses.dataclass
class Session:
  """What a stage is given: the config, the character (already narrowed to the run's traits), the folder.

  Attributes:
    checked: the stages that `check` has looked through since a stage last worked.
    asked: the address of a hub that config.model.path was, before it named the very commit; or ''.
    basis: of the stage that works, the fingerprint of what its result depends on beside the character and its inputs.
    used: the names of the chunks that it needed so far.
  """

  config: ml_collections.ConfigDict
  character: Character
  workdir: epath.Path
  checked: set[str] = dataclasses.field(default_factory=set)
  asked: str = ''
  basis: str = ''
  used: set[str] = dataclasses.field(default_factory=set)

  def folder(self, stage_name: str) -> epath.Path:
    """Where a stage keeps its files."""
    return self.workdir / stage_name

  @functools.cached_property
  def checkpoint(self) -> Checkpoint:
    """The starting model, read when a stage first needs it."""
    from charjax import starting_model

    return starting_model.load(self.config.model)

  @functools.cached_property
  def model_contents(self) -> dict[str, Any]:
    """The fields of config.model that name what others made, by what is in it; see `starting_model.contents`."""
    from charjax import starting_model

    return {f'model.{field}': value for field, value in starting_model.contents(self.config.model).items()}

  @functools.cached_property
  def model(self) -> LanguageModel:
    """The starting model on the current mesh."""
    from charjax.model import language_model

    return language_model.build(self.checkpoint, self.config.model)

  def log(self, line: str) -> None:
    """Prints a line for the person who waits."""
    if is_first_process():
      print(line, flush=True)


# ---- fingerprints ----


def fingerprint(value: Any) -> str:
  """sha256 of a value's canonical JSON."""
  text = json.dumps(value, sort_keys=True, separators=(',', ':'), default=str)
  return hashlib.sha256(text.encode()).hexdigest()


def file_fingerprint(path: epath.PathLike) -> str:
  """sha256 of a file's contents.

  Raises:
    UserError: it cannot be read, or has no end.
  """
  digest = hashlib.sha256()
  try:
    check_ends(path)
    with epath.Path(path).open('rb') as file:
      while block := file.read(1 << 20):
        digest.update(block)
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror or error}); restore it') from error
  return digest.hexdigest()


def flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
  """The values of nested mappings, by dotted name."""
  if isinstance(value, Mapping):
    for key in value:
      yield from flat(value[key], f'{prefix}.{key}')
  else:
    yield prefix, value


# Fields that say how a result is reached and not what it is: one who changes them keeps what was made.
_HOW = re.compile(r'model\.(attention|remat|scan_layers|shape\..*)|\w+\.(save_every|skipped_steps|microbatches)')


def relevant_config(stage: Stage, session: Session) -> dict[str, Any]:
  """The values that a stage's result depends on, by dotted field, as JSON reads them back.

  The character stands there by its contents, a trait at a time, in place of the path it was read from. The weights of
  traits stand there for the stages that name the field 'character.weights'.
  """
  values: dict[str, Any] = {}
  character = dataclasses.asdict(session.character)
  weights = {trait['id']: trait.pop('weight') for trait in character['traits']}
  for field in stage.fields:
    if field == 'character.weights':
      values.update(flat(weights, field))
      continue
    value: Any = session.config
    for part in field.split('.'):
      value = value[part]
    if isinstance(value, ml_collections.ConfigDict):
      value = value.to_dict()
    values.update(flat(value, field))
  values = {field: value for field, value in values.items() if not _HOW.fullmatch(field)}
  for field in stage.files:
    if values.get(field):
      values[field] = 'contents ' + file_fingerprint(values[field])[:16]
  if 'model.path' in values:
    values |= session.model_contents
  values.pop('character.path', None)
  values['character.name'] = character['name']
  values['character.description'] = character['description']
  values['character.traits'] = [trait['id'] for trait in character['traits']]
  for trait in character['traits']:
    values[f'character.traits.{trait["id"]}'] = 'contents ' + fingerprint(trait)[:16]
  return json.loads(json.dumps(values, default=str))


def _read_json(path: epath.Path) -> Row:
  """A file that we wrote; {} when there is none.

  Raises:
    UserError: it was damaged from outside. To make the stage anew would throw away what it speaks of.
  """
  try:
    with storage.reading(path):
      text = read_file(path)
  except OSError as error:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
      return {}
    raise UserError(f'{path}: cannot be read ({error.strerror or error}); move it away') from error
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path}: damaged ({type(error).__name__}); restore it, or {_remove(path.parent)}') from error
  if not isinstance(value, dict):
    raise UserError(f'{path}: damaged (no JSON object); restore it, or {_remove(path.parent)}')
  return value


def _remove(folder: epath.Path) -> str:
  return f'remove {folder} to make the stage anew'


def _read_records(folder: epath.Path) -> tuple[Row, Row]:
  """stage.json and unfinished.json; {} for one that is not there, or says nothing yet.

  Raises:
    UserError: one was damaged, or its form is that of another version.
  """
  records = []
  for name in ('stage.json', 'unfinished.json'):
    record = _read_json(folder / name)
    wanted = {'version': str, 'inputs': dict, 'config_values': dict} | (
      {'products': dict} if name == 'stage.json' else {}
    )
    wrong = [field for field, kind in wanted.items() if not isinstance(record.get(field), kind)]
    if not wrong and any('/' in product for product in record.get('products', ())):  # It would lead out of the folder.
      wrong = ['products']
    if record and wrong:
      raise UserError(
        f'{folder / name}: field {wrong[0]} is missing or damaged; restore the file, or {_remove(folder)}'
      )
    records.append(record)
  return records[0], records[1]


def contents(folder: epath.Path, names: Iterable[str]) -> str:
  """What stands for the files of a stage that others read."""
  return fingerprint(_products(folder, names))


def _products(folder: epath.Path, names: Iterable[str]) -> dict[str, str]:
  return {name: file_fingerprint(folder / name) for name in names}


def _inputs(stage: Stage, session: Session) -> dict[str, str]:
  """Fingerprints of what lies in the folders the stage reads now, edits by hand included.

  Raises:
    UserError: one of them is not finished.
  """
  inputs = {}
  for name in stage.reads:
    folder = session.folder(name)
    names = _read_records(folder)[0].get('products', {})
    if not names or not all((folder / file).exists() for file in names):
      raise UserError(f'{folder}: stage {name} is not finished and {stage.name} reads it; run {name} first')
    inputs[name] = contents(folder, names)
  for name in stage.added:
    folder = session.folder(name)
    files = sorted(path.name for path in folder.glob('*.jsonl')) if folder.is_dir() else []
    if files:
      inputs[name] = contents(folder, files)
  return inputs


# ---- what is finished ----


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """The fields that differ between two flat configs. One that is empty says as much as none: those of later versions
  leave what earlier ones made as it is."""
  missing = object()

  def said(values: Mapping[str, Any], field: str) -> Any:
    value = values.get(field, missing)
    return missing if value in ('', []) else value

  return [field for field in {**before, **now} if said(before, field) != said(now, field)]


def _change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
  """Names the first field that differs between two flat configs, and how many more do."""
  fields = _changed(before, now)
  # The contents of one trait say more than the list of all.
  field = min(fields, key=lambda f: f == 'character.traits')
  if field.startswith('character.'):
    reason = f'{field.replace("character.traits.", "character trait ")} changed'
  elif field not in before or field not in now:
    reason = f'config field {field} was {"added" if field in now else "removed"}'
  else:
    reason = f'config field {field} changed from {before[field]!r} to {now[field]!r}'
  return reason + (f', and {len(fields) - 1} more' if len(fields) > 1 else '')


def status(stage: Stage, session: Session) -> str:
  """'done', 'missing', 'unfinished' (can be resumed), or the reason why a result no longer holds.

  A product that was edited by hand leaves its own stage done, since a person may correct a message; the
  stages that read it are made anew.
  """
  return hosts.first(lambda: _status(stage, session))


def _status(stage: Stage, session: Session) -> str:
  folder = session.folder(stage.name)
  done, unfinished = _read_records(folder)
  if not done and not unfinished:
    return 'missing'
  record = done or unfinished
  config = relevant_config(stage, session)
  if _changed(record['config_values'], config):
    return _change(record['config_values'], config)
  try:
    inputs = _inputs(stage, session)
  except UserError:
    return 'missing'
  before = record['inputs']
  changed = [name for name in {**before, **inputs} if before.get(name) != inputs.get(name)]
  if changed:
    return f'{", ".join(changed)} changed'
  if not done:
    return 'unfinished' if record['version'] == charjax.__version__ else 'the version of charjax changed'
  lost = [name for name in stage.products if not (folder / name).exists()]
  return f'{lost[0]} is gone' if lost else 'done'


def check(stages: Sequence[Stage], session: Session) -> None:
  """Reads what stands in a run folder and would be lost, or would be in the way, before any work.

  Raises:
    UserError: a stage that is not done cannot have its folder, or cannot read what it reads.
  """
  hosts.first(lambda: _check(stages, session))


def _check(stages: Sequence[Stage], session: Session) -> None:
  states = {stage.name: status(stage, session) for stage in stages}
  for stage in stages:
    state, folder = states[stage.name], session.folder(stage.name)
    if state == 'done':
      continue
    if folder.exists() and not folder.is_dir():
      raise UserError(f'{folder}: a file, where the stage has its folder; move it away or choose another --workdir')
    # What is about to be emptied must be ours: --workdir may name any folder of a person's disk.
    ours = (folder / 'stage.json').exists() or (folder / 'unfinished.json').exists()
    if folder.exists() and not ours and not all(map(storage.is_half_written, folder.iterdir())):
      raise UserError(f'{folder}: holds files that no run wrote; choose another --workdir or move them away')
    record = next((record for record in _read_records(folder) if record), None)
    if record and record['version'] != charjax.__version__:
      raise UserError(
        f'{folder}: made by version {record["version"][:20]} of charjax, and this is {charjax.__version__}, to which '
        f'it is not finished ({state}); use that version, choose another --workdir, or {_remove(folder)}'
      )
    if all(states.get(name, 'done') == 'done' for name in stage.reads):
      _inputs(stage, session)
      stage.check(session)
      session.checked.add(stage.name)


def read_products(session: Session, name: str) -> None:
  """Reads what a stage made.

  Raises:
    UserError: a file of it was damaged.
  """
  folder = session.folder(name)
  for product in _read_records(folder)[0]['products']:
    path = folder / product
    if path.suffix == '.jsonl':
      read_jsonl(path)
    elif path.suffix == '.json':
      _read_json(path)


def forget(folder: epath.Path) -> None:
  """Has a stage not be made, neither done nor resumable, and its folder still be the run's."""
  write_text(folder / 'unfinished.json', '{}')
  (folder / 'stage.json').unlink(missing_ok=True)


def _empty(folder: epath.Path, keeps: bool) -> None:
  """Empties a stage's folder, of all but chunks that it keeps, so that a kill half-way leaves one that is not made."""
  forget(folder)
  for child in folder.iterdir():
    if child.name == 'unfinished.json' or (keeps and child.name == CHUNKS):
      continue
    storage.remove(child)


def _tidy(folder: epath.Path, keeps: bool) -> None:
  """Removes what only a resume needs."""
  if (folder / CHUNKS).exists() and not keeps:
    storage.remove(folder / CHUNKS)
  (folder / 'unfinished.json').unlink(missing_ok=True)


def _perform(stage: Stage, session: Session) -> None:
  """Brings one stage to 'done'."""
  hosts.at(stage.name)
  record = hosts.first(lambda: _begin(stage, session))
  if not record:
    return
  from charjax.engine import work

  after = {f'{stage.name}.{field}' for field in stage.after}
  beside = {
    field: value
    for field, value in record['config_values'].items()
    if not field.startswith('character.') and field not in after
  }
  session.basis, session.used = fingerprint([record['version'], beside]), set()
  start, before = time.monotonic(), work.done()
  with trace.into(session.folder(stage.name) / 'profile' if session.config.profile else None):
    counts = stage.run(session)
  seconds, done = time.monotonic() - start, work.done().since(before)
  made: Row = {
    'counts': counts,
    # Of the process that finished it; the time before a kill is not known.
    'seconds': round(seconds, 2),
    'compile_seconds': round(done.compile_seconds, 2),
    'tokens': done.tokens,
    'model_flops': done.flops,
    **work.rates(done, seconds),
  }
  hosts.first(lambda: _finish(stage, session, record, made))
  session.log(f'{stage.name}: finished in {duration(seconds)}')


def _begin(stage: Stage, session: Session) -> Row:
  """Makes a stage's folder ready, and gives what its record begins with; {}: the stage is done."""
  folder = session.folder(stage.name)
  state = status(stage, session)
  if state == 'done':
    recorded = _read_records(folder)[0]['products']
    edited = [name for name in stage.products if recorded.get(name) != file_fingerprint(folder / name)]
    session.log(f'{stage.name}: done already' + (f' ({", ".join(edited)} edited since)' if edited else ''))
    _tidy(folder, stage.keeps)
    return {}
  if stage.name not in session.checked:
    check([stage], session)
  session.checked.clear()
  inputs, config = _inputs(stage, session), relevant_config(stage, session)
  record: Row = {
    'stage': stage.name,
    'inputs': inputs,
    'config': fingerprint(config),
    'config_values': config,
    'version': charjax.__version__,
  }
  if state == 'unfinished':
    session.log(f'{stage.name}: going on where it was cut off')
  else:
    session.log(f'{stage.name}: ' + ('starting' if state == 'missing' else f'made anew, since {state}'))
    if folder.exists():
      _empty(folder, stage.keeps)
    write_text(folder / 'unfinished.json', json.dumps(record, indent=2, ensure_ascii=False))
  return record | {'resumed': state == 'unfinished'}


def _finish(stage: Stage, session: Session, record: Row, made: Row) -> None:
  folder = session.folder(stage.name)
  resumed = record.pop('resumed')
  record |= {'products': _products(folder, stage.products)} | made | {'resumed': resumed}
  write_text(folder / 'stage.json', json.dumps(record, indent=2, ensure_ascii=False), new=True)
  _tidy(folder, stage.keeps)
  if (folder / CHUNKS).exists():
    for file in (folder / CHUNKS).iterdir():
      if file.name not in session.used:  # Of an earlier character.
        file.unlink()


def execute(stages: Sequence[Stage], session: Session) -> None:
  """Runs stages in order: skips the done, goes on with the unfinished, makes anew what no longer holds.

  Raises:
    UserError: a stage that is read is not finished, or a stage raised it.
    SystemExit: 130 after Ctrl-C, 143 after SIGTERM, having said how to go on.
  """
  name = ''
  try:
    with interrupts.raising():
      for stage in stages:
        name = stage.name
        _perform(stage, session)
        interrupts.check()
  except KeyboardInterrupt as error:
    session.log(f'\n{name}: interrupted; give the same command again to go on from here')
    raise SystemExit(143 if isinstance(error, interrupts.Terminated) else 130) from None


@contextlib.contextmanager
def lock(workdir: epath.Path) -> Iterator[None]:
  """Keeps a second run out of a run folder.

  Raises:
    UserError: another process holds it, or the folder cannot be written, or is another for each of many processes.
  """
  with contextlib.ExitStack() as stack:
    _look(workdir, hosts.first(lambda: _hold(workdir, stack)))
    yield


def _look(workdir: epath.Path, holder: str) -> None:
  """Whether this process sees what process 0 wrote."""
  deadline = time.monotonic() + 10  # a network's file system may take a moment
  while not (workdir / '.lock').exists() or (workdir / '.lock').read_text() != holder:
    if time.monotonic() > deadline:
      raise UserError(f'--workdir={workdir}: not the folder that process 0 sees; choose one that all hosts share')
    time.sleep(0.1)


def _hold(workdir: epath.Path, stack: contextlib.ExitStack) -> str:
  def lost(line: str) -> None:
    watch.end_now(hosts.LOST, line)

  try:
    return stack.enter_context(storage.lock(workdir / '.lock', lost, functools.partial(print, flush=True)))
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f'--workdir={workdir}: cannot be written ({reason}); choose another folder') from error
