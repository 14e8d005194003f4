"""Work that is committed in chunks: none is lost to a kill, and none is done again that a change leaves as it is."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from charjax import hosts
from charjax.files import Row, read_jsonl, write_jsonl
from charjax.progress import Progress
from charjax.workdir import CHUNKS, Session, fingerprint

T = TypeVar('T')


def chunks(
  session: Session,
  stage: str,
  name: str,
  items: Sequence[T],
  size: int,
  make: Callable[[Sequence[T], int], list[Row]],
  bar: Progress | None = None,
  of: Any = None,
) -> list[Row]:
  """Makes rows from items in chunks of `size`, each committed as it is finished.

  A chunk is named by the contents of all that it is made from. It is there if an earlier process made it before it was
  killed; of a stage that keeps its chunks (`workdir.Stage.keeps`), if an earlier run did, and what changed since is in
  none of: the config of the stage (but for `workdir.Stage.after`), the starting model, its items, `of`.

  Args:
    session: of the run.
    stage: whose folder has the chunks.
    name: what is made; begins the files' names.
    items: what the rows are made from: anything that JSON, or `str`, tells by its contents.
    size: items in a chunk; the last chunk may be shorter.
    make: (the chunk's items, the chunk's index) -> its rows.
    bar: counts items, if given.
    of: all else that the character says and `make` reads.

  Returns:
    All rows in the order of the items.
  """
  rows: list[Row] = []
  for index, start in enumerate(range(0, len(items), size)):
    chunk = items[start : start + size]
    file = f'{name}-{index:05d}-{fingerprint([session.basis, of, list(chunk)])[:16]}.jsonl'
    path = session.folder(stage) / CHUNKS / file
    session.used.add(file)
    if hosts.first(path.exists):
      made = read_jsonl(path)
      if bar is not None:
        bar.skip(len(chunk))
    else:
      made = make(chunk, index)
      write_jsonl(path, made)
      if bar is not None:
        bar.advance(len(chunk))
    rows.extend(made)
  return rows
