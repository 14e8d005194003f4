"""The command line on configs/smoke.py, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import FAST

ROOT = Path(__file__).parent.parent


def command(workdir: Path, *flags: str) -> list[str]:
  config = f'--config={ROOT / "configs" / "smoke.py"}'
  return [sys.executable, '-m', 'charjax.main', 'run', config, f'--workdir={workdir}', *flags]


def environment() -> dict[str, str]:
  # One device, as a user's CPU has: the eight of conftest.py are for the tests of sharding.
  return {**os.environ, 'XLA_FLAGS': FAST, 'PYTHONPATH': str(ROOT)}


def run(workdir: Path, *flags: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    command(workdir, *flags), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, check=False
  )
