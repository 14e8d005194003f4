"""Text to token ids and back, from a SentencePiece tokenizer.model.

The library parses and runs the model. What is done here to the file's bytes, a protocol buffer (see
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto), it has no call for: pieces are
made control, and the space before a text is switched off.
"""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sentencepiece

from charjax.errors import UserError, one_line
from charjax.files import read_file
from charjax.model.tokenizer import Tokenizer, padding_id, turn_ends

# Tags of protocol buffer fields: ModelProto.pieces, SentencePiece.piece and .type.
_PIECES, _PIECE, _TYPE = 0x0A, 0x0A, 0x18
# SentencePiece.Type; those of single bytes and of unused pieces do not matter here.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
# What a template is likely to mean as a token where it writes it: '<end>' or '[INST]', but not 'user' or '\n\n'.
_MARKUP = re.compile(r'[^\w\s▁].*\w.*[^\w\s▁]', re.DOTALL)
# A second normalizer_spec, which is merged into the first: add_dummy_prefix = false.
_NO_SPACE = b'\x1a\x02\x18\x00'


class Model(NamedTuple):
  """A tokenizer.model as read.

  Attributes:
    source: the file.
    pieces: the piece of each id, and its SentencePiece.Type.
    bos: the piece that it says begins a text, '' if none.
    eos: the piece that ends one.
  """

  source: bytes
  pieces: list[tuple[str, int]]
  bos: str
  eos: str


class _SentencePiece:
  """A Tokenizer over the `sentencepiece` library.

  Ids of plain text are the library's own. `decode` gives back what was encoded, also with the special tokens cut
  out, but for what the model's normalisation changes: all make U+2581 a space. It is the library's, one run between
  special tokens at a time, so that a space that `encode` put before a run is taken from it again. Bytes that
  are no whole character become U+FFFD.
  """

  def __init__(
    self,
    source: bytes,
    spaced: str,
    special_tokens: Mapping[str, int],
    added: Mapping[str, int],
    eos_ids: tuple[int, ...],
    pad_id: int,
  ):
    """Args: source, a tokenizer.model with its special tokens made control; added, ordinary tokens that it
    does not hold; the rest as in `make` and Tokenizer."""
    self._made_of = source, spaced, special_tokens, added, eos_ids, pad_id
    # The one encodes text that opens a sequence, the other what follows a special token.
    self._first = _library(source + (_NO_SPACE if spaced == 'never' else b''))
    self._later = self._first if spaced == 'always' else _library(source + _NO_SPACE)
    self._size = self._first.get_piece_size()
    self._unknown = self._first.unk_id()
    self._added = added
    self._added_by_id = {i: token for token, i in added.items()}
    self._special_ids = set(special_tokens.values())
    self._find_added, self._find_all = _any_of(added), _any_of([*added, *special_tokens])
    self.special_tokens, self.eos_ids, self.pad_id = special_tokens, eos_ids, pad_id
    self.vocab_size = max(self._size, 1 + max([*special_tokens.values(), *added.values()]))

  def __reduce__(self) -> tuple[Any, ...]:
    return _SentencePiece, self._made_of

  def encode(self, text: str, special: bool = False, opens: bool = True) -> list[int]:
    ids: list[int] = []
    end = 0
    for match in itertools.chain((self._find_all if special else self._find_added).finditer(text), [None]):
      plain = text[end : match.start() if match else len(text)]
      # Without text there is nothing that a space could stand before.
      if plain:
        ids += (self._first if opens and not end else self._later).encode(plain)
      if match:
        token, end = match[0], match.end()
        ids.append(self._added[token] if token in self._added else self.special_tokens[token])
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    texts: list[str] = []
    run: list[int] = []
    library = self._first
    for i in ids:
      if i in self._added_by_id or (i in self._special_ids and i != self._unknown):
        texts += [library.decode(run), self._added_by_id.get(i, '')]
        run, library = [], self._later
      # Embeddings may be more than there are tokens: what is drawn from the rest says nothing.
      elif 0 <= i < self._size and i != self._unknown:
        run.append(int(i))
    return ''.join([*texts, library.decode(run)])


def read(path: str) -> Model:
  """Reads a tokenizer.model.

  Raises:
    UserError: no such file, or not one that the `sentencepiece` library can read.
  """
  try:
    source = read_file(path)
    library = _library(source)
    stored = (value for tag, value, _ in _fields(source) if tag == _PIECES)
    fields = ({tag: value for tag, value, _ in _fields(piece)} for piece in stored)
    pieces = [(str(field[_PIECE], 'utf-8'), field.get(_TYPE, _NORMAL)) for field in fields]
    if len(pieces) != library.get_piece_size():
      raise ValueError(f'{len(pieces)} pieces, but {library.get_piece_size()} are counted')
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror or error}); fetch it again') from error
  except Exception as error:  # The library raises RuntimeErrors, and may raise anything.
    raise UserError(f'{path}: not a SentencePiece tokenizer.model ({one_line(error)}); fetch it again') from error

  def piece(index: int) -> str:
    return pieces[index][0] if 0 <= index < len(pieces) else ''

  return Model(source, pieces, piece(library.bos_id()), piece(library.eos_id()))


def make(
  model: Model,
  where: str,
  added: Mapping[str, int],
  special: Collection[str] = (),
  eos_ids: Sequence[int] = (),
  eos: str = '',
  pad: str = '',
  template: str = '',
  reply_end: str = '',
  spaced: str = 'always',
) -> Tokenizer:
  """The tokenizer of a tokenizer.model and of what the files beside it add.

  Args:
    model: the tokenizer.model.
    where: its path, for error messages.
    added: tokens and their ids that other files name, those of the model's own pieces among them.
    special: which tokens are special beside the model's control pieces, if it has them.
    eos_ids: ids that the checkpoint says end a text.
    eos: the token that it says ends a text.
    pad: the token that it says fills rows.
    template: the chat template; what it writes of the added or user-defined tokens is special, too.
    reply_end: what it writes after a reply; the first token in it that is no plain text is the end of a turn.
    spaced: if the model puts a space before texts, before which runs of plain text there is one: 'always', after
      special tokens too; 'first', only where a text opens with it; 'never'.

  Raises:
    UserError: tokens and ids that do not fit together.
  """
  strings = {i: piece for i, (piece, _) in enumerate(model.pieces)}
  strings |= {i: token for token, i in added.items()}
  ids = {token: i for i, token in strings.items()}
  kinds = {i: kind for i, (_, kind) in enumerate(model.pieces)}
  # What may end a turn or be special. All else is plain text, which a template writes without meaning a token.
  marks = {
    token: i
    for token, i in ids.items()
    if kinds.get(i) in (_UNKNOWN, _CONTROL)
    or ((token in added or kinds[i] == _USER_DEFINED) and (token in special or _MARKUP.fullmatch(token)))
  }
  ends = turn_ends(where, strings, marks, [*eos_ids, *([ids[eos]] if eos in ids else [])], reply_end)
  special_tokens = {
    token: i
    for token, i in ids.items()
    if i in ends or kinds.get(i) in (_UNKNOWN, _CONTROL) or (token in marks and (token in special or token in template))
  }
  # The library finds its own pieces, but for those that got another name; of two names the last one counts.
  own = {token for token, i in added.items() if i in kinds and model.pieces[i][0] == token}
  others = {t: i for t, i in added.items() if t not in special_tokens and t not in own and strings[i] == t}
  control = {i for i in (*special_tokens.values(), *others.values()) if kinds.get(i) not in (None, _UNKNOWN, _CONTROL)}
  pad_id = padding_id(ids.get(pad), ends, special_tokens)
  try:
    source = _with_control(model.source, control)
    tokenizer = _SentencePiece(source, spaced, special_tokens, others, ends, pad_id)
    # The library finds none by itself: here this is checked, whatever its version does.
    found = [t for t, i in special_tokens.items() if kinds.get(i) != _UNKNOWN and i in tokenizer.encode(t)]
  except Exception as error:  # As above.
    raise UserError(f'{where}: its special tokens do not fit it ({one_line(error)}); fetch it again') from error
  if found:
    raise UserError(f'{where}: text that reads {found[0][:40]!r} would be control; use a tokenizer.json')
  return tokenizer


def _library(source: bytes) -> Any:
  """The library's tokenizer; its constructor would make one without a model of an empty file."""
  library = sentencepiece.SentencePieceProcessor()
  library.load_from_serialized_proto(source)
  return library


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
  """Finds any of the tokens, the longest that stands at a place; of none, nothing."""
  return re.compile('|'.join(map(re.escape, sorted(tokens, key=len, reverse=True))) or '(?!)')


def _with_control(source: bytes, ids: Collection[int]) -> bytes:
  """The model with the pieces of these ids made control, which no text is encoded to."""
  parts: list[bytes] = []
  index = 0
  for tag, value, raw in _fields(source):
    if tag == _PIECES and index in ids:
      # Of a field that is there twice the last one counts.
      piece = value + bytes([_TYPE, _CONTROL])
      parts.append(bytes([_PIECES]) + _varint(len(piece)) + piece)
    else:
      parts.append(raw)
    index += tag == _PIECES
  return b''.join(parts)


def _fields(message: bytes) -> Iterator[tuple[int, Any, bytes]]:
  """Tag, value (a number or bytes) and bytes of each field of a protocol buffer; ValueError if it is damaged."""
  position = 0

  def number() -> int:
    nonlocal position
    value = shift = 0
    while True:
      if position == len(message) or shift > 63:
        raise ValueError(f'a number is cut off or too long at byte {position}')
      byte = message[position]
      value |= (byte & 127) << shift
      position, shift = position + 1, shift + 7
      if byte < 128:
        return value

  while position < len(message):
    start = position
    tag = number()
    value: Any = None
    if tag & 7 == 0:
      value = number()
    elif tag & 7 in (1, 2, 5):
      size = number() if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7]
      if size > len(message) - position:
        raise ValueError(f'a field is cut off at byte {position}')
      value = message[position : position + size]
      position += size
    else:
      raise ValueError(f'a field of unknown kind {tag & 7} at byte {start}')
    yield tag, value, message[start:position]


def _varint(value: int) -> bytes:
  """A number as protocol buffers write it: seven bits a byte, the last byte below 128."""
  parts = []
  while value > 127:
    parts.append(value & 127 | 128)
    value >>= 7
  return bytes([*parts, value])
