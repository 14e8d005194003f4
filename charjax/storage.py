"""How the files of a run are kept: in a folder, or in a bucket of Google Cloud Storage, gs://BUCKET/FOLDER.

Both are read through etils.epath, and Orbax writes checkpoints to both. They differ in what is written here. A folder
has files that can be renamed and added to, and locks that the kernel takes from a process that dies. A bucket has
objects, each written whole or not at all; or, if one asks for that, only where nobody else has written since.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import mimetypes
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from charjax.errors import Passing, UserError, one_line

# Seconds after which a lock in a bucket that was not renewed has no owner. Its owner renews it six times as often, and
# ends after two thirds of them without success, whatever an answer takes.
LEASE = 90.0
_ANSWER = 5.0  # seconds to connect, and then to answer, where others wait for it


class Locked(UserError):
  """Another process works in a run folder."""


class NoAnswer(Passing):
  """A bucket does not answer, and may do so later."""


def unread(path: epath.PathLike, error: Exception) -> NoAnswer:
  """What is to be raised where something in a bucket that should be there could not be read."""
  return NoAnswer(f'{path}: cannot be read ({one_line(error)}); give the same command again once the bucket answers')


@contextlib.contextmanager
def reading(path: epath.PathLike) -> Iterator[None]:
  """Reads within it what may not be there; of a bucket that does not answer it says so.

  Raises:
    NoAnswer: the bucket does not answer.
    OSError: all else, as it came.
  """
  try:
    yield
  except OSError as error:
    if is_bucket(path) and not isinstance(error, (FileNotFoundError, NotADirectoryError)):
      raise unread(path, error) from error
    raise


# ---- places ----


def is_bucket(path: epath.PathLike) -> bool:
  """Whether a place is no folder of this machine."""
  return os.fspath(path).startswith('gs://')


def absolute(path: epath.Path) -> epath.Path:
  """The same place, wherever one stands; epath takes the name of a bucket for that of a folder here."""
  return path if is_bucket(path) else path.resolve()


def place(name: str) -> epath.Path:
  """What a person calls a folder; a bucket is asked whether it is there.

  Raises:
    UserError: it is no folder's name, or the bucket cannot be used.
    NoAnswer: the bucket does not answer.
  """
  name = os.path.expanduser(name)
  scheme, separator, rest = name.partition('://')
  if not separator:
    return epath.Path(name)
  bucket, _, folder = rest.partition('/')
  if scheme != 'gs' or not bucket or not folder.strip('/'):
    raise UserError(f'{name}: neither a folder nor gs://BUCKET/FOLDER; give one of them')
  try:
    import fsspec
    import gcsfs  # noqa: F401  (what epath reads with)
  except ImportError as error:
    raise UserError(f"{name}: needs the clients of Google Cloud Storage; run: pip install 'charjax[gcs]'") from error
  # Others write there too: what was listed before may be wrong.
  fsspec.config.conf.setdefault('gs', {})['use_listings_cache'] = False
  with _told(name):
    _bucket(bucket)
  return epath.Path(name)


@functools.cache
def _bucket(name: str) -> Any:
  from google.cloud import storage

  return storage.Client().get_bucket(name, timeout=_ANSWER, retry=_soon())


def _soon() -> Any:
  """How often something is asked again, where somebody waits for it."""
  from google.cloud.storage.retry import DEFAULT_RETRY

  return DEFAULT_RETRY.with_timeout(2 * _ANSWER)


def _blob(path: epath.PathLike) -> Any:
  bucket, _, name = os.fspath(path).removeprefix('gs://').partition('/')
  return _bucket(bucket).blob(name)


@contextlib.contextmanager
def _told(path: epath.PathLike) -> Iterator[None]:
  """Says in a line why a bucket does not do what was asked, and what helps. An unmet condition passes.

  Raises:
    UserError: what was asked for is not there, or not allowed.
    NoAnswer: asked again, it might do it.
  """
  from google.api_core import exceptions as answers
  from google.auth import exceptions as auth

  bucket = os.fspath(path).split('/')[2]
  try:
    yield
  except answers.PreconditionFailed:
    raise
  except (auth.DefaultCredentialsError, auth.RefreshError, answers.Unauthorized) as error:
    login = 'gcloud auth application-default login'
    raise UserError(f'{path}: no credentials for Google Cloud Storage ({one_line(error)}); run: {login}') from error
  except answers.NotFound as error:
    raise UserError(
      f'{path}: there is no bucket {bucket}; make it: gcloud storage buckets create gs://{bucket}'
    ) from error
  except answers.Forbidden as error:
    roles = 'roles/storage.objectUser and roles/storage.legacyBucketReader'
    raise UserError(f'{path}: not allowed ({one_line(error)}); ask for {roles} on the bucket') from error
  except (answers.GoogleAPIError, auth.GoogleAuthError, OSError) as error:
    if str(error).startswith('Project was not passed'):
      raise UserError(f'{path}: no project of Google Cloud is known here; set GOOGLE_CLOUD_PROJECT') from error
    raise NoAnswer(f'{path}: {one_line(error)}; give the same command again once the bucket answers') from error


# ---- text ----


def put(path: epath.Path, data: bytes, new: bool = False) -> None:
  """Writes a file whole or not at all: a reader, or a restart, never sees half of it.

  Args:
    path: of the file; its folder is made.
    data: its contents.
    new: whether it must not be there yet. A bucket makes sure of it, since there another process may have taken the
      lock from this one.

  Raises:
    OSError: naming the file: the disk does not take it.
    UserError: the bucket does not, or somebody else wrote it.
    NoAnswer: the bucket does not answer.
  """
  if not is_bucket(path):
    _replace(path, data)
    return
  from google.api_core.exceptions import PreconditionFailed

  blob, kind = _blob(path), mimetypes.guess_type(path.name)[0] or 'text/plain'
  with _told(path):
    try:
      blob.upload_from_string(data, f'{kind}; charset=utf-8', if_generation_match=0 if new else None)
    except PreconditionFailed:
      if _blob(path).download_as_bytes() != data:  # Else it is ours: an answer was lost, and the client tried again.
        raise Locked(f'{path}: another process wrote it; give the same command again to go on from there') from None


def remove(path: epath.Path) -> None:
  """Removes a file, a folder with all that is in it, or a link and not what it leads to."""
  if path.is_dir() and not os.path.islink(path):
    path.rmtree()
  else:
    path.unlink()


def is_half_written(path: epath.Path) -> bool:
  """Whether a file is what a kill leaves of one that was being written."""
  return path.name.startswith('.') and path.name.endswith('.tmp')


def _replace(path: epath.Path, data: bytes) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  # Of several processes that write the same file without a lock, as those of a search, each has its own.
  temporary = path.parent / f'.{path.name}.{os.getpid()}.tmp'
  try:
    with open(temporary, 'wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())  # Else, where the power fails, a file may have its new name and not its contents.
    temporary.replace(path)
  except OSError as error:
    # On a full disk, half a file would take up what is left.
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    # The library says neither which file nor, of a folder in its place, which error.
    code = errno.EISDIR if isinstance(error, IsADirectoryError) else error.errno
    raise OSError(code, os.strerror(code), str(path)) if code else error from error


class Lines:
  """A file that grows by lines. In a bucket `flush` writes it whole; what came after is lost with the process."""

  def __init__(self, path: epath.Path):
    self._path, self._bucket = path, is_bucket(path)
    self._text, self._written = '', True

  def read(self) -> str:
    """What stands in it, or ''."""
    self.flush()
    return self._path.read_text() if self._path.exists() else ''

  def write(self, text: str) -> None:
    """Makes this all that stands in it."""
    put(self._path, text.encode())
    self._text, self._written = text, True

  def append(self, line: str) -> None:
    """Adds a line, after what `write` wrote."""
    if self._bucket:
      self._text, self._written = self._text + line, False
    else:
      with open(self._path, 'a', encoding='utf-8') as file:
        file.write(line)

  def flush(self) -> None:
    """Returns when what was added is kept."""
    if not self._written:
      self.write(self._text)


# ---- locks ----


@contextlib.contextmanager
def lock(path: epath.Path, lost: Callable[[str], object], wait: Callable[[str], object]) -> Iterator[str]:
  """Holds a file that one process at a time can hold, and gives what stands in it meanwhile.

  When its holder dies, the kernel lets go of a folder's at once; a bucket's is anyone's after LEASE seconds.

  Args:
    path: the file.
    lost: ends this process, called with a line that says why it is no longer the holder.
    wait: is told who is waited for, where that may take LEASE seconds.

  Raises:
    Locked: another process holds it.
    UserError: the bucket cannot be written.
    NoAnswer: the bucket does not answer.
    OSError: the folder cannot be written.
  """
  with _lease(path, lost, wait) if is_bucket(path) else _kernel_lock(path) as ours:
    yield ours


@contextlib.contextmanager
def _kernel_lock(path: epath.Path) -> Iterator[str]:
  path.parent.mkdir(parents=True, exist_ok=True)
  file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise _locked(path, os.read(file, 32).decode(errors='replace').strip() or 'unknown') from None
    os.ftruncate(file, 0)
    os.pwrite(file, (ours := f'{os.getpid()}\n').encode(), 0)
    yield ours
  finally:
    os.close(file)


def _locked(path: epath.Path, holder: str) -> Locked:
  # Of a machine that died, a server of NFS before version 4 never hears that it holds nothing any more.
  elsewhere = not is_bucket(path) and not os.path.exists(f'/proc/{holder}')
  instead = f'; if it was on another machine, which is gone, remove {path.name}' if elsewhere else ''
  return Locked(
    f'--workdir={path.parent}: process {holder} is working in it; wait for it or choose another folder{instead}'
  )


@contextlib.contextmanager
def _lease(path: epath.Path, lost: Callable[[str], object], wait: Callable[[str], object]) -> Iterator[str]:
  """A lock by the generation of an object, which changes whenever it is written: no two clocks are compared."""
  ours = json.dumps({'process': f'{os.getpid()} on {socket.gethostname()}', 'key': uuid.uuid4().hex}) + '\n'
  with _told(path):
    before, text = _found(path)
    if before:
      wait(f'{path}: process {_holder(text)} worked here; waiting up to {LEASE:.0f} s to see whether it still does')
    end = time.monotonic() + LEASE
    while before and time.monotonic() < end:
      time.sleep(LEASE / 100)
      now, text = _found(path)
      if now and now != before:
        raise _locked(path, _holder(text))
      before = now
    generation = _claim(path, ours, before)
    if not generation:
      raise _locked(path, _holder(_found(path)[1]))
  over = threading.Event()
  renewed = [time.monotonic()]
  threads = [
    threading.Thread(target=_renew, args=(path, ours, generation, over, renewed, lost), daemon=True),
    threading.Thread(target=_watch, args=(path, over, renewed, lost), daemon=True),
  ]
  for thread in threads:
    thread.start()
  try:
    yield ours
  finally:
    over.set()
    threads[0].join()
    with contextlib.suppress(Exception):  # Else others wait until it has no owner.
      generation, text = _found(path)
      if text == ours:
        _blob(path).delete(if_generation_match=generation, timeout=_ANSWER)


def _found(path: epath.Path) -> tuple[int, str]:
  """The generation of what stands there, and its text; 0 where nothing does."""
  from google.api_core.exceptions import NotFound

  while True:
    blob = _blob(path).bucket.get_blob(_blob(path).name, timeout=_ANSWER, retry=_soon())
    if blob is None:
      return 0, ''
    with contextlib.suppress(NotFound):  # written anew since
      return int(blob.generation), blob.download_as_bytes(timeout=_ANSWER, retry=_soon()).decode(errors='replace')


def _holder(text: str) -> str:
  try:
    return str(json.loads(text)['process'])[:80]
  except (ValueError, TypeError, KeyError):  # Let go meanwhile, or not ours.
    return 'unknown'


def _claim(path: epath.Path, ours: str, before: int) -> int:
  """Writes who holds the lock over what stood there, and nothing else; its generation, or 0: something else did."""
  from google.api_core.exceptions import PreconditionFailed

  blob = _blob(path)
  try:
    blob.upload_from_string(ours, 'application/json', if_generation_match=before, timeout=_ANSWER, retry=None)
    return int(blob.generation)
  except PreconditionFailed:
    generation, text = _found(path)  # The answer to an earlier try may have been lost.
    return generation if text == ours else 0


_AGAIN = 'give the same command again to go on from what was saved'


def _renew(
  path: epath.Path,
  ours: str,
  generation: int,
  over: threading.Event,
  renewed: list[Any],
  lost: Callable[[str], object],
) -> None:
  """Writes the lock anew again and again; `renewed` holds when a try that succeeded last began, and then why not."""
  pause = LEASE / 6
  while not over.wait(pause):
    begun = time.monotonic()
    try:
      generation = _claim(path, ours, generation)
      renewed[:], pause = [begun], LEASE / 6
    except Exception as error:  # Whatever it is, it may be over soon.
      renewed[1:], pause = [one_line(error)], LEASE / 60
    if not generation:
      lost(f'{path}: this lock was not renewed in time, and another process took it; {_AGAIN}')
      return


def _watch(path: epath.Path, over: threading.Event, renewed: list[Any], lost: Callable[[str], object]) -> None:
  """Ends what was not renewed in time, however long an answer takes."""
  while not over.wait(LEASE / 90):
    if time.monotonic() - renewed[0] > LEASE * 2 / 3:
      lost(f'{path}: this lock cannot be renewed ({", ".join(renewed[1:]) or "no answer"}); {_AGAIN}')
      return
