"""What a chip can do, and what a topology is called: v5e:4x4 is sixteen v5e chips, h100:8 a host of eight H100."""

import contextlib
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from charjax.errors import UserError, one_line


class Chip(NamedTuple):
  """One chip, as its maker's data sheet has it.

  Attributes:
    memory: bytes that programs may use; of a TPU as its compiler allots them, a little less than the data sheet's.
    flops: peak dense bfloat16 FLOP/s.
    memory_bandwidth: bytes/s of its memory.
    link_bandwidth: bytes/s that it sends to other chips of its slice or host, and as many that it receives.
    kinds: what JAX calls it where it is there.
  """

  memory: float
  flops: float
  memory_bandwidth: float
  link_bandwidth: float
  kinds: tuple[str, ...]


GIB = 2**30
# Of TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p and v6e (peak compute, HBM bandwidth, and half of the bidirectional
# bandwidth of all ICI links of a chip).
TPUS = {
  'v4': Chip(31.25 * GIB, 275e12, 1228e9, 300e9, ('TPU v4',)),
  'v5e': Chip(15.75 * GIB, 197e12, 819e9, 200e9, ('TPU v5 lite',)),
  'v5p': Chip(95.74 * GIB, 459e12, 2765e9, 600e9, ('TPU v5', 'TPU v5p')),
  'v6e': Chip(31.25 * GIB, 918e12, 1640e9, 400e9, ('TPU v6 lite',)),
}
# Of GPUs, in hosts of up to eight: NVIDIA's data sheets of A100, H100 SXM, H200 and B200 (half of the bidirectional
# NVLink bandwidth). What is left of the memory is the runtime's.
GPU_SHARE = 0.92
GPUS = {
  'a100': Chip(GPU_SHARE * 80e9, 312e12, 2039e9, 300e9, ('NVIDIA A100-SXM4-40GB', 'NVIDIA A100-SXM4-80GB')),
  'h100': Chip(GPU_SHARE * 80e9, 989e12, 3350e9, 450e9, ('NVIDIA H100 80GB HBM3',)),
  'h200': Chip(GPU_SHARE * 141e9, 989e12, 4800e9, 450e9, ('NVIDIA H200',)),
  'b200': Chip(GPU_SHARE * 180e9, 2250e12, 7700e9, 900e9, ('NVIDIA B200',)),
}


class Topology(NamedTuple):
  """Chips that a run would have: `devices` to compile for, or none where there is no compiler for them here."""

  name: str
  chip: Chip
  size: int
  devices: Any


def peak(kind: str) -> float | None:
  """Peak dense bfloat16 FLOP/s of what JAX calls so; None where that is not known. A TPU v4 or v5p is one device."""
  return next((chip.flops for chip in (*TPUS.values(), *GPUS.values()) if kind in chip.kinds), None)


def find(name: str) -> Topology:
  """The topology of a name.

  Raises:
    UserError: there is none such, or libtpu, the compiler, is not installed.
  """
  kind, _, shape = name.lower().partition(':')
  if kind in GPUS and re.fullmatch('[1-8]', shape):
    return Topology(name, GPUS[kind], int(shape), None)
  if kind in GPUS:
    raise UserError(f'--topology={name}: give the number of GPUs of one host, {kind}:1 to {kind}:8')
  dims = [int(size) for size in shape.split('x')] if re.fullmatch(r'\d{1,3}(x\d{1,3}){1,2}', shape) else []
  wanted = 3 if kind in ('v4', 'v5p') else 2
  if kind not in TPUS or len(dims) != wanted or not 1 <= math.prod(dims) <= 256:
    raise UserError(
      f'--topology={name}: there is no such topology; give a TPU slice of 1 to 256 chips, as v5e:4x4, v6e:4x4, '
      'v4:2x2x2 or v5p:2x2x2, or the GPUs of a host, as h100:8'
    )
  return Topology(name, TPUS[kind], math.prod(dims), _tpu_devices(name, kind, dims))


def _tpu_devices(name: str, kind: str, dims: list[int]) -> Any:
  """The devices of a slice that is not there: the TPU compiler takes them for a target."""
  from jax.experimental import topologies

  # Else libtpu asks the metadata server of a TPU machine, which is not there, again and again.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  # Else it would let one process of a machine in; no chip of it is touched.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  # A v4 chip has two cores, which programs see as one; slices smaller than a host must say so.
  more: dict[str, Any] = {'chip_config_name': 'megacore'} if kind == 'v4' else {}
  if math.prod(dims) < 4:
    more['chips_per_host_bounds'] = (*dims, *(1,) * (3 - len(dims)))
  try:
    with _quiet():
      return topologies.get_topology_desc(
        platform='tpu', topology_name=f'{kind}:{name.partition(":")[2]}', **more
      ).devices
  except Exception as error:
    if importlib.util.find_spec('libtpu') is None:
      raise UserError(
        f"--topology={name}: its compiler is not installed ({one_line(error)}); run: pip install 'charjax[tpu]'"
      ) from error
    raise UserError(f'--topology={name}: the TPU compiler knows no such slice ({one_line(error)})') from error


@contextlib.contextmanager
def _quiet() -> Any:
  """libtpu writes to the descriptor of stderr, past Python."""
  saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  os.dup2(null, 2)
  try:
    yield
  finally:
    os.dup2(saved, 2)
    os.close(saved)
    os.close(null)
