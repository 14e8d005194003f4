"""The decoder: the same numbers as transformers on the same weights, however a text is padded, split or cached."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama_reference import (
  numpy_log_probs,
  random_tensors,
  tiny_config,
  transformers_llama,
  transformers_names,
  transformers_replies,
)

from charjax.engine.batch import common_prefix, compute_prefix, item_keys, length_before, pad
from charjax.engine.rows import Group, make_rows, reply_mask
from charjax.engine.sample import Sampling, sample
from charjax.engine.score import reply_log_probs
from charjax.errors import UserError
from charjax.model import checkpoint_source
from charjax.model.config import PROJECTIONS
from charjax.model.decoder import Decoder, Runtime, forward, logits, lower_layers, make_cache
from charjax.model.lora import Adapter, merge
from charjax.model.products import Widened, matmul
from charjax.model.weights import make_decoder
from charjax.training.heads import make_trainable

CONFIGS = {
  'tied, grouped heads': tiny_config(),
  'own head, one key head, wide heads': tiny_config(
    embed_dim=36, num_heads=3, num_kv_heads=1, head_dim=16, tied_embeddings=False, rope_theta=500.0, norm_eps=1e-3
  ),
}
LENGTHS = (9, 1, 14, 4)


@pytest.fixture(params=CONFIGS, scope='module')
def config(request):
  return CONFIGS[request.param]


def build(config, seed=0, **runtime) -> Decoder:
  return make_decoder(config, random_tensors(config, seed), jnp.float32, Runtime(**runtime))


def texts(config, lengths=LENGTHS, seed=0) -> list[list[int]]:
  rng = np.random.default_rng(seed)
  return [rng.integers(0, config.vocab_size, length).tolist() for length in lengths]


@partial(jax.jit, static_argnames=('left',))
def padded_log_probs(decoder, tokens, real, adapter=None, before=(), *, left):
  """log softmax [B, T, V] of a padded batch."""
  width = tokens.shape[1]
  lengths = real.sum(-1)
  start = width - lengths if left else jnp.zeros_like(lengths)
  slots = jnp.arange(width)
  positions = jnp.maximum(slots - start[:, None], 0) + length_before(before, len(tokens))
  hidden, _ = forward(decoder, tokens, positions, real.astype(np.int32), adapter=adapter, before=before)
  return jax.nn.log_softmax(logits(decoder, hidden), -1)


def of_rows(decoder, rows, left=False, adapter=None, before=(), width=16) -> list[np.ndarray]:
  tokens, real = pad([row[::-1] for row in rows] if left else rows, width)
  if left:
    tokens, real = tokens[:, ::-1], real[:, ::-1]
  out = np.asarray(padded_log_probs(decoder, tokens, real, adapter, before, left=left))
  return [out[i][real[i]] for i in range(len(rows))]


def assert_close(found, expected, tolerance):
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


# ---- SmolLM2 ----

OPENINGS = [
  *(f'The capital of {c} is' for c in ('France', 'Peru', 'Japan', 'Kenya', 'Norway', 'Canada', 'Egypt', 'Laos')),
  *(f'{a} + {b} =' for a, b in ((2, 2), (17, 5), (100, 250), (9, 8))),
  *(f'My favourite {x}' for x in ('fruit', 'river', 'planet', 'poet', 'sport', 'metal', 'language of India')),
  'Hi',
  'Once upon a time, in a village by the sea, there',
  'def add(a, b):\n  return',
  'The sky is blue because',
  'Dear Sir or Madam,\n\nI am',
  'To be, or not to be,',
  '<html><head><title>',
  'Water freezes at',
  'She opened the door and',
  'Größe, naïve, 日本語 🙂',
  'Monday, Tuesday,',
  'I think, therefore',
  'Q: Is it wrong to lie?\nA:',
]
SHARED = 'She said: '


@pytest.fixture(scope='module')
def smol():
  pytest.importorskip('torch')
  checkpoint = checkpoint_source.load(checkpoint_source.EMBEDDED)
  decoder = make_decoder(checkpoint.config, checkpoint.tensors, jnp.float32, Runtime(scan_layers=True))
  prompts = [checkpoint.tokenizer.encode(SHARED + opening) for opening in OPENINGS]
  return decoder, transformers_llama(checkpoint.config, checkpoint.tensors), checkpoint.tokenizer, prompts


def test_smollm2_decodes_32_texts_greedily_as_transformers_does(smol):
  decoder, peer, tokenizer, prompts = smol
  assert len(prompts) == 32 and common_prefix(prompts) == len(tokenizer.encode(SHARED)) - 1
  # After a shared prefix and prompts of several lengths, with a cache.
  settings = Sampling(12, temperature=0, batch_size=32)
  drawn = sample(decoder, prompts, item_keys(0, 'test', OPENINGS), tokenizer.eos_ids, settings)
  assert tokenizer.decode(drawn[0].tokens).startswith(' Paris')
  rows = transformers_replies(peer, prompts, [reply.tokens for reply in drawn])
  # Each token being transformers' choice after the tokens before it, the decodings are the same, one by one.
  for reply, row in zip(drawn, rows, strict=True):
    assert row.argmax(-1).tolist() == reply.tokens
    ended = reply.tokens[-1] in tokenizer.eos_ids
    assert reply.finish == ('stop' if ended else 'length') and (ended or len(reply.tokens) == 12)


def test_smollm2_gives_the_log_probs_of_transformers_however_it_is_padded(smol):
  decoder, peer, tokenizer, prompts = smol
  prompts = prompts[16:24]
  replies = [tokenizer.encode(text) for text in (' blue.', ' we', ' a + b\n', ' of', ' the', ' that is', '42', ' 0 C')]
  expected = transformers_replies(peer, prompts, replies)
  texts = [prompt + reply[:-1] for prompt, reply in zip(prompts, replies, strict=True)]
  shared = common_prefix(prompts)
  prefix = jax.jit(compute_prefix)(decoder, np.asarray([prompts[0][:shared]], np.int32), np.array([shared], np.int32))
  after_prefix = [text[shared:] for text in texts]
  for found in (
    of_rows(decoder, texts, width=24),
    of_rows(decoder, texts, left=True, width=24),
    of_rows(decoder, after_prefix, left=True, before=(prefix,), width=24),
  ):
    assert_close([row[-len(reply) :] for row, reply in zip(found, replies, strict=True)], expected, 1e-3)


# ---- tiny models ----


def test_a_padded_batch_gives_what_each_text_gives_alone(config):
  decoder, tensors = build(config), random_tensors(config)
  rows = texts(config)
  expected = [numpy_log_probs(config, tensors, row) for row in rows]
  assert_close(of_rows(decoder, rows), expected, 1e-4)
  assert_close(of_rows(decoder, rows, left=True), expected, 1e-4)


def test_transformers_agrees(config):
  torch = pytest.importorskip('torch')
  peer = transformers_llama(config, random_tensors(config))
  rows = texts(config)
  with torch.no_grad():
    expected = [torch.log_softmax(peer(torch.tensor([row])).logits[0], -1).numpy() for row in rows]
  assert_close(of_rows(build(config), rows), expected, 1e-4)


both_ways = pytest.mark.parametrize('scan', [False, True], ids=['unrolled', 'scanned'])
precompute = jax.jit(compute_prefix)


@both_ways
def test_a_shared_prefix_is_as_if_it_stood_in_each_row(config, scan):
  decoder, rows = build(config, scan_layers=scan), texts(config)
  for length in (1, 6, 8):
    prefix = texts(config, [length], seed=1)[0]
    padded = np.asarray([prefix + [5] * (8 - length)], np.int32)  # what stands in the padding must not matter
    computed = precompute(decoder, padded, np.array([length], np.int32))
    expected = [numpy_log_probs(config, random_tensors(config), prefix + row)[length:] for row in rows]
    assert_close(of_rows(decoder, rows, left=True, before=(computed,)), expected, 1e-4)


@both_ways
def test_texts_before_groups_of_rows_are_as_if_they_stood_in_each(config, scan):
  decoder, rows, tensors = build(config, scan_layers=scan), texts(config), random_tensors(config)
  first, *seconds = texts(config, [5, 3, 7], seed=1)
  whole = precompute(decoder, np.asarray([first], np.int32), np.array([5], np.int32))
  padded, real = pad(seconds, 8)
  groups = jax.jit(compute_prefix)(decoder, padded, real.sum(-1), None, (whole,))
  found = of_rows(decoder, rows, before=(whole, groups))
  for i, row in enumerate(rows):
    text = first + seconds[i // 2]
    assert_close([found[i]], [numpy_log_probs(config, tensors, text + row)[len(text) :]], 1e-4)


@both_ways
def test_a_text_read_bit_by_bit_with_a_cache_is_as_if_read_at_once(config, scan):
  decoder = build(config, scan_layers=scan)
  row = texts(config, [14])[0]
  run = jax.jit(lambda d, t, p, c, i: forward(d, t, p, cache=c, cache_index=i))
  cache, hidden = make_cache(decoder, 1, 16), []
  for begin, end in ((0, 6), (6, 7), (7, 8), (8, 14)):
    positions = np.arange(begin, end)[None]
    states, cache = run(decoder, np.asarray([row[begin:end]]), positions, cache, begin)
    hidden.append(states[0])
  found = jax.nn.log_softmax(logits(decoder, jnp.concatenate(hidden)), -1)
  assert_close([found], [numpy_log_probs(config, random_tensors(config), row)], 1e-4)


def test_scanned_and_unrolled_layers_agree(config):
  rows = texts(config)
  scanned, unrolled = (of_rows(build(config, scan_layers=scan), rows) for scan in (True, False))
  assert_close(scanned, unrolled, 1e-5)


@pytest.mark.parametrize('tap', [1, 2])
@pytest.mark.parametrize('scan', [False, True])
def test_a_tap_gives_what_the_lower_layers_end_in_on_the_way(config, scan, tap):
  decoder = build(config, scan_layers=scan)
  tokens = np.array(texts(config, (9, 9, 9)))
  positions = np.tile(3 + np.arange(9), (3, 1))
  lower = lower_layers(decoder, tap)
  before, cut = ((compute_prefix(d, np.array([[4, 5, 6]]), np.array([3])),) for d in (decoder, lower))
  (tapped, last), kv = forward(decoder, tokens, positions, before=before, tap=tap)
  expected, expected_kv = forward(decoder, tokens, positions, before=before)
  np.testing.assert_allclose(last, expected, atol=1e-6)
  jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), kv, expected_kv)
  np.testing.assert_allclose(tapped, forward(lower, tokens, positions, before=cut)[0], atol=1e-6)


def test_the_lower_layers_are_a_decoder_of_their_own(config):
  decoder, rows = build(config, scan_layers=True), texts(config)
  lower = lower_layers(decoder, 1)
  assert (lower.config.num_layers, decoder.config.num_layers) == (1, config.num_layers)
  first = {name: value[:1] if name.startswith('blocks') else value for name, value in random_tensors(config).items()}
  alone = make_decoder(dataclasses.replace(config, num_layers=1), first, jnp.float32, decoder.runtime)
  assert_close(of_rows(lower, rows), of_rows(alone, rows), 1e-6)


def reply_loss(decoder, rows, adapter=None, prefix_tokens=None):
  """Mean over the replies' tokens of their negative log-prob."""
  before = ()
  if prefix_tokens is not None:
    before = (compute_prefix(decoder, prefix_tokens, jnp.full(1, prefix_tokens.shape[1]), adapter),)
  log_probs = reply_log_probs(decoder, rows, adapter=adapter, before=before)
  return -log_probs.sum() / reply_mask(rows).sum()


def arrays_by_name(tree) -> dict[str, np.ndarray]:
  return {'.'.join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(tree))}


def torch_gradient(config, prompts, replies):
  torch = pytest.importorskip('torch')
  peer = transformers_llama(config, random_tensors(config))
  total = 0.0
  for prompt, reply in zip(prompts, replies, strict=True):
    log_probs = torch.log_softmax(peer(torch.tensor([prompt + reply])).logits[0], -1)
    total = total - log_probs[len(prompt) - 1 : -1].gather(1, torch.tensor(reply)[:, None]).sum()
  loss = total / sum(map(len, replies))
  loss.backward()
  return loss.item(), {name: value.grad.numpy() for name, value in peer.named_parameters()}


@pytest.mark.parametrize(
  ('name', 'runtime', 'split'),
  [
    ('tied, grouped heads', {}, False),
    ('own head, one key head, wide heads', {'scan_layers': True, 'remat': True}, True),
  ],
  ids=['unrolled', 'scanned, recomputed, through a shared prefix'],
)
def test_the_gradient_of_a_loss_is_torchs(name, runtime, split):
  config = CONFIGS[name]
  shared = texts(config, [5], seed=2)[0]
  prompts, replies = texts(config, (3, 6), seed=3), texts(config, (4, 1, 7), seed=4)
  # Two replies share the first prompt.
  expected_loss, expected = torch_gradient(config, [shared + prompts[i] for i in (0, 0, 1)], replies)
  decoder = build(config, **runtime)
  prefix = np.asarray([shared], np.int32) if split else None
  first, second = prompts if split else [shared + prompt for prompt in prompts]
  groups = [Group(first, replies[:2]), Group(second, replies[2:])]
  rows = make_rows(groups, each=2, prompt_width=12, width=9, count=3)
  loss, gradient = jax.jit(jax.value_and_grad(reply_loss))(decoder, rows, None, prefix)
  assert float(loss) == pytest.approx(expected_loss, abs=1e-5)
  found = transformers_names(arrays_by_name(gradient))
  assert set(found) == set(expected)
  for name, theirs in expected.items():
    assert np.abs(found[name] - theirs).max() <= 1e-3 * np.abs(theirs).max(), name


# ---- adapters ----


def test_a_fresh_adapter_changes_nothing_and_learns():
  config = CONFIGS['tied, grouped heads']
  decoder, rows = build(config, scan_layers=True), texts(config)
  adapter = Adapter(config, 3, rngs=nnx.Rngs(0))
  for found, expected in zip(of_rows(decoder, rows, adapter=adapter), of_rows(decoder, rows), strict=True):
    np.testing.assert_array_equal(found, expected)
  said = texts(config, (3, 3, 3, 3), seed=5)
  groups = [Group(row, [reply]) for row, reply in zip(rows, said, strict=True)]
  batch = make_rows(groups, each=1, prompt_width=16, width=5)
  gradient = jax.jit(jax.grad(lambda adapter: reply_loss(decoder, batch, adapter)))(adapter)
  for name, value in arrays_by_name(gradient).items():
    # b starts at zero, so that a has no gradient yet, and b has one everywhere.
    assert (np.abs(value).max() > 0) == name.endswith('.b'), name


@both_ways
def test_an_adapter_is_a_product_added_to_each_weight(scan):
  config = CONFIGS['own head, one key head, wide heads']
  tensors, rows = random_tensors(config), texts(config)
  adapter = Adapter(config, 2, rngs=nnx.Rngs(0))
  for i, target in enumerate(PROJECTIONS):
    pair, name = getattr(adapter, target), f'blocks.{target}'
    pair['b'][...] = jax.random.normal(jax.random.key(i), pair['b'].shape) * 0.3
    change = np.asarray(pair['a'][...]) @ np.asarray(pair['b'][...])
    tensors[name] = tensors[name] + change.reshape(tensors[name].shape)
  expected = [numpy_log_probs(config, tensors, row) for row in rows]
  decoder = build(config, scan_layers=scan)
  assert_close(of_rows(decoder, rows, adapter=adapter), expected, 1e-4)
  assert_close(of_rows(merge(decoder, adapter), rows), expected, 1e-4)


def test_adapters_that_cannot_be_are_refused():
  with pytest.raises(UserError, match='rank is 0'):
    Adapter(tiny_config(), 0, rngs=nnx.Rngs(0))
  with pytest.raises(UserError, match="'head': there is no such projection; choose from q, k, v, o, gate, up, down"):
    Adapter(tiny_config(), 1, rngs=nnx.Rngs(0), targets=('head',))


def test_an_adapter_stands_beside_the_named_projections_alone():
  decoder = build(tiny_config())
  adapters = [
    make_trainable(decoder, 2, 0, lora_targets=targets)['adapter'].arrays()
    for targets in (('v', 'down'), ('down', 'v'))
  ]
  assert list(adapters[0]) == ['v', 'down']
  jax.tree.map(np.testing.assert_array_equal, *adapters)


# ---- products ----


@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize('lead', [(5,), (2, 3), ()])
def test_matmuls_own_gradient_is_autodiffs(axis, lead):
  x, weight, out = (jax.random.normal(key, shape) for key, shape in zip(
    jax.random.split(jax.random.key(0), 3), ((*lead, 7), (7, 4) if axis == 0 else (4, 7), (*lead, 4)), strict=True
  ))  # fmt: skip

  def plain(x, weight):
    return x @ (weight if axis == 0 else weight.T)

  ours, pull = jax.vjp(lambda x, weight: matmul(x, weight, jnp.float32, axis), x, weight)
  theirs, pull_plain = jax.vjp(plain, x, weight)
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
  for a, b in zip(pull(out), pull_plain(out), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_bfloat16_product_accumulates_in_float32_and_keeps_the_dtypes_of_gradients():
  # In bfloat16 the sum of 4096 ones would stop at 256.
  x, weight = jnp.ones((1, 4096)), jnp.ones((4096, 2), jnp.bfloat16)
  out, pull = jax.vjp(lambda x, weight: matmul(x, weight, jnp.bfloat16), x, weight)
  assert out.dtype == jnp.float32 and (np.asarray(out) == 4096).all()
  grad_x, grad_weight = pull(jnp.ones_like(out))
  assert (grad_x.dtype, grad_weight.dtype) == (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize('axis', [0, 1])
def test_a_product_of_rounded_operands_is_that_of_bfloat16_whatever_it_is_computed_in(axis):
  rng = np.random.default_rng(0)
  x, out = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 3, 40), (2, 3, 7)))
  weight = jnp.asarray(rng.normal(size=(40, 7) if axis == 0 else (7, 40)), jnp.float32)
  # Under jit, where XLA takes what conversions it likes for none.
  pull = jax.jit(
    lambda x, weight, dtype: jax.vjp(lambda *a: matmul(*a, dtype, axis), x, weight)[1](out), static_argnums=2
  )
  product = jax.jit(lambda x, weight, dtype: matmul(x, weight, dtype, axis), static_argnums=2)
  for weights in (weight, weight.astype(jnp.bfloat16)):
    narrow, wide = ((product(x, weights, t), *pull(x, weights, t)) for t in (jnp.bfloat16, Widened(jnp.bfloat16)))
    for a, b in zip(narrow, wide, strict=True):
      assert a.dtype == b.dtype
      np.testing.assert_allclose(np.float32(a), np.float32(b), atol=1e-5, rtol=1e-5 if a.dtype == jnp.float32 else 1e-2)
  assert np.abs(narrow[0] - product(x, weight, jnp.float32)).max() > 1e-3  # no more than they agree


# ---- weights in ----


@pytest.mark.parametrize(
  ('change', 'expected'),
  [
    (lambda t: t.pop('blocks.k'), 'tensor blocks.k is missing'),
    (lambda t: t.update(extra=t['embed']), 'tensor extra is not part'),
    (lambda t: t.update(embed=t['embed'][:-1]), r'tensor embed has shape \(47, 32\), the config says \(48, 32\)'),
  ],
)
def test_tensors_that_do_not_fit_are_named(change, expected):
  config = tiny_config()
  tensors = random_tensors(config)
  change(tensors)
  with pytest.raises(UserError, match=expected):
    make_decoder(config, tensors, jnp.float32, Runtime())


def test_a_shape_that_cannot_be_is_refused():
  with pytest.raises(UserError, match='num_heads'):
    dataclasses.replace(tiny_config(), num_heads=5)
