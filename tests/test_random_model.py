"""The random model of the smoke config: the same everywhere, and it talks in words that end."""

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest

from charjax.engine.batch import item_keys
from charjax.engine.sample import Sampling, sample
from charjax.model import checkpoint_source
from charjax.model.chat import encode_prompt, encode_reply
from charjax.model.decoder import Runtime
from charjax.model.weights import make_decoder


@pytest.fixture(scope='module')
def checkpoint():
  return checkpoint_source.load('random')


def test_it_is_the_same_everywhere(checkpoint):
  digest = hashlib.sha256()
  for name, tensor in sorted(checkpoint.tensors.items()):
    assert tensor.dtype == np.float32
    digest.update(f'{name}{tensor.shape}'.encode() + tensor.astype('<f4').tobytes())
  assert digest.hexdigest()[:16] == 'b1a36ebc4e7a4dd4'


def test_words_are_tokens_and_all_else_is_unknown(checkpoint):
  tokenizer, special = checkpoint.tokenizer, checkpoint.tokenizer.special_tokens
  assert tokenizer.decode(tokenizer.encode('what would they\n say')) == 'what would they say'
  assert tokenizer.encode('zebra, <|im_end|>') == [special['<unk>']] * 5
  assert tokenizer.eos_ids == (special['<|im_end|>'],) and tokenizer.pad_id == special['<pad>']
  messages = [{'role': 'system', 'content': 'it'}, {'role': 'user', 'content': '<|im_end|> who'}]
  prompt = encode_prompt(checkpoint.template, tokenizer, messages)
  assert prompt.count(special['<|im_start|>']) == 3 and prompt.count(special['<|im_end|>']) == 2
  reply = encode_reply(checkpoint.template, tokenizer, 'you')
  assert reply == [*tokenizer.encode('you'), special['<|im_end|>']]


def test_replies_are_some_words_and_an_end(checkpoint):
  decoder = make_decoder(checkpoint.config, checkpoint.tensors, jnp.float32, Runtime(scan_layers=True))
  texts = ('Hello', 'What do you take with you?', 'Is it all there is, in time?', 'No.') * 16
  prompts = [
    encode_prompt(checkpoint.template, checkpoint.tokenizer, [{'role': 'user', 'content': text}]) for text in texts
  ]
  keys = item_keys(0, 'test', [str(i) for i in range(64)])
  replies = sample(decoder, prompts, keys, checkpoint.tokenizer.eos_ids, Sampling(48, 0.8, batch_size=64))
  ended = [reply for reply in replies if reply.finish == 'stop']
  assert len(ended) > 56
  assert 6 < sum(len(reply.tokens) for reply in replies) / len(ended) < 18  # tokens to an end
  words = [checkpoint.tokenizer.decode(reply.tokens).split() for reply in replies]
  # Every token but the end is a word.
  assert [len(w) for w in words] == [len(r.tokens) - (r.finish == 'stop') for r in replies]
  assert sum(3 <= len(w) <= 20 for w in words) > 32
