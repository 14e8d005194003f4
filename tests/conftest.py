"""Eight CPU devices for every test, said before JAX is imported; and one run of the whole loop for all that read it."""

import os
import pathlib
import tempfile

import pytest

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
# Compiled programs are kept for the processes that tests start and for the next run of the tests.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(tempfile.gettempdir()) / f'charjax-tests-{os.getuid()}')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')


@pytest.fixture(scope='session')
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
  """The folder of a finished run of configs/smoke.py, not to be changed, and what it printed."""
  from smoke import run

  workdir = tmp_path_factory.mktemp('smoke') / 'run'
  done = run(workdir)
  assert done.returncode == 0, done.stderr[-3000:]
  return workdir, done.stdout
