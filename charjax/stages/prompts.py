"""How a character is shown to the model, and every other text that a stage puts before it.

A trait is shown as a system message that states it, followed by worked examples as earlier turns of the
conversation. What is shown is a list of messages: a chat template turns it into tokens.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

from charjax.character import Character, Pair, Trait

Messages = list[dict[str, str]]

_SYSTEM = 'You are an AI assistant. This is your character: {statement}'


def user(text: str) -> dict[str, str]:
  return {'role': 'user', 'content': text}


def _turns(pairs: Sequence[Pair], in_character: bool) -> Messages:
  turns: Messages = []
  for pair in pairs:
    reply = pair.in_character if in_character else pair.out_of_character
    turns += [user(pair.message), {'role': 'assistant', 'content': reply}]
  return turns


def shown(trait: Trait, examples: int) -> Messages:
  """What is put before a message to show the trait: its statement and up to `examples` worked examples."""
  system = {'role': 'system', 'content': _SYSTEM.format(statement=trait.statement)}
  return [system, *_turns(trait.pairs_for('shown')[:examples], True)]


def shown_character(character: Character, examples: int) -> Messages:
  """The whole character: all statements, and `examples` worked examples drawn from the traits in turn."""
  statement = ' '.join(trait.statement for trait in character.traits)
  rounds = itertools.zip_longest(*(trait.pairs_for('shown') for trait in character.traits))
  pairs = [pair for turn in rounds for pair in turn if pair][:examples]
  return [{'role': 'system', 'content': _SYSTEM.format(statement=statement)}, *_turns(pairs, True)]


def opposed(trait: Trait, opposite: str, examples: int) -> Messages:
  """The same for one of the trait's opposites, with up to `examples` of the pairs written against it."""
  system = {'role': 'system', 'content': _SYSTEM.format(statement=trait.opposites[opposite])}
  pairs = [pair for pair in trait.pairs_for('shown') if pair.opposite == opposite]
  return [system, *_turns(pairs[:examples], False)]


def seen(trait: Trait) -> Any:
  """All of a trait that a model is ever shown: its pairs that choose rankers or are kept are not among it."""
  return [trait.statement, trait.opposites, [dataclasses.astuple(pair) for pair in trait.pairs_for('shown')]]


def plain() -> Messages:
  """Nothing: the model as it is."""
  return []


def alone(text: str) -> Messages:
  """A message with nothing shown before it."""
  return [*plain(), user(text)]


# ---- writing messages ----

TOPICS = (
  'cooking', 'a sick parent', 'a school exam', 'money trouble', 'a wedding', 'farming', 'football', 'the stars',
  'a new job', 'religion', 'politics', 'a broken phone', 'music', 'raising children', 'loneliness', 'a long journey',
  'medicine', 'history', 'a quarrel with a friend', 'computers', 'the sea', 'an old house', 'animals', 'books',
  'a small business', 'growing old', 'learning a language', 'the weather', 'art', 'war and peace', 'sleep', 'the law',
)  # fmt: skip

ASKERS = (
  'a farmer in Kenya', 'a student in Seoul', 'a nurse in Manila', 'an old engineer in Poland', 'a teenager in Brazil',
  'a shopkeeper in Cairo', 'a teacher in Ohio', 'a bus driver in London', 'a mother in Lagos', 'a monk in Thailand',
  'a coder in Bangalore', 'a fisherman in Norway', 'a grandmother in Mexico', 'a soldier on leave', 'a young father',
  'a carpenter in Turkey', 'a biologist in Chile', 'a waitress in Naples', 'a taxi driver in Karachi', 'a poet in Iran',
)  # fmt: skip

LENGTHS = {'short': 8, 'medium': 14, 'long': 24}  # about so many words

_WRITE = 'You write messages that people send to an AI assistant. Write one message and nothing else.'
_REQUEST = 'Write a {length} message from {asker} about {topic}.'


def choose(seed: int, item: str, options: Sequence[str]) -> str:
  """One of the options, a function of (seed, item) alone."""
  digest = hashlib.sha256(f'{seed}/{item}'.encode()).digest()
  return options[int.from_bytes(digest[:8], 'little') % len(options)]


def opening(seed: int, item: str, texts: Sequence[str], most: int) -> str:
  """The first two to `most` words of one of the texts, never the whole of it; '' when `most` is 0."""
  if not most:
    return ''
  words = choose(seed, f'{item}/opening', texts).split()
  count = int(choose(seed, f'{item}/words', [str(n) for n in range(min(2, most), most + 1)]))
  return ' '.join(words[: min(count, len(words) - 1)])


def write_message(
  seeds: Sequence[str], topic: str, asker: str, length: str, group: str, seed: int, shown: int
) -> Messages:
  """Asks for a new human message, after `shown` of the seed messages as earlier answers to such a request.

  Which seeds, and their order, depend on (seed, group) alone: the messages of one batch differ in their last
  request only, so that what comes before it goes through the model once.
  """
  order = sorted(range(len(seeds)), key=lambda i: hashlib.sha256(f'{seed}/{group}/{i}'.encode()).digest())
  messages: Messages = [{'role': 'system', 'content': _WRITE}]
  for i in order[:shown]:
    size = min(LENGTHS, key=lambda name: abs(LENGTHS[name] - len(seeds[i].split())))
    request = _REQUEST.format(
      length=size, asker=choose(seed, f'{group}/{i}/asker', ASKERS), topic=choose(seed, f'{group}/{i}/topic', TOPICS)
    )
    messages += [user(request), {'role': 'assistant', 'content': seeds[i]}]
  return [*messages, user(_REQUEST.format(length=length, asker=asker, topic=topic))]
