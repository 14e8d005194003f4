"""Sampling and scoring: the distribution they say, and the same numbers in whatever company a text is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from llama_reference import numpy_log_probs, numpy_reply, random_tensors, tiny_config
from scipy.stats import chi2

from charjax.engine import draw as engine
from charjax.engine.batch import bucket, common_prefix, item_keys, pad, prefill
from charjax.engine.draw import draw
from charjax.engine.rows import FixedShapes, Group, make_rows, pad_values, reply_mask, take_replies
from charjax.engine.sample import Sampling, compilations, sample
from charjax.engine.score import (
  hidden_states,
  map_rows,
  mean_over_tokens,
  mean_states,
  over_chunks,
  reply_width,
  score,
  score_options,
  token_log_probs,
)
from charjax.model.decoder import Runtime, forward, logits
from charjax.model.lora import Adapter
from charjax.model.weights import make_decoder

# More tokens than one block of the sampler holds, and no whole number of blocks.
CONFIG = tiny_config(vocab_size=300)
TENSORS = random_tensors(CONFIG)
EOS = (7, 11, 19, *range(200, 230))
NAMES = [f'item-{i}' for i in range(12)]


@pytest.fixture(scope='module')
def decoder():
  return make_decoder(CONFIG, TENSORS, jnp.float32, Runtime(scan_layers=True))


@pytest.fixture(scope='module')
def prompts():
  """Twelve prompts of 1 to 12 tokens without a common beginning."""
  rng = np.random.default_rng(0)
  rows = [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in range(1, 13)]
  assert common_prefix(rows) == 0
  return rows


@pytest.fixture(scope='module')
def keys():
  return item_keys(0, 'test', NAMES)


SETTINGS = Sampling(10, temperature=0.7, batch_size=5)


@pytest.fixture(scope='module')
def drawn(decoder, prompts, keys):
  return sample(decoder, prompts, keys, EOS, SETTINGS)


def assert_rows_close(found, expected, tolerance=1e-4):
  assert len(found) == len(expected)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


# ---- scoring ----


def test_scores_are_those_of_a_full_softmax_in_float64(decoder, prompts):
  rng = np.random.default_rng(1)
  # With empty and long replies; their order by length is not the order given.
  replies = [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in rng.permutation([0, *range(1, 12)])]
  for temperature in (1.0, 0.5):
    expected = [numpy_reply(CONFIG, TENSORS, p, r, temperature) for p, r in zip(prompts, replies, strict=True)]
    assert_rows_close(score(decoder, prompts, replies, temperature=temperature, batch_size=5), expected)


def test_a_common_prefix_changes_no_score(decoder, prompts):
  shared = prompts[-1]
  asked, replies = [shared + prompt for prompt in prompts], [prompt[::-1] for prompt in prompts]
  assert common_prefix(asked) == len(shared)
  expected = [numpy_reply(CONFIG, TENSORS, p, r) for p, r in zip(asked, replies, strict=True)]
  assert_rows_close(score(decoder, asked, replies, batch_size=12), expected)
  # One prompt alone is all prefix but for its last token.
  assert_rows_close(score(decoder, asked[:1], replies[:1], batch_size=12), expected[:1])


def test_the_adapter_goes_through_the_prefix_too(decoder, prompts):
  adapter = Adapter(CONFIG, 2, rngs=nnx.Rngs(0))
  tensors = dict(TENSORS)
  for i, (name, pair) in enumerate(adapter.arrays().items()):
    b = np.asarray(jax.random.normal(jax.random.key(i), pair['b'].shape)) * 0.3
    getattr(adapter, name)['b'][...] = b
    tensors[f'blocks.{name}'] = TENSORS[f'blocks.{name}'] + (np.asarray(pair['a']) @ b).reshape(
      TENSORS[f'blocks.{name}'].shape
    )
  asked, replies = [prompts[-1] + prompt for prompt in prompts[:4]], prompts[4:8]
  expected = [numpy_reply(CONFIG, tensors, p, r) for p, r in zip(asked, replies, strict=True)]
  assert_rows_close(score(decoder, asked, replies, adapter=adapter, batch_size=4), expected)
  drawn = sample(decoder, asked, item_keys(0, 'lora', NAMES[:4]), EOS, Sampling(6, batch_size=4), adapter=adapter)
  expected = [numpy_reply(CONFIG, tensors, p, r.tokens) for p, r in zip(asked, drawn, strict=True)]
  assert_rows_close([reply.log_probs for reply in drawn], expected)


def test_option_scores_are_those_of_the_next_token(decoder, prompts):
  options = [3, 299, 0]
  found = score_options(decoder, prompts, options, batch_size=5)
  expected = [numpy_log_probs(CONFIG, TENSORS, prompt)[-1, options] for prompt in prompts]
  np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize('batch_size', [2, 7, 40])
def test_replies_to_one_prompt_share_its_pass_and_do_not_see_each_other(decoder, prompts, batch_size):
  rng = np.random.default_rng(2)
  # 1 to 9 replies a prompt, mixed up, some empty, one long.
  asked = [prompts[i] for i in rng.permutation(np.repeat(np.arange(9), np.arange(1, 10)))]
  replies = [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in rng.integers(0, 9, len(asked))]
  replies[5] = rng.integers(0, CONFIG.vocab_size, 120).tolist()
  expected = [numpy_reply(CONFIG, TENSORS, p, r) for p, r in zip(asked, replies, strict=True)]
  assert_rows_close(score(decoder, asked, replies, batch_size=batch_size), expected)


def test_what_is_said_of_replies_comes_back_in_the_order_given(decoder, prompts):
  replies = [[i] * (i % 3) for i in range(len(prompts))]
  asked = [prompts[i // 2] for i in range(len(prompts))]
  found = map_rows(lambda before, rows: jnp.asarray(rows.tokens), decoder, asked, replies, batch_size=5)
  for prompt, reply, tokens in zip(asked, replies, found, strict=True):
    # The prompt's last token stands where the reply's first is predicted.
    assert tokens[: 1 + len(reply)].tolist() == [prompt[-1], *reply]
  assert score(decoder, [], []) == [] and sample(decoder, [], None, EOS, SETTINGS) == []


def test_widths_of_batches_halve_and_those_of_many_have_steps_between():
  few, many = ({needed: reply_width(224, needed, many) for needed in range(1, 225)} for many in (False, True))
  assert set(few.values()) == {224, 112, 56, 28, 14, 7, 3, 1}
  assert set(many.values()) == {224, 168, 112, 88, 56, 48, 28, 24, 14, 7, 3, 1}
  for needed in range(1, 225):
    assert needed <= many[needed] <= few[needed] < max(2 * needed, 225)


def test_the_batches_of_a_training_run_have_one_shape_and_groups_of_replies_in_order():
  prompts = [[1, 2, 3, 4], [1, 2, 5]]
  shapes = FixedShapes(prompts, longest_reply=20)
  groups = [Group(prompts[0], [[10 + i] * i for i in range(5)]), Group(prompts[1], [[20], [21, 21]])]
  rows = shapes.rows(groups, each=5, count=3)
  assert shapes.opening.tokens.tolist() == [[1, 2]] and shapes.opening.length.tolist() == [2]
  assert rows.lengths.tolist() == [1, 2, 3, 4, 5, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0]
  assert rows.prompt_lengths.tolist() == [1, 0, 0] and rows.prompts[0, 0] == 3
  assert rows.tokens[4, :5].tolist() == [4, 14, 14, 14, 14] and rows.tokens[5, :2].tolist() == [5, 20]
  again = shapes.rows([Group(prompts[1], [[7]])], each=5, count=3)
  assert [array.shape for array in again[:4]] == [array.shape for array in rows[:4]]
  # Where it is not told how long replies are, they may all be long.
  assert 15 * 21 <= rows.packing.slots.shape[1] == again.packing.slots.shape[1] < 15 * 24
  values = pad_values([np.arange(1.0, n) for n in rows.lengths], rows.tokens.shape[1] - 1)
  assert ((values > 0) == reply_mask(rows)).all()
  np.testing.assert_allclose(mean_over_tokens(values, rows)[:7], [0, 1, 1.5, 2, 2.5, 1, 1.5])


def test_a_reply_s_mean_state_is_that_of_its_own_tokens(decoder, prompts):
  rng = np.random.default_rng(3)
  replies = [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in (3, 1, 6)]
  groups = [Group(prompts[6], replies[:2]), Group(prompts[2], replies[2:])]
  rows = make_rows(groups, each=2, prompt_width=12, width=9)
  found = np.asarray(mean_states(hidden_states(decoder, rows), rows))
  for prompt, reply, state in zip([prompts[6], prompts[6], prompts[2]], replies, found[:3], strict=True):
    text = np.asarray([prompt + reply])
    states, _ = forward(decoder, text, np.arange(text.shape[1])[None])
    np.testing.assert_allclose(state, np.asarray(states, np.float64)[0, len(prompt) :].mean(0), atol=1e-5)
  assert found[3].tolist() == [0] * CONFIG.embed_dim


def test_log_probs_of_a_reply_that_went_on_leave_its_end_out(decoder, prompts):
  rng = np.random.default_rng(4)
  end = 7
  replies = [[token for token in rng.integers(0, CONFIG.vocab_size, 6).tolist() if token != end] for _ in range(2)]
  rows = make_rows([Group(prompts[3], replies)], each=2, prompt_width=12, width=9)
  hidden = hidden_states(decoder, rows)
  plain = np.asarray(token_log_probs(decoder, hidden, rows, 0.7))
  found = np.asarray(token_log_probs(decoder, hidden, rows, 0.7, end))
  for place, token in enumerate(replies[0]):
    scaled = numpy_log_probs(CONFIG, TENSORS, [*prompts[3], *replies[0][:place]])[-1] / 0.7
    going_on = np.delete(scaled, end)
    expected = scaled[token] - going_on.max() - np.log(np.exp(going_on - going_on.max()).sum())
    assert found[0, place] == pytest.approx(expected, abs=1e-4) and found[0, place] > plain[0, place]


def test_replies_are_taken_by_prompt():
  rows = np.arange(12).reshape(6, 2)  # two prompts, three replies to each
  assert np.asarray(take_replies(rows, 2, slice(1)))[:, 0].tolist() == [0, 6]
  assert np.asarray(take_replies(rows, 2, slice(1, None)))[:, 0].tolist() == [2, 4, 8, 10]


def test_padding_of_chunks_reaches_no_gradient(decoder, prompts):
  # More tokens than a chunk holds, and no whole number of chunks.
  rng = np.random.default_rng(0)
  groups = [Group(prompts[3], [rng.integers(0, CONFIG.vocab_size, 9).tolist() for _ in range(8)]) for _ in range(8)]
  rows = make_rows(groups, each=8, prompt_width=12, width=10)

  def total(decoder):
    return token_log_probs(decoder, hidden_states(decoder, rows), rows, 0.7).sum()

  def unchunked(decoder):
    scaled = logits(decoder, hidden_states(decoder, rows)[:, :-1]) / 0.7
    return jnp.take_along_axis(jax.nn.log_softmax(scaled, -1), rows.tokens[:, 1:, None], 2).sum()

  for found, expected in zip(*(jax.tree.leaves(jax.grad(f)(decoder)) for f in (total, unchunked)), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('shape', [(3, 7), (4, 128), (5, 111)])
def test_chunks_are_put_together_again(shape):
  x = np.random.default_rng(0).normal(size=(*shape, 2)).astype(np.float32)
  y = np.arange(shape[0] * shape[1]).reshape(shape)

  def total(x):
    both = over_chunks(lambda x, y: (x.sum(-1) * y, x * 2), x, y)
    return (both[0] ** 2).sum(), both

  gradient, (products, doubled) = jax.grad(total, has_aux=True)(x)
  np.testing.assert_allclose(products, x.sum(-1) * y, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(doubled, x * 2)
  np.testing.assert_allclose(gradient, np.repeat((2 * x.sum(-1) * y * y)[..., None], 2, -1), rtol=1e-4, atol=1e-2)


# ---- drawing a token ----


def test_tokens_are_drawn_as_often_as_the_softmax_says():
  logits = np.random.default_rng(0).normal(size=(1, 300)).astype(np.float32) * 2
  logits[0, [0, 255, 256, 299]] += 3  # the ends of blocks
  count = 40_000
  uniform = (np.arange(count, dtype=np.float32) + 0.5) / count  # evenly, so that a share is off by two draws at most
  for temperature in (1.0, 0.6):
    token, log_prob = jax.jit(draw, static_argnums=(2, 3))(np.repeat(logits, count, 0), uniform, temperature, 1.0)
    scaled = logits[0].astype(np.float64) / temperature
    expected = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
    assert np.abs(np.bincount(token, minlength=300) - expected * count).max() < 2
    np.testing.assert_allclose(log_prob, np.log(expected)[np.asarray(token)], atol=1e-5)


def test_the_ends_of_the_unit_interval_draw_tokens_of_weight():
  logits = np.full((4, 300), -np.inf, np.float32)
  logits[:, [40, 270]] = 0
  uniform = jnp.array([0.0, 0.4999, 0.5001, 1.0])
  token, log_prob = draw(logits, uniform, 1.0, 1.0)
  assert token.tolist() == [40, 40, 270, 270]
  np.testing.assert_allclose(log_prob, np.log(0.5), atol=1e-6)


def test_a_token_without_weight_is_never_drawn():
  # Running sums over many blocks round, and end above or below the total.
  logits = np.random.default_rng(2).normal(size=(200, 20_000)).astype(np.float32) * 4
  uniform = np.float32(1) - np.logspace(-8, -1, 200, dtype=np.float32)
  token, log_prob = jax.jit(draw, static_argnums=(2, 3))(logits, uniform, 1.0, 0.9)
  assert np.isfinite(log_prob).all()
  assert all(int(t) in nucleus(row, 0.9) for t, row in zip(token, logits, strict=True))


def nucleus(logits, top_p) -> set[int]:
  """The smallest set of the most probable tokens that holds `top_p`, by a sort in float64."""
  weight = np.exp(logits.astype(np.float64) - logits.max())
  order = np.argsort(-weight, kind='stable')
  return set(order[: int((np.cumsum(weight[order]) / weight.sum() < top_p).sum()) + 1].tolist())


def test_top_p_keeps_the_nucleus():
  rng = np.random.default_rng(0)
  logits = np.concatenate([rng.normal(size=(20, 300)) * scale for scale in (0.1, 1, 3, 8)]).astype(np.float32)
  # Its bound: the threshold is found to a factor of exp(20 / 2^16).
  slack = np.exp(-20 / 2**16 - 1e-6)
  exact = 0
  for top_p in (0.1, 0.5, 0.9, 0.99):
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    threshold = np.asarray(engine._top_p_threshold(jnp.asarray(weight), top_p))
    for row, least, row_logits in zip(weight, threshold, logits, strict=True):
      kept, expected = set(np.flatnonzero(row >= least).tolist()), nucleus(row_logits, top_p)
      assert expected <= kept
      assert all(row[i] >= row[list(expected)].min() * slack for i in kept)
      exact += kept == expected
  assert exact > 0.97 * 4 * len(logits)


def test_top_p_draws_from_the_nucleus_alone_and_says_its_log_probs():
  logits = np.random.default_rng(1).normal(size=300).astype(np.float32) * 2
  count = 20_000
  uniform = (np.arange(count, dtype=np.float32) + 0.5) / count
  token, log_prob = jax.jit(draw, static_argnums=(2, 3))(np.repeat(logits[None], count, 0), uniform, 0.8, 0.7)
  kept = sorted(nucleus(logits / 0.8, 0.7))
  weight = np.exp((logits[kept].astype(np.float64) - logits.max()) / 0.8)
  expected = np.zeros(300)
  expected[kept] = weight / weight.sum()
  assert np.abs(np.bincount(token, minlength=300) - expected * count).max() < 2
  np.testing.assert_allclose(log_prob, np.log(expected[np.asarray(token)]), atol=1e-5)


# ---- sampling ----


def test_top_k_draws_from_so_many_and_says_their_log_probs():
  logits = np.random.default_rng(4).normal(size=(60, 300)).astype(np.float32) * 3
  uniform = (np.arange(60, dtype=np.float32) + 0.5) / 60
  for top_k, top_p in ((1, 1.0), (7, 1.0), (7, 0.6), (300, 1.0), (1000, 1.0)):
    token, log_prob = jax.jit(draw, static_argnums=(2, 3, 4))(logits, uniform, 0.9, top_p, top_k)
    for row, t, found in zip(logits.astype(np.float64) / 0.9, token, log_prob, strict=True):
      kept = np.sort(row)[::-1][:top_k]
      kept = kept[: len(nucleus(kept, top_p))]
      assert row[t] >= kept[-1]
      np.testing.assert_allclose(found, row[t] - np.log(np.exp(kept - kept[0]).sum()) - kept[0], atol=2e-3)


def test_the_first_tokens_of_many_keys_pass_a_chi_square_test(decoder):
  count = 4096
  prompt = [5, 3, 260]
  keys = item_keys(1, 'test', [str(i) for i in range(count)])
  replies = sample(decoder, [prompt] * count, keys, EOS, Sampling(2, batch_size=1024))
  first = np.exp(numpy_log_probs(CONFIG, TENSORS, prompt)[-1])
  assert_drawn_from([reply.tokens[0] for reply in replies], first)
  # Second tokens too, which a key that is not folded with the step would tie to the first.
  seconds = [reply.tokens[1] for reply in replies if len(reply.tokens) > 1]
  assert_drawn_from(seconds, second_token_probability(prompt, first))


def assert_drawn_from(tokens, probability):
  found, expected = np.bincount(tokens, minlength=len(probability)), probability * len(tokens)
  often = expected >= 5
  found, expected = (np.append(x[often], x[~often].sum()) for x in (found, expected))
  assert ((found - expected) ** 2 / expected).sum() < chi2.ppf(0.999, len(expected) - 1)


def second_token_probability(prompt, first) -> np.ndarray:
  """Of each token in second place, given that the first ended nothing."""
  likely = [token for token in np.argsort(-first) if token not in EOS]
  weights = first[likely]
  rows = np.stack([np.exp(numpy_log_probs(CONFIG, TENSORS, [*prompt, token])[-1]) for token in likely])
  return (weights[:, None] * rows).sum(0) / weights.sum()


def test_the_log_probs_of_a_reply_are_those_of_scoring_it(decoder, prompts, drawn):
  replies = [reply.tokens for reply in drawn]
  expected = [numpy_reply(CONFIG, TENSORS, p, r, 0.7) for p, r in zip(prompts, replies, strict=True)]
  assert_rows_close([reply.log_probs for reply in drawn], expected)
  assert_rows_close(score(decoder, prompts, replies, temperature=0.7, batch_size=5), expected)


def test_a_reply_ends_at_its_first_end_and_nowhere_else(drawn):
  assert {reply.finish for reply in drawn} == {'stop', 'length'}
  for reply in drawn:
    ends = [i for i, token in enumerate(reply.tokens) if token in EOS]
    if reply.finish == 'stop':
      assert ends == [len(reply.tokens) - 1]
    else:
      assert not ends and len(reply.tokens) == SETTINGS.max_new_tokens
    assert len(reply.log_probs) == len(reply.tokens)


def test_an_end_in_the_prompt_ends_no_reply(decoder, prompts, keys):
  asked = [[EOS[0], *prompt, EOS[1], 5, EOS[0]] for prompt in prompts]
  # A shared prefix that is an end, and ends before and right before the reply.
  replies = sample(decoder, asked, keys, EOS[:1] * len(EOS), SETTINGS)
  assert all(reply.tokens for reply in replies)
  assert [reply.finish for reply in replies].count('length') > 8
  expected = [numpy_reply(CONFIG, TENSORS, p, r.tokens, 0.7) for p, r in zip(asked, replies, strict=True)]
  assert_rows_close([reply.log_probs for reply in replies], expected)


def test_greedy_is_the_argmax_of_teacher_forcing(decoder, prompts, keys):
  replies = sample(decoder, prompts, keys, EOS, Sampling(8, temperature=0, batch_size=5))
  for prompt, reply in zip(prompts, replies, strict=True):
    rows = numpy_log_probs(CONFIG, TENSORS, [*prompt, *reply.tokens])[len(prompt) - 1 : -1]
    assert rows.argmax(-1).tolist() == reply.tokens


def test_a_reply_depends_on_its_key_not_on_its_place(decoder, prompts, keys, drawn):
  order = np.random.default_rng(0).permutation(len(prompts))
  again = sample(decoder, [prompts[i] for i in order], keys[order], EOS, SETTINGS)
  for reply, i in zip(again, order, strict=True):
    assert reply.tokens == drawn[i].tokens
    np.testing.assert_array_equal(reply.log_probs, drawn[i].log_probs)
  others = sample(decoder, prompts, item_keys(1, 'test', NAMES), EOS, SETTINGS)
  assert sum(a.tokens == b.tokens for a, b in zip(others, drawn, strict=True)) < 4


@pytest.mark.parametrize('repeats', [(4, 4, 4), (6, 2, 4), (1, 3, 8)])
def test_replies_to_one_prompt_share_its_pass_and_stay_what_they_are(decoder, repeats):
  """In any order and number, with as many rows of a batch filled as can be."""
  three = [[3, 4, 5, 6], [2], [9, 8, 7]]
  asked = [prompt for prompt, count in zip(three, repeats, strict=True) for _ in range(count)]
  order = np.random.default_rng(1).permutation(len(asked))
  keys = item_keys(2, 'test', [str(i) for i in range(len(asked))])
  together = sample(decoder, [asked[i] for i in order], keys[order], EOS, dataclasses.replace(SETTINGS, batch_size=8))
  for reply, i in zip(together, order, strict=True):
    (alone,) = sample(decoder, [asked[i]], keys[i : i + 1], EOS, dataclasses.replace(SETTINGS, batch_size=1))
    assert reply.tokens == alone.tokens and reply.finish == alone.finish
    np.testing.assert_allclose(reply.log_probs, alone.log_probs, atol=1e-5)


@pytest.mark.parametrize('each', [1, 3])
def test_rows_are_refilled_and_their_caches_grow_and_no_reply_can_tell(decoder, each):
  """Replies of 1 to 150 tokens to more prompts than there are rows; some packed, one with nothing to be read."""
  rng = np.random.default_rng(5)
  lengths = [1, 2, 14, 30, 3, 9, 30, 1, 22, 5, 17]
  asked = [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in lengths]
  asked = [prompt for prompt in asked for _ in range(each)]
  keys = item_keys(3, 'test', [str(i) for i in range(len(asked))])
  ends = tuple(range(280, 286))
  replies = sample(decoder, asked, keys, ends, Sampling(150, batch_size=2 * each))
  sizes = sorted(len(reply.tokens) for reply in replies)
  assert sizes[0] < 40 and sizes[-1] > 128, sizes
  for prompt, reply in zip(asked, replies, strict=True):
    assert (reply.tokens[-1] in ends) == (reply.finish == 'stop') and not set(reply.tokens[:-1]) & set(ends)
    assert_rows_close([reply.log_probs], [numpy_reply(CONFIG, TENSORS, prompt, reply.tokens)])


def test_without_an_end_every_reply_is_as_long_as_it_may_be(decoder, prompts, keys):
  replies = sample(decoder, prompts, keys, (), SETTINGS)
  assert {(len(reply.tokens), reply.finish) for reply in replies} == {(10, 'length')}


def test_keys_are_of_seed_stage_and_item_alone():
  def data(*args):
    return item_keys(*args)

  both = data(0, 'replies', ['a', 'b'])
  np.testing.assert_array_equal(both[1:], data(0, 'replies', ['b']))
  others = [both[0], both[1], *data(1, 'replies', ['a']), *data(0, 'policy', ['a'])]
  assert len({tuple(row) for row in others}) == 4


def test_a_common_prefix_changes_no_reply(decoder, prompts, keys):
  shared = [4, 250, 17]
  asked = [shared + prompt for prompt in prompts]
  with_prefix = sample(decoder, asked, keys, EOS, SETTINGS)
  # A stranger among them leaves nothing in common.
  stranger = [[0], *asked]
  assert (common_prefix(asked), common_prefix(stranger)) == (3, 0)
  more_keys = np.concatenate([keys[:1], keys])
  without = sample(decoder, stranger, more_keys, EOS, SETTINGS)[1:]
  assert [reply.tokens for reply in with_prefix] == [reply.tokens for reply in without]
  assert_rows_close([r.log_probs for r in with_prefix], [r.log_probs for r in without])


def test_the_sampler_is_compiled_once_for_each_bucket_of_lengths(decoder, prompts, keys, drawn):
  long = [[i, *[1] * 40] for i in range(3)]
  counts = [compilations()]
  for rows in (prompts[:3], prompts[3:12], [*prompts[5:6], [9]], long, prompts[:2], [*long, [50]]):
    sample(decoder, rows, keys, EOS, SETTINGS)
    counts.append(compilations())
  assert np.diff(counts).tolist() == [0, 0, 0, 1, 0, 0]
  sample(decoder, prompts[:3], keys, EOS, SETTINGS, width=41)  # as wide as the long ones from the start
  assert compilations() == counts[-1]


# ---- layout ----


@pytest.mark.parametrize('step', [8, 16, 32])
def test_buckets_are_few_and_close(step):
  sizes = [bucket(length, step) for length in range(1, 64 * step + 1)]
  for length, size in enumerate(sizes, 1):
    assert length <= size and (size - length < step or size < length * 5 / 4)
  assert len(set(sizes)) == 8 + 3 * 4
  assert bucket(0, step) == step


def test_padding_and_prefixes():
  tokens, real = pad([[1, 2], [], [3]], 3)
  assert tokens.tolist() == [[1, 2, 0], [0, 0, 0], [3, 0, 0]]
  assert real.tolist() == [[True, True, False], [False] * 3, [True, False, False]]
  assert common_prefix([]) == 0
  assert common_prefix([[1, 2, 3], [1, 2, 4], [1, 2, 3, 5]]) == 2
  assert common_prefix([[1, 2], [1, 2, 3]]) == 1  # each keeps a token of its own
  assert prefill(None, []) == ()
