"""Text to token ids and back, from a GGUF file's metadata or a tokenizer.json; see sentencepiece.py for the third."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from charjax.errors import UserError, one_line
from charjax.files import read_file


class Tokenizer(Protocol):
  """What the rest of charjax knows of a tokenizer.

  Attributes:
    vocab_size: ids are smaller than this.
    eos_ids: ids that end a turn; the first is the one written at the end of a reply.
    pad_id: fills rows; it ends no turn wherever the vocabulary has another special token to offer.
    special_tokens: the strings that `encode(..., special=True)` turns into one id, and those ids.
  """

  vocab_size: int
  eos_ids: tuple[int, ...]
  pad_id: int
  special_tokens: Mapping[str, int]

  def encode(self, text: str, special: bool = False, opens: bool = True) -> list[int]:
    """Token ids, with no BOS or EOS of its own; special-token strings are plain text unless `special`.

    `opens` says whether a plain text begins a sequence, where some tokenizers put a space before it. Else it
    follows a special token.
    """

  def decode(self, ids: Sequence[int]) -> str:
    """The text of the ids, special tokens left out."""


class _Backed:
  """A Tokenizer over the `tokenizers` library.

  `decode` gives back what was encoded, but for bytes that the vocabulary lacks, which the library drops:
  SmolLM2's has none for six control characters and for unassigned planes of Unicode.
  """

  def __init__(self, source: str, eos_ids: tuple[int, ...], pad_id: int):
    """Args: source, a tokenizer.json as text; eos_ids and pad_id, as in Tokenizer."""
    self.source, self.eos_ids, self.pad_id = source, eos_ids, pad_id
    # Two, since whether special tokens are seen is a state of the library's object, and threads share it.
    self._seeing = tokenizers.Tokenizer.from_str(source)
    self._plain = tokenizers.Tokenizer.from_str(source)
    self._plain.encode_special_tokens = True
    # One kind of those that put a space before a text puts it there only where a sequence opens.
    inner = source.replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
    self._inner = self._plain if inner == source else tokenizers.Tokenizer.from_str(inner)
    self._inner.encode_special_tokens = True
    self.vocab_size = 1 + max(self._seeing.get_vocab().values())
    self.special_tokens: Mapping[str, int] = _special_tokens(self._seeing)

  def __reduce__(self) -> tuple[Any, ...]:
    # The library's own pickle forgets encode_special_tokens.
    return _Backed, (self.source, self.eos_ids, self.pad_id)

  def encode(self, text: str, special: bool = False, opens: bool = True) -> list[int]:
    backend = self._seeing if special else self._plain if opens else self._inner
    return backend.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Sequence[int]) -> str:
    return self._seeing.decode(list(ids), skip_special_tokens=True)


def to_tokenizer_json(tokenizer: Tokenizer) -> str:
  """The tokenizer.json of a tokenizer that is none of SentencePiece's."""
  assert isinstance(tokenizer, _Backed)
  return tokenizer.source


def bpe_from_gguf(metadata: Mapping[str, Any], where: str, reply_end: str = '') -> Tokenizer:
  """The byte-level BPE tokenizer that a GGUF file's metadata describes.

  Args:
    metadata: the file's key-value pairs.
    where: the file's path, for error messages.
    reply_end: what the chat template writes after a reply; its first special token is the end of a turn.

  Raises:
    UserError: a kind of tokenizer that is not supported, or metadata that do not fit together.
  """
  kind, split = metadata.get('tokenizer.ggml.model'), metadata.get('tokenizer.ggml.pre')
  if (kind, split) != ('gpt2', 'smollm'):
    raise UserError(
      f'{where}: tokenizer {str(kind)[:40]!r} with pre-tokenizer {str(split)[:40]!r} is not supported, only '
      f'byte-level BPE as in SmolLM2 is; use a Hugging Face directory, which has a tokenizer.json or tokenizer.model'
    )
  try:
    tokens = metadata['tokenizer.ggml.tokens']
    kinds = metadata['tokenizer.ggml.token_type']
    merges = [tuple(merge.split(' ')) for merge in metadata['tokenizer.ggml.merges']]
    eos_id = int(metadata['tokenizer.ggml.eos_token_id'])
    pad_id = int(metadata.get('tokenizer.ggml.padding_token_id', eos_id))
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(kinds) != len(tokens):
      raise ValueError(f'{len(tokens)} tokens, {len(vocab)} of them different, {len(kinds)} token types')
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
      [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    # Token types of GGUF: 3 is a control token, 4 one that its user added.
    backend.add_special_tokens([_added(t) for t, k in zip(tokens, kinds, strict=True) if k == 3])
    backend.add_tokens([_added(t) for t, k in zip(tokens, kinds, strict=True) if k == 4])
  except KeyError as error:
    raise UserError(f'{where}: field {error.args[0]} is missing; is this a complete file?') from error
  except Exception as error:  # The library raises bare Exceptions.
    raise UserError(f'{where}: the tokenizer in it is damaged ({one_line(error)}); fetch it again') from error
  return _with_ends(backend, where, [eos_id], pad_id, reply_end)


def from_tokenizer_json(
  path: str, eos_ids: Sequence[int] = (), eos: str = '', pad: str = '', reply_end: str = ''
) -> Tokenizer:
  """The tokenizer of a Hugging Face tokenizer.json.

  Args:
    path: the file.
    eos_ids: ids that the checkpoint says end a text.
    eos: the token that it says ends a text.
    pad: the token that it says fills rows.
    reply_end: what the chat template writes after a reply; its first special token is the end of a turn.

  Raises:
    UserError: no such file, or not a tokenizer.json that the `tokenizers` library can read.
  """
  try:
    description = json.loads(read_file(path))
    # Saved by many a training run, and silent: texts would be cut off or filled up.
    description['truncation'] = description['padding'] = None
    backend = tokenizers.Tokenizer.from_str(json.dumps(description))
  except FileNotFoundError as error:
    raise UserError(f'{path}: no such file; fetch it') from error
  except Exception as error:  # The library raises bare Exceptions.
    raise UserError(f'{path}: not a tokenizer.json ({one_line(error)}); fetch it again') from error
  tokens: dict[int, str] = {}
  for token, i in backend.get_vocab().items():
    if i in tokens:
      raise UserError(f'{path}: tokens {tokens[i][:40]!r} and {token[:40]!r} both have id {i}; fetch it again')
    tokens[i] = token
  eos_id = backend.token_to_id(eos) if eos else None
  ids = [*eos_ids, *([] if eos_id is None else [eos_id])]
  return _with_ends(backend, path, ids, backend.token_to_id(pad) if pad else None, reply_end)


def _with_ends(
  backend: tokenizers.Tokenizer, where: str, eos_ids: Sequence[int], pad_id: int | None, reply_end: str
) -> Tokenizer:
  """Settles which ids end a turn and which fills rows, and checks that text cannot turn into control."""
  added = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.content}
  strings = {i: token for token, i in backend.get_vocab().items()}
  ends = turn_ends(where, strings, added, eos_ids, reply_end)
  # Some tokenizers list their end of turn as an ordinary token, which a message could then spell out.
  special = _special_tokens(backend)
  backend.add_special_tokens([_added(strings[i]) for i in ends if strings[i] not in special])
  special = _special_tokens(backend)
  pad_id = padding_id(pad_id if pad_id in strings else None, ends, special)
  tokenizer = _Backed(backend.to_str(), ends, pad_id)
  for token, i in special.items():
    # A model of whole words or of pieces may find it by itself, whatever the library is told.
    if i in tokenizer.encode(token) and not _is_unknown(backend, token, i):
      raise UserError(f'{where}: text that reads {token[:40]!r} would be control; use a BPE tokenizer')
  return tokenizer


def _is_unknown(backend: tokenizers.Tokenizer, token: str, index: int) -> bool:
  """Whether it stands for what the vocabulary lacks: text may well be that, and no control."""
  model = json.loads(backend.to_str())['model']
  return token == model.get('unk_token') or index == model.get('unk_id')


def turn_ends(
  where: str, known: Collection[int], named: Mapping[str, int], eos_ids: Sequence[int], reply_end: str
) -> tuple[int, ...]:
  """The ids that end a turn, the one that the chat template writes first.

  Args:
    where: the tokenizer's file, for error messages.
    known: all ids that have a token.
    named: the tokens, and their ids, that are no plain text.
    eos_ids: what the checkpoint says ends a text.
    reply_end: what the template writes after a reply.

  Raises:
    UserError: there is none, or one of them has no token.
  """
  ends = list(eos_ids)
  written = [token for token in named if token in reply_end]
  if written:
    ends.insert(0, named[min(written, key=lambda token: (reply_end.index(token), -len(token)))])
  if not ends or not all(i in known for i in ends):
    raise UserError(f'{where}: end-of-text ids {ends} are not among its {len(known)} tokens; wrong file?')
  return tuple(dict.fromkeys(ends))


def padding_id(pad_id: int | None, ends: Sequence[int], special: Mapping[str, int]) -> int:
  """The id that fills rows: `pad_id`, unless there is none or it ends turns, too (as SmolLM2's does)."""
  if pad_id is not None and pad_id not in ends:
    return pad_id
  # A mask of padding would hide the end of a turn.
  return min((i for i in special.values() if i not in ends), default=ends[0])


def _added(token: str) -> AddedToken:
  return AddedToken(token, normalized=False)


def _special_tokens(backend: tokenizers.Tokenizer) -> dict[str, int]:
  added = backend.get_added_tokens_decoder()
  return {token.content: i for i, token in sorted(added.items()) if token.special and token.content}
