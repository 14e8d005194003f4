"""Adapters in the format of PEFT: a folder of adapter_config.json and adapter_model.safetensors.

There a linear layer [O, I] has a lora_A [R, I] and a lora_B [O, R], and lora_alpha / R times their product is added to
it (https://github.com/huggingface/peft, tuners/lora). Layers may differ in rank and scale, and some may have none.
Where a family keeps several projections in one layer, they share an adapter.

Letters: L layers, I inputs, O outputs, R rank.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (gives numpy the bfloat16 that safetensors asks it for)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from charjax.errors import UserError, one_line
from charjax.model.config import ModelConfig
from charjax.model.families import tensor_names
from charjax.model.huggingface import FLOATS, read_json
from charjax.model.lora import Arrays, sizes

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'

_READ = ('peft_type', 'r', 'lora_alpha', 'rank_pattern', 'alpha_pattern', 'use_rslora', 'init_lora_weights')
# What tells how an adapter was trained or where it came from. Which layers it is for is seen from its tensors.
_MEANS_NOTHING = (
  *('auto_mapping', 'base_model_name_or_path', 'revision', 'task_type', 'inference_mode', 'peft_version'),
  *('lora_dropout', 'target_modules', 'exclude_modules', 'layers_to_transform', 'layers_pattern', 'eva_config'),
  *('megatron_core', 'qalora_group_size', 'runtime_config', 'ensure_weight_tying'),
)
# All other fields, also those of versions to come, change what is computed unless they have one of these values.
_NEUTRAL: tuple[Any, ...] = (None, False, 'none', '', [], {})
# First values that leave the base model's weights as they are; others (pissa, olora, loftq) take from them what they
# put into the adapter.
_INITS = (None, True, False, 'gaussian', 'orthogonal', 'eva')


class _Module(NamedTuple):
  """A linear layer of the base model: its name with {layer}, inputs, and which projections its outputs are, in turn."""

  name: str
  inputs: int
  outputs: dict[str, int]


def _modules(config: ModelConfig, family: str) -> list[_Module]:
  """The linear layers that adapters can stand beside."""
  names, found = tensor_names(family), dict[str, _Module]()
  for ours, (inputs, outputs) in sizes(config).items():
    name = names[f'blocks.{ours}'].removesuffix('.weight')
    found.setdefault(name, _Module(name, inputs, {})).outputs[ours] = outputs
  return list(found.values())


# ---- out ----


def write(adapter: Arrays, config: ModelConfig, family: str, folder: str | Path, base_name: str) -> None:
  """Writes an adapter so that `peft.PeftModel.from_pretrained` loads it beside the model that it was trained on.

  Args:
    adapter: by projection, a [L, I, R] and b [L, R, O].
    config: the model's shape.
    family: its model_type, which names its layers.
    folder: where to; made if it is not there.
    base_name: what PEFT is to take for the model when it is given none: a path or a name.
  """
  tensors: dict[str, np.ndarray] = {}
  ranks: dict[str, int] = {}
  for module in _modules(config, family):
    pairs = {
      ours: (_float32(adapter[ours]['a']), _float32(adapter[ours]['b'])) for ours in module.outputs if ours in adapter
    }
    if not pairs:
      continue
    rank = sum(a.shape[2] for a, _ in pairs.values())
    ranks[module.name.rpartition('.')[2]] = rank
    for layer in range(config.num_layers):
      # Side by side, each projection's ranks reach its own outputs alone.
      lora_a = np.concatenate([a[layer].T for a, _ in pairs.values()])
      lora_b = np.zeros((sum(module.outputs.values()), rank), np.float32)
      row = column = 0
      for ours, size in module.outputs.items():
        if ours in pairs:
          b = pairs[ours][1][layer]
          lora_b[row : row + size, column : column + len(b)] = b.T
          column += len(b)
        row += size
      name = _PREFIX + module.name.format(layer=layer)
      tensors |= {f'{name}.lora_A.weight': lora_a, f'{name}.lora_B.weight': lora_b}
  usual = max(ranks.values(), key=[*ranks.values()].count)
  others = {name: rank for name, rank in ranks.items() if rank != usual}
  said = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base_name,
    'inference_mode': True,
    'target_modules': list(ranks),
    'r': usual,
    'rank_pattern': others,
    # The scale alpha / r is in the weights already: it is 1.
    'lora_alpha': usual,
    'alpha_pattern': others,
    'lora_dropout': 0.0,
    'bias': 'none',
  }
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / f'.{WEIGHTS}.tmp')
  os.replace(folder / f'.{WEIGHTS}.tmp', folder / WEIGHTS)
  (folder / f'.{CONFIG}.tmp').write_text(json.dumps(said, indent=2) + '\n', encoding='utf-8')
  os.replace(folder / f'.{CONFIG}.tmp', folder / CONFIG)


def _float32(array: Any) -> np.ndarray:
  return np.asarray(array).astype(np.float32, copy=False)


# ---- in ----


def read(folder: str | Path, config: ModelConfig, family: str) -> dict[str, dict[str, np.ndarray]]:
  """Reads an adapter as PEFT saves it.

  Args:
    folder: of adapter_config.json and adapter_model.safetensors.
    config: the shape of the model that it stands beside.
    family: that model's model_type.

  Returns:
    By projection, a [L, I, R] and b [L, R, O] in float32, with the scale in b. Where layers differ in rank, R is the
    largest of them; a layer without an adapter has zeros.

  Raises:
    UserError: a file is missing or damaged, does not fit the model, or computes something that is not supported.
  """
  folder = Path(folder)
  said = _settings(folder / CONFIG)
  tensors = _tensors(folder)
  modules = _modules(config, family)
  places = {m.name.format(layer=layer): (m, layer) for m in modules for layer in range(config.num_layers)}
  found: dict[str, dict[str, np.ndarray]] = {}
  for name, value in tensors.items():
    match = re.fullmatch(r'base_model\.model\.(.+)\.lora_([AB])\.weight', name)
    if not match or match[1] not in places:
      raise UserError(
        f'{folder / WEIGHTS}: tensor {name[:120]!r} is no adapter of a projection that a {family} decoder of this '
        'shape can have one for; was it made for another model, or with adapters of embeddings, heads or experts?'
      )
    found.setdefault(match[1], {})[match[2]] = value
  if not found:
    raise UserError(f'{folder / WEIGHTS}: it holds no adapter; was it saved to the end?')
  ranks: dict[str, int] = {}
  for name, pair in found.items():
    module, _ = places[name]
    rank = _rank(folder, name, module, pair, said)
    for ours in module.outputs:
      ranks[ours] = max(rank, ranks.get(ours, 0))
  out: dict[str, dict[str, np.ndarray]] = {}
  for ours, (inputs, outputs) in sizes(config).items():
    if ours in ranks:
      a, b = (config.num_layers, inputs, ranks[ours]), (config.num_layers, ranks[ours], outputs)
      out[ours] = {'a': np.zeros(a, np.float32), 'b': np.zeros(b, np.float32)}
  for name, pair in found.items():
    module, layer = places[name]
    rank, row = len(pair['A']), 0
    lora_b = _scale(folder, name, rank, said) * pair['B']
    for ours, size in module.outputs.items():
      out[ours]['a'][layer, :, :rank] = pair['A'].T
      out[ours]['b'][layer, :rank] = lora_b[row : row + size].T
      row += size
  return out


def _settings(path: Path) -> dict[str, Any]:
  """What adapter_config.json says, once all that is not read here is known to change nothing."""
  said = read_json(path, what='the folder of a PEFT adapter')
  if said.get('peft_type') != 'LORA':
    raise UserError(f"{path}: field peft_type is {str(said.get('peft_type'))[:40]!r}; only 'LORA' is supported")
  if said.get('init_lora_weights') not in _INITS:
    raise UserError(
      f'{path}: field init_lora_weights is {str(said["init_lora_weights"])[:40]!r}, which changes the weights of the '
      'base model too and is not supported; convert it to plain LoRA (path_initial_model_for_weight_conversion)'
    )
  for field, value in said.items():
    # 0 and 0.0 count as False here: what they are of is not used.
    if field not in (*_READ, *_MEANS_NOTHING) and value not in _NEUTRAL:
      raise UserError(f'{path}: field {field[:40]} = {str(value)[:60]!r} is not supported; only plain LoRA is read')
  for field in ('r', 'lora_alpha'):
    said[field] = _number(path, field, said.get(field, 8))
  for field in ('rank_pattern', 'alpha_pattern'):
    patterns = said.get(field) or {}
    if not isinstance(patterns, dict):
      raise UserError(f'{path}: field {field} is {str(patterns)[:40]!r}; it must be an object')
    said[field] = {_pattern(path, field, key): _number(path, field, value) for key, value in patterns.items()}
  if not isinstance(said.get('use_rslora') or False, bool):
    raise UserError(f'{path}: field use_rslora is {str(said["use_rslora"])[:40]!r}; it must be true or false')
  return said


def _number(path: Path, field: str, value: Any) -> float:
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**31:
    raise UserError(f'{path}: field {field} says {str(value)[:40]!r}; it must be a number above 0')
  return value


def _pattern(path: Path, field: str, key: str) -> re.Pattern[str]:
  """A name or an expression, as PEFT reads it; one that repeats something could take for ever to search."""
  if set(key) & set('*+?{'):
    raise UserError(f'{path}: field {field} has an expression {key[:60]!r}; only names of modules are supported')
  try:
    return re.compile(rf'(.*\.)?({key})$')
  except re.error as error:
    raise UserError(f'{path}: field {field} has {key[:60]!r}, which is no expression ({one_line(error)})') from error


def _tensors(folder: Path) -> dict[str, np.ndarray]:
  path = folder / WEIGHTS
  if not path.exists() and (folder / 'adapter_model.bin').exists():
    raise UserError(f'{folder / "adapter_model.bin"}: pickled weights are not read; save the adapter as safetensors')
  out = {}
  try:
    with safe_open(path, framework='numpy') as file:
      for name in file.keys():  # noqa: SIM118  (not a mapping)
        if (kind := file.get_slice(name).get_dtype()) not in FLOATS:
          raise UserError(f'{path}: tensor {name[:80]!r} is {kind}; only {", ".join(FLOATS)} are read')
        out[name] = file.get_tensor(name).astype(np.float32)
  except (OSError, SafetensorError) as error:
    raise UserError(f'{path}: missing or damaged ({one_line(error)}); fetch it again') from error
  return out


def _rank(folder: Path, name: str, module: _Module, pair: Mapping[str, np.ndarray], said: Mapping[str, Any]) -> int:
  """The rank of a layer's adapter, whose shapes must be those of the layer."""
  where = f'{folder / WEIGHTS}: {name}'
  for part in 'AB':
    if part not in pair:
      raise UserError(f'{where}: tensor lora_{part} is missing; was it saved to the end?')
  rank = _first(said['rank_pattern'], name, said['r'])
  for part, wanted in (('A', (rank, module.inputs)), ('B', (sum(module.outputs.values()), rank))):
    if pair[part].shape != wanted:
      raise UserError(
        f'{where}: lora_{part} has shape {pair[part].shape}, but {CONFIG} and the model say {wanted}; was it made for '
        'another model?'
      )
  return len(pair['A'])


def _scale(folder: Path, name: str, rank: int, said: Mapping[str, Any]) -> np.float32:
  """alpha / r, or with use_rslora alpha / sqrt(r) (Kalajdzievski 2023, eq. 4)."""
  alpha = _first(said['alpha_pattern'], name, said['lora_alpha'])
  return np.float32(alpha / (math.sqrt(rank) if said.get('use_rslora') else rank))


def _first(patterns: Mapping[re.Pattern[str], float], name: str, otherwise: float) -> float:
  return next((value for pattern, value in patterns.items() if pattern.match(name)), otherwise)
