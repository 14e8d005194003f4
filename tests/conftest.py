"""Eight CPU devices for every test, said before JAX is imported; and one run of the whole loop for all that read it."""

import fcntl
import os
import pathlib
import tempfile

import pytest

# Most of the time goes into compiling programs that run for a moment: with less optimisation by LLVM, a third less.
FAST = ' --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + FAST + ' --xla_force_host_platform_device_count=8'
# Compiled programs are kept for the processes that tests start and for the next run of the tests.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(tempfile.gettempdir()) / f'charjax-tests-{os.getuid()}')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')

# The files that take longest, in this order: where several processes share the tests, none is left with one of these.
_FIRST = ('test_smoke.py', 'test_mesh.py', 'test_stages_on_meshes.py', 'test_checkpoints.py', 'test_decoder.py')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  places = {name: place for place, name in enumerate(_FIRST)}
  items.sort(key=lambda item: places.get(item.path.name, len(_FIRST)))


@pytest.fixture(scope='module')
def compiled_anew():
  """No program comes from the cache: one for chips that are not there comes back without what it says of itself."""
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  precision = jax.config.jax_default_matmul_precision  # `charjax plan` sets it for its process
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()
  yield
  jax.config.update('jax_default_matmul_precision', precision)
  jax.config.update('jax_enable_compilation_cache', True)
  compilation_cache.reset_cache()


@pytest.fixture(scope='session')
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
  """The folder of a finished run of configs/smoke.py, not to be changed, and what it printed."""
  from smoke import run

  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent  # One for the processes that share the tests.
  workdir, out = folder / 'smoke' / 'run', folder / 'smoke' / 'out.txt'
  out.parent.mkdir(exist_ok=True)
  with (out.parent / 'lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not out.exists():
      done = run(workdir)
      assert done.returncode == 0, done.stderr[-3000:]
      out.write_text(done.stdout)
  return workdir, out.read_text()
