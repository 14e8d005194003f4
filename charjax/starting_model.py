"""What a run starts from: a checkpoint, or the policy of another run, with adapters in its weights.

config.model.path and the entries of config.model.adapters may name the folder of a run: it stands for the policy that
it trained. Of a run that is given as a path, that is all its weights; of one that is given as an adapter, its LoRA.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_collections
from etils import epath

from charjax import defaults, limits, storage
from charjax.errors import UserError, one_line
from charjax.files import read_file
from charjax.workdir import file_fingerprint, fingerprint

if TYPE_CHECKING:
  import numpy as np

  from charjax.model.checkpoint_source import Checkpoint, Tensors
  from charjax.model.config import ModelConfig
  from charjax.model.lora import Arrays


def check(model: ml_collections.ConfigDict) -> None:
  """Whether what config.model names is there, and what it needs; what is in it is checked when it is read.

  Raises:
    UserError: it is not.
  """
  check_path(model.path, 'config.model.path=')
  check_quantize(model)
  for place, _ in _entries(model.adapters):
    if read_record(place) is None and (storage.is_bucket(place) or not (place / 'adapter_config.json').exists()):
      raise UserError(
        f'config.model.adapters: {place}: neither a PEFT adapter nor a run is there; give the folder of an '
        'adapter_config.json, or that of a run'
      )


def check_quantize(model: ml_collections.ConfigDict) -> None:
  """Whether what quantises weights is installed, where config.model asks for it.

  Raises:
    UserError: it is not.
  """
  if model.quantize and importlib.util.find_spec('qwix') is None:
    raise UserError("config.model.quantize needs qwix, which is not installed; run: pip install 'charjax[quantize]'")


def check_path(path: str, field: str = '') -> None:
  """Whether a model or a run is there.

  Raises:
    UserError: beginning with `field`: it is not.
  """
  from charjax.model import hub
  from charjax.model.checkpoint_source import EMBEDDED, RANDOM

  if hub.is_address(path):
    hub.check(path)
    return
  if storage.is_bucket(path):
    if read_record(path) is None:
      raise UserError(f'{field}{path}: no run was begun there; models of other kinds are read from this machine alone')
    return
  if path in (EMBEDDED, RANDOM) or os.path.lexists(os.path.join(path, 'config.json')):
    return
  if os.path.isdir(path) or not os.path.exists(path):
    what = 'neither a model nor a run folder' if os.path.isdir(path) else 'no such file or directory'
    raise UserError(
      f'{field}{path}: {what}; give {EMBEDDED}, a .gguf file, a Hugging Face directory or a run folder{hub.hint(path)}'
    )


def load(model: Mapping[str, Any]) -> Checkpoint:
  """Opens what config.model says.

  Raises:
    UserError: something is missing, damaged or does not fit, or a run starts from itself.
  """
  return _load(model, ())


def contents(model: Mapping[str, Any]) -> dict[str, Any]:
  """What stands for fields of config.model where results are compared: of runs and adapters the contents, so that it
  counts neither where they lie nor what they are called.

  Raises:
    UserError: one of their files cannot be read.
  """
  return _contents(model, ())


def read_record(folder: epath.PathLike) -> ml_collections.ConfigDict | None:
  """The config that a run was started with; None if the folder is not a run's."""
  from charjax.model import hub

  if hub.is_address(os.fspath(folder)):  # epath would look into it where it is.
    return None
  folder = storage.place(os.fspath(folder)) if storage.is_bucket(folder) else epath.Path(folder)
  try:
    with storage.reading(folder):
      record = json.loads(read_file(folder / 'config.json'))
  except OSError:
    return None
  except (ValueError, RecursionError) as error:
    raise UserError(
      f'{folder / "config.json"}: not valid JSON ({one_line(error)}); fetch it again or restore it'
    ) from error
  # A Hugging Face checkpoint has a config.json, too.
  found = record.get('config') if isinstance(record, dict) else None
  return ml_collections.ConfigDict(found) if isinstance(found, dict) else None


def read_run(folder: epath.PathLike) -> ml_collections.ConfigDict:
  """The config that a run was started with.

  Raises:
    UserError: the folder is not a run's.
  """
  record = read_record(folder)
  if record is None:
    raise UserError(f'{folder}: no run was begun there; give the folder of a run')
  return record


def read_asked(folder: epath.PathLike) -> tuple[str, str]:
  """The address of a hub that a run was asked to start from, and the same with the commit; '' where there is none."""
  try:
    record = json.loads(read_file(epath.Path(folder) / 'config.json'))
    return str(record['asked']), str(record['config']['model']['path'])
  except (OSError, ValueError, TypeError, KeyError, RecursionError):  # Damage is told where the record is needed.
    return '', ''


def check_apart(model: ml_collections.ConfigDict, workdir: epath.Path) -> None:
  """Whether a run in this folder would leave what it starts from as it is.

  Raises:
    UserError: it starts from its own folder.
  """
  from charjax.model import hub

  start = [] if hub.is_address(model.path) else [epath.Path(model.path)]
  for folder in (*start, *(place for place, _ in _entries(model.adapters))):
    if storage.absolute(folder) == storage.absolute(workdir):
      raise UserError(f'--workdir={workdir}: a run cannot start from its own folder; choose another --workdir')


def check_trained(folder: epath.Path, remedy: str = 'run charjax policy') -> None:
  """Whether a run has trained its policy.

  Raises:
    UserError: ending in `remedy`: it has not.
  """
  if not (folder / 'policy' / 'stage.json').exists():
    raise UserError(f'{folder}: its policy is not trained to the end; {remedy}')


# ---- runs ----


def _load(model: Mapping[str, Any], through: Sequence[epath.Path]) -> Checkpoint:
  """`load`, by way of the runs `through`."""
  from charjax.model import checkpoint_source, lora

  record = read_record(model['path'])
  if record is None:
    start = checkpoint_source.load(model['path'])
  else:
    start = _policy(epath.Path(model['path']), record, through)
  adapters = [(weight, _adapter(place, start)) for place, weight in _entries(model['adapters'])]
  return dataclasses.replace(start, tensors=lora.add(start.tensors, adapters)) if adapters else start


def _policy(folder: epath.Path, record: ml_collections.ConfigDict, through: Sequence[epath.Path]) -> Checkpoint:
  """The checkpoint that a run's policy is: what it started from, with its trained weights or its LoRA."""
  from charjax.model import lora
  from charjax.model.checkpoint_source import Tensors

  model, through = _model_of(folder, record, through)
  trained = _trained(folder)
  start = _load(model, through)
  if all(f'decoder.{name}' in trained for name in start.tensors):
    tensors = Tensors(start.tensors.keys(), lambda name, dtype: trained.read(f'decoder.{name}', dtype))
  else:
    tensors = lora.add(_as_kept(start, model), [(1.0, _lora(folder, trained, start.config))])
  return dataclasses.replace(start, tensors=tensors)


def _as_kept(start: Checkpoint, model: ml_collections.ConfigDict) -> Tensors:
  """What a run started from as it was kept, and its LoRA trained beside it: rounded to its type, or quantised."""
  from charjax.model import quantized
  from charjax.model.blocks import block_parameters
  from charjax.model.checkpoint_source import Tensors, read_tensor

  parameters = block_parameters(start.config)
  small = {f'blocks.{name}': parameters[name].inputs for name in start.config.dense_projections if model.quantize}

  def read(name: str, dtype: Any) -> np.ndarray:
    if name in small:
      return quantized.rounded(start.tensors[name], small[name], model.quantize).astype(dtype)
    return read_tensor(start.tensors, name, model.dtype).astype(dtype)

  return Tensors(start.tensors.keys(), read)


def _model_of(
  folder: epath.Path, record: ml_collections.ConfigDict, through: Sequence[epath.Path]
) -> tuple[ml_collections.ConfigDict, Sequence[epath.Path]]:
  """The config.model of a run, and the runs that led there, itself included."""
  where = storage.absolute(folder)
  if where in through:
    raise UserError(f'{folder}: the run starts from itself; set model.path in {folder / "config.json"} to its model')
  model = defaults.get_config().model
  found = record.get('model')
  for field in found if isinstance(found, ml_collections.ConfigDict) else ():
    if field in model:
      try:
        model[field] = found[field]
      except TypeError as error:
        raise UserError(
          f'{folder / "config.json"}: field model.{field} is {str(found[field])[:40]!r}; restore the file'
        ) from error
  for field in ('dtype', 'quantize'):
    if model[field] not in limits.CHOICES[f'model.{field}']:
      raise UserError(f'{folder / "config.json"}: field model.{field} is {model[field][:40]!r}; restore the file')
  return model, (*through, where)


def _trained(folder: epath.Path) -> Any:
  from charjax.training.checkpoint import read_trained

  check_trained(folder)
  return read_trained(folder / 'policy' / 'checkpoints')


def _lora(folder: epath.Path, trained: Mapping[str, np.ndarray], config: ModelConfig) -> Arrays:
  """The adapter of a run, which must fit this model."""
  from charjax.model.lora import sizes

  if not any(name.startswith('adapter.') for name in trained):
    raise UserError(
      f'{folder}: this run trained all parameters and has no LoRA (config.policy.lora_rank is 0); it can be the '
      'config.model.path of another, but no adapter'
    )
  arrays = {}
  for target, (inputs, outputs) in sizes(config).items():
    if {f'adapter.{target}.a', f'adapter.{target}.b'} <= trained.keys():
      a, b = trained[f'adapter.{target}.a'], trained[f'adapter.{target}.b']
      if a.shape != (config.num_layers, inputs, a.shape[-1]) or b.shape != (config.num_layers, a.shape[-1], outputs):
        raise UserError(f'{folder}: the LoRA of this run does not fit the model; it was trained beside another')
      arrays[target] = {'a': a, 'b': b}
  return arrays


# ---- adapters ----


def _adapter(place: epath.Path, start: Checkpoint) -> Arrays:
  """The adapter that a folder holds: PEFT's, or a run's LoRA alone."""
  from charjax.model import peft

  if read_record(place) is None:
    return peft.read(place, start.config, start.family)
  return _lora(place, _trained(place), start.config)


def _entries(adapters: Sequence[str]) -> list[tuple[epath.Path, float]]:
  """The places and weights of config.model.adapters: 'path', or 'path:weight'."""
  out = []
  for entry in adapters:
    if not isinstance(entry, str) or not entry:
      raise UserError(f'config.model.adapters names {entry!r}; give folders, each with :WEIGHT behind it or without')
    path, colon, text = entry.rpartition(':')
    try:
      weight = float(text) if colon else 1.0
    except ValueError:
      path, weight = '', 1.0
    if not math.isfinite(weight):
      raise UserError(f'config.model.adapters={entry}: the weight must be a number')
    out.append((epath.Path(os.path.expanduser(path or entry)), weight))
  return out


# ---- contents ----


def _contents(model: Mapping[str, Any], through: Sequence[epath.Path]) -> dict[str, Any]:
  """`contents`, by way of the runs `through`."""
  path, record = model['path'], read_record(model['path'])
  if record is not None:
    folder = epath.Path(path)
    theirs, through = _model_of(folder, record, through)
    start = _contents(theirs, through) | {'dtype': theirs.dtype, 'quantize': theirs.quantize}
    path = 'contents ' + fingerprint([start, _of_files(folder / 'policy' / 'fingerprint.json')])[:16]
  adapters = []
  for place, weight in _entries(model['adapters']):
    names = ('adapter_config.json', 'adapter_model.safetensors')
    files = [place / name for name in names] if read_record(place) is None else [place / 'policy' / 'fingerprint.json']
    adapters.append(f'contents {_of_files(*files)[:16]}:{weight}')
  return {'path': path, 'adapters': adapters}


def _of_files(*paths: epath.Path) -> str:
  return fingerprint([file_fingerprint(path) for path in paths])
