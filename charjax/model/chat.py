"""How a conversation becomes text, and the text token ids: the checkpoint's own chat template."""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from charjax import bounded
from charjax.errors import UserError, one_line
from charjax.model.tokenizer import Tokenizer

Message = Mapping[str, str]

# What `reply_end` has the assistant say; no template is likely to write it by itself.
_PROBE = 'charjaxprobe'


class ChatTemplate:
  """A Jinja chat template, rendered as transformers does.

  Two things are settled here. A template that has no place for a system message reads it as the opening of the first
  user message. One that can have the model think before it answers is told not to: a reply is all that comes
  after the prompt.

  The template comes with the checkpoint and is not trusted: see `bounded.render`.
  """

  def __init__(self, source: str, bos: str, eos: str):
    """Raises UserError when `source` is no valid Jinja."""
    self.source, self.bos, self.eos = source, bos, eos
    try:
      bounded.render(source, None)
    except bounded.Refused as error:
      raise UserError(f'chat template: not a valid template ({one_line(error)}); use an instruct model') from error

  def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """The conversation as text, ready to be encoded with its special tokens.

    Args:
      messages: each with a 'role' ('system', 'user', 'assistant') and a 'content'.
      add_generation_prompt: end with the opening of the assistant's next turn.

    Raises:
      UserError: the template fails, does what the sandbox forbids, or takes too long.
    """
    if [message['role'] for message in messages[:2]] == ['system', 'user'] and not self.takes_system:
      system, user, *rest = messages
      messages = [{**user, 'content': f'{system["content"]}\n\n{user["content"]}'}, *rest]
    try:
      return self._render(messages, add_generation_prompt)
    except bounded.Refused as error:
      raise UserError(
        f'chat template: it cannot render this conversation ({one_line(error)}); use the template of an instruct model'
      ) from error

  def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    variables = {
      'messages': [dict(message) for message in messages],
      'tools': None,
      'documents': None,
      'add_generation_prompt': add_generation_prompt,
      'enable_thinking': False,
      'bos_token': self.bos,
      'eos_token': self.eos,
    }
    return bounded.render(self.source, variables)

  @functools.cached_property
  def takes_system(self) -> bool:
    """Whether it writes what a system message says; Gemma 2's and Mistral's first refuse to."""
    try:
      return _PROBE in self._render([{'role': 'system', 'content': _PROBE}, {'role': 'user', 'content': 'Hi'}], True)
    except bounded.Refused:
      return False

  @functools.cached_property
  def reply_end(self) -> str:
    """What the template writes after an assistant's reply, such as '<|im_end|>' and a line break."""
    exchange = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': _PROBE}]
    _, found, end = self.render(exchange, add_generation_prompt=False).rpartition(_PROBE)
    if not found:
      raise UserError('chat template: it leaves out what the assistant says; use a template for chats')
    return end


def encode_prompt(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
  """Token ids of the conversation and the opening of the assistant's turn.

  BOS stands where the template writes it and nowhere else. Text in a message that looks like a special token
  is encoded as the characters it is made of.
  """
  return _encode(template, tokenizer, messages, add_generation_prompt=True)


def encode_reply(template: ChatTemplate, tokenizer: Tokenizer, text: str) -> list[int]:
  """Token ids of an assistant's reply, its end-of-turn id included, to stand right after `encode_prompt`.

  They are cut out of a whole conversation, since a template may put a space before a reply; where a token
  would span prompt and reply (a reply that starts with a line break), the reply is encoded by itself.
  """
  user = {'role': 'user', 'content': 'Hi'}
  prompt = _encode(template, tokenizer, [user], add_generation_prompt=True)
  whole = _encode(template, tokenizer, [user, {'role': 'assistant', 'content': text}], add_generation_prompt=False)
  reply = whole[len(prompt) :]
  if whole[: len(prompt)] == prompt:
    for i, token in enumerate(reply):
      if token in tokenizer.eos_ids:
        return [*reply[:i], tokenizer.eos_ids[0]]
  return [*tokenizer.encode(text), tokenizer.eos_ids[0]]


def _encode(
  template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool
) -> list[int]:
  """Renders and encodes, with the special tokens of the template but none of the messages.

  Without special-token strings in the messages the text is encoded whole, as transformers does. Else they
  are rendered as stand-ins, the text is cut at the template's special tokens, and what lies between, its
  stand-ins undone, is encoded as plain text.
  """
  longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
  special = re.compile('|'.join(map(re.escape, longest_first)))
  if not longest_first or not any(special.search(v) for m in messages for v in m.values()):
    return tokenizer.encode(template.render(messages, add_generation_prompt), special=True)
  mark = next(_private_characters(template.source + ''.join(v for m in messages for v in m.values())))
  hidden: dict[str, str] = {}

  def hide(match: re.Match[str]) -> str:
    stand_in = f'{mark}{len(hidden)}{mark}'
    hidden[stand_in] = match[0]
    return stand_in

  rendered = template.render(
    [{key: special.sub(hide, value) for key, value in message.items()} for message in messages],
    add_generation_prompt,
  )
  ids: list[int] = []
  end = 0
  for match in itertools.chain(special.finditer(rendered), [None]):
    plain = rendered[end : match.start() if match else len(rendered)]
    ids += tokenizer.encode(re.sub(f'{mark}[0-9]+{mark}', lambda m: hidden.get(m[0], ''), plain), opens=not end)
    if match:
      ids += tokenizer.encode(match[0], special=True)
      end = match.end()
  return ids


def _private_characters(text: str) -> Iterator[str]:
  """Characters of Unicode's private planes that `text` does not hold."""
  used = set(text)
  return (c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in used)
