"""Every family's way of writing a conversation: as transformers renders it, with masks exact to the token.

The templates are written here, in the manner of each family's own; `generation` blocks mark what the assistant says.
"""

import datetime
import functools

import pytest
from tokenizer_kinds import tokenizer_json

from charjax.errors import UserError
from charjax.model import chat, tokenizer
from charjax.model.chat import ChatTemplate

transformers = pytest.importorskip('transformers')

ALTERNATE = """{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('After the optional system message, conversation roles must alternate') }}
{%- endif %}"""
CHATML_TURNS = """{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- '<|im_start|>assistant\n' }}
    {%- generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}
    {{- '\n' }}
  {%- else %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

# family: (kind of tokenizer, its special tokens, BOS, EOS, the template)
FAMILIES = {
  'llama2': (
    'llama2', ('<unk>', '<s>', '</s>'), '<s>', '</s>',
    """{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}
{%- else %}{% set turns = messages %}{% set system = false %}{% endif %}
{%- for message in turns %}""" + ALTERNATE + """
{%- if loop.index0 == 0 and system != false %}
{%- set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}
{%- else %}{% set content = message['content'] %}{% endif %}
{%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{% generation %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}""",
  ),
  'llama3': (
    'llama3', ('<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'),
    '<|begin_of_text|>', '<|end_of_text|>',
    """{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% else %}{% set date = '1' %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
  {%- set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\n' }}{% endif %}
{{- 'Today Date: ' + date + '\n\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
  {%- if message['role'] == 'assistant' %}
    {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
  {%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
  ),
  'mistral_v1': (
    'llama2', ('<unk>', '<s>', '</s>'), '<s>', '</s>',
    """{{ bos_token }}{% for message in messages %}""" + ALTERNATE + """
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- endfor %}""",
  ),
  'mistral_v3': (
    'mistral', ('<unk>', '<s>', '</s>', '[INST]', '[/INST]', '[AVAILABLE_TOOLS]'), '<s>', '</s>',
    """{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- set users = turns | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in turns %}
  {%- if message['role'] == 'user' %}
    {%- if tools is not none and message == users[-1] %}{{- '[AVAILABLE_TOOLS]' + tools | tojson }}{% endif %}
    {%- if loop.last and system is defined %}{{- '[INST]' + system + '\n\n' + message['content'] + '[/INST]' }}
    {%- else %}{{- '[INST]' + message['content'] + '[/INST]' }}{% endif %}
  {%- else %}{% generation %}{{- ' ' + message['content'] | trim + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}""",
  ),
  'mixtral': (
    'llama2', ('<unk>', '<s>', '</s>'), '<s>', '</s>',
    """{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{{- bos_token }}
{%- for message in turns %}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('must alternate') }}{% endif %}
  {%- if message['role'] == 'user' %}
    {%- if loop.first and system is defined %}{{- ' [INST] ' + system + '\n\n' + message['content'] + ' [/INST]' }}
    {%- else %}{{- ' [INST] ' + message['content'] + ' [/INST]' }}{% endif %}
  {%- else %}{% generation %}{{- ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}
{%- endfor %}""",
  ),
  'qwen2': (
    'qwen', ('<|endoftext|>', '<|im_start|>', '<|im_end|>'), '', '<|im_end|>',
    """{%- if tools %}{{- '<|im_start|>system\n# Tools\n' + tools | tojson }}{% endif %}
{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\nYou are Q.<|im_end|>\n' }}{% endif %}
""" + CHATML_TURNS,
  ),
  'qwen3': (
    'qwen', ('<|endoftext|>', '<|im_start|>', '<|im_end|>'), '', '<|im_end|>',
    """{%- set ns = namespace(last=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}
  {%- set index = (messages | length - 1) - loop.index0 %}
  {%- if not ns.found and message.role == 'user' and message.content is string %}
    {%- set ns.found = true %}{% set ns.last = index %}
  {%- endif %}
{%- endfor %}
{%- for message in messages %}
  {%- if message.role != 'assistant' %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
  {%- else %}
    {%- set content = message.content %}
    {%- set reasoning = '' %}
    {%- if message.reasoning_content is string %}{% set reasoning = message.reasoning_content %}
    {%- elif '</think>' in content %}
      {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
      {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\n' }}
    {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
      {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
    {%- endif %}
    {%- generation %}{{- content.lstrip('\n') + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}""",
  ),
  'gemma2': (
    'gemma', ('<pad>', '<eos>', '<bos>', '<unk>', '<start_of_turn>', '<end_of_turn>'), '<bos>', '<eos>',
    """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{- raise_exception('System role not supported') }}{% endif %}{% for message in messages %}""" + ALTERNATE + """
{%- if message['role'] == 'assistant' %}{{ '<start_of_turn>model\n' }}
{%- generation %}{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
  ),
  'gemma3': (
    'gemma', ('<pad>', '<eos>', '<bos>', '<unk>', '<start_of_turn>', '<end_of_turn>'), '<bos>', '<eos>',
    """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
  {%- if messages[0]['content'] is string -%}{%- set prefix = messages[0]['content'] + '\n\n' -%}
  {%- else -%}{%- set prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}
  {%- set turns = messages[1:] -%}
{%- else -%}{%- set prefix = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- for message in turns -%}
  {%- if message['role'] == 'assistant' -%}{%- set role = 'model' -%}{%- else -%}{%- set role = 'user' -%}{%- endif -%}
  {{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}
  {%- if role == 'model' -%}
    {% generation %}{{ message['content'] | trim }}{{ '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}
  {%- elif message['content'] is string -%}{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}
  {%- else -%}{{ raise_exception('Invalid content type') }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}""",
  ),
  'smollm3': (
    'llama3', ('<|begin_of_text|>', '<|im_start|>', '<|im_end|>'), '', '<|im_end|>',
    """{# ---- defaults ---- #}
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- if enable_thinking -%}{%- set mode = '/think' -%}{%- else -%}{%- set mode = '/no_think' -%}{%- endif -%}
{{- '<|im_start|>system\n' -}}
{%- if messages[0].role == 'system' -%}
  {%- set own = messages[0].content.replace('/no_think', '').replace('/think', '').rstrip() -%}
{%- endif -%}
{%- set today = strftime_now('%d %B %Y') -%}
{{- '## Metadata\n\nToday Date: ' ~ today ~ '\nReasoning Mode: ' + mode + '\n\n' -}}
{{- '## Custom Instructions\n\n' + (own if own else 'You are helpful.') + '\n\n<|im_end|>\n' -}}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{{ '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
  {%- elif message.role == 'assistant' -%}
    {{- '<|im_start|>assistant\n' + ('' if mode == '/think' else '<think>\n\n</think>\n') -}}
    {% generation %}{{ message.content.lstrip('\n') + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '<|im_start|>assistant\n' + ('' if mode == '/think' else '<think>\n\n</think>\n') }}
{%- endif -%}""",
  ),
  'olmo2': (
    'gpt2', ('<|endoftext|>', '<|pad|>'), '<|endoftext|>', '<|endoftext|>',
    """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}
{%- elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}
{%- elif message['role'] == 'assistant' %}{{ '<|assistant|>\n' }}
{%- generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% if not loop.last %}{{ '\n' }}{% endif %}
{%- endif %}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
{%- endfor %}""",
  ),
  'phi3': (
    'llama2', ('<unk>', '<s>', '<|endoftext|>', '<|assistant|>', '<|system|>', '<|user|>', '<|end|>'),
    '<s>', '<|endoftext|>',
    """{% for message in messages %}
{%- if message['role'] == 'assistant' %}{{ '<|assistant|>\n' }}
{%- generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
  ),
}  # fmt: skip
NO_SYSTEM = {'mistral_v1', 'gemma2'}

SYSTEM = {'role': 'system', 'content': 'You are kind.\nYou like "stories".'}
TALK = [
  {'role': 'user', 'content': ' Wie heißt du? 🎉 '},
  {'role': 'assistant', 'content': "I'm no one.\n\nAnd you?"},
  {'role': 'user', 'content': 'x = {"a": <b>}\n\tprint(12)'},
]
REPLIES = ['Well, 42.', 'Naïve?\n\nYes: it\'s "so".\n', 'Зачем 你好 🤷🏾', 'a']


@functools.cache
def read(family: str, folder: str):
  """Our template and tokenizer, and transformers'."""
  kind, special, bos, eos, source = FAMILIES[family]
  path = f'{folder}/{family}.json'
  with open(path, 'w', encoding='utf-8') as file:
    file.write(tokenizer_json(kind, special))
  template = ChatTemplate(source, bos, eos)
  ours = tokenizer.from_tokenizer_json(path, eos=eos, reply_end=template.reply_end)
  names = {'bos_token': bos} if bos else {}
  theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=path, eos_token=eos, **names)
  theirs.chat_template = source
  return template, ours, theirs


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return str(tmp_path_factory.mktemp('templates'))


@pytest.fixture(autouse=True)
def one_day(monkeypatch):
  """Today is for transformers what it is for us."""

  class Day(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
      return cls(2024, 7, 26)

  monkeypatch.setattr('transformers.utils.chat_template_utils.datetime', Day)


def folded(family, messages):
  """What a family reads that has no place for a system message."""
  if family not in NO_SYSTEM or messages[0]['role'] != 'system':
    return messages
  first = {'role': 'user', 'content': f'{messages[0]["content"]}\n\n{messages[1]["content"]}'}
  return [first, *messages[2:]]


def apply(family, theirs, messages, **settings):
  return theirs.apply_chat_template(folded(family, messages), enable_thinking=False, **settings)


CONVERSATIONS = [TALK[:1], TALK, [SYSTEM, TALK[0]], [SYSTEM, *TALK]]


@pytest.mark.parametrize('family', FAMILIES)
def test_conversations_read_as_transformers_renders_and_encodes_them(folder, family):
  template, ours, theirs = read(family, folder)
  assert template.takes_system == (family not in NO_SYSTEM)
  for messages in [*CONVERSATIONS, TALK[:2], [SYSTEM, *TALK[:2]]]:
    for opened in (True, False):
      expected = apply(family, theirs, messages, tokenize=False, add_generation_prompt=opened)
      assert template.render(messages, opened) == expected
    if messages[-1]['role'] == 'user':
      ids = apply(family, theirs, messages, add_generation_prompt=True, return_dict=False)
      assert chat.encode_prompt(template, ours, messages) == ids
      assert ('You are kind.' in expected) == (messages[0]['role'] == 'system')


@pytest.mark.parametrize('family', FAMILIES)
def test_a_reply_is_exactly_what_transformers_masks(folder, family):
  """Prompt and reply are the whole conversation, and the mask of what the assistant says ends with the reply."""
  template, ours, theirs = read(family, folder)
  for messages in CONVERSATIONS:
    prompt = chat.encode_prompt(template, ours, messages)
    for text in REPLIES:
      whole = [*messages, {'role': 'assistant', 'content': text}]
      out = apply(family, theirs, whole, return_dict=True, return_assistant_tokens_mask=True)
      ids, mask = out['input_ids'], out['assistant_masks']
      reply = chat.encode_reply(template, ours, text)
      start = len(prompt)
      if 'system' in (m['role'] for m in messages) and family == 'mistral_v3':
        # It moves the system message to the last of the user's: a conversation that goes on is another one.
        assert ids[: start + len(reply)] != prompt + reply
        continue
      assert ids[: start + len(reply)] == prompt + reply
      assert reply[-1] == ours.eos_ids[0] and not set(reply[:-1]) & set(ours.eos_ids)
      assert all(mask[start : start + len(reply)]) and not any(mask[start + len(reply) :])
      assert not mask[start - 1]


@pytest.mark.parametrize('family', FAMILIES)
def test_a_message_cannot_write_what_the_template_writes(folder, family):
  template, ours, _ = read(family, folder)
  special = set(ours.special_tokens.values()) - {ours.special_tokens.get('<unk>')}
  usual = [i for i in chat.encode_prompt(template, ours, [SYSTEM, *TALK]) if i in special]
  for token in ours.special_tokens:
    attack = f'a{token}\n{token} b'
    for at in range(4):
      messages = [SYSTEM, *TALK]
      messages[at] = {**messages[at], 'content': attack}
      ids = chat.encode_prompt(template, ours, messages)
      assert [i for i in ids if i in special] == usual
      assert attack in ours.decode(ids)


def test_a_template_without_generation_blocks_or_with_a_broken_one_is_told():
  with pytest.raises(UserError, match='not a valid template'):
    ChatTemplate('{% generation %}{{ messages }}', '', '')
  # What is set inside such a block is unknown outside, as in transformers.
  inside = ChatTemplate('{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x }}', '', '')
  assert inside.render(TALK, True) == '1'


def test_filters_and_functions_are_those_of_transformers(folder):
  _, _, theirs = read('qwen2', folder)
  source = (
    '{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ messages[0] | tojson(ensure_ascii=true) }}'
    "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}{{ tools is none }}{{ documents is none }}"
    "{{ strftime_now('%A %Y-%m-%d') }}{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}"
    'x{% endfor %}'
  )
  theirs.chat_template = source
  expected = apply('qwen2', theirs, TALK, tokenize=False)
  assert ChatTemplate(source, '', '').render(TALK, False) == expected
  assert 'Friday 2024-07-26' in expected
