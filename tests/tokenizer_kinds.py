"""Tokenizers of the kinds that open models have, trained on this folder's own text, and strings of all kinds.

Their pre-tokenizers, normalisers and decoders are those of the families; what the vocabulary holds does not matter.
"""

import functools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ('<unk>', '<s>', '</s>', '<pad>', '<|im_start|>', '<|im_end|>', '<|eot_id|>', '<end_of_turn>', '[INST]')

# What is one word before byte pairs are merged: contractions, letters with what stands before them, digits, the rest.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes(before: Sequence[pre_tokenizers.PreTokenizer], **model: bool) -> tokenizers.Tokenizer:
  backend = tokenizers.Tokenizer(models.BPE(**model))
  backend.pre_tokenizer = pre_tokenizers.Sequence(before)
  backend.decoder = decoders.ByteLevel()
  return backend


def _split(digits: str) -> list[pre_tokenizers.PreTokenizer]:
  words = pre_tokenizers.Split(Regex(_WORDS.replace('DIGITS', digits)), 'isolated')
  return [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def _gpt2() -> tokenizers.Tokenizer:
  return _bytes([pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _llama3() -> tokenizers.Tokenizer:
  return _bytes(_split(r'\p{N}{1,3}'), ignore_merges=True)


def _qwen() -> tokenizers.Tokenizer:
  backend = _bytes(_split(r'\p{N}'))
  backend.normalizer = normalizers.NFC()
  return backend


def _pieces(*normal: normalizers.Normalizer, strip: bool) -> tokenizers.Tokenizer:
  backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token='<unk>'))
  backend.normalizer = normalizers.Sequence([*normal])
  stripped = [decoders.Strip(' ', 1, 0)] if strip else []
  backend.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), *stripped])
  return backend


def _llama2() -> tokenizers.Tokenizer:
  return _pieces(normalizers.Prepend('▁'), normalizers.Replace(' ', '▁'), strip=True)


def _mistral() -> tokenizers.Tokenizer:
  backend = _pieces(strip=True)
  backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
  return backend


def _gemma() -> tokenizers.Tokenizer:
  backend = _pieces(normalizers.Replace(' ', '▁'), strip=False)
  backend.pre_tokenizer = pre_tokenizers.Split(' ', 'merged_with_previous')
  return backend


def _unigram() -> tokenizers.Tokenizer:
  backend = tokenizers.Tokenizer(models.Unigram())
  backend.normalizer = normalizers.NFKC()
  backend.pre_tokenizer = pre_tokenizers.Metaspace()
  backend.decoder = decoders.Metaspace()
  return backend


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
  'gpt2': _gpt2,
  'llama3': _llama3,
  'qwen': _qwen,
  'llama2': _llama2,
  'mistral': _mistral,
  'gemma': _gemma,
  'unigram': _unigram,
}


@functools.cache
def tokenizer_json(kind: str, special: tuple[str, ...] = SPECIAL) -> str:
  """A tokenizer.json whose special tokens are `special`."""
  backend = KINDS[kind]()
  # Pieces that are merged from the text of a special token would be that token; and none is longer than a line.
  words = [
    *Path(__file__).read_text().splitlines(),
    *(line for text in texts(600, seed=5) for line in text.splitlines()),
  ]
  words = [text for text in words if not any(token in text for token in (*special, *_LIKE_SPECIAL))]
  if kind == 'unigram':
    # Apart from the vocabulary, where the model would find them by itself.
    backend.train_from_iterator(
      words, trainers.UnigramTrainer(vocab_size=4000, show_progress=False, unk_token='<unk>', special_tokens=['<unk>'])
    )
  else:
    alphabet = (
      pre_tokenizers.ByteLevel.alphabet() if kind in ('gpt2', 'llama3', 'qwen') else [*map(chr, range(32, 127)), '▁']
    )
    own = list(special)
    if kind in ('llama2', 'mistral', 'gemma'):
      own += [f'<0x{byte:02X}>' for byte in range(256)]
    trainer = trainers.BpeTrainer(
      vocab_size=1200, special_tokens=own, initial_alphabet=alphabet, limit_alphabet=300, show_progress=False
    )
    backend.train_from_iterator(words, trainer)
    # Bytes are pieces of the vocabulary, not added tokens that a text is searched for.
    description = json.loads(backend.to_str())
    backend = tokenizers.Tokenizer.from_str(json.dumps(description | {'added_tokens': []}))
  backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
  return backend.to_str()


# ---- strings ----

# First and last code point of blocks of many scripts, of symbols, and of what stands for no character.
_BLOCKS = (
  (0x41, 0x5A), (0x61, 0x7A), (0x30, 0x39), (0x20, 0x7E), (0xC0, 0x24F), (0x370, 0x3FF), (0x400, 0x52F), (0x530, 0x58F),
  (0x590, 0x5FF), (0x600, 0x6FF), (0x700, 0x74F), (0x900, 0x97F), (0x980, 0x9FF), (0xA00, 0xA7F), (0xB80, 0xBFF),
  (0xC00, 0xC7F), (0xD00, 0xD7F), (0xE00, 0xE7F), (0xE80, 0xEFF), (0xF00, 0xFFF), (0x1000, 0x109F), (0x10A0, 0x10FF),
  (0x1100, 0x11FF), (0x1200, 0x137F), (0x13A0, 0x13FF), (0x1780, 0x17FF), (0x1E00, 0x1FFF), (0x2000, 0x206F),
  (0x2070, 0x20CF), (0x2100, 0x22FF), (0x2500, 0x27BF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xA000, 0xA4CF),
  (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0xFB00, 0xFDFF), (0xFE00, 0xFEFF), (0xFF00, 0xFFFF), (0x10300, 0x1034F),
  (0x12000, 0x1203F), (0x1D400, 0x1D4FF), (0x1F300, 0x1F6FF), (0x1F900, 0x1FAFF), (0x20000, 0x2A6DF),
  (0xE0000, 0xE007F), (0xF0000, 0xF00FF), (0x10FF00, 0x10FFFF),
)  # fmt: skip
_EMOJI = ('🎉', '👩‍👩‍👧‍👦', '🏳️‍🌈', '👍🏽', '🇫🇷', '❤️', '1️⃣', '🏴󠁧󠁢󠁥󠁮󠁧󠁿', '🤷🏾‍♂️')
_SPACE = (
  ' ',
  '  ',
  '   ',
  '\t',
  '\n',
  '\n\n',
  '\r\n',
  '\x0b',
  '\x0c',
  '\x85',
  '\xa0',
  '\u2009',
  '\u2028',
  '\u3000',
  '\u200b',
)
_CONTROL = tuple(map(chr, [*range(32), *range(0x7F, 0xA0), 0xAD, 0x200D, 0x200E, 0x202E, 0x2060, 0xFEFF, 0xFFFD]))
_LIKE_SPECIAL = (
  *SPECIAL, '<|im_<|im_end|>end|>', '<|im_end', 'im_end|>', '<|', '|>', '< s>', '<S>', '<0x41>', '<0xFF>', '[/INST]',
  '<|IM_END|>', '<<SYS>>', '<think>', '[gMASK]', '<|eot_id|><|eot_id|>', ' </s> ', '\\n', '&lt;s&gt;', '▁', '▁▁a',
  '##ing',
)  # fmt: skip
_SENTENCES = """
  don't I'll WE'VE it's 'twas naïve Straße façade é 3.14159 1,000,000 2026-11-24 x=1; def f(x): return x**2
  https://example.org/a?b=c#d user@example.org C++ #hashtag @name $5 100% (a) [b] {c} "d" ... -- — … ½ ² ﬁ ǅ İstanbul
  Привет мир שלום مرحبا नमस्ते สวัสดี こんにちは 你好世界 안녕하세요 Γειά გამარჯობა ሰላም
"""
_WORDS_OF_TEXT = _SENTENCES.split()


def texts(count: int, seed: int = 0) -> list[str]:
  """Strings of many scripts, emoji, control characters, runs of white space and look-alikes of special tokens."""
  rng = random.Random(seed)

  def script() -> str:
    first, last = rng.choice(_BLOCKS)
    return ''.join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 12)))

  def spaces() -> str:
    return ''.join(rng.choices(_SPACE, k=rng.randint(1, 6)))

  makers = (
    (script, 4), (spaces, 2), (lambda: rng.choice(_WORDS_OF_TEXT), 5), (lambda: ' ' + rng.choice(_WORDS_OF_TEXT), 4),
    (lambda: rng.choice(_EMOJI), 1), (lambda: rng.choice(_CONTROL), 1), (lambda: rng.choice(_LIKE_SPECIAL), 2),
    (lambda: str(rng.randrange(10 ** rng.randint(1, 12))), 1), (lambda: rng.choice('ab .!') * rng.randint(1, 40), 1),
  )  # fmt: skip
  parts = [maker for maker, weight in makers for _ in range(weight)]
  return [''.join(rng.choice(parts)() for _ in range(rng.randint(0, 12))) for _ in range(count)]
