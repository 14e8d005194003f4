"""report: one self-contained page that shows what each trait changed.

Reads what every stage wrote and writes report/index.html; what the intervals do not carry, it does not say.
"""

import itertools
from typing import Any

from etils import epath

from charjax import hosts
from charjax.files import write_text
from charjax.report.page import render
from charjax.report.read import read_run
from charjax.report.replies import Reply, by_typicality, exchanges
from charjax.report.words import ellipsis, spoken
from charjax.terminal import wrapped
from charjax.workdir import Session, forget

_SHOWN = 3
_LONGEST = 280


def run(session: Session) -> dict[str, Any]:
  """Writes report/index.html and returns its size in bytes."""
  return hosts.first(lambda: _write(session))


def _write(session: Session) -> dict[str, Any]:
  page = render(session.workdir)
  write_text(session.folder('report') / 'index.html', page)
  return {'bytes': len(page.encode())}


def make_anew(workdir: epath.Path) -> None:
  """Writes the page of a run of which no more is known than its folder says; it is no stage's product: the run by its
  config makes its own."""
  page = render(workdir)
  folder = workdir / 'report'
  folder.mkdir(parents=True, exist_ok=True)
  forget(folder)
  write_text(folder / 'index.html', page)


def console_summary(workdir: epath.PathLike) -> str:
  """Where the report is and three replies before and after training, for the end of a run.

  The replies are typical ones: of each trait the message whose change of score is nearest the median.
  """
  found = read_run(workdir)
  by_trait = {trait: by_typicality(items) for trait, items in exchanges(found.evaluation_replies).items() if trait}
  rounds = itertools.zip_longest(*([(trait, item) for item in items] for trait, items in by_trait.items()))
  chosen = [entry for entries in rounds for entry in entries if entry is not None][:_SHOWN]
  lines = [f'Report: {epath.Path(workdir) / "report" / "index.html"}']
  if chosen:
    lines += ['', 'Typical replies, before and after (the median change of score, not the best):']
  for trait, item in chosen:
    lines += ['', _wrapped(f'{spoken(trait)}: {item.prompt}', '  ', '  ')]
    for name, reply in (('before', item.reply('base')), ('after', item.reply('trained'))):
      lines.append(_said(name, reply))
  return '\n'.join(lines)


def _said(name: str, reply: Reply | None) -> str:
  return _wrapped((reply.text if reply else '').strip() or '(nothing)', f'    {name:<7} ', ' ' * 12)


def _wrapped(text: str, first: str, rest: str) -> str:
  return wrapped(ellipsis(' '.join(text.split()), _LONGEST), first, rest)
