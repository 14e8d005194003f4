"""The count of tokens and FLOPs: against a count pair by pair, and of what sampling and scoring really computed."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama_reference import tiny_config

from charjax import progress
from charjax.engine import work
from charjax.engine.batch import item_keys
from charjax.engine.sample import Sampling, sample
from charjax.engine.score import score
from charjax.model.decoder import Decoder

CONFIG = tiny_config()
CONFIGS = {
  'all see all': CONFIG,
  'windows': dataclasses.replace(CONFIG, windows=(5, *(0,) * (CONFIG.num_layers - 1))),
  'experts': dataclasses.replace(CONFIG, num_experts=4, experts_per_token=1),
}


def expected_flops(config, before, length):
  """One text, one product after the other."""
  c = config
  qkvo = c.embed_dim * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
  mlp = 3 * c.embed_dim * c.mlp_dim * max(1, c.experts_per_token) + c.embed_dim * c.num_experts
  total = 0
  for kind in c.layer_kinds():
    for place in range(length):
      seen = min(before + place + 1, kind.window or 10**9)
      total += 2 * (qkvo + mlp) + 2 * (2 * c.num_heads * c.head_dim * seen)
  return total


@pytest.mark.parametrize('name', CONFIGS)
def test_flops_are_those_of_every_pair(name):
  rng, start = np.random.default_rng(0), work.done()
  before, length = rng.integers(0, 9, 6), rng.integers(0, 12, 6)
  work.count(CONFIGS[name], before, length, times=3, predicted=7)
  found = work.done().since(start)
  flops = 3 * sum(expected_flops(CONFIGS[name], b, n) for b, n in zip(before, length, strict=True))
  assert found.tokens == length.sum()
  assert found.flops == pytest.approx(flops + 7 * 2 * CONFIG.embed_dim * CONFIG.vocab_size, rel=1e-12)


def test_a_prompt_is_counted_once_for_all_its_replies():
  decoder = Decoder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)
  # Three tokens are common to all; the last of a prompt goes with its reply.
  prompts = [[1, 2, 3, 4, 5]] * 2 + [[1, 2, 3, 6]] * 2
  replies = [[7, 8], [9], [7, 7, 7], [8, 9]]
  start = work.done()
  score(decoder, prompts, replies, batch_size=4)
  found = work.done().since(start)
  texts = [(0, 3), (3, 1), (4, 3), (4, 2), (3, 0), (3, 4), (3, 3)]
  assert found.tokens == sum(length for _, length in texts)
  head = 2 * CONFIG.embed_dim * CONFIG.vocab_size * 8
  assert found.flops == pytest.approx(sum(expected_flops(CONFIG, *text) for text in texts) + head, rel=1e-12)

  start = work.done()
  drawn = sample(decoder, prompts, item_keys(0, 'work', list('abcd')), [0], Sampling(3, batch_size=4))
  assert work.done().since(start).tokens == 3 + 1 + sum(len(reply.tokens) for reply in drawn)


def test_rates_are_a_second_and_absent_where_there_is_no_work():
  assert work.rates(work.Work(), 1.0) == {}
  found = work.rates(work.Work(tokens=10, flops=4e9), 2.0)
  assert found == {'tokens_per_second': 5.0, 'model_flops_per_second': 2e9}


def test_progress_says_what_is_compiled(monkeypatch, capsys):
  """Heard from JAX itself."""
  monkeypatch.setattr(progress, '_SECONDS_BETWEEN_LINES', 0.0)
  work.watch_compilation()
  with progress.Progress('replies', 4) as bar:
    before = work.done().compile_seconds
    jax.jit(lambda x: x * 3.7)(1.0).block_until_ready()
    assert re.fullmatch(r'(replies: 0/4 items in 0 s \(compiling jit\(<lambda>\)\)\n)+', capsys.readouterr().err)
    assert work.done().compile_seconds > before
    bar.advance(4)
  capsys.readouterr()
  jax.jit(lambda x: x * 3.8)(1.0)
  assert not capsys.readouterr().err
