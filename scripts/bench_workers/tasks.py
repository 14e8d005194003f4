"""What bench.py asks of charjax and its peers, as token ids, drawn from the texts of the shipped characters.

Every task is a pure function of its name and the model's tokenizer and chat template.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from charjax import character
from charjax.model.chat import encode_prompt, encode_reply
from charjax.model.checkpoint_source import Checkpoint

_CHARACTERS = ('assistant', 'poet', 'skeptic', 'stoic', 'wit')
TASKS = ('sample', 'sample_eos', 'score', 'score_4', 'reward', 'rl')
EACH = 4  # replies to a prompt
_SHUFFLED = (0.0, 0.1, 0.3, 0.8)  # share of the words of a ranked reply that stand in another's place, best first

Messages = list[dict[str, str]]


class _Texts:
  """Draws from what the characters say, the same for the same seed."""

  def __init__(self, checkpoint: Checkpoint, seed: str):
    self._checkpoint, self.random = checkpoint, random.Random(seed)
    found = [character.load(name) for name in _CHARACTERS]
    self.pairs = [pair for one in found for trait in one.traits for pair in trait.pairs]
    self._words = ' '.join(f'{pair.in_character} {pair.out_of_character}' for pair in self.pairs).split()

  def prompt(self, messages: Messages) -> list[int]:
    return encode_prompt(self._checkpoint.template, self._checkpoint.tokenizer, messages)

  def reply(self, text: str) -> list[int]:
    return encode_reply(self._checkpoint.template, self._checkpoint.tokenizer, text)

  def message(self) -> Messages:
    return [_says('user', self.random.choice(self.pairs).message)]

  def conversation(self, tokens: int) -> list[int]:
    """A prompt of at most so many tokens, or of one short message: with earlier turns before it as far as they fit."""
    found = [_says('user', self.random.choice(self.pairs).message)]
    while True:
      pair = self.random.choice(self.pairs)
      longer = [_says('user', pair.message), _says('assistant', pair.in_character), *found]
      if len(self.prompt(longer)) > tokens:
        return self.prompt(found)
      found = longer

  def passage(self, low: int, high: int) -> list[str]:
    """From `low` to `high` words that follow one another."""
    count = self.random.randint(low, high)
    begin = self.random.randrange(len(self._words) - count)
    return self._words[begin : begin + count]

  def shuffled(self, words: list[str], share: float) -> str:
    """The words, a share of them in each other's places."""
    places = self.random.sample(range(len(words)), round(share * len(words)))
    words = list(words)
    for place, word in zip(places, self.random.sample([words[i] for i in places], len(places)), strict=True):
      words[place] = word
    return ' '.join(words)


def _says(role: str, text: str) -> dict[str, str]:
  return {'role': role, 'content': text}


def make(task: str, checkpoint: Checkpoint, share: float = 1.0) -> dict[str, Any]:
  """The data of a task, as JSON holds it; with a `share`, of so many fewer texts or tokens.

  sample, sample_eos: `prompts`, ragged conversations of up to 20 to 300 tokens (the template's system prompt makes the
    shortest about 45); `each`; `max_new_tokens`; `eos`, whether the model may end a reply.
  score, score_4: `prompts` and `replies` of about 128 tokens each, all prompts different or each standing four times.
  reward: `train` and `heldout`, lists of a `prompt` and its `replies`, best first: the more of its words are
    shuffled, the worse a reply. `prompts_a_step` of them are learned from in each step.
  rl: `messages`, a list of chat messages for each prompt, and `prompts`, the same as ids; as many for each of some
    steps as `prompts_a_step` says; `each`; `max_new_tokens`; replies are never ended.
  """
  texts = _Texts(checkpoint, task.removesuffix('_eos'))
  if task in ('sample', 'sample_eos'):
    count = 128 if task == 'sample_eos' else 32
    prompts = [texts.conversation(texts.random.randint(20, 300)) for _ in range(count)]
    return {'prompts': prompts, 'each': EACH, 'max_new_tokens': round(128 * share), 'eos': task == 'sample_eos'}
  if task in ('score', 'score_4'):
    each = EACH if task == 'score_4' else 1
    # About 1.3 tokens a word, and 35 around the message.
    prompts = [
      texts.prompt([_says('user', ' '.join(texts.passage(40, 124)))]) for _ in range(round(256 * share) // each)
    ]
    asked = [prompt for prompt in prompts for _ in range(each)]
    return {'prompts': asked, 'replies': [texts.reply(' '.join(texts.passage(48, 148))) for _ in asked]}
  if task == 'reward':
    rows = list(_ranked(texts, 16 * 12 + 64))
    return {'train': rows[64:], 'heldout': rows[:64], 'prompts_a_step': round(16 * share), 'learning_rate': 5e-5}
  messages = [texts.message() for _ in range(8 * 8)]
  return {
    'messages': messages,
    'prompts': [texts.prompt(message) for message in messages],
    'prompts_a_step': round(8 * share),
    'each': EACH,
    'max_new_tokens': 64,
    'learning_rate': 1e-6,
  }


def _ranked(texts: _Texts, count: int) -> Iterator[dict[str, Any]]:
  for _ in range(count):
    replies = [texts.reply(texts.shuffled(texts.passage(10, 70), share)) for share in _SHUFFLED]
    yield {'prompt': texts.prompt(texts.message()), 'replies': replies}


def describe(data: dict[str, Any]) -> str:
  """How long the texts of a task are, in tokens."""

  def lengths(rows: Sequence[Sequence[int]]) -> str:
    found = [len(row) for row in rows]
    return f'{len(rows)} of {min(found)} to {max(found)} tokens, {sum(found) / len(found):.0f} on average'

  if 'train' in data:
    rows = data['train']
    replies = [reply for row in rows for reply in row['replies']]
    return f'prompts: {lengths([row["prompt"] for row in rows])}; replies: {lengths(replies)}'
  parts = [f'{name}: {lengths(data[name])}' for name in ('prompts', 'replies') if name in data]
  return '; '.join(parts)
