"""Streaming: the same replies as the sampler's, a few tokens at a time, with a program for a bucket of lengths."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama_reference import random_tensors, tiny_config

from charjax.engine import stream as engine
from charjax.engine.batch import item_keys
from charjax.engine.sample import Sampling, sample
from charjax.engine.stream import shapes, stream
from charjax.model.decoder import Runtime
from charjax.model.lora import Adapter
from charjax.model.weights import make_decoder

CONFIG = tiny_config(vocab_size=300)
EOS = (7, 11, 19, *range(200, 230))
LENGTHS = (1, 2, 63, 64, 65)
KEYS = item_keys(0, 'chat', [str(length) for length in LENGTHS])


@pytest.fixture(scope='module')
def decoder():
  return make_decoder(CONFIG, random_tensors(CONFIG), jnp.float32, Runtime(scan_layers=True))


@pytest.fixture(scope='module')
def adapter():
  adapter = Adapter(CONFIG, 2, rngs=nnx.Rngs(1))
  adapter.q['b'][...] = jnp.full_like(adapter.q['b'][...], 0.3)
  return adapter


PROMPTS = [np.random.default_rng(length).integers(0, CONFIG.vocab_size, length).tolist() for length in LENGTHS]


@pytest.mark.parametrize(
  ('settings', 'adapted', 'finish'),
  [
    (Sampling(22, 0.0), True, None),
    (Sampling(22, 1.0), True, 'stop'),
    (Sampling(5, 0.7, 0.9), False, 'length'),
    (Sampling(5, 2.0, top_k=3), False, None),
  ],
)
def test_a_reply_is_the_one_that_is_sampled(decoder, adapter, settings, adapted, finish):
  used = adapter if adapted else None
  settings = dataclasses.replace(settings, batch_size=5)
  drawn = sample(decoder, PROMPTS, KEYS, EOS, settings, adapter=used)
  for prompt, key, reply in zip(PROMPTS, KEYS, drawn, strict=True):
    pieces = list(stream(decoder, prompt, key, EOS, settings, adapter=used))
    assert all(1 <= len(piece) <= 4 for piece in pieces)
    assert list(itertools.chain(*pieces)) == reply.tokens
  assert finish in (None, *(reply.finish for reply in drawn))


def test_shapes_are_few_and_hold_what_is_asked_for():
  for length, most in itertools.product((1, 64, 65, 700, 5000), (1, 512, 3000)):
    width, slots = shapes(length, most)
    assert length <= width <= slots and length + most <= slots
  assert len({shapes(length, 200)[1] for length in range(1, 300)}) == 1


def test_what_was_compiled_once_serves_all_of_its_bucket(decoder):
  settings = Sampling(40, 0.5)
  for prompt, key in zip(PROMPTS[:2], KEYS[:2], strict=True):
    list(stream(decoder, prompt, key, EOS, settings))
  before = engine._draw._cache_size(), engine._read._cache_size()
  for prompt, key in zip(PROMPTS[:4], KEYS[:4], strict=True):
    list(stream(decoder, prompt, key, EOS, Sampling(400, 0.9)))
  assert (engine._draw._cache_size(), engine._read._cache_size()) == before


def test_a_reply_that_is_left_off_computes_nothing_more(decoder, monkeypatch):
  calls = []
  go_on = engine._go_on
  monkeypatch.setattr(engine, '_go_on', lambda *arguments: (calls.append(1), go_on(*arguments))[1])
  replies = stream(decoder, PROMPTS[0], KEYS[0], (299,), Sampling(100, 1.0))
  next(replies)
  next(replies)
  replies.close()
  assert len(calls) == 2
