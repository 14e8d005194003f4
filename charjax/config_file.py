"""A run's config: the defaults, changed by a Python file, by what stands behind its name, and by flags; and sweeps,
Python files that yield changes of a config, one trial each.
"""

import contextlib
import dataclasses
import difflib
import inspect
import operator
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_flags

from charjax import defaults
from charjax.errors import UserError
from charjax.files import read_file

_TRIAL_NAME = re.compile(r'[A-Za-z0-9][\w.=,+-]{0,79}', re.ASCII)  # of a folder


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What a sweep asks for.

  Attributes:
    name: of the sweep and the config that it varies, as a folder may be called.
    base: the --config of every trial.
    changes: --config.field=value arguments of every trial.
    trials: by name, the further ones of each; of a search none.
    search: of a search, what asks an Optuna trial for the further ones of a run, and what says of the summary of an
      evaluation how good it is.
  """

  name: str
  base: str
  changes: Sequence[str]
  trials: Mapping[str, Sequence[str]]
  search: tuple[Callable[[Any], list[str]], Callable[[Mapping[str, Any]], float]] | None = None


def nearest(word: str, words: Sequence[str]) -> str:
  found = difflib.get_close_matches(word, words, n=1)
  return f'; did you mean {found[0]}?' if found else f'; there are {", ".join(words)}'


def read_config(spec: str, changes: Sequence[str]) -> ml_collections.ConfigDict:
  """The defaults, changed by the config file, by what stands behind its name, and by the flags.

  Args:
    spec: FILE.py[:argument][,field=value...].
    changes: --config.field=value arguments.

  Raises:
    UserError: the file fails, or a field is unknown or has the wrong type.
  """
  path, argument, behind = _split(spec)
  config = defaults.get_config()
  config.lock()
  merge(config, _call_config(_execute(path), path, argument), path, '')
  return override(config, [*behind, *changes])


def read_sweep(spec: str, changes: Sequence[str]) -> Sweep:
  """A sweep over a config, which its file is given.

  Args:
    spec: SWEEP.py[:config][,field=value...]; the config is a FILE.py with what may stand behind it, or the name of one
      in the folder above the sweep's; 'quickstart' by default.
    changes: --config.field=value arguments.

  Raises:
    UserError: a file fails, a trial has no name that a folder may have, or a field is unknown or has the wrong type.
  """
  path, argument, behind = _split(spec)
  base = argument or 'quickstart'
  if '.py' not in base:
    base = str(epath.Path(path).parent.parent / f'{base}.py')
    if not epath.Path(base).exists():
      raise UserError(f'--config={spec}: there is no {base} to vary; name a config, as in {path}:FILE.py')
  shared = [*behind, *changes]
  config = read_config(base, shared)
  name = '-'.join(epath.Path(_split(part)[0]).stem for part in (spec, base))
  namespace = _execute(path)
  if 'get_search' in namespace:
    return Sweep(name, base, shared, {}, _searching(namespace, path, config))
  trials: dict[str, list[str]] = {}
  for trial, fields in _call_sweep(namespace, path, config):
    if not _TRIAL_NAME.fullmatch(str(trial)) or trial in (*trials, 'comparison'):
      reason = 'is there twice, or taken' if _TRIAL_NAME.fullmatch(str(trial)) else 'cannot name a folder'
      raise UserError(f'{path}: trial {str(trial)[:90]!r} {reason}; use other letters, digits, or one of ._=,+-')
    trials[trial] = _as_changes(fields)
  if not trials:
    raise UserError(f'{path}: get_sweep yields no trial')
  return Sweep(name, base, shared, trials)


def _as_changes(fields: Mapping[str, Any]) -> list[str]:
  """As flags say it."""
  values = {
    field: ','.join(map(str, value)) if isinstance(value, (tuple, list)) else value for field, value in fields.items()
  }
  return [f'--config.{field}={value}' for field, value in values.items()]


def _split(spec: str) -> tuple[str, str | None, list[str]]:
  """The file that --config names, its argument, and what is changed behind it, as --config.field=value."""
  match = re.fullmatch(r'(.+?\.py)(?:[:,](.*))?', spec, re.DOTALL)
  if not match:
    raise UserError(f'--config={spec}: not a Python file; give FILE.py')
  path, behind = match.groups()
  # Commas inside brackets belong to a value, as in mesh=(1,2,4).
  words = re.split(r',(?![^(\[{]*[)\]}])', behind) if behind else []
  argument = words.pop(0) if words and '=' not in words[0] else None
  for word in words:
    if '=' not in word:
      raise UserError(f'--config={spec}: {word} is no field=value')
  return path, argument, [f'--config.{word}' for word in words]


def _execute(path: str) -> dict[str, Any]:
  """What a Python file defines."""
  try:
    source = read_file(path).decode()
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'--config={path}: cannot be read ({reason}); check the path') from error
  namespace: dict[str, Any] = {'__file__': path, '__name__': 'charjax_config'}
  with _told(path):
    exec(compile(source, path, 'exec'), namespace)
  return namespace


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
  """Whatever goes wrong in a file that is executed is the file's mistake."""
  try:
    yield
  except UserError:
    raise
  except SyntaxError as error:
    raise UserError(f'{path}:{error.lineno or 1}: {error.msg}; mend the line') from error
  except (Exception, SystemExit) as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())
    short = reason if len(reason) < 200 else reason[:200] + '...'
    raise UserError(f'{path}:{lines[-1] if lines else 1}: {short}') from error


def _call_config(namespace: Mapping[str, Any], path: str, argument: str | None) -> ml_collections.ConfigDict:
  function = namespace.get('get_config')
  if not callable(function):
    is_sweep = 'get_sweep' in namespace or 'get_search' in namespace
    more = 'it is a sweep: charjax sweep' if is_sweep else 'see configs/quickstart.py'
    raise UserError(f'{path}: has no function get_config; {more}')
  arguments = () if argument is None else (argument,)
  try:
    inspect.signature(function).bind(*arguments)
  except TypeError:
    wants = 'takes no argument' if arguments else 'needs an argument, --config=FILE.py:ARGUMENT'
    raise UserError(f'{path}: get_config {wants}') from None
  except ValueError:  # A builtin has no signature.
    pass
  with _told(path):
    config = function(*arguments)
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f'{path}: get_config returned {type(config).__name__}; it must return a ConfigDict')
  return config


def _call_sweep(
  namespace: Mapping[str, Any], path: str, config: ml_collections.ConfigDict
) -> list[tuple[str, Mapping[str, Any]]]:
  function = namespace.get('get_sweep')
  if not callable(function):
    raise UserError(f'{path}: has no function get_sweep; see configs/sweeps/kl.py')
  with _told(path):
    trials = list(function(config))
  for trial in trials:
    if not (isinstance(trial, tuple) and len(trial) == 2 and isinstance(trial[1], Mapping)):
      raise UserError(f'{path}: get_sweep yields {str(trial)[:60]!r}; it must yield (name, {{"some.field": value}})')
  return trials


def _searching(
  namespace: Mapping[str, Any], path: str, config: ml_collections.ConfigDict
) -> tuple[Callable[[Any], list[str]], Callable[[Mapping[str, Any]], float]]:
  search, judge = namespace['get_search'], namespace.get('get_value')
  if not callable(search) or not callable(judge):
    raise UserError(f'{path}: a search takes two functions, get_search and get_value; see configs/sweeps/search.py')

  def suggest(trial: Any) -> list[str]:
    with _told(path):
      return _as_changes(search(config, trial))

  def value(summary: Mapping[str, Any]) -> float:
    with _told(path):
      return float(judge(summary))

  return suggest, value


def merge(config: ml_collections.ConfigDict, changes: ml_collections.ConfigDict, where: str, prefix: str) -> None:
  """Sets the fields of `changes` in `config`, which knows all fields and their types."""
  for key in changes:
    if key not in config:
      raise UserError(f'{where}: there is no config field {prefix}{key}{nearest(key, sorted(config))}')
    try:
      value, default = changes[key], config[key]
      if isinstance(value, ml_collections.ConfigDict) and isinstance(default, ml_collections.ConfigDict):
        merge(default, value, where, f'{prefix}{key}.')
      elif value is None and default is not None:
        raise UserError(f'{where}: config field {prefix}{key} is None; give a {type(default).__name__}')
      else:
        config[key] = value
    except (TypeError, ValueError) as error:
      wanted = config.get_type(key).__name__
      raise UserError(f'{where}: config field {prefix}{key} is {changes[key]!r}; give a {wanted}') from error


def override(config: ml_collections.ConfigDict, changes: Sequence[str]) -> ml_collections.ConfigDict:
  """Applies --config.field=value arguments, with the types that the config has; of two, the last counts."""
  latest: dict[str, list[str]] = {}
  tuples = {}
  for change in changes:
    name, _, value = change.partition('=')
    field = re.sub(r'^--?(no)?config\.', '', name)
    default: Any = config
    for part in field.split('.'):
      if not isinstance(default, ml_collections.ConfigDict) or part not in default:
        hint = nearest(part, sorted(default)) if isinstance(default, ml_collections.ConfigDict) else ''
        raise UserError(f'{change}: there is no config field {field}{hint}')
      default = default[part]
    if isinstance(default, ml_collections.ConfigDict):
      raise UserError(f'{change}: {field} is a section; set one of its fields: {", ".join(sorted(default))}')
    latest[field] = [change]
    if isinstance(default, tuple):
      tuples[field] = default
      # config_flags gathers a tuple from repeated flags: a,b becomes one flag each.
      if not value.strip():
        latest[field] = [f'{name}=()']
      elif not re.search(r'[(\[\'"]', value):
        latest[field] = [f'{name}={word.strip()}' for word in value.split(',')]
  character = config.character.path
  values = flags.FlagValues()
  values.set_gnu_getopt(True)
  # config_flags looks in its sys_argv for the fields to define, and absl then parses the same arguments.
  arguments = ['charjax', *(argument for arguments in latest.values() for argument in arguments)]
  try:
    config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=arguments)
    values(arguments)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, SyntaxError) as error:
    raise UserError(f'config: {error}') from error
  if values.config.character.path != character and 'character.traits' not in latest:
    # Those that the file chose are another character's.
    values.config.character.traits = ()
  for field, default in tuples.items():
    value = operator.attrgetter(field)(values.config)
    if default and not all(type(item) is type(default[0]) for item in value):
      raise UserError(f'--config.{field}: {value!r} is not like {default!r}, which it replaces')
  return values.config
