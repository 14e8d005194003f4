"""Reads a GGUF file: header, weights, tokenizer and chat template.

The header is parsed here rather than by gguf.GGUFReader, which makes an object of every element (3 s for
SmolLM2's vocabulary) and follows a damaged length without end. The format is that of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; `gguf` knows the quantised types.
"""

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quant_shape_to_byte_shape

from charjax.errors import UserError
from charjax.model.chat import ChatTemplate
from charjax.model.checkpoint_source import Checkpoint, Index, assemble
from charjax.model.gguf_families import from_gguf
from charjax.model.tokenizer import bpe_from_gguf

# GGUFValueType of the scalars, as struct and numpy write them; 8 is a string and 9 an array.
_SCALARS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}
_STRING, _ARRAY = 8, 9


class _Stored(NamedTuple):
  """Where a tensor lies: shape as numpy has it (the fastest axis last), type, and offset in bytes."""

  shape: tuple[int, ...]
  kind: GGMLQuantizationType
  offset: int


def read(path: str) -> Checkpoint:
  """A GGUF file of a family of charjax.model.gguf_families as a checkpoint, dequantised when tensors are asked for.

  Raises:
    UserError: the file is missing, truncated, damaged, or of a kind that is not supported.
  """
  try:
    data = np.asarray(np.memmap(path, mode='r'))  # a plain array: slices of a memmap are slow to make
    metadata, stored = _parse(data)
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror or error}); check the path') from error
  except (ValueError, struct.error) as error:
    raise UserError(f'{path}: not a GGUF file, truncated or damaged ({error}); fetch it again') from error
  for name, header in stored.items():
    _check_readable(header.kind, f'{path}: tensor {name[:80]}')
  shapes = {name: header.shape for name, header in stored.items()}

  family = from_gguf(metadata, shapes, lambda name: _dequantize(data, stored[name], slice(None)), path)
  config = family.config

  def tensor(name: str, file_name: str, part: Index) -> np.ndarray:
    value = _dequantize(data, stored[file_name], part[0])[:, *part[1:]]
    if family.interleaved and name in ('blocks.q', 'blocks.k'):
      # Such a file keeps the pairs that are rotated together next to each other; here they are half a head apart.
      value = value.reshape(-1, config.head_dim // 2, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
    return value

  template, reply_end = _template(metadata, path)
  tokenizer = bpe_from_gguf(metadata, path, reply_end)
  if tokenizer.vocab_size > config.vocab_size:
    raise UserError(f'{path}: {tokenizer.vocab_size} tokens for {config.vocab_size} embeddings; wrong file?')
  tensors = assemble(config, path, family.names, shapes, tensor, family.ignored, family.architecture)
  return Checkpoint(config, tensors, tokenizer, template, family.family, family.rope)


def _parse(data: np.ndarray) -> tuple[dict[str, Any], dict[str, _Stored]]:
  """Key-value pairs and tensors of a GGUF file; ValueError or struct.error when it is damaged."""
  view, position = data.data, 0

  def take(size: int) -> memoryview:
    nonlocal position
    if size > len(view) - position:
      raise ValueError(f'it ends after {len(view)} bytes, in the middle of its header')
    position += size
    return view[position - size : position]

  def number(code: str) -> Any:
    return struct.unpack('<' + code, take(struct.calcsize('<' + code)))[0]

  def string() -> str:
    return str(take(number('Q')), 'utf-8')

  def value(kind: int) -> Any:
    if kind in _SCALARS:
      return number(_SCALARS[kind])
    if kind == _STRING:
      return string()
    if kind != _ARRAY:
      raise ValueError(f'unknown value type {kind}')
    element, count = number('I'), number('Q')
    if element in _SCALARS:
      dtype = np.dtype(_SCALARS[element]).newbyteorder('<')
      return np.frombuffer(take(count * dtype.itemsize), dtype).tolist()
    if element != _STRING:
      raise ValueError(f'an array of value type {element}')
    return [string() for _ in range(count)]

  if bytes(take(4)) != b'GGUF':
    raise ValueError('it does not start with GGUF')
  version = number('I')
  if version not in (2, 3):
    raise ValueError(f'version {version}, where 2 and 3 are known')
  num_tensors, num_pairs = number('Q'), number('Q')
  metadata: dict[str, Any] = {}
  for _ in range(num_pairs):
    key = string()
    if key in metadata:
      raise ValueError(f'field {key[:40]!r} is there twice')
    metadata[key] = value(number('I'))
  headers = []
  for _ in range(num_tensors):
    name, dims = string(), number('I')
    if dims > 4:
      raise ValueError(f'tensor {name[:40]!r} has {dims} dimensions')
    shape = tuple(number('Q') for _ in range(dims))[::-1]
    headers.append((name, shape, GGMLQuantizationType(number('I')), number('Q')))
  alignment = metadata.get('general.alignment', 32)
  if not isinstance(alignment, int) or alignment < 1:
    raise ValueError(f'general.alignment is {alignment!r}')
  start = position + -position % alignment
  stored = {name: _Stored(shape, kind, start + offset) for name, shape, kind, offset in headers}
  if len(stored) != len(headers):
    raise ValueError('two of its tensors have the same name')
  for name, (shape, kind, offset) in stored.items():
    if offset + _size(shape, kind) > len(view):
      raise ValueError(f'it ends after {len(view)} bytes, before the end of tensor {name[:40]!r}')
  end = 0
  for name, (shape, kind, offset) in sorted(stored.items(), key=lambda item: item[1].offset):
    if offset < end:
      raise ValueError(f'tensor {name[:40]!r} begins before the end of another')
    end = offset + _size(shape, kind)
  return metadata, stored


def _size(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
  """Bytes of a tensor; ValueError if its rows are no whole number of blocks."""
  size = 1
  for axis in quant_shape_to_byte_shape(shape or (1,), kind):
    size *= axis
  return size


def _dequantize(data: np.ndarray, stored: _Stored, rows: slice) -> np.ndarray:
  """Some rows of a tensor, [rows, in] whatever its shape; of a vector each number is a row, without an axis for it."""
  shape, kind, offset = stored
  raw = data[offset : offset + _size(shape, kind)]
  if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
    values = raw.view('<f4' if kind == GGMLQuantizationType.F32 else '<f2')
    return values.reshape(-1, *shape[-1:] * (len(shape) > 1))[rows].astype(np.float32)
  if len(shape) < 2:
    return dequantize(raw, kind)[rows]
  return dequantize(raw.reshape(-1, quant_shape_to_byte_shape(shape, kind)[-1])[rows], kind)


def _check_readable(kind: GGMLQuantizationType, where: str) -> None:
  """Refuses a type that cannot be dequantised, by trying one block of it."""
  if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
    return
  try:
    dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)
  except NotImplementedError as error:
    raise UserError(f'{where} is of type {kind.name}, which is not read; use Q4_K, Q8_0 or F16') from error


def _template(metadata: Mapping[str, Any], where: str) -> tuple[ChatTemplate, str]:
  """The chat template, and what it writes after a reply."""
  source = metadata.get('tokenizer.chat_template')
  if not isinstance(source, str):
    raise UserError(f'{where}: it has no chat template; use an instruction-tuned model')
  tokens = metadata.get('tokenizer.ggml.tokens')
  tokens = tokens if isinstance(tokens, list) else []

  def token(name: str) -> str:
    index = metadata.get(f'tokenizer.ggml.{name}_token_id')
    return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else ''

  try:
    template = ChatTemplate(source, token('bos'), token('eos'))
    return template, template.reply_end
  except UserError as error:
    raise UserError(f'{where}: {error}') from error
