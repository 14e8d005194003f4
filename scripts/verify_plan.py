"""Compiles the programs of every plan in README's table, and says where the table is not what the compiler says.

  JAX_PLATFORMS=cpu .venv/bin/python scripts/verify_plan.py [CONFIG...]

Prints the table's rows as they are now; exits with 1 where one differs. A plan of an 8B model takes some minutes. Needs
the tpu extra, and no chip.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_PROGRAMS = ('prefill', 'decode', 'scoring', 'policy step', 'preference step')
_ROW = re.compile(r'\| `configs/(\w+)\.py` \| (v\w+:[\dx]+) \|((?: [\d.]+ \|){6} [\d.]+) \|')
_GIB, _FAR = 2**30, 0.05  # the table has two decimals, and compilers of one version agree


def figures(config: str, topology: str) -> list[float]:
  """GiB a chip of each program, the chip's limit, and chip-hours."""
  command = [
    sys.executable,
    '-m',
    'charjax.main',
    'plan',
    f'--config=configs/{config}.py',
    f'--topology={topology}',
    '--json',
  ]
  plan = json.loads(subprocess.run(command, cwd=_ROOT, stdout=subprocess.PIPE, check=True).stdout)
  by_name = {program['name']: program for program in plan['programs']}
  sizes = [by_name[name]['bytes_per_chip'] / _GIB for name in _PROGRAMS]
  return [*sizes, by_name['decode']['limit_bytes'] / _GIB, plan['chip_hours']]


def main(chosen: list[str]) -> int:
  """Checks the rows of the configs that are named, or all."""
  rows = _ROW.findall((_ROOT / 'README.md').read_text())
  known = {config for config, _, _ in rows}
  if unknown := [config for config in chosen if config not in known] or ([] if rows else ['any']):
    print(f'README.md: the table has no plan of {", ".join(unknown)}', file=sys.stderr)
    return 1
  wrong = 0
  for config, topology, cells in rows:
    if chosen and config not in chosen:
      continue
    found, told = figures(config, topology), [float(cell) for cell in cells.split('|')]
    far = max(abs(a - b) for a, b in zip(found[:-1], told[:-1], strict=True))
    hours = abs(found[-1] / told[-1] - 1)
    print(f'| `configs/{config}.py` | {topology} | ' + ' | '.join(f'{value:.2f}' for value in found) + ' |')
    if far > _FAR or hours > _FAR:
      wrong += 1
      print(f'{config} on {topology}: README is {far:.2f} GiB and {hours:.0%} of the chip-hours off', file=sys.stderr)
  return int(bool(wrong))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
