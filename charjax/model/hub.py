"""`hf://org/name[@revision]`: a model of the Hugging Face Hub, fetched by its own client into its own cache."""

import contextlib
import importlib.util
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from charjax.errors import Passing, UserError, one_line
from charjax.hosts import is_first_process

_PREFIX = 'hf://'
_NAME = r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*'
_COMMIT = re.compile(r'[0-9a-f]{40}')  # other revisions may mean something else tomorrow
_INSTALL = "pip install 'huggingface-hub>=2.4'"


def is_address(path: str) -> bool:
  """Whether a model is to be fetched rather than read from a path."""
  return path.startswith(_PREFIX)


def hint(path: str) -> str:
  """What to say of a path that is not there: it may be meant as a name on the hub."""
  return f'; if it is a model of the Hugging Face Hub, give {_PREFIX}{path}' if re.fullmatch(_NAME, path) else ''


def check(address: str) -> None:
  """Looks at an address without asking anyone.

  Raises:
    UserError: it is malformed, or the hub's client is not installed.
  """
  _split(address)
  if importlib.util.find_spec('huggingface_hub') is None:
    raise _missing_client(address)


def pin(address: str) -> str:
  """The address with the hash of the commit that its revision (by default the main branch) is at.

  That is asked of the hub; where it cannot be reached, what it said last counts.

  Raises:
    UserError: there is no such model or revision.
    Passing: nobody knows.
  """
  name, revision = _split(address)
  if not _COMMIT.fullmatch(revision):
    with _told(address):
      revision = _client().resolve_revision(name, revision=revision or None).resolved
  return f'{_PREFIX}{name}@{revision}'


def fetch(address: str, names: Sequence[str]) -> str:
  """The folder of the cache that has these files, of those that the model has; what is there is not fetched again.

  Args:
    address: with the hash of a commit; see `pin`.
    names: files.

  Raises:
    UserError: they are not to be had.
    Passing: they cannot be fetched now, and are not all there.
    KeyboardInterrupt: at Ctrl-C, without waiting for the end of a file.
  """
  name, commit = _split(address)
  with _told(address), _stoppable(address) as bar:
    return _client().snapshot_download(name, revision=commit, allow_patterns=list(names), tqdm_class=bar)


def _split(address: str) -> tuple[str, str]:
  """The name and the revision, or ''."""
  match = re.fullmatch(rf'{_PREFIX}({_NAME})(?:@([^\s@]+))?', address, re.ASCII)
  if not match or '--' in match[1] or '..' in match[1]:
    raise UserError(f'{address}: not the address of a model; give {_PREFIX}ORG/NAME or {_PREFIX}ORG/NAME@REVISION')
  return match[1], match[2] or ''


def _missing_client(address: str) -> UserError:
  return UserError(f'{address}: needs the client of the Hugging Face Hub; run: {_INSTALL}, or give a directory')


def _client() -> Any:
  # Imported when it is needed: few who run charjax have it.
  import huggingface_hub

  return huggingface_hub


@contextlib.contextmanager
def _told(address: str) -> Iterator[None]:
  """Says in one line what the client says in many."""
  try:
    from huggingface_hub import constants, errors, resolve_revision  # noqa: F401  (which older versions lack)
  except ImportError as error:
    raise _missing_client(address) from error
  name, revision = _split(address)
  page = f'{constants.ENDPOINT}/{name}'
  try:
    yield
  except errors.GatedRepoError as error:
    raise UserError(f'{address}: its owners ask who uses it; accept at {page}, then run: hf auth login') from error
  except errors.RevisionNotFoundError as error:
    raise UserError(f'{address}: it has no revision {revision}; choose from those at {page}/tree/main') from error
  except (errors.RevisionResolutionError, errors.LocalEntryNotFoundError) as error:
    # The client went on to its cache; the reason why stands in what it raised this from.
    reason = one_line(error.__cause__) if isinstance(error.__cause__, Exception) else one_line(error)
    reason = 'HF_HUB_OFFLINE is set' if constants.is_offline_mode() else reason
    kind = UserError if constants.is_offline_mode() else Passing
    raise kind(
      f'{address}: not whole in the cache {constants.HF_HUB_CACHE}, and the hub cannot be reached ({reason}); connect '
      'and give the same command again, or give a directory'
    ) from error
  except Exception as error:
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    # To those who may not see it, the hub says that a model is not there.
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
      raise UserError(
        f'{address}: no such model, or a private one; check the name at {page}, or run: hf auth login'
      ) from error
    network = isinstance(error, (ConnectionError, TimeoutError, socket.gaierror))
    if isinstance(error, OSError) and error.errno and not network:  # of the disk, which the command line tells
      raise
    raise Passing(
      f'{address}: cannot be fetched ({one_line(error)}); give the same command again: files that are whole are kept'
    ) from error


@contextlib.contextmanager
def _stoppable(address: str) -> Iterator[type]:
  """A class of progress bars, by which Ctrl-C ends a download.

  The client's threads would read their files to the end, which may be gigabytes away; but they tell a bar of what they
  have read, now and then.
  """
  from huggingface_hub.utils import tqdm

  stopped = threading.Event()

  class Bar(tqdm):
    def __init__(self, *args: Any, **kwargs: Any):
      shown = {'disable': None if is_first_process() else True, 'leave': False}
      super().__init__(*args, **kwargs | shown)

    def update(self, n: float | None = 1) -> bool | None:
      if stopped.is_set():
        raise KeyboardInterrupt
      return super().update(n)

  def stop(number: int, frame: FrameType | None) -> None:
    del number, frame
    stopped.set()
    raise KeyboardInterrupt

  # Other threads than the main one can neither hear Ctrl-C nor say who does.
  main = threading.current_thread() is threading.main_thread()
  before = signal.signal(signal.SIGINT, stop) if main else None
  try:
    yield Bar
  except KeyboardInterrupt as error:
    raise KeyboardInterrupt(f'{address}: interrupted; give the same command again to go on') from error
  finally:
    if main:
      signal.signal(signal.SIGINT, before)
