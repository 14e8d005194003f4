"""A tiny model of random weights, for trying out the whole loop in seconds: it says nothing, but in words."""

import tempfile

import numpy as np
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from charjax.model.chat import ChatTemplate
from charjax.model.checkpoint_source import Checkpoint, tensor_shapes
from charjax.model.config import ModelConfig
from charjax.model.tokenizer import Tokenizer, from_tokenizer_json

_WORDS = (
  'the', 'be', 'to', 'of', 'and', 'a', 'in', 'that', 'have', 'I', 'it', 'for', 'not', 'on', 'with', 'he',
  'as', 'you', 'do', 'at', 'this', 'but', 'his', 'by', 'from', 'they', 'we', 'say', 'her', 'she', 'or',
  'an', 'will', 'my', 'one', 'all', 'would', 'there', 'their', 'what', 'so', 'up', 'out', 'if', 'about',
  'who', 'get', 'which', 'go', 'me', 'when', 'make', 'can', 'like', 'time', 'no', 'just', 'him', 'know',
  'take',
)  # fmt: skip
_ROLES = ('system', 'user', 'assistant')
_UNKNOWN, _START, _END, _PAD = _SPECIAL = ('<unk>', '<|im_start|>', '<|im_end|>', '<pad>')
_VOCAB = (*_SPECIAL, *_ROLES, *_WORDS)
# SmolLM2's, without the system prompt that it adds where there is none.
_TEMPLATE = (
  '{% for message in messages %}'
  "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Standard deviations of weights; of all others it is 1 / sqrt(embed_dim). Logits of words vary by about 1.
_SCALES = {'embed': 1.0, 'head': 0.25}
# The first coordinate of every embedding: so large that it is still there after all layers, and the head can
# read from it how likely a token is whatever came before.
_CONSTANT = 6.0
# Head weights of that coordinate: about each twelfth token ends a reply at temperatures between 0.7 and 1,
# and nothing but words and ends is ever drawn.
_END_WEIGHT, _NEVER_WEIGHT = 0.6, -8.0


def make() -> Checkpoint:
  """The same tiny checkpoint each time and on each machine."""
  config = ModelConfig(
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    vocab_size=len(_VOCAB),
    tied_embeddings=False,
  )
  # Numpy promises never to change what RandomState gives, and its uniform numbers pass through no libm. With
  # this seed the most probable replies are neither empty nor endless.
  rng = np.random.RandomState(7)
  tensors = {}
  for name, shape in tensor_shapes(config).items():
    scale = _SCALES.get(name, config.embed_dim**-0.5)
    values = np.ones(shape) if name.endswith('norm') else rng.uniform(-1, 1, shape) * 3**0.5 * scale
    tensors[name] = values.astype(np.float32)
  tensors['embed'][:, 0] = _CONSTANT
  tensors['head'][0] = [0.0 if token in _WORDS else _NEVER_WEIGHT for token in _VOCAB]
  tensors['head'][0, _VOCAB.index(_END)] = _END_WEIGHT
  return Checkpoint(config, tensors, _tokenizer(), ChatTemplate(_TEMPLATE, bos='', eos=_END))


def _tokenizer() -> Tokenizer:
  """Whole words; other words and punctuation are one unknown token. Decoding puts a space between words."""
  vocab = {token: i for i, token in enumerate(_VOCAB)}
  backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=_UNKNOWN))
  backend.pre_tokenizer = pre_tokenizers.Whitespace()
  backend.add_special_tokens([AddedToken(token, normalized=False) for token in _SPECIAL])
  # Through a file, so that what reads and checks every other tokenizer does this one's too.
  with tempfile.NamedTemporaryFile('w', suffix='.json') as file:
    file.write(backend.to_str())
    file.flush()
    return from_tokenizer_json(file.name, eos=_END, pad=_PAD, reply_end=_END)
