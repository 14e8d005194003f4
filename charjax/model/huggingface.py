"""Reads a Hugging Face directory: config.json, safetensors, tokenizer.json or tokenizer.model, chat template."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy the bfloat16 that safetensors asks it for)
import numpy as np
from safetensors import SafetensorError, safe_open

from charjax.errors import UserError, one_line
from charjax.files import read_file
from charjax.model import sentencepiece
from charjax.model.chat import ChatTemplate
from charjax.model.checkpoint_source import Checkpoint, Index, Tensors, assemble
from charjax.model.config import ModelConfig
from charjax.model.families import from_hf, tensor_names
from charjax.model.tokenizer import Tokenizer, from_tokenizer_json

FLOATS = ('F64', 'F32', 'F16', 'BF16')
_WEIGHTS, _INDEX = 'model.safetensors', 'model.safetensors.index.json'
# All that is read but the weights; no model has all of them.
TEXT = (
  'config.json', 'generation_config.json', 'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json',
  'special_tokens_map.json', 'added_tokens.json', 'chat_template.jinja', _INDEX,
)  # fmt: skip


def read(path: str, fetch: Callable[[Sequence[str]], object] = lambda names: None) -> Checkpoint:
  """A checkpoint as transformers saves it, one file or sharded, of any family of charjax.model.families.

  Args:
    path: the directory.
    fetch: called before the files of the weights are opened, with their names, when all else was found right.

  Raises:
    UserError: a file is missing, damaged, or of a kind that is not supported.
  """
  folder = Path(path)
  raw = read_json(folder / 'config.json')
  where = str(folder / 'config.json')
  if raw.get('quantization_config'):
    raise UserError(f'{where}: quantization_config is not supported; use an unquantised checkpoint')
  config = from_hf(raw, where)
  template, tokenizer = _text(folder, raw, config)
  family = raw['model_type']
  tensors = _tensors(folder, config, family, fetch)
  return Checkpoint(config, tensors, tokenizer, template, family, source=str(folder))


def _tensors(folder: Path, config: ModelConfig, family: str, fetch: Callable[[Sequence[str]], object]) -> Tensors:
  files: dict[str, Any] = {}
  shapes: dict[str, tuple[int, ...]] = {}
  for shard in _shards(folder, fetch):
    try:
      # Left open, that is mapped into memory, until the last of its tensors has been read.
      file = safe_open(shard, framework='numpy')
      for name in file.keys():  # noqa: SIM118  (not a mapping)
        stored = file.get_slice(name)
        if (kind := stored.get_dtype()) not in FLOATS:
          raise UserError(f'{shard}: tensor {name[:80]!r} is {kind}; only {", ".join(FLOATS)} are read')
        files[name], shapes[name] = file, tuple(stored.get_shape())
    except (OSError, SafetensorError) as error:
      raise UserError(f'{shard}: missing or damaged ({one_line(error)}); fetch it again') from error
  names = tensor_names(family)
  # Rotary frequencies follow from the config; a tied head is the embedding once more.
  ignored = [name for name in shapes if name.endswith('.rotary_emb.inv_freq')]
  if config.tied_embeddings:
    ignored.append(names['head'])

  def tensor(_: str, file_name: str, part: Index) -> np.ndarray:
    try:
      return files[file_name].get_slice(file_name)[part]
    except (OSError, SafetensorError) as error:
      raise UserError(f'{folder}: tensor {file_name} cannot be read ({one_line(error)}); fetch it again') from error

  return assemble(config, str(folder), names, shapes, tensor, ignored, family)


def _shards(folder: Path, fetch: Callable[[Sequence[str]], object]) -> list[Path]:
  single, index = folder / _WEIGHTS, folder / _INDEX
  if not index.exists():
    fetch([_WEIGHTS])
  if single.exists():
    return [single]
  if not index.exists():
    raise UserError(f'{single}: no such file, nor {index.name}; convert other formats to safetensors first')
  weight_map = read_json(index).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(f'{index}: field weight_map is missing; fetch it again')
  for name in weight_map.values():
    # The index comes with the checkpoint: it must not lead out of its folder.
    if not isinstance(name, str) or Path(name).name != name or name == '..':
      raise UserError(f'{index}: shard {str(name)[:80]!r} is not a plain file name; fetch the checkpoint again')
  names = sorted(set(weight_map.values()))
  fetch(names)
  return [folder / name for name in names]


def _text(folder: Path, raw: Mapping[str, Any], config: ModelConfig) -> tuple[ChatTemplate, Tokenizer]:
  """Chat template and tokenizer; the end of a turn is looked up in everything that names one."""
  # Before it was one file, the special tokens stood in a second.
  settings = read_json(folder / 'special_tokens_map.json', optional=True)
  settings |= read_json(folder / 'tokenizer_config.json', optional=True)
  generation = read_json(folder / 'generation_config.json', optional=True)
  eos_ids = [*_ids(generation, 'eos_token_id', folder), *_ids(raw, 'eos_token_id', folder)]
  bos, eos, pad = (_token(settings.get(f'{name}_token')) for name in ('bos', 'eos', 'pad'))
  path = folder / 'tokenizer.json'
  model = None
  if not path.exists():
    path = folder / 'tokenizer.model'
    if not path.exists():
      raise UserError(f'{folder}: neither tokenizer.json nor tokenizer.model is there; fetch the one that it came with')
    model = sentencepiece.read(str(path))
    bos, eos = bos or model.bos, eos or model.eos
  source, where = _template_source(folder, settings)
  try:
    template = ChatTemplate(source, bos, eos)
    reply_end = template.reply_end
  except UserError as error:
    raise UserError(f'{where}: {error}') from error
  if model is None:
    tokenizer = from_tokenizer_json(str(path), eos_ids, eos, pad, reply_end)
  else:
    added, special = _added_tokens(folder, settings)
    tokenizer = sentencepiece.make(
      model,
      str(path),
      added,
      special=special,
      eos_ids=eos_ids,
      eos=eos,
      pad=pad,
      template=source,
      reply_end=reply_end,
      spaced=_spaced(settings),
    )
  if tokenizer.vocab_size > config.vocab_size:
    raise UserError(
      f'{path}: {tokenizer.vocab_size} tokens, but {config.vocab_size} embeddings (field vocab_size of config.json); '
      f'wrong file? Fetch the one that came with these weights'
    )
  return template, tokenizer


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, int], set[str]]:
  """Tokens that stand beside a tokenizer.model, with their ids, and which tokens are special."""
  where = folder / 'added_tokens.json'
  added = read_json(where, optional=True)
  special = {_token(settings.get(f'{name}_token')) for name in ('bos', 'eos', 'unk', 'pad')}
  for field in ('additional_special_tokens', 'extra_special_tokens'):
    more = settings.get(field)
    special |= {
      _token(t) for t in (more.values() if isinstance(more, dict) else more if isinstance(more, list) else [])
    }
  described = settings.get('added_tokens_decoder')
  if described:
    where = folder / 'tokenizer_config.json'
    try:
      added |= {token['content']: int(i) for i, token in described.items()}
      special |= {token['content'] for token in described.values() if token.get('special')}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise UserError(f'{where}: field added_tokens_decoder is damaged ({one_line(error)}); fetch it again') from error
  for token, i in added.items():
    if not isinstance(token, str) or not token or isinstance(i, bool) or not isinstance(i, int) or i < 0:
      raise UserError(f'{where}: added token {str(token)[:40]!r} has id {str(i)[:40]}; fetch it again')
  return added, special


def _spaced(settings: Mapping[str, Any]) -> str:
  """Which runs of plain text a tokenizer.model puts a space before; see `sentencepiece.make`."""
  if settings.get('add_prefix_space') is False:
    return 'never'
  # Where nothing is said, as the library itself does and versions of transformers before 5.
  return 'first' if settings.get('legacy') is False else 'always'


def _template_source(folder: Path, settings: Mapping[str, Any]) -> tuple[str, Path]:
  path = folder / 'chat_template.jinja'
  if path.exists():
    try:
      return read_file(path).decode(), path
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f'{path}: cannot be read ({one_line(error)}); fetch it again') from error
  path = folder / 'tokenizer_config.json'
  source = settings.get('chat_template')
  if isinstance(source, list):
    # Several templates, told apart by name.
    source = {t.get('name'): t.get('template') for t in source if isinstance(t, dict)}.get('default')
  if not isinstance(source, str):
    raise UserError(f'{path}: no chat template here, nor a chat_template.jinja; use an instruct model')
  return source, path


def _token(value: Any) -> str:
  """A special token of tokenizer_config.json: a string, or an object that holds it."""
  if isinstance(value, dict):
    value = value.get('content')
  return value if isinstance(value, str) else ''


def _ids(settings: Mapping[str, Any], field: str, folder: Path) -> list[int]:
  value = settings.get(field)
  ids = value if isinstance(value, list) else [] if value is None else [value]
  if not all(isinstance(i, int) for i in ids):
    raise UserError(f'{folder}: {field} is {str(value)[:40]}; it must be a token id or a list of them')
  return ids


def read_json(path: Path, optional: bool = False, what: str = 'a Hugging Face checkpoint directory') -> dict[str, Any]:
  """The object in a JSON file of `what`; {} where it is optional and not there.

  Raises:
    UserError: it is missing, or holds something else.
  """
  if optional and not path.exists():
    return {}
  try:
    content = json.loads(read_file(path))
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}; is this {what}?') from error
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path}: not valid JSON ({one_line(error)}); fetch it again') from error
  if not isinstance(content, dict):
    raise UserError(f'{path}: a JSON object is expected there; fetch it again')
  return content
