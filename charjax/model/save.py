"""Weights out: arrays by name become the safetensors of a Hugging Face directory, one tensor in memory at a time.

The format (https://github.com/huggingface/safetensors#format) is written here, since the library's own writer wants
all tensors of a file at once.
"""

import functools
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from charjax.model.checkpoint_source import Layout

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
SHARD_BYTES = 5 * 10**9
_CODES = {DTYPES['float32']: 'F32', DTYPES['bfloat16']: 'BF16'}


class Stored(NamedTuple):
  """A tensor of a file: its name, shape and type, and how to get it."""

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    """In bytes."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def to_stored(
  layout: Layout, get: Callable[[str], Any], dtype: np.dtype, shifts: Mapping[str, float] | None = None
) -> Iterator[Stored]:
  """The tensors of a file, of ours. Read in this order, one of our stacked arrays is held at a time (or those that
  share tensors of the file), and only as long as it is needed.

  Args:
    layout: which of ours are in which.
    get: our name to the array, of numpy or JAX; one on devices is cut there, and comes here a tensor at a time.
    dtype: of the file.
    shifts: what is added to some of ours.
  """
  held: dict[str, Any] = {}

  def read(places: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    if held.keys() != places.keys():
      held.clear()
      held.update({name: get(name) for name in places})
    rows = []
    for name, place in places.items():
      value = held[name][place]
      if shifts and name in shifts:
        value = value.astype(np.float32) + np.float32(shifts[name])
      rows.append(layout.to_file(name, np.asarray(value.astype(dtype))))
    return rows[0] if len(rows) == 1 else np.concatenate(rows)

  for ours in layout.together.values():
    for parts in zip(*(layout.parts(name) for name in ours), strict=True):
      places = {name: part.place for name, part in zip(ours, parts, strict=True)}
      yield Stored(parts[0].file_name, layout.file_shape(ours[0]), dtype, functools.partial(read, places))


def write(folder: epath.Path, tensors: Sequence[Stored], shard_bytes: int = SHARD_BYTES) -> None:
  """Writes model.safetensors or, above `shard_bytes`, numbered files and the index that transformers reads."""
  shards: list[list[Stored]] = [[]]
  filled = 0
  for tensor in tensors:
    if shards[-1] and filled + tensor.size > shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(tensor)
    filled += tensor.size
  if len(shards) == 1:
    _write_file(folder / 'model.safetensors', shards[0])
    return
  weight_map: dict[str, str] = {}
  for number, shard in enumerate(shards, start=1):
    name = f'model-{number:05d}-of-{len(shards):05d}.safetensors'
    _write_file(folder / name, shard)
    weight_map |= {tensor.name: name for tensor in shard}
  index = {'metadata': {'total_size': sum(t.size for t in tensors)}, 'weight_map': weight_map}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n')


def _write_file(path: epath.Path, tensors: Sequence[Stored]) -> None:
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for tensor in tensors:
    begin, end = end, end + tensor.size
    header[tensor.name] = {'dtype': _CODES[tensor.dtype], 'shape': tensor.shape, 'data_offsets': [begin, end]}
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for tensor in tensors:
      value = np.ascontiguousarray(tensor.read())
      assert value.shape == tensor.shape and value.dtype == tensor.dtype, tensor.name
      file.write(value.reshape(-1).view(np.uint8).data)
