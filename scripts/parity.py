"""Compares the decoder with transformers, for each family of models, on small random checkpoints.

  python scripts/parity.py [--family=qwen3] [--ablate]

prints a row a checkpoint: transformers' class and the shapes, then the largest differences that this run measured, and
exits with 1 where one is too large:

  prefill   log-probs of replies after a shared prefix and a prompt of their own, `engine.score` with scanned layers
  cached    log-probs of the tokens that `engine.sample` drew, with its cache, after the same prefix and prompts
  greedy    whether its most probable continuations are those of `generate`
  gradient  of a loss over the replies, by each tensor's largest entry; scanned where embeddings are tied, else unrolled

With --ablate, each thing that sets a checkpoint apart from a plain llama is left out in turn, and the prefill must then
be wrong: what changes nothing is not tested.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from charjax.engine.batch import item_keys
from charjax.engine.rows import Group, make_rows, reply_mask
from charjax.engine.sample import Sampling, sample
from charjax.engine.score import reply_log_probs, score
from charjax.model import checkpoint_source
from charjax.model.checkpoint_source import Checkpoint
from charjax.model.config import ModelConfig
from charjax.model.decoder import Decoder, Runtime
from charjax.model.weights import make_decoder

LOG_PROB_TOLERANCE, GRADIENT_TOLERANCE = 5e-4, 1e-3
_NO_EOS = (10**6,)
_NEW_TOKENS = 10

# ---- checkpoints ----

_SIZES = {
  'hidden_size': 32,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'intermediate_size': 48,
  'vocab_size': 64,
  'max_position_embeddings': 64,
  'tie_word_embeddings': False,
  'pad_token_id': None,
  'bos_token_id': None,
  'eos_token_id': None,
}


def _scaled(rope_type: str, **more: Any) -> dict[str, Any]:
  return {'rope_parameters': {'rope_type': rope_type, 'rope_theta': 50.0, 'factor': 4.0, **more}}


_LLAMA3 = _scaled('llama3', low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
_YARN = _scaled('yarn', original_max_position_embeddings=16, beta_fast=4.0)
_BY_LAYER = ['sliding_attention', 'full_attention']
_GEMMA3_ROPE = {
  'sliding_attention': {'rope_type': 'default', 'rope_theta': 10.0},
  'full_attention': {'rope_type': 'linear', 'rope_theta': 300.0, 'factor': 4.0},
}

# By model_type, what its checkpoints are: changes to _SIZES, told in words.
CASES: dict[str, dict[str, dict[str, Any]]] = {
  'llama': {
    'tied, llama3 rope': {'tie_word_embeddings': True, **_LLAMA3},
    'all biases, wide heads, linear rope': {
      **{'attention_bias': True, 'mlp_bias': True, 'head_dim': 16},
      **_scaled('linear'),
    },
  },
  'mistral': {
    'window 6': {'sliding_window': 6},
    'window 14, one key head': {'sliding_window': 14, 'num_key_value_heads': 1, 'head_dim': 16},
  },
  'qwen2': {
    'tied, yarn rope': {'tie_word_embeddings': True, **_YARN},
    'window 6 in upper layers': {'use_sliding_window': True, 'sliding_window': 6, 'max_window_layers': 1},
  },
  'qwen3': {
    'wide heads, yarn rope': {'head_dim': 16, **_YARN},
    'tied, biases, window 6 in upper layers': {
      **{'tie_word_embeddings': True, 'attention_bias': True, 'head_dim': 8},
      **{'use_sliding_window': True, 'sliding_window': 6, 'max_window_layers': 1},
    },
  },
  'gemma2': {
    'tied, window 6, softcaps': {
      **{'tie_word_embeddings': True, 'head_dim': 16, 'query_pre_attn_scalar': 4, 'sliding_window': 6},
      **{'attn_logit_softcapping': 1.5, 'final_logit_softcapping': 2.0, 'layer_types': _BY_LAYER},
    },
    'untied, all heads alike, softcap of logits': {
      **{'head_dim': 8, 'num_key_value_heads': 4, 'query_pre_attn_scalar': 20, 'sliding_window': 14},
      **{'attn_logit_softcapping': None, 'final_logit_softcapping': 3.0, 'layer_types': _BY_LAYER},
    },
  },
  'gemma3_text': {
    'tied, window 6, two ropes': {
      **{'tie_word_embeddings': True, 'head_dim': 16, 'query_pre_attn_scalar': 4, 'sliding_window': 6},
      **{'layer_types': _BY_LAYER, 'rope_parameters': _GEMMA3_ROPE},
    },
    'untied, one key head, softcap of logits': {
      **{'head_dim': 8, 'num_key_value_heads': 1, 'query_pre_attn_scalar': 20, 'sliding_window': 14},
      **{'final_logit_softcapping': 2.0, 'layer_types': _BY_LAYER[::-1], 'rope_parameters': _GEMMA3_ROPE},
    },
  },
  'smollm3': {
    'tied, no rope in a layer': {'tie_word_embeddings': True, 'no_rope_layer_interval': 2},
    'biases, window 6 where no rope, yarn rope': {
      **{'attention_bias': True, 'mlp_bias': True, 'no_rope_layers': [0, 1]},
      **{'use_sliding_window': True, 'sliding_window': 6, **_YARN},
    },
  },
  'olmo2': {
    'grouped heads': {},
    'biases, tied, linear rope': {'attention_bias': True, 'tie_word_embeddings': True, **_scaled('linear')},
  },
  'phi3': {
    'window 6': {'sliding_window': 6},
    'half of a head rotated': {'num_key_value_heads': 4, 'partial_rotary_factor': 0.5},
  },
  'qwen3_moe': {
    'two of eight experts': {
      **{'head_dim': 8, 'num_experts': 8, 'num_experts_per_tok': 2, 'moe_intermediate_size': 24},
      **{'norm_topk_prob': True, 'tie_word_embeddings': True},
    },
    'three of five, weights as they are, window 6, biases': {
      **{'head_dim': 16, 'num_experts': 5, 'num_experts_per_tok': 3, 'moe_intermediate_size': 16},
      **{'norm_topk_prob': False, 'attention_bias': True, 'use_sliding_window': True, 'sliding_window': 6},
    },
  },
  'mixtral': {
    'two of four experts': {'num_local_experts': 4, 'num_experts_per_tok': 2},
    'two of three, tied, window 6': {
      **{'num_local_experts': 3, 'num_experts_per_tok': 2, 'sliding_window': 6, 'tie_word_embeddings': True},
    },
  },
}


def make_peer(model_type: str, changes: Mapping[str, Any]) -> Any:
  """transformers' model with random weights: such that everything it computes matters, and logits spread by about 2."""
  import torch
  import transformers

  transformers.utils.logging.disable_progress_bar()
  torch.set_num_threads(1)
  config = transformers.AutoConfig.for_model(model_type, **{**_SIZES, **json.loads(json.dumps(changes))})
  peer = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager', dtype=torch.float32)
  generator = torch.Generator().manual_seed(0)
  embed = peer.get_input_embeddings().weight
  head = peer.get_output_embeddings().weight
  for name, value in peer.named_parameters():
    drawn = torch.randn(value.shape, generator=generator)
    with torch.no_grad():
      if value is embed or value is head:
        # Not so large that a tied head finds the last token in every state.
        drawn *= 0.2 if model_type.startswith('gemma') and value is embed else 0.4
      elif name.endswith('bias'):
        drawn *= 0.5
      elif value.ndim == 1:
        # Of those that are added to 1, and of others.
        drawn = torch.rand(value.shape, generator=generator) + (-0.5 if model_type.startswith('gemma') else 0.5)
      else:
        drawn *= 1.3 * value.shape[-1] ** -0.5
      value.copy_(drawn)
  return peer.eval()


def write(peer: Any, folder: pathlib.Path, shard_size: str = '5GB') -> Checkpoint:
  """The model as transformers saves it, with a tokenizer of the plainest kind, as the loader reads it."""
  import tokenizers
  from tokenizers import models, pre_tokenizers

  peer.save_pretrained(folder, max_shard_size=shard_size)
  backend = tokenizers.Tokenizer(models.WordLevel({'<unk>': 0, '<end>': 1}, unk_token='<unk>'))
  backend.pre_tokenizer = pre_tokenizers.Whitespace()
  backend.add_special_tokens(['<end>'])
  backend.save(str(folder / 'tokenizer.json'))
  template = '{% for m in messages %}{{ m.role }}{{ m.content }}<end>{% endfor %}'
  (folder / 'tokenizer_config.json').write_text(json.dumps({'chat_template': template, 'eos_token': '<end>'}))
  return checkpoint_source.load(str(folder))


# ---- texts ----

_RNG = np.random.default_rng(0)


def _texts(*lengths: int) -> list[list[int]]:
  return [_RNG.integers(0, _SIZES['vocab_size'], length).tolist() for length in lengths]


# Longer than the windows, which end in the reply, in the prompt or in the prefix.
PREFIX = _texts(9)[0]
PROMPTS = _texts(5, 2, 8)
REPLIES = _texts(12, 4, 7)


# ---- checks ----


def reference_log_probs(peer: Any, prompt: list[int], reply: list[int]) -> Any:
  """transformers' log-probs of a reply's tokens, one text at a time, without padding or cache."""
  import torch

  logits = peer(torch.tensor([prompt + reply]), use_cache=False).logits[0, len(prompt) - 1 : -1]
  return torch.log_softmax(logits, -1).gather(1, torch.tensor(reply)[:, None])[:, 0]


def _largest(found: list[Any], peer: Any, prompts: list[list[int]], replies: list[list[int]]) -> float:
  import torch

  with torch.no_grad():
    expected = [reference_log_probs(peer, p, r).numpy() for p, r in zip(prompts, replies, strict=True)]
  return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


def build(checkpoint: Checkpoint, **runtime: Any) -> Decoder:
  return make_decoder(checkpoint.config, checkpoint.tensors, jnp.float32, Runtime(**runtime))


def prefill(peer: Any, decoder: Decoder) -> float:
  """The largest difference of log-probs of replies."""
  asked = [PREFIX + prompt for prompt in PROMPTS]
  return _largest(score(decoder, asked, REPLIES, batch_size=4), peer, asked, REPLIES)


def cached(peer: Any, decoder: Decoder) -> tuple[float, bool]:
  """The largest difference of log-probs of drawn replies, and whether the most probable ones are the same."""
  import torch

  asked = [PREFIX + prompt for prompt in PROMPTS]
  keys = item_keys(0, 'parity', [str(i) for i in range(len(asked))])
  drawn = sample(decoder, asked, keys, _NO_EOS, Sampling(_NEW_TOKENS, batch_size=4))
  largest = _largest([reply.log_probs for reply in drawn], peer, asked, [reply.tokens for reply in drawn])
  greedy = sample(decoder, asked, keys, _NO_EOS, Sampling(_NEW_TOKENS, temperature=0, batch_size=4))
  settings = {'max_new_tokens': _NEW_TOKENS, 'do_sample': False}
  with torch.no_grad():
    theirs = [peer.generate(torch.tensor([p]), **settings)[0, len(p) :].tolist() for p in asked]
  return largest, [reply.tokens for reply in greedy] == theirs


def _loss(decoder: Decoder, rows: Any) -> jax.Array:
  return -reply_log_probs(decoder, rows).sum() / reply_mask(rows).sum()


def gradient(peer: Any, decoder: Decoder, folder: pathlib.Path) -> float:
  """The largest difference of a gradient's entry from torch's, by the largest of its tensor.

  The peer is used up: it is saved with its gradients for weights, so that they are read by the names of ours.
  """
  import torch

  total = sum(reference_log_probs(peer, PREFIX + p, r).sum() for p, r in zip(PROMPTS, REPLIES, strict=True))
  (-total / sum(map(len, REPLIES))).backward()
  for parameter in peer.parameters():
    parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
  theirs = write(peer, folder).tensors
  groups = [Group(PREFIX + prompt, [reply]) for prompt, reply in zip(PROMPTS, REPLIES, strict=True)]
  rows = make_rows(groups, each=1, prompt_width=16, width=16)
  gradients = jax.jit(jax.grad(_loss))(decoder, rows)
  ours = {'.'.join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(gradients))}
  assert set(ours) == set(theirs)
  return max(float(np.abs(ours[n] - theirs[n]).max() / max(np.abs(theirs[n]).max(), 1e-30)) for n in ours)


class Row(NamedTuple):
  """What one checkpoint was measured to differ by; None is not measured.

  Attributes:
    model_class: transformers'.
    prefill, cached: in nats.
    greedy: whether the most probable continuations are the same.
    gradient: relative.
  """

  model_class: str
  prefill: float
  cached: float | None = None
  greedy: bool | None = None
  gradient: float | None = None

  def failures(self) -> list[str]:
    """The cells that are too large, or not a number."""
    limits = {'prefill': LOG_PROB_TOLERANCE, 'cached': LOG_PROB_TOLERANCE, 'gradient': GRADIENT_TOLERANCE}
    values = {name: getattr(self, name) for name in limits}
    found = [name for name, value in values.items() if value is not None and not value <= limits[name]]
    return found + (['greedy'] if self.greedy is False else [])


def measure(model_type: str, changes: Mapping[str, Any], folder: pathlib.Path, only_prefill: bool = False) -> Row:
  """All checks of one checkpoint, which is written to `folder`.

  Where the embedding is tied, it is written in shards, and gradients go through scanned layers that are recomputed.
  """
  peer = make_peer(model_type, changes)
  tied = peer.config.tie_word_embeddings
  checkpoint = write(peer, folder / 'model', '20KB' if tied else '5GB')
  scanned = build(checkpoint, scan_layers=True)
  row = Row(type(peer).__name__, prefill(peer, scanned))
  if only_prefill:
    return row
  row = row._replace(**dict(zip(('cached', 'greedy'), cached(peer, scanned), strict=True)))
  trained = build(checkpoint, scan_layers=tied, remat=tied)
  return row._replace(gradient=gradient(peer, trained, folder / 'gradient'))


# ---- what a checkpoint would be without what sets it apart ----


def ablations(config: ModelConfig) -> Iterator[tuple[str, dict[str, Any]]]:
  """Changes to a config that leave out one thing each."""
  plain = {
    **{'rope_factors': (), 'rope_gain': 1.0, 'rotary_dim': 0, 'local_rope_theta': 0.0, 'windows': ()},
    **{'rope_layers': (), 'query_scale': 0.0, 'attention_softcap': 0.0, 'logit_softcap': 0.0, 'qkv_bias': False},
    **{'o_bias': False, 'mlp_bias': False, 'qk_norm': '', 'post_norms': False, 'norm_offset': 0.0},
    **{'embed_scale': 1.0, 'activation': 'silu', 'experts_per_token': 1},
  }
  for field, value in plain.items():
    if getattr(config, field) not in (value, 0):
      yield field, {field: value} | ({'pre_norms': True} if field == 'post_norms' else {})
  if config.windows:
    yield 'windows one wider', {'windows': tuple(window + (window > 0) for window in config.windows)}
  if config.experts_per_token > 1:
    yield 'renormalize_experts', {'renormalize_experts': not config.renormalize_experts}


def ablate(model_type: str, changes: Mapping[str, Any], folder: pathlib.Path) -> dict[str, float]:
  """The difference in prefill without each thing that sets this checkpoint apart."""
  peer = make_peer(model_type, changes)
  checkpoint = write(peer, folder / 'model')
  out = {}
  for name, change in ablations(checkpoint.config):
    config = dataclasses.replace(checkpoint.config, **change)
    kept = checkpoint_source.tensor_shapes(config)
    tensors = {n: checkpoint.tensors[n] if n in checkpoint.tensors else np.ones(kept[n], np.float32) for n in kept}
    out[name] = prefill(peer, make_decoder(config, tensors, jnp.float32, Runtime(scan_layers=True)))
  return out


# ---- the table ----

_FAMILY = flags.DEFINE_string('family', '', 'one model_type; all by default')
_ABLATE = flags.DEFINE_bool('ablate', False, 'leave out each thing in turn and see that it matters')


def main(_: Any) -> None:
  # Elsewhere products of float32 may be computed in fewer bits.
  jax.config.update('jax_platforms', 'cpu')
  failed = False
  print('| model_type | transformers class | checkpoint | prefill | cached | greedy | gradient |')
  print('|---|---|---|---|---|---|---|')
  for model_type, cases in CASES.items():
    for title, changes in cases.items() if _FAMILY.value in ('', model_type) else ():
      with tempfile.TemporaryDirectory() as folder:
        if _ABLATE.value:
          for name, difference in ablate(model_type, changes, pathlib.Path(folder)).items():
            missed = difference <= LOG_PROB_TOLERANCE
            failed |= missed
            print(f'{model_type}: {title}: without {name}: {difference:.1e}' + ' NOT SEEN' * missed, flush=True)
          continue
        row = measure(model_type, changes, pathlib.Path(folder))
      failed |= bool(row.failures())
      cells = f'{row.prefill:.1e} | {row.cached:.1e} | {"same" if row.greedy else "other"} | {row.gradient:.1e}'
      note = ' too large: ' + ', '.join(row.failures()) if row.failures() else ''
      print(f'| {model_type} | {row.model_class} | {title} | {cells} |{note}', flush=True)
  sys.exit(int(failed))


if __name__ == '__main__':
  app.run(main)
