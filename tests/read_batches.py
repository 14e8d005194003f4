"""What one of several processes reads of the first batches of both trainings, and what then lies on all devices.

python read_batches.py ADDRESS PROCESSES PROCESS    prints `batches` on several meshes, as JSON
"""

import hashlib
import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
from llama_reference import tiny_config

from charjax import defaults, hosts
from charjax.engine.rows import FixedShapes
from charjax.mesh import fetch, make_mesh
from charjax.stages import policy, preference, rollouts

# The last: each process has a column of the devices. Along columns alone the few messages of a part are split, and
# their replies are not.
SHAPES = (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8), (4, 2, 1)


def batches(shape, steps=2):
  """On a mesh: a digest of the batches, of messages that are ranked and of a policy without rollouts; and how many
  examples this process read for each."""
  config, few = defaults.get_config(), shape == SHAPES[-1]
  size, k = (4, 4) if few else (16, 2)
  config.preference.update(messages_per_batch=size, microbatches=2)
  config.policy.update(
    prompts_per_step=size, microbatches=2, replies_per_prompt=0, ranked_replies=k, shown_replies=1, max_new_tokens=9
  )
  rng = np.random.default_rng(5)

  def tokens():
    return rng.integers(8, 60, rng.integers(2, 20)).tolist()

  model = SimpleNamespace(decoder=SimpleNamespace(config=tiny_config(vocab_size=60)), eos_ids=(7,))
  devices = jax.devices()
  if few:
    devices = [device for row in zip(devices[:4], devices[4:], strict=True) for device in row]
  with jax.set_mesh(make_mesh(shape, devices)):
    prompts = [[1, 2, *tokens()] for _ in range(40)]
    shapes, shapes_shown = FixedShapes(prompts, 20), FixedShapes([[3, *prompt] for prompt in prompts], 20)
    width = shapes.rows([], 1, 8).tokens.shape[1] - 1
    asked = [
      {
        'prompt': prompt, 'replies': [tokens() for _ in range(k)], 'probabilities': rng.random((k, k)), 'trait': 0,
        'weight': 1.0, 'shown': [tokens()], 'shown_prompt': [3, *prompt], 'real': np.ones(k, bool), 'best': np.int64(0),
        'before': np.zeros((k, width), np.float32), 'preferred': np.eye(k, dtype=np.float32),
      }
      for prompt in prompts
    ]  # fmt: skip
    asked = [item | {'ranked': rollouts.Ranked(item['replies'], None)} for item in asked]
    neutral = [{'prompt': prompt, 'reply': tokens()} for prompt in prompts]
    session = SimpleNamespace(config=config, model=model)
    ranked, both = preference.read(config.preference, asked, k, 3), policy.read(config.policy, asked, neutral, 4)
    digest, read = hashlib.sha256(), []
    for _ in range(steps):
      some, now = next(ranked), next(both)
      made = preference.make_examples_batch(config.preference, model.decoder, shapes, some, k)
      made = made, policy.make_policy_batch(session, shapes, shapes_shown, now['asked'], now['neutral'], None)
      for leaf in jax.tree.leaves(fetch(made)):
        digest.update(str((leaf.dtype, leaf.shape)).encode() + np.asarray(leaf).tobytes())
      read.append([sum(any(item['prompt']) for item in kind) for kind in (some, now['asked'], now['neutral'])])
  return digest.hexdigest(), read


if __name__ == '__main__':
  address, count, process = sys.argv[1:]
  hosts.join(address, int(count), int(process))
  print(json.dumps([batches(shape) for shape in SHAPES]))
  hosts.leave()
