"""A finished run folder to judge, in which every reply says whose it is, for tests alone; and a server on it."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath
from report_run import TRAITS, write_run

from charjax.report.read import read_run
from charjax.review import server, verdicts
from charjax.review.pairs import Pair, pairs

SAMPLES = {'base': 2, 'prompted': 1, 'prompted_examples': 1, 'trained': 2}


def write_replies(folder: Path, texts: dict[tuple[str, str, int], str] | None = None, messages: int = 4) -> Path:
  """A run with some messages a trait; of the texts, by (message, condition, sample), some may be given."""
  write_run(folder, messages=1, steps=2)
  rows = [
    {
      'message': f'{trait}-{i}',
      'trait': trait,
      'prompt': f'What of {trait}, {i}?',
      'condition': condition,
      'sample': sample,
      'text': (texts or {}).get((f'{trait}-{i}', condition, sample), f'{condition} says {sample} to {trait}-{i}'),
      'finish': 'length' if i == 0 else 'stop',
      # The judge is for the trained model in every message but the last of a trait.
      'score': (2.0 if i < messages - 1 else -2.0) if condition == 'trained' else 0.0,
    }
    for trait in TRAITS
    for i in range(messages)
    for condition, samples in SAMPLES.items()
    for sample in range(samples)
  ]
  (folder / 'evaluation' / 'replies.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return folder


def asked_of(folder: Path) -> list[Pair]:
  return pairs(read_run(folder))


def lines(folder: Path, reviewer: str = 'ann') -> list[dict[str, Any]]:
  """What stands in a reviewer's file."""
  return [json.loads(line) for line in verdicts.path_of(folder, reviewer).read_text().split('\n') if line]


@contextlib.contextmanager
def serving(folder: Path, reviewer: str = 'ann') -> Iterator[server.Server]:
  """A server in this process, on any port."""
  with verdicts.opened(epath.Path(folder), reviewer) as file:
    review = server.Review(asked_of(folder), file, reviewer, 'run')
    with server.Server(review) as serves:
      thread = threading.Thread(target=serves.serve_forever, kwargs={'poll_interval': 0.02})
      thread.start()
      try:
        yield serves
      finally:
        serves.shutdown()
        thread.join()
