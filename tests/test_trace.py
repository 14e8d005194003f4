"""A trace for xprof: of three batches of a bar's work, once nothing is compiled any more."""

import jax
import jax.numpy as jnp
from etils import epath
from llama_reference import tiny_config

from charjax import trace
from charjax.engine import work
from charjax.progress import Progress

CONFIG = tiny_config()


def batches(function, shapes):
  """A bar whose batches have these shapes; after the first comes one without work of the model."""
  with Progress('batches', len(shapes) + 1) as bar:
    for i, shape in enumerate(shapes):
      with jax.profiler.TraceAnnotation(f'batch {i}'):
        jax.block_until_ready(function(jnp.zeros(shape)))
      work.count(CONFIG, 0, 3)
      bar.advance()
      if not i:
        bar.advance()


def traced(folder):
  """The batches in each trace of a folder."""
  found = []
  for file in sorted(folder.glob('plugins/profile/*/*.xplane.pb')):
    data = jax.profiler.ProfileData.from_file(str(file))
    names = {event.name for plane in data.planes for line in plane.lines for event in line.events}
    found.append(sorted(name for name in names if name.startswith('batch ')))
  return found


def test_three_batches_are_traced_after_one_that_compiled_nothing(tmp_path):
  work.watch_compilation()
  folder = epath.Path(tmp_path)
  function = jax.jit(lambda x: jnp.sin(x).sum())
  jax.block_until_ready([jnp.zeros(3), jnp.zeros(4)])
  with trace.into(folder / 'profile'):
    batches(function, [3, 4, 4, 4, 4, 4, 4])
  # The first two were compiled.
  assert traced(folder / 'profile') == [['batch 3', 'batch 4', 'batch 5']]
  # A bar that ends before that leaves what there is.
  with trace.into(folder / 'short'):
    batches(function, [3, 3])
  assert traced(folder / 'short') == [['batch 1']]
  with trace.into(None):
    batches(function, [3] * 6)
  batches(function, [3] * 6)
  assert sorted(path.name for path in folder.iterdir()) == ['profile', 'short']
