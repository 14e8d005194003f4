"""Replies side by side: the same message under each condition, and as training went on."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from charjax.report.read import CONDITIONS, Run, finite

_STEPS_SHOWN = 6


@dataclasses.dataclass(frozen=True)
class Reply:
  condition: str
  text: str
  score: float | None


@dataclasses.dataclass(frozen=True)
class Exchange:
  """One message and its replies in the order base, prompted, prompted_examples, trained."""

  message: str
  prompt: str
  replies: Sequence[Reply]

  def reply(self, condition: str) -> Reply | None:
    return next((reply for reply in self.replies if reply.condition == condition), None)

  @property
  def change(self) -> float | None:
    """Held-out judge's score of the trained reply minus the base reply's."""
    base, trained = self.reply('base'), self.reply('trained')
    if base is None or trained is None or base.score is None or trained.score is None:
      return None
    return trained.score - base.score


@dataclasses.dataclass(frozen=True)
class Sample:
  step: int
  text: str
  reward: float | None


@dataclasses.dataclass(frozen=True)
class Timeline:
  """Replies to one message, one a step, in the order of training."""

  prompt: str
  samples: Sequence[Sample]


def exchanges(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Exchange]]:
  """Rows of evaluation/replies.jsonl by trait ('' for neutral), messages in the order of the file.

  Of several replies to a message in one condition the first is shown: the best would flatter.
  """
  found: dict[str, dict[str, tuple[str, list[Reply]]]] = {}
  for row in rows:
    if row.get('sample'):
      continue
    by_message = found.setdefault(str(row.get('trait') or ''), {})
    _, replies = by_message.setdefault(str(row.get('message')), (str(row.get('prompt', '')), []))
    replies.append(Reply(str(row.get('condition')), str(row.get('text', '')), finite(row.get('score'))))

  def rank(reply: Reply) -> int:
    return CONDITIONS.index(reply.condition) if reply.condition in CONDITIONS else len(CONDITIONS)

  return {
    trait: [Exchange(name, prompt, sorted(replies, key=rank)) for name, (prompt, replies) in by_message.items()]
    for trait, by_message in found.items()
  }


def by_typicality(found: Sequence[Exchange]) -> list[Exchange]:
  """Those with a reply before and after, the one nearest to the median change of score first."""
  complete = [exchange for exchange in found if exchange.reply('base') and exchange.reply('trained')]
  changes = [exchange.change for exchange in complete if exchange.change is not None]
  if not changes:
    return complete
  middle = statistics.median(changes)
  return sorted(complete, key=lambda e: float('inf') if e.change is None else abs(e.change - middle))


def typical(found: Sequence[Exchange]) -> Exchange | None:
  """The exchange with the median change of score: neither the best nor the worst that could be picked."""
  return next(iter(by_typicality(found)), None)


def samples_over_time(run: Run) -> list[Timeline]:
  """Replies sampled in training: a few evenly spaced steps of each message sampled more than once."""
  prompts = {str(row.get('id')): str(row.get('text', '')) for row in run.messages}
  found: dict[str, dict[int, Sample]] = {}
  for row in run.samples:
    step = finite(row.get('step'))
    if step is None:
      continue
    by_step = found.setdefault(str(row.get('message')), {})
    # Of several replies to a message at one step the first is shown: the best would flatter.
    by_step.setdefault(int(step), Sample(int(step), str(row.get('text', '')), finite(row.get('reward'))))
  return [
    Timeline(prompts.get(message, message), _spread([by_step[step] for step in sorted(by_step)]))
    for message, by_step in found.items()
    if len(by_step) > 1
  ]


def _spread(samples: Sequence[Sample]) -> list[Sample]:
  if len(samples) <= _STEPS_SHOWN:
    return list(samples)
  return [samples[round(i * (len(samples) - 1) / (_STEPS_SHOWN - 1))] for i in range(_STEPS_SHOWN)]
