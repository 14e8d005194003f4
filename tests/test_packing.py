"""Packed rows: the numbers of padded ones, of real tokens alone; on one device and on eight."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from llama_reference import numpy_reply, random_tensors, tiny_config
from test_mesh import whole

from charjax.engine.rows import FixedShapes, Group, make_rows, pack_alike, parts_of
from charjax.engine.score import hidden_states, mean_states, token_log_probs
from charjax.mesh import make_mesh, shard_batch
from charjax.model.decoder import Runtime
from charjax.model.packing import make_packing, pack, packed_size, unpack
from charjax.model.weights import make_decoder

CONFIG = tiny_config(vocab_size=60, tied_embeddings=False)
TENSORS = random_tensors(CONFIG)
RNG = np.random.default_rng(0)
LENGTHS = np.array([3, 0, 7, 1, 0, 2, 1, 8], np.int32)


@pytest.mark.parametrize('parts', [1, 2])
def test_real_tokens_stand_end_to_end_and_come_back(parts):
  packing = make_packing(LENGTHS, 8, 24, parts)
  rows = RNG.normal(size=(8, 8, 3)).astype(np.float32)
  real = np.arange(8) < LENGTHS[:, None]
  packed = np.asarray(pack(rows, packing))
  for part, some, mask in zip(packed, rows.reshape(parts, -1, 8, 3), real.reshape(parts, -1, 8), strict=True):
    np.testing.assert_array_equal(part[: mask.sum()], some[mask])
  back = np.asarray(unpack(packed, packing))
  np.testing.assert_array_equal(back[real], rows[real])
  # A gradient reaches real tokens, each once, whatever stands for the others.
  weight = RNG.normal(size=rows.shape).astype(np.float32)
  gradient = jax.grad(lambda x: (unpack(jnp.sin(pack(x, packing)), packing) * weight).sum())(rows)
  np.testing.assert_allclose(gradient, np.where(real[..., None], np.cos(rows) * weight, 0), atol=1e-6)


def test_packed_sizes_are_few_and_hold_what_they_are_for():
  rows, width = 16, 40
  sizes = {tokens: packed_size(tokens, rows, width, 8) for tokens in range(rows * width + 1)}
  assert set(sizes.values()) == {0, 80, 160, 240, 320, 400, 480, 560}
  for tokens, size in sizes.items():
    assert tokens <= size < tokens + 81 if size else tokens > 560


def test_what_does_not_fit_is_not_packed():
  assert make_packing(LENGTHS, 8, 22) is not None and make_packing(LENGTHS, 8, 21) is None
  assert make_packing(LENGTHS * 0, 8, 0) is None  # no tokens, and a size that says that padded they do as well
  assert make_packing(LENGTHS, 8, 11, 2) is not None and make_packing(LENGTHS, 8, 10, 2) is None


def ragged_texts():
  """Prompts and replies of a run."""
  prompts = [[1] * int(n) for n in RNG.integers(2, 60, 400)]
  return prompts, [[1] * int(n) for n in RNG.geometric(0.05, 2000).clip(1, 90)]


def some_batches(prompts, replies, count):
  """Batches of 16 prompts, 4 replies to each."""
  return [
    [Group(prompts[i], [replies[j] for j in RNG.integers(0, len(replies), 4)]) for i in RNG.integers(0, 400, 16)]
    for _ in range(count)
  ]


def fullest(packed, parts=2):
  return max(rows.lengths.reshape(parts, -1).sum(1).max() for rows in packed)


def test_few_batches_of_a_run_exceed_its_size_and_those_stay_padded():
  prompts, replies = ragged_texts()
  shapes = FixedShapes(prompts, 90, replies)
  packed = [shapes.rows(some, 4, microbatches=2) for some in some_batches(prompts, replies, 50)]
  [size] = {rows.packing and rows.packing.slots.shape[1] for rows in packed}
  assert size and fullest(packed) <= size < 0.75 * 32 * 96
  long = shapes.rows([Group(prompts[0], [[1] * 90] * 4)] * 16, 4, microbatches=2)
  assert long.packing is None and long.tokens.shape == packed[0].tokens.shape


def test_batches_that_are_known_are_packed_as_tightly_as_the_fullest_of_them_allows():
  prompts, replies = ragged_texts()
  shapes, batches = FixedShapes(prompts, 90, replies), some_batches(prompts, replies, 20)
  [likely] = {shapes.rows(some, 4, microbatches=2).packing.slots.shape[1] for some in batches}
  shapes.expect(batches, 4, microbatches=2)
  packed = [shapes.rows(some, 4, microbatches=2) for some in batches]
  [size] = {rows.packing.slots.shape[1] for rows in packed}
  # A sixty-fourth of the padded tokens is a step.
  assert fullest(packed) <= size < min(likely, fullest(packed) + 32 * 96 / 64)
  # Of others nothing is known.
  unseen = FixedShapes(prompts, 90, replies).rows(batches[0], 4)
  assert shapes.rows(batches[0], 4).packing.slots.shape == unseen.packing.slots.shape


def groups():
  """Of eight prompts, one to four replies; some of them empty."""
  lengths = iter(RNG.integers(0, 9, 40).tolist())

  def tokens(length):
    return RNG.integers(0, 60, length).tolist()

  return [
    Group(tokens(1 + length), [tokens(next(lengths)) for _ in range(1 + i % 4)])
    for i, length in enumerate((12, 1, 3, 0, 5, 2, 2, 6))
  ]


GROUPS = groups()


def rows(parts):
  # Forty rows, which no other array has.
  made = make_rows(GROUPS, each=5, prompt_width=16, width=12)
  if parts:
    [made] = pack_alike([made], parts)
    assert made.packing is not None and made.prompt_packing is not None
  return made


def loss(decoder, rows):
  """Reads states and log-probs as what is trained does."""
  hidden, count = hidden_states(decoder, rows), len(rows.tokens)
  log_probs = token_log_probs(
    decoder, hidden, rows, 0.5 + jnp.arange(count) % 4 / 4, jnp.array([3]), jnp.arange(count) % 4 > 2
  )
  return jnp.square(mean_states(hidden, rows)).sum() - jnp.tanh(log_probs / 5).sum(), log_probs


def build(**runtime):
  return make_decoder(CONFIG, TENSORS, jnp.float32, Runtime(**runtime))


run = jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.fixture(scope='module')
def padded():
  return run(build(scan_layers=True), rows(0))


def assert_alike(found, expected):
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('runtime', [{'scan_layers': True, 'remat': True}, {}], ids=str)
def test_losses_and_gradients_are_those_of_padded_rows(padded, runtime):
  assert_alike(run(build(**runtime), rows(2)), padded)


def test_parts_of_packed_rows_are_packed_by_themselves(padded):
  decoder, parts = build(scan_layers=True), parts_of(rows(2), 2)
  found = [run(decoder, part) for part in parts]
  (a, b), whole_loss = (float(value) for (value, _), _ in found), float(padded[0][0])
  assert a + b == pytest.approx(whole_loss, rel=1e-5)
  assert_alike(np.concatenate([log_probs for (_, log_probs), _ in found]), padded[0][1])


def test_log_probs_of_packed_replies_are_those_of_a_full_softmax_in_float64():
  made = rows(1)
  decoder = build(scan_layers=True)
  found = np.asarray(token_log_probs(decoder, hidden_states(decoder, made), made, 1.0)).reshape(8, 5, -1)
  for some, (prompt, replies) in zip(found, GROUPS, strict=True):
    for row, reply in zip(some, replies, strict=False):
      np.testing.assert_allclose(row[: len(reply)], numpy_reply(CONFIG, TENSORS, prompt, reply), atol=1e-4)
      assert not row[len(reply) :].any()


def test_on_eight_devices_each_packs_its_own(padded):
  with jax.set_mesh(make_mesh((2, 2, 2))):
    decoder, made = build(scan_layers=True), shard_batch(rows(4))
    assert made.packing.slots.addressable_shards[0].data.shape[0] == 1
    assert_alike(run(decoder, made), padded)
    compiled = run.lower(decoder, made).compile()
  # No device has the rows of all of them, in any form.
  assert not whole(compiled, 40, 12)
  size = made.packing.slots.shape[1]
  shapes = {tuple(map(int, found.split(','))) for found in re.findall(r'\bf32\[([\d,]+)\]', compiled.as_text())}
  assert (1, size, 32) in shapes and not [shape for shape in shapes if shape[:2] == (4, size) or 4 * size in shape]


def test_prompts_that_devices_do_not_divide_are_computed_by_several():
  # Six prompts, of which each of four devices has three of the twelve replies.
  some = [Group(prompt, replies[:2]) for prompt, replies in GROUPS[:6]]
  made = make_rows(some, each=2, prompt_width=16, width=12)
  expected = run(build(scan_layers=True), made)
  packing = make_packing(made.lengths, 12, 36, 4)
  assert packing is not None
  with jax.set_mesh(make_mesh((2, 2, 2))):
    for held in (made, made._replace(packing=packing)):
      assert_alike(run(build(scan_layers=True), shard_batch(held)), expected)
  # Nor do they divide the rows: one reply to each.
  some = [Group(prompt, replies[:1]) for prompt, replies in GROUPS[:6]]
  made = make_rows(some, each=1, prompt_width=16, width=12)
  expected = run(build(scan_layers=True), made)
  with jax.set_mesh(make_mesh((2, 2, 2))):
    assert_alike(run(build(scan_layers=True), shard_batch(made)), expected)
