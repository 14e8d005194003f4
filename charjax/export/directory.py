"""A Hugging Face directory, written whole or not at all: config.json, weights, tokenizer, chat template, model card."""

import contextlib
import dataclasses
import errno
import fnmatch
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

import charjax
from charjax.errors import UserError, one_line
from charjax.files import read_file, write_text
from charjax.model import save
from charjax.model.chat import encode_prompt
from charjax.model.checkpoint_source import Checkpoint, Layout
from charjax.model.config import ModelConfig
from charjax.model.families import tensor_names
from charjax.model.huggingface import read_json
from charjax.model.to_hf import check_says, class_name, norm_shift, to_hf
from charjax.model.tokenizer import to_tokenizer_json

_REWARD_MODULE = 'modeling_charjax_reward'
# A checkpoint's own, copied as they are.
_TEXT_FILES = (
  'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
  'chat_template.jinja', 'vocab.json', 'merges.txt',
)  # fmt: skip
_WRITTEN = (*_TEXT_FILES, 'config.json', 'generation_config.json', 'README.md', f'{_REWARD_MODULE}.py')
_WEIGHTS = ('model.safetensors', 'model.safetensors.index.json', 'model-*-of-*.safetensors')
# What a config.json says of where it lay, and of code and files that do not come along.
_LEFT_OUT = ('_name_or_path', 'auto_map', 'dtype', 'torch_dtype', 'transformers_version')


@dataclasses.dataclass(frozen=True)
class Model:
  """What is exported.

  Attributes:
    kind: 'policy', 'start', 'preference' or 'judge'.
    config: its shape: of a preference model, its trunk's.
    get: the name of a tensor to its array, of numpy or JAX, stacked over layers.
    head: of a preference model, the directions [N, D]; else None.
    traits: of a preference model, the ids of its N traits.
  """

  kind: str
  config: ModelConfig
  get: Callable[[str], Any]
  head: np.ndarray | None = None
  traits: Sequence[str] = ()


def write(folder: epath.Path, model: Model, checkpoint: Checkpoint, dtype: str, card: str) -> None:
  """Writes all files of an export.

  Args:
    folder: an empty folder.
    model: what is exported.
    checkpoint: the starting model, whose family, tokenizer and chat template it shares.
    dtype: 'float32' or 'bfloat16'.
    card: README.md.

  Raises:
    UserError: a config.json cannot say what the model is, or a file of the checkpoint leads out of its folder.
  """
  said = _model_config(checkpoint, model.config)
  shift = norm_shift(said, model.config)
  if model.head is None:
    config = said
    generation = _generation_config(checkpoint)
    write_text(folder / 'generation_config.json', json.dumps(generation, indent=2) + '\n')
  else:
    config = _reward_config(said, model, checkpoint)
    write_text(folder / f'{_REWARD_MODULE}.py', Path(__file__).with_name(f'{_REWARD_MODULE}.py').read_text())
  record = {'version': charjax.__version__, 'model': model.kind}
  config |= {'torch_dtype': dtype, 'charjax': record}
  write_text(folder / 'config.json', json.dumps(config, indent=2, ensure_ascii=False) + '\n')
  write_text(folder / 'README.md', card)
  _write_text_files(folder, checkpoint)

  # A preference model has no use for what reads the next token.
  shape = model.config if model.head is None else dataclasses.replace(model.config, tied_embeddings=True)
  layout = Layout(shape, tensor_names(checkpoint.family))
  shifts = {name: shift for name in layout.shapes if shift and name.endswith('norm')}
  tensors = list(save.to_stored(layout, model.get, save.DTYPES[dtype], shifts))
  if model.head is not None:
    head = model.head.astype(np.float32)
    tensors.append(save.Stored('traits.weight', head.shape, head.dtype, lambda: head))
  save.write(folder, tensors)


# ---- config.json ----


def _model_config(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Any]:
  """The config.json of a model of the checkpoint's family, or of its lower layers: its own where it has one."""
  if not checkpoint.source:
    return to_hf(config, checkpoint.family, checkpoint.rope) | _token_ids(checkpoint)
  where = Path(checkpoint.source) / 'config.json'
  said = {key: value for key, value in read_json(where).items() if key not in _LEFT_OUT}
  said |= {'architectures': [class_name(checkpoint.family)], 'num_hidden_layers': config.num_layers}
  for field in ('layer_types', 'no_rope_layers'):
    if isinstance(said.get(field), list):
      said[field] = said[field][: config.num_layers]
  check_says(said, config, str(where))
  return said


def _reward_config(said: dict[str, Any], model: Model, checkpoint: Checkpoint) -> dict[str, Any]:
  trunk = {key: value for key, value in said.items() if key not in ('architectures', 'charjax')}
  return {
    # A model type of its own: as llama's it would load without its code, and score something else.
    'model_type': 'charjax_reward',
    'architectures': ['CharacterRewardModel'],
    'auto_map': {
      'AutoConfig': f'{_REWARD_MODULE}.CharacterRewardConfig',
      'AutoModelForSequenceClassification': f'{_REWARD_MODULE}.CharacterRewardModel',
    },
    'id2label': {str(i): trait for i, trait in enumerate(model.traits)},
    'label2id': {trait: i for i, trait in enumerate(model.traits)},
    'problem_type': 'regression',
    'reply_header': reply_header(checkpoint),
    'turn_ends': list(checkpoint.tokenizer.eos_ids),
    'pad_token_id': checkpoint.tokenizer.pad_id,
    'trunk': trunk,
  }


def reply_header(checkpoint: Checkpoint) -> list[int]:
  """The ids that stand before every reply: what prompts end with, whatever was asked.

  Raises:
    UserError: the template writes nothing there, or only what ends turns.
  """
  asked = [
    encode_prompt(checkpoint.template, checkpoint.tokenizer, [{'role': 'user', 'content': text}])
    for text in ('Hi', 'What is it?', 'Take the time', 'It is 12', 'Do you know')  # which end in nothing alike
  ]
  header: list[int] = []
  for tokens in zip(*(reversed(ids) for ids in asked), strict=False):
    if len(set(tokens)) > 1:
      break
    header.insert(0, tokens[0])
  if all(token in checkpoint.tokenizer.eos_ids for token in header):
    raise UserError('chat template: it writes nothing before a reply by which one could be found; use another template')
  return header


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
  """Generation ends where the policy was taught to end; all else is the checkpoint's own."""
  ids = _token_ids(checkpoint)
  own = read_json(Path(checkpoint.source) / 'generation_config.json', optional=True) if checkpoint.source else {}
  out = {**ids, **own, 'eos_token_id': ids['eos_token_id']}
  return {key: value for key, value in out.items() if value is not None and key not in _LEFT_OUT}


def _token_ids(checkpoint: Checkpoint) -> dict[str, Any]:
  tokenizer = checkpoint.tokenizer
  ends = tokenizer.eos_ids
  return {
    'bos_token_id': tokenizer.special_tokens.get(checkpoint.template.bos),
    'eos_token_id': list(ends) if len(ends) > 1 else ends[0],
    'pad_token_id': tokenizer.pad_id,
  }


# ---- tokenizer and chat template ----


def _write_text_files(folder: epath.Path, checkpoint: Checkpoint) -> None:
  if checkpoint.source:
    for name in _TEXT_FILES:
      path = Path(checkpoint.source) / name
      if path.exists():
        _check_inside(path)
        (folder / name).write_bytes(read_file(path))
    return
  tokenizer, template = checkpoint.tokenizer, checkpoint.template
  strings = {i: token for token, i in tokenizer.special_tokens.items()}
  settings = {
    # The class that takes tokenizer.json as it is, by the name that all versions of transformers know.
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': template.bos or None,
    'eos_token': template.eos or strings.get(tokenizer.eos_ids[0]),
    'pad_token': strings.get(tokenizer.pad_id),
    'model_max_length': checkpoint.config.max_length,
    'clean_up_tokenization_spaces': False,
  }
  write_text(folder / 'tokenizer.json', to_tokenizer_json(tokenizer))
  write_text(folder / 'tokenizer_config.json', json.dumps(settings, indent=2, ensure_ascii=False) + '\n')
  write_text(folder / 'chat_template.jinja', template.source)


def _check_inside(path: Path) -> None:
  """Refuses a link to a file of this machine that is no part of the checkpoint."""
  folder, target = path.parent.resolve(), path.resolve()
  # Where the hub's cache keeps the files that a snapshot of a checkpoint links to.
  blobs = folder.parent.parent / 'blobs' if folder.parent.name == 'snapshots' else folder
  if not (target.is_relative_to(folder) or target.is_relative_to(blobs)):
    raise UserError(f'{path}: a link that leads out of the checkpoint; put the file itself there')


# ---- the folder ----


def check_output(output: epath.Path, source: str) -> None:
  """Refuses a place where an export would take the place of something else.

  Args:
    output: where it is to be.
    source: what is read for it: a file, a folder, or a model's name.

  Raises:
    UserError: there is something that no export wrote, or what is read.
  """
  if not output.exists():
    return
  if not output.is_dir():
    raise UserError(f'--output={output}: a file is there; choose another')
  try:
    names = sorted(path.name for path in output.iterdir())
  except OSError as error:
    raise UserError(f'--output={output}: cannot be read ({error.strerror or error}); choose another') from error
  if not names:
    return
  other = [name for name in names if not any(fnmatch.fnmatchcase(name, known) for known in (*_WRITTEN, *_WEIGHTS))]
  if other or not _is_export(output):
    what = f', such as {other[0][:60]!r}' if other else ''
    raise UserError(f'--output={output}: holds what no export wrote{what}; choose another, or move it away')
  if os.path.exists(source) and Path(source).resolve().is_relative_to(Path(output).resolve()):
    raise UserError(f'--output={output}: the model that is exported is read from there; choose another')


def _is_export(folder: epath.Path) -> bool:
  try:
    config = json.loads(read_file(folder / 'config.json'))
    return 'model' in config['charjax']
  except (OSError, ValueError, TypeError, KeyError, RecursionError):
    return False


@contextlib.contextmanager
def published(output: epath.Path) -> Iterator[epath.Path]:
  """A folder to write in that takes the place of `output` when all went well, and else is removed.

  Raises:
    UserError: it cannot be written.
  """
  beside = f'.{output.name}.{os.getpid()}'
  temporary, old = output.parent / f'{beside}.tmp', output.parent / f'{beside}.old'
  try:
    temporary.mkdir(parents=True)
    yield temporary
    if output.exists():
      output.rename(old)
    temporary.rename(output)
  except OSError as error:
    remedy = 'free some space' if error.errno in (errno.ENOSPC, errno.EDQUOT) else 'choose another'
    reason = one_line(OSError(error.strerror or str(error)))
    raise UserError(f'--output={output}: cannot be written ({reason}); {remedy}') from error
  finally:
    with contextlib.suppress(OSError):
      if old.exists() and not output.exists():
        old.rename(output)
    for left in (temporary, old):
      with contextlib.suppress(OSError):
        if left.exists():
          left.rmtree()
