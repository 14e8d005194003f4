"""A run's config: the defaults, changed by a Python file, by what stands behind its name, and by flags."""

import difflib
import inspect
import operator
import re
import traceback
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_flags

from charjax import defaults
from charjax.errors import UserError


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
  config = defaults.get_config()
  config.lock()
  merge(config, _execute_config(path, argument), path, '')
  return override(config, [*(f'--config.{word}' for word in words), *changes])


def _execute_config(path: str, argument: str | None) -> ml_collections.ConfigDict:
  """Calls get_config() of a Python file; whatever goes wrong in there is the file's mistake."""
  try:
    source = epath.Path(path).read_text()
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'--config={path}: cannot be read ({reason}); check the path') from error
  namespace: dict[str, Any] = {'__file__': path, '__name__': 'charjax_config'}
  try:
    exec(compile(source, path, 'exec'), namespace)
    function = namespace.get('get_config')
    if not callable(function):
      raise UserError(f'{path}: has no function get_config; see configs/quickstart.py')
    arguments = () if argument is None else (argument,)
    try:
      inspect.signature(function).bind(*arguments)
    except TypeError:
      wants = 'takes no argument' if arguments else 'needs an argument, --config=FILE.py:ARGUMENT'
      raise UserError(f'{path}: get_config {wants}') from None
    except ValueError:  # A builtin has no signature.
      pass
    config = function(*arguments)
  except UserError:
    raise
  except SyntaxError as error:
    raise UserError(f'{path}:{error.lineno or 1}: {error.msg}; mend the line') from error
  except (Exception, SystemExit) as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())
    short = reason if len(reason) < 200 else reason[:200] + '...'
    raise UserError(f'{path}:{lines[-1] if lines else 1}: {short}') from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(f'{path}: get_config returned {type(config).__name__}; it must return a ConfigDict')
  return config


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
