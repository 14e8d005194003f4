"""The loop, in the order the data flows: what each stage reads, depends on and makes."""

import functools
import importlib
from collections.abc import Sequence

from charjax.files import Row
from charjax.workdir import Session, Stage, read_products

_EDITED = ('messages', 'replies', 'rankings')  # whose JSON Lines a person may have put right by hand


def _run(name: str, session: Session) -> Row:
  # Imported when it runs: the stages bring JAX with them, which `charjax --help` need not wait for.
  return importlib.import_module(f'charjax.stages.{name}').run(session)


def _check(name: str, reads: Sequence[str], session: Session) -> None:
  edited = [read for read in reads if read in _EDITED]
  for read in reads:
    if read not in edited:
      read_products(session, read)
  if name == 'report':
    importlib.import_module('charjax.report.read').read_run(session.workdir)
    importlib.import_module('charjax.review.verdicts').read_all(session.workdir)
  elif edited:  # The last of them is checked against those before it, which are read on the way.
    importlib.import_module(f'charjax.stages.{edited[-1]}').load(session)


def _stage(
  name: str,
  reads: tuple[str, ...],
  products: tuple[str, ...],
  files: tuple[str, ...] = (),
  also: tuple[str, ...] = (),
  added: tuple[str, ...] = (),
  keeps: bool = False,
  after: tuple[str, ...] = (),
) -> Stage:
  """A stage whose own settings are the config section of its name (some have none), and `also` some others."""
  own = () if name in ('baseline', 'report') else (name,)
  return Stage(
    name=name,
    run=functools.partial(_run, name),
    reads=reads,
    fields=('seed', 'model', 'character', *own, *also),
    products=products,
    files=files,
    check=functools.partial(_check, name, reads),
    added=added,
    keeps=keeps,
    after=after,
  )


STAGES: tuple[Stage, ...] = (
  _stage(
    'messages',
    reads=(),
    products=('messages.jsonl',),
    keeps=True,
    after=('train_per_trait', 'heldout_per_trait', 'train_neutral', 'heldout_neutral', 'near_duplicate'),
  ),
  _stage('replies', reads=('messages',), products=('replies.jsonl',), keeps=True),
  _stage(
    'rankings',
    reads=('messages', 'replies'),
    products=('rankings.jsonl', 'audit.json'),
    keeps=True,
    after=('ranker', 'minimum_accuracy', 'label_low', 'label_high', 'length_limit', 'skipped_replies'),
  ),
  _stage(
    'preference',
    reads=('messages', 'replies', 'rankings'),
    products=('fingerprint.json', 'metrics.jsonl', 'report.json'),
    also=('character.weights',),
  ),
  _stage(
    'baseline',
    reads=('messages', 'preference'),
    products=('replies.jsonl', 'measures.json'),
    files=('evaluation.probes', 'evaluation.neutral'),
    also=('evaluation',),
    keeps=True,
  ),
  _stage(
    'policy',
    reads=('messages', 'replies', 'rankings', 'preference'),
    products=('fingerprint.json', 'metrics.jsonl', 'samples.jsonl'),
    also=('character.weights', 'rankings.label_low', 'rankings.label_high'),
  ),
  _stage(
    'evaluation',
    reads=('messages', 'replies', 'preference', 'baseline', 'policy'),
    products=('summary.json', 'replies.jsonl'),
    files=('evaluation.probes', 'evaluation.neutral'),
  ),
  _stage(
    'behaviour',
    reads=('messages', 'preference', 'policy', 'evaluation'),
    products=('summary.json', 'replies.jsonl'),
    also=tuple(
      f'evaluation.{field}'
      for field in ('examples', 'temperature', 'top_p', 'top_k', 'max_new_tokens', 'batch_size', 'prompt_width')
    ),
  ),
  _stage(
    'report',
    reads=('messages', 'replies', 'rankings', 'preference', 'policy', 'evaluation', 'behaviour'),
    products=('index.html',),
    added=('review',),
    also=('character.weights',),
  ),
)
