"""Compares exports of a run, as transformers loads them, with the run's own models: see scripts/verify_export.sh."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import app, flags, logging
from etils import epath

from charjax import main as command_line
from charjax import start
from charjax.engine.batch import item_keys
from charjax.engine.sample import Sampling, sample
from charjax.files import read_jsonl
from charjax.model.decoder import Decoder, forward, logits
from charjax.stages import policy, preference, prompts
from charjax.training.heads import bind, read_rewards, reply_states
from charjax.workdir import Session

_WORKDIR = flags.DEFINE_string('workdir', None, 'the run', required=True)
_EXPORTS = flags.DEFINE_string('exports', None, 'folder of policy, policy-bfloat16, preference, judge', required=True)

_LOG_PROB_TOLERANCE, _REWARD_TOLERANCE = 1e-3, 1e-4
_NEW_TOKENS, _REPLIES = 40, 48
_ASKED = (
  'What is the capital of France?',
  'Would you lie to me to make me feel better?',
  'Do you dream when you sleep?',
  'Write two lines about the sea.',
  'How do I boil an egg?',
  "I'd like to quit my job & move to 東京 — good plan?",
)


def _log_probs(decoder: Decoder, adapter: Any, ids: Sequence[int]) -> np.ndarray:
  """Over the vocabulary, at each token, [T, V]."""
  count = len(ids)

  @jax.jit
  def compute(decoder: Decoder, adapter: Any, ids: jax.Array) -> jax.Array:
    hidden = forward(decoder, ids[None], jnp.arange(count)[None], adapter=adapter)[0]
    return jax.nn.log_softmax(logits(decoder, hidden[0]), -1)

  return np.asarray(compute(decoder, adapter, jnp.asarray(ids)))


def _compare_policy(session: Session, folder: pathlib.Path, expect_same: bool) -> bool:
  stored = str(transformers.AutoConfig.from_pretrained(folder).dtype).removeprefix('torch.')
  peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = session.model
  decoder, adapter = bind(model.decoder, policy.load(session))
  asked = [model.prompt(prompts.alone(text)) for text in _ASKED]
  keys = item_keys(0, 'export', [str(i) for i in range(len(asked))])
  settings = Sampling(_NEW_TOKENS, temperature=0)
  ours = [r.tokens for r in sample(decoder, asked, keys, model.eos_ids, settings, adapter=adapter)]
  same_ids = same_replies = 0
  largest, change = 0.0, 0.0
  for text, prompt, reply in zip(_ASKED, asked, ours, strict=True):
    said = [{'role': 'user', 'content': text}]
    ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)['input_ids']
    same_ids += ids == prompt
    whole = torch.tensor([[*prompt, *reply]])
    with torch.no_grad():
      found = torch.log_softmax(peer(whole).logits[0].float(), -1).numpy()
      drawn = peer.generate(torch.tensor([prompt]), max_new_tokens=_NEW_TOKENS, do_sample=False)[0, len(prompt) :]
    same_replies += drawn.tolist() == reply
    expected = _log_probs(decoder, adapter, whole[0].tolist())
    largest = max(largest, float(np.abs(found - expected).max()))
    change = max(change, float(np.abs(_log_probs(model.decoder, None, whole[0].tolist()) - expected).max()))
  print(
    f'{folder.name}: {type(peer).__name__}, {stored}, computed in float32: prompts with the same ids '
    f'{same_ids}/{len(asked)}; log-probs over the vocabulary differ by at most {largest:.1e} nats (training moved them '
    f'by up to {change:.1e}); the same greedy reply {same_replies}/{len(asked)}',
    flush=True,
  )
  print(f'  {_ASKED[0]} {model.text(ours[0])}')
  return same_ids == len(asked) and (
    not expect_same or (largest <= _LOG_PROB_TOLERANCE < change and same_replies == len(asked))
  )


def _compare_rewards(session: Session, folder: pathlib.Path, name: str) -> bool:
  kind = transformers.AutoModelForSequenceClassification
  peer = kind.from_pretrained(folder, trust_remote_code=True).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
  model = session.model
  texts = {row['id']: row['text'] for row in read_jsonl(session.folder('messages') / 'messages.jsonl')}
  rows = read_jsonl(session.folder('replies') / 'replies.jsonl')[:_REPLIES]
  asked = [model.prompt(prompts.alone(texts[row['message']])) for row in rows]
  said = [model.reply(row['text'], row['finish'] == 'stop') for row in rows]
  ids = [[*prompt, *reply] for prompt, reply in zip(asked, said, strict=True)]
  # Whole conversations as transformers writes them, to whatever their templates write after a reply.
  for pair in [pair for trait in session.character.traits for pair in trait.pairs_for('kept')][:_REPLIES]:
    talk = [{'role': 'user', 'content': pair.message}, {'role': 'assistant', 'content': pair.in_character}]
    ids.append(tokenizer.apply_chat_template(talk, return_dict=True)['input_ids'])
    asked.append(model.prompt(prompts.alone(pair.message)))
    said.append(model.reply(pair.in_character))
  trainable = preference.load(session, name)
  states = reply_states(preference.trunk(session), trainable, asked, said)
  expected = np.asarray(jax.device_get(read_rewards(trainable, states)))
  largest = 0.0
  for side in ('left', 'right'):
    tokenizer.padding_side = side
    for first in range(0, len(ids), 16):
      with torch.no_grad():
        found = peer(**tokenizer.pad({'input_ids': ids[first : first + 16]}, return_tensors='pt')).logits.numpy()
      largest = max(largest, float(np.abs(found - expected[first : first + 16]).max()))
  print(
    f'{folder.name}: {type(peer).__name__}, {list(peer.config.id2label.values())}: {len(ids)} rewards a trait, padded '
    f'on either side, differ by at most {largest:.1e}; their standard deviation is {expected.std():.2g}',
    flush=True,
  )
  return largest <= _REWARD_TOLERANCE


def main(_: Any) -> None:
  logging.set_verbosity(logging.WARNING)  # Orbax tells of every step.
  transformers.utils.logging.disable_progress_bar()
  place, exports = epath.Path(_WORKDIR.value), pathlib.Path(_EXPORTS.value)
  session = start.prepare(command_line._at(place, True, [])[0], place)
  with start.devices(session.config):
    right = [
      _compare_policy(session, exports / 'policy', True),
      _compare_policy(session, exports / 'policy-bfloat16', False),
      _compare_rewards(session, exports / 'preference', 'train'),
      _compare_rewards(session, exports / 'judge', 'judge'),
    ]
  sys.exit(int(not all(right)))


if __name__ == '__main__':
  app.run(main)
