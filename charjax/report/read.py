"""What a run folder holds, read for the report: missing pieces are empty, broken ones are a UserError."""

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from charjax import stages
from charjax.character import parse_choice
from charjax.errors import UserError
from charjax.files import read_file, read_jsonl
from charjax.workdir import contents

STAGES = tuple(stage.name for stage in stages.STAGES if stage.name != 'report')
# The fields of a run that say what training did: old ones would be taken for those of what is there now.
_EFFECTS = {
  'evaluation': ('summary', 'evaluation_replies', 'margins'),
  'behaviour': ('behaviour', 'behaviour_replies'),
}
CONDITIONS = ('base', 'prompted', 'prompted_examples', 'trained')

# Control characters (line breaks and tabs apart) and halves of surrogate pairs can neither be shown nor
# always be written as UTF-8; both occur in what a small model samples.
_UNPRINTABLE = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]')


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean with its 95% interval; low and high are None where the file holds a bare number."""

  mean: float
  low: float | None = None
  high: float | None = None
  n: int | None = None

  def side_of(self, reference: float) -> int:
    """1 or -1 when the whole interval lies above or below the reference, 0 when it does not say."""
    if self.low is not None and self.low > reference:
      return 1
    if self.high is not None and self.high < reference:
      return -1
    return 0


@dataclasses.dataclass(frozen=True)
class Run:
  """The parts of a run folder that the report shows, as parsed JSON; empty where there is none.

  `config` has the settings that its finished stages were made with, whatever a later command was given. `outdated` are
  the stages that were made from what others held before these were made anew; of those, effects are left out.
  """

  name: str
  character: Mapping[str, Any]
  config: Mapping[str, Any]
  stages: Mapping[str, Mapping[str, Any]]
  messages: list[dict[str, Any]]
  replies: list[dict[str, Any]]
  rankings: list[dict[str, Any]]
  audit: Mapping[str, Any]
  preference: Mapping[str, Any]
  preference_metrics: list[dict[str, Any]]
  policy_metrics: list[dict[str, Any]]
  choice: Mapping[str, Any]
  samples: list[dict[str, Any]]
  summary: Mapping[str, Any]
  evaluation_replies: list[dict[str, Any]]
  margins: list[dict[str, Any]]
  behaviour: Mapping[str, Any]
  behaviour_replies: Sequence[Mapping[str, Any]]
  outdated: Sequence[str] = ()

  @property
  def traits(self) -> list[dict[str, Any]]:
    """The traits of this run in the character's order, then those only the evaluation knows (id alone)."""
    written = [trait for trait in listed(self.character, 'traits') if isinstance(trait, dict) and trait.get('id')]
    # A run may train some of a character's traits; every stage records which.
    chosen = next((listed(section(stage, 'config_values'), 'character.traits') for stage in self.stages.values()), [])
    asked = dict(parse_choice(str(entry)) for entry in listed(section(self.config, 'config', 'character'), 'traits'))
    chosen = chosen or list(asked)
    # The file's own weight, unless the run was given another.
    weights = {name: {'weight': weight} for name, weight in asked.items() if weight is not None}
    written = [trait | weights.get(trait['id'], {}) for trait in written if not chosen or trait['id'] in chosen]
    known = {trait['id'] for trait in written}
    return written + [{'id': name} for name in section(self.summary, 'traits') if name not in known]


def read_run(workdir: epath.PathLike) -> Run:
  """Reads a run folder.

  Raises:
    UserError: there is no such folder, or one of its files is not what its name says.
  """
  root = epath.Path(workdir)
  if not root.is_dir():
    raise UserError(f'{root}: no such run folder; give --workdir the folder that a run wrote')
  made = {name: stage for name in STAGES if (stage := _object(root / name / 'stage.json'))}
  outdated = _outdated(root, made)
  run = Run(
    name=root.name,
    character=_toml(root / 'character.toml'),
    config=_object(root / 'config.json'),
    stages=made,
    messages=_lines(root / 'messages' / 'messages.jsonl'),
    replies=_lines(root / 'replies' / 'replies.jsonl'),
    rankings=_lines(root / 'rankings' / 'rankings.jsonl'),
    audit=_object(root / 'rankings' / 'audit.json'),
    preference=_object(root / 'preference' / 'report.json'),
    preference_metrics=_lines(root / 'preference' / 'metrics.jsonl', appended=True),
    policy_metrics=_lines(root / 'policy' / 'metrics.jsonl', appended=True),
    choice=_object(root / 'policy' / 'choice.json'),
    samples=_lines(root / 'policy' / 'samples.jsonl'),
    summary=_object(root / 'evaluation' / 'summary.json'),
    evaluation_replies=_lines(root / 'evaluation' / 'replies.jsonl'),
    margins=_lines(root / 'evaluation' / 'margins.jsonl'),
    behaviour=_object(root / 'behaviour' / 'summary.json'),
    behaviour_replies=_lines(root / 'behaviour' / 'replies.jsonl'),
    outdated=outdated,
  )
  run = without(run, [name for name in outdated if name in _EFFECTS])
  return dataclasses.replace(run, config=_as_made(run))


def without(run: Run, effects: Sequence[str]) -> Run:
  """The run as if its evaluation or behaviour stages had not been made."""
  empty = {field: type(getattr(run, field))() for name in effects for field in _EFFECTS[name]}
  return dataclasses.replace(run, **empty, stages={n: stage for n, stage in run.stages.items() if n not in effects})


def _outdated(root: epath.Path, made: Mapping[str, Any]) -> list[str]:
  """The finished stages that were made from what others held before these were made anew or put right by hand."""
  found: list[str] = []

  def is_other(name: str, fingerprint_then: Any) -> bool:
    folder, files = root / name, section(made, name, 'products')
    # With a slash it would lead out of the folder, to a device that has no end, say.
    if not files or not all('/' not in file and (folder / file).exists() for file in files):
      return (folder / 'unfinished.json').exists()
    return fingerprint_then not in (None, contents(folder, files))

  for stage in stages.STAGES:
    inputs = section(made, stage.name, 'inputs')
    if stage.name in made and any(name in found or is_other(name, inputs.get(name)) for name in stage.reads):
      found.append(stage.name)
  return found


def _as_made(run: Run) -> dict[str, Any]:
  """config.json with the settings that finished stages were made with, where it was given others since."""
  config = {
    name: dict(values) if isinstance(values, Mapping) else values
    for name, values in section(run.config, 'config').items()
  }
  seed = run.config.get('seed')
  files = {field for stage in stages.STAGES for field in stage.files}
  for stage in run.stages.values():
    for field, value in section(stage, 'config_values').items():
      first, _, name = field.partition('.')
      if field == 'seed':
        config['seed'] = seed = value
      # Traits, models and files are recorded by what they hold, not by how they were named.
      elif first not in ('character', 'model') and field not in files and name and isinstance(config.get(first), dict):
        config[first][name] = value
  return {**run.config} | ({'config': config, 'seed': seed} if config else {})


def cut_off(run: Run) -> list[str]:
  """The finished stages that were cut off and gone on with: of their time, what was before is not known."""
  return [stage for stage in STAGES if section(run.stages, stage).get('resumed') is True]


def section(parent: Any, *path: str) -> dict[str, Any]:
  """The mapping found along `path`, or an empty one."""
  for key in path:
    parent = parent.get(key) if isinstance(parent, Mapping) else None
  return dict(parent) if isinstance(parent, Mapping) else {}


def seconds(run: Run) -> dict[str, float]:
  """What each finished stage took, in their order."""
  found = {stage: finite(section(run.stages, stage).get('seconds')) for stage in STAGES}
  return {stage: value for stage, value in found.items() if value is not None}


def listed(parent: Mapping[str, Any], key: str) -> list[Any]:
  """The list under `key`, or an empty one."""
  value = parent.get(key)
  return value if isinstance(value, list) else []


def estimate(value: Any) -> Estimate | None:
  """`{mean, low, high, n}` or a bare number as an Estimate; None for null, NaN and anything else."""
  if isinstance(value, Mapping):
    mean = finite(value.get('mean'))
    n = value.get('n')
    if mean is None:
      return None
    return Estimate(mean, finite(value.get('low')), finite(value.get('high')), n if isinstance(n, int) else None)
  mean = finite(value)
  return None if mean is None else Estimate(mean)


def finite(value: Any) -> float | None:
  """The value where it is a finite number, else None."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  try:
    return float(value) if math.isfinite(value) else None
  except OverflowError:  # A whole number of hundreds of digits.
    return None


def printable(text: str) -> str:
  """The text with every character that cannot be shown replaced by U+FFFD."""
  return _UNPRINTABLE.sub('\ufffd', text.replace('\r\n', '\n').replace('\r', '\n'))


def _clean(value: Any) -> Any:
  if isinstance(value, str):
    return printable(value)
  if isinstance(value, dict):
    return {printable(str(key)): _clean(item) for key, item in value.items()}
  if isinstance(value, list):
    return [_clean(item) for item in value]
  return value


def _text(path: epath.Path) -> str:
  if not path.exists():
    return ''
  try:
    return read_file(path).decode('utf-8')
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror or error}); restore it') from error
  except UnicodeDecodeError as error:
    raise UserError(f'{path}: not UTF-8 text (byte {error.start}); write it anew') from error


def _object(path: epath.Path) -> dict[str, Any]:
  text = _text(path)
  if not text:
    return {}
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path}: not JSON ({error}); restore it, or run the stage that writes it again') from error
  if not isinstance(value, dict):
    raise UserError(f'{path}: holds no JSON object; run the stage that writes it again')
  return _clean(value)


def _lines(path: epath.Path, appended: bool = False) -> list[dict[str, Any]]:
  return _clean(read_jsonl(path, appended=appended)) if path.exists() else []


def _toml(path: epath.Path) -> dict[str, Any]:
  try:
    return _clean(tomllib.loads(_text(path)))
  except (ValueError, RecursionError) as error:  # Whole numbers of thousands of digits, and deep nesting, too.
    raise UserError(f'{path}: not readable as TOML ({error}); copy the character file here again') from error
