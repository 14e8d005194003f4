"""What the compiler says of a program for devices that are not there: memory, or that it is too little, and traffic."""

import dataclasses
import functools
import math
import re
from collections import defaultdict

from charjax.plan.programs import Program

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """Figures of one device.

  Attributes:
    arguments: bytes of the arguments, as the compiler lays them out.
    working: bytes that the program needs beside them, for results and in between.
    sent: bytes that go to other devices, or come from them, in one call.
    refused: the compiler found the memory too small.
  """

  arguments: int
  working: int
  sent: float
  refused: bool


def compile_program(program: Program) -> Compiled:
  """Compiles a program on the current mesh."""
  lowered = program.function.lower(*program.arguments, **program.static)  # type: ignore[attr-defined]
  try:
    found = lowered.compile()
  except RuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return Compiled(*_read_refusal(str(error)), 0.0, True)
  memory = found.memory_analysis()
  working = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return Compiled(memory.argument_size_in_bytes, working, traffic(found.as_text(), program.repeats), False)


def _read_refusal(text: str) -> tuple[int, int]:
  """Bytes of arguments and of all else, of the compiler's message that it found no room."""

  def figure(pattern: str) -> int:
    found = re.search(pattern + r'\W+([\d.]+)([KMGT]?)', text)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0

  arguments = figure('arguments')
  return arguments, max(figure('HLO temporaries'), figure('Used') - arguments, figure('program'))


# ---- collectives ----

_SHAPE = re.compile(r'\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]')
_COLLECTIVE = re.compile(
  r'= (\(.*?\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all)(-start)?\('
)
_CALLED = re.compile(r'(?:calls|to_apply|condition|body)=(%?[\w.\-]+)|branch_computations=\{([^}]*)\}')


def traffic(text: str, repeats: int = 1) -> float:
  """Bytes that one device sends in the collectives of a compiled text; loops of unknown length run `repeats` times.

  Of n devices that take part, (n - 1) / n of what is gathered, or of what is scattered, passes each, and twice as much
  of what is reduced for all (Thakur et al. 2005, rings).
  """
  own: dict[str, dict[str, float]] = defaultdict(dict)
  calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
  name = entry = ''
  for number, line in enumerate(text.splitlines()):
    if head := re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line):
      name = head[2]
      entry = name if head[1] else entry
      continue
    if found := _COLLECTIVE.search(line):
      # One that goes on beside other work stands in each piece of that work, always with the number of its channel.
      channel = re.search(r'channel_id=(\d+)', line)
      own[name][channel[1] if channel else f'line {number}'] = _passed(found[2], _result(*found.groups()), _group(line))
    times = 1
    if loop := re.search(r' while\(.*condition=%?([\w.\-]+)', line):
      times = _trips(text, loop[1]) or repeats
    for one, some in _CALLED.findall(line):
      calls[name] += [(called.strip(' %'), times) for called in (one or some).split(',')]

  @functools.cache
  def total(name: str) -> dict[str, float]:
    found = dict(own[name])
    for called, times in calls[name]:
      for channel, size in total(called).items():
        found[channel] = max(found.get(channel, 0.0), times * size)
    return found

  return sum(total(entry).values())


def _trips(text: str, condition: str) -> int:
  """How often a loop with this condition runs, if it counts from 0 to a constant; else 0."""
  found = re.search(r'^%?' + re.escape(condition) + r' \(.*?^}', text, re.MULTILINE | re.DOTALL)
  last = re.search(r'ROOT .* compare\(.*?(?:, |%)([\w.\-]+)\), direction=LT', found[0]) if found else None
  bound = (
    re.search(r'%?' + re.escape(last[1]) + r' = [su]32\[\]\S* constant\((\d+)\)', found[0]) if found and last else None
  )
  return int(bound[1]) if bound else 0


def _result(shapes: str, kind: str, start: str | None) -> int:
  """Bytes of what a collective gives: of all arrays that it was joined from."""
  if start and kind != 'all-reduce':  # One that is under way holds its operands first, and then its results.
    depth, begin, parts = 0, 1, []
    for place, letter in enumerate(shapes):
      depth += (letter in '([{') - (letter in ')]}')
      if (depth == 1 and letter == ',') or depth == 0:
        parts.append(shapes[begin:place])
        begin = place + 1
    shapes = parts[1] if len(parts) > 1 else shapes
  total = 0
  for dtype, dims in _SHAPE.findall(shapes):
    bits = re.search(r'\d+', dtype)
    total += math.prod(int(size) for size in dims.split(',') if size) * (int(bits[0]) if bits else 8) // 8
  return total


def _group(line: str) -> int:
  """How many devices take part."""
  if found := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', line):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
  if found := re.search(r'replica_groups=\[\d+,(\d+)\]', line):
    return int(found[1])
  if found := re.search(r'replica_groups=\{\{([\d,]*)\}', line):
    return found[1].count(',') + 1
  return 2


def _passed(kind: str, size: int, count: int) -> float:
  if kind == 'collective-permute':
    return size
  share = (count - 1) / count
  if kind == 'reduce-scatter':  # Its result is what is left of it.
    return size * (count - 1)
  return size * share * (2 if kind == 'all-reduce' else 1)
