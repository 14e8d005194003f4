"""Weights on their way from a file to the devices: the same bits in every layout, and no more memory than they take."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import verify_mesh
from flax import nnx
from test_checkpoints import CONFIG, random_tensors, write_gguf, write_hf

from charjax.mesh import make_mesh
from charjax.model import checkpoint_source
from charjax.model.checkpoint_source import tensor_shapes
from charjax.model.decoder import Runtime
from charjax.model.weights import make_decoder

SHAPES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4))


@pytest.fixture(scope='module')
def files(tmp_path_factory) -> dict[str, str]:
  """One checkpoint in both formats, in several shards and types."""
  folder, config = tmp_path_factory.mktemp('files'), dataclasses.replace(CONFIG, tied_embeddings=False)
  tensors = random_tensors(config)
  return {
    'safetensors': write_hf(folder / 'hf', tensors, config, ml_dtypes.bfloat16, 2),
    'gguf': write_gguf(folder / 'm.gguf', tensors, config, quantize=('blk.0.ffn_down.weight', 'token_embd.weight')),
  }


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('format', ['safetensors', 'gguf'])
def test_every_layout_holds_the_same_bits(files, format, shape, monkeypatch):
  monkeypatch.setattr(checkpoint_source, '_BLOCK', 100)  # a row or two, and of heads one
  checkpoint = checkpoint_source.load(files[format])
  with jax.set_mesh(make_mesh(shape)):
    decoder = make_decoder(checkpoint.config, checkpoint.tensors, jnp.bfloat16, Runtime())
    assert verify_mesh.misplaced(decoder) == []
  monkeypatch.undo()
  found = {'.'.join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(decoder))}
  for name, value in checkpoint.tensors.items():
    np.testing.assert_array_equal(found[name], value.astype(ml_dtypes.bfloat16), err_msg=name)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_no_more_is_read_than_the_devices_of_a_host_hold(files, shape):
  with jax.set_mesh(make_mesh(shape)):
    checkpoint, read = checkpoint_source.load(files['safetensors']), []
    tensors, original = checkpoint.tensors, checkpoint.tensors.read_part
    tensors.read_part = lambda name, dtype, part: read.append(original(name, dtype, part)) or read[-1]
    decoder = make_decoder(checkpoint.config, tensors, jnp.float32, Runtime())
  # Each part once, however many devices hold it.
  held = jax.tree.leaves(nnx.state(decoder))
  assert sum(part.nbytes for part in read) == sum(array.nbytes for array in held)


def test_devices_of_a_cpu_share_what_was_read_and_do_not_write_into_it(files):
  checkpoint = checkpoint_source.load(files['safetensors'])
  with jax.set_mesh(make_mesh((8, 1, 1))):
    embed = make_decoder(checkpoint.config, checkpoint.tensors, jnp.float32, Runtime()).embed[...]
    assert len({shard.data.unsafe_buffer_pointer() for shard in embed.addressable_shards}) == 1
    # A step that may use the memory of what it is given.
    twice = jax.jit(lambda x: 2 * x, donate_argnums=0)(embed)
  assert embed.is_deleted()
  for shard in twice.addressable_shards:
    np.testing.assert_array_equal(shard.data, 2 * checkpoint.tensors['embed'])


# ---- memory ----

BIG = dataclasses.replace(
  CONFIG, num_layers=6, embed_dim=768, num_heads=12, num_kv_heads=4, head_dim=64, mlp_dim=3072, vocab_size=4096
)
# In a process of its own. What it asks the kernel for is what is its alone: the file's pages are not.
MEASURE = """
import gc, json, sys, threading, time
import jax, jax.numpy as jnp
import verify_mesh
from charjax.mesh import make_mesh
from charjax.model import checkpoint_source
from charjax.model.decoder import Runtime
from charjax.model.weights import make_decoder

def anonymous():
  with open('/proc/self/status') as file:
    return 1024 * next(int(line.split()[1]) for line in file if line.startswith('RssAnon'))

class Peak(threading.Thread):
  def run(self):
    self.peak, self.on = 0, True
    while self.on:
      self.peak = max(self.peak, anonymous())
      time.sleep(0.0005)

found = {}
for path in sys.argv[1:]:
  for shape in ('one', (8, 1, 1), (2, 2, 2)):
    with jax.set_mesh(verify_mesh.one_device() if shape == 'one' else make_mesh(shape)):
      checkpoint = checkpoint_source.load(path)
      before, peak = anonymous(), Peak()
      peak.start()
      decoder = make_decoder(checkpoint.config, checkpoint.tensors, jnp.bfloat16, Runtime())
      peak.on = False
      peak.join()
      found[f'{path} {shape}'] = peak.peak - before
      del decoder, checkpoint
      gc.collect()
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='asks Linux how much memory is used')
def test_a_host_needs_no_more_than_the_model_and_twice_its_largest_tensor(tmp_path):
  # The same numbers in every layer, which are quickly made.
  rng, tensors = np.random.default_rng(0), {}
  for name, shape in tensor_shapes(BIG).items():
    of_layer = rng.random(shape[1:] if name.startswith('blocks.') else shape, np.float32)
    tensors[name] = np.broadcast_to(of_layer, shape)
  quantized = [f'blk.{layer}.ffn_{name}.weight' for layer in range(BIG.num_layers) for name in ('gate', 'up', 'down')]
  paths = [
    write_hf(tmp_path / 'hf', tensors, BIG, ml_dtypes.bfloat16),
    write_gguf(tmp_path / 'm.gguf', tensors, BIG, quantize=(*quantized, 'token_embd.weight')),
  ]
  root = Path(__file__).parent.parent
  done = subprocess.run(
    [sys.executable, '-c', MEASURE, *paths], cwd=root, capture_output=True, text=True, timeout=600, check=False,
    # With this, what was let go is not kept for what comes next.
    env=os.environ | {'PYTHONPATH': f'{root}:{root / "scripts"}', 'MALLOC_MMAP_THRESHOLD_': '131072'},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  # In bfloat16; the devices of a CPU share what they all hold.
  model = 2 * sum(value.size for value in tensors.values())
  largest = 2 * BIG.vocab_size * BIG.embed_dim
  assert len(found) == 6 and min(found.values()) > 0.9 * model
  assert {name: peak for name, peak in found.items() if peak > model + 2 * largest} == {}
