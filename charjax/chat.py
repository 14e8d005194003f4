"""`charjax chat`: a conversation in the terminal with a model, or with what a run made of it.

What the model writes is not trusted: nothing of it reaches the terminal that could drive it.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, TextIO

from charjax import starting_model
from charjax.engine.batch import item_keys
from charjax.engine.sample import Sampling
from charjax.engine.stream import shapes, stream
from charjax.errors import UserError
from charjax.model import language_model
from charjax.model.decoder import Decoder
from charjax.model.language_model import LanguageModel
from charjax.stages import policy, prompts
from charjax.terminal import print_nowhere, printable
from charjax.training.heads import bind
from charjax.workdir import Session

_AGAIN = '/new'
_NARROWEST = 30  # cells of a column; with fewer, replies stand one after another
_GAP = ' │ '


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to talk.

  Attributes:
    temperature: logits are divided by it; 0 takes the most probable token.
    top_p: see engine.sample.Sampling.
    max_new_tokens: a reply that has not ended by then is cut off.
    top_k: see there, too.
    seed: of the draws; the n-th message is answered alike each time.
    side_by_side: the starting model (also without its adapters, if it has some), the same with the character shown, and
      the trained one answer each message.
    trait: whose statement is shown then; '' for all of the character's.
  """

  temperature: float
  top_p: float
  max_new_tokens: int
  top_k: int = 0
  seed: int = 0
  side_by_side: bool = False
  trait: str = ''


def run(session: Session, trained: bool, settings: Settings) -> None:
  """Talks until the input ends.

  Args:
    session: the model, the character and, if `trained`, the run folder.
    trained: talk to the run's policy; else to the starting model.
    settings: how.

  Raises:
    UserError: the policy is not there, there is no such trait, or the chat template cannot render what was said.
  """
  for file in (sys.stdin, sys.stdout, sys.stderr):
    if hasattr(file, 'reconfigure'):
      file.reconfigure(errors='replace')
  try:
    with _working(f'reading {session.config.model.path}...'):
      speakers = _speakers(session, trained, settings)
    _talk(session.model, speakers, settings)
  except BrokenPipeError:
    print_nowhere()


# ---- who speaks ----


@dataclasses.dataclass
class Speaker:
  """One model in the conversation, with a history of its own.

  Attributes:
    name: what stands over its replies.
    before: what it is shown before the conversation.
    decoder: its weights.
    adapter: a LoRA adapter, or None.
    history: what was said so far.
    text: of the reply it is giving, as it may be printed.
    ended: nothing is to come of this reply.
    note: what there is to say about it.
  """

  name: str
  before: prompts.Messages
  decoder: Decoder
  adapter: Any = None
  history: prompts.Messages = dataclasses.field(default_factory=list)
  text: str = ''
  ended: bool = True
  note: str = ''

  def answer(self, model: LanguageModel, message: str, turn: int, settings: Settings, met: set[Any]) -> Iterator[None]:
    """Answers a message; `text` grows at each step. The history is right whenever the caller stops.

    Args:
      model: the tokenizer and the template.
      message: what is said.
      turn: the how many-th message of the conversation it is; each has its own draws.
      settings: how to draw.
      met: for which programs nobody has to wait any more; others are added.
    """
    self.text, self.note, self.ended = '', '', False
    history = [*self.history, prompts.user(message)]
    limit = self.decoder.config.max_length
    room = min(settings.max_new_tokens, max(1, limit // 2))
    prompt = model.prompt([*self.before, *history])
    while len(prompt) + room > limit and len(history) > 1:
      history = history[2:]
      prompt = model.prompt([*self.before, *history])
    if left_out := len(self.history) + 1 - len(history):
      self.note = f'no more than {limit} tokens are read: the oldest {left_out} messages and replies are left out'
    room = min(room, limit - len(prompt))
    if room < 1:
      self.ended, self.note = True, f'{len(prompt)} tokens to read, and {limit} are the most: shorten the message'
      return
    sampling = Sampling(room, settings.temperature, settings.top_p, top_k=settings.top_k)
    key = item_keys(settings.seed, 'chat', [str(turn)])[0]
    tokens: list[int] = []
    replies = stream(self.decoder, prompt, key, model.eos_ids, sampling, adapter=self.adapter)
    while not self.ended:
      program = (id(self.decoder), id(self.adapter), shapes(len(prompt), room))
      with _working('compiling...') if program not in met else contextlib.nullcontext():
        tokens += next(replies)
      met.add(program)
      stopped = tokens[-1] in model.eos_ids
      said = model.text(tokens)
      # A character of several tokens is whole when all are there.
      said = said if stopped else said.rstrip('\ufffd').rstrip()
      self.text = printable(said)
      self.ended = stopped or len(tokens) >= room
      # A reply of which nothing was said would be a turn that no template expects.
      self.history = [*history, {'role': 'assistant', 'content': said}] if said or stopped else self.history
      if self.ended and not stopped:
        self.note = ', '.join(filter(None, [self.note, f'cut off after {room} tokens']))
      yield


def _speakers(session: Session, trained: bool, settings: Settings) -> list[Speaker]:
  model, adapters = session.model, session.config.model.adapters
  speakers = [Speaker('combined' if adapters else 'base', [], model.decoder)]
  if settings.side_by_side and adapters:
    config = session.config.model.copy_and_resolve_references()
    config.adapters = ()
    speakers.insert(0, Speaker('base', [], language_model.build(starting_model.load(config), config).decoder))
  if settings.side_by_side:
    traits = {trait.id: trait for trait in session.character.traits}
    if settings.trait and settings.trait not in traits:
      raise UserError(f'--trait={settings.trait}: there is no such trait; choose from {", ".join(traits)}')
    shown = (
      prompts.shown(traits[settings.trait], 0) if settings.trait else prompts.shown_character(session.character, 0)
    )
    speakers.append(Speaker('prompted', shown, model.decoder))
  if trained:
    weights = Speaker('trained', [], *bind(model.decoder, policy.load(session)))
    speakers = [*speakers, weights] if settings.side_by_side else [weights]
  return speakers


# ---- the conversation ----


def _talk(model: LanguageModel, speakers: Sequence[Speaker], settings: Settings) -> None:
  interactive = sys.stdin.isatty()
  if interactive:
    _note(f'Ctrl-C stops a reply, {_AGAIN} begins anew, Ctrl-D ends.')
  met: set[Any] = set()
  for turn, message in enumerate(_messages(interactive)):
    if message == _AGAIN:
      for speaker in speakers:
        speaker.history = []
      continue
    if interactive and re.fullmatch(r'/[a-z]+', message):
      _note(f'there is no {message}: {_AGAIN} begins anew, Ctrl-D ends')
      continue
    width = shutil.get_terminal_size().columns - 1
    column = (width - len(_GAP) * (len(speakers) - 1)) // len(speakers)
    for speaker in speakers:
      speaker.text = speaker.note = ''
    with _stoppable(interactive) as stop:
      answers = [speaker.answer(model, message, turn, settings, met) for speaker in speakers]
      if len(speakers) > 1 and sys.stdout.isatty() and column >= _NARROWEST:
        _print_columns(speakers, answers, column, stop)
      else:
        _print_in_turn(speakers, answers, stop)
    for speaker in speakers:
      if speaker.note:
        _note(speaker.note if len(speakers) == 1 else f'{speaker.name}: {speaker.note}')
    if stop:
      _note('stopped')
    if interactive:
      print(flush=True)


def _messages(interactive: bool) -> Iterator[str]:
  """What the person says, line by line, until they end it."""
  if interactive:
    with contextlib.suppress(ImportError):
      import readline  # noqa: F401  (input() then edits lines)
  while True:
    try:
      if interactive:
        message = input('> ' if sys.stdout.isatty() else '')
      else:
        message = sys.stdin.readline()
        if not message:
          return
    except (EOFError, KeyboardInterrupt):
      if not interactive:
        raise
      print(file=sys.stderr)
      return
    if message.strip():
      yield message.strip()


@contextlib.contextmanager
def _stoppable(interactive: bool) -> Iterator[list[int]]:
  """A list that an interrupt is put into, instead of striking half-way through a step."""
  stop: list[int] = []

  def hold(number: int, frame: FrameType | None) -> None:
    del frame
    stop.append(number)

  if not interactive:
    yield stop
    return
  before = signal.signal(signal.SIGINT, hold)
  try:
    yield stop
  finally:
    signal.signal(signal.SIGINT, before)


# ---- what is seen ----


def cells(text: str) -> int:
  """How many cells of a terminal a text of one line takes, or a few more: joined emoji are counted one by one."""
  count = 0
  for c in text:
    if unicodedata.east_asian_width(c) in 'WF':
      count += 2
    # The selector of an emoji's picture makes what stands before it wider.
    elif c == '\ufe0f' or unicodedata.category(c) not in ('Mn', 'Me', 'Cf'):
      count += 1
  return count


def wrap(text: str, width: int) -> list[str]:
  """Lines of at most `width` cells. When text is added to its end, all lines but the last stay as they are."""
  lines = []
  for paragraph in text.split('\n'):
    line, used = '', 0
    for word in re.findall(r' +|[^ ]+', paragraph):
      if used and used + cells(word) > width:
        lines.append(line.rstrip(' '))
        line, used = '', 0
        if word[0] == ' ':
          continue
      # A word longer than a line is cut.
      for c in word:
        if used + cells(c) > width:
          lines.append(line)
          line, used = '', 0
        line, used = line + c, used + cells(c)
    lines.append(line)
  return lines


def _print_in_turn(speakers: Sequence[Speaker], answers: Sequence[Iterator[None]], stop: Sequence[int]) -> None:
  """Replies as they come, one speaker after another."""
  for speaker, answer in zip(speakers, answers, strict=True):
    if len(speakers) > 1:
      print(_styled(f'{speaker.name}:', '1', sys.stdout), flush=True)
    shown = ''
    for _ in answer:
      print(speaker.text[len(shown) :], end='', flush=True)
      shown = speaker.text
      if stop:
        break
    print(flush=True)
    if stop:
      return


def _print_columns(
  speakers: Sequence[Speaker], answers: Sequence[Iterator[None]], width: int, stop: Sequence[int]
) -> None:
  """Replies side by side, all growing together.

  A line is left behind once it is whole in all columns; only the last one is drawn anew, so that replies may be longer
  than the screen.
  """

  def draw(row: int, end: str) -> None:
    found = [some[row] if row < len(some) else '' for some in lines]
    print('\r' + _GAP.join(text + ' ' * (width - cells(text)) for text in found), end=end, flush=True)

  print(_GAP.join(_styled(speaker.name.ljust(width), '1', sys.stdout) for speaker in speakers), flush=True)
  row, going = 0, True
  lines = [['']] * len(speakers)
  while going and not stop:
    for answer in answers:
      next(answer, None)
    going = not all(speaker.ended for speaker in speakers)
    lines = [wrap(speaker.text, width) for speaker in speakers]
    last = max(map(len, lines)) - 1
    while row < last and all(len(some) > row + 1 or s.ended for some, s in zip(lines, speakers, strict=True)):
      draw(row, '\n')
      row += 1
    draw(row, '')
  for rest in range(row, max(map(len, lines))):
    draw(rest, '\n')


def _styled(text: str, code: str, file: TextIO) -> str:
  return f'\x1b[{code}m{text}\x1b[0m' if file.isatty() and not os.environ.get('NO_COLOR') else text


def _note(text: str) -> None:
  """A line beside the conversation."""
  print(_styled(text, '2', sys.stderr), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _working(text: str) -> Iterator[None]:
  """Says what one waits for, and on a terminal takes it back afterwards."""
  again = sys.stderr.isatty()
  print(text, end='' if again else '\n', file=sys.stderr, flush=True)
  try:
    yield
  finally:
    if again:
      # Two more, in case that Ctrl-C is written after it.
      print(f'\r{" " * (len(text) + 2)}\r', end='', file=sys.stderr, flush=True)
