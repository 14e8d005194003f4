"""Which replies people judge against each other, in which order, and who stands left."""

import dataclasses
import random
from collections.abc import Sequence

from charjax.report.read import Run, finite, section
from charjax.workdir import fingerprint

OPPONENTS = ('base', 'prompted')


@dataclasses.dataclass(frozen=True)
class Reply:
  text: str
  cut_off: bool
  score: float | None  # the held-out judge's
  likelihood: float | None = None  # the likelihood ranker's, where it read it


@dataclasses.dataclass(frozen=True)
class Pair:
  """A reply of the trained model and one that it is to beat, to the same message.

  Attributes:
    id: of what a reviewer sees and is asked; it is the same whichever of the two is the trained model's.
    against: 'base' or 'prompted'.
  """

  id: str
  trait: str
  statement: str
  message: str
  prompt: str
  against: str
  trained: Reply
  other: Reply

  def sides(self, reviewer: str) -> tuple[str, str]:
    """The conditions on the left and on the right, drawn for each reviewer: a liking for one side evens out."""
    sides = ('trained', self.against)
    return sides if random.Random(f'side/{reviewer}/{self.id}').random() < 0.5 else sides[::-1]

  def reply(self, condition: str) -> Reply:
    return self.trained if condition == 'trained' else self.other


def pairs(run: Run) -> list[Pair]:
  """All pairs of a run, in the order in which every reviewer is asked, drawn by the run's seed.

  Each message comes once, against base and prompted in turn, before any comes again: wherever a reviewer stops, traits
  and opponents are about equally many, and all reviewers have judged the same. The second time, another reply of the
  trained model is shown: one that is seen twice would betray whose it is. Where there is a single one, there is no
  second time.
  """
  seed = section(run.config, 'config').get('seed', 0)
  drawn = random.Random(f'review/{seed}')
  statements = {str(trait['id']): str(trait.get('statement', '')) for trait in run.traits}
  replies = _replies(run)
  rounds: list[list[Pair]] = [[], []]
  for trait, statement in statements.items():
    messages = [message for message, (of, _, _) in replies.items() if of == trait]
    drawn.shuffle(messages)
    first = drawn.randrange(2)  # Of an odd number of messages, no opponent has the larger half in all traits.
    for place, message in enumerate(messages):
      _, prompt, by_condition = replies[message]
      trained = by_condition.get('trained', [])
      there = [opponent for opponent in OPPONENTS if by_condition.get(opponent)]
      opponents = there if (place + first) % 2 == 0 else there[::-1]
      for turn, (against, ours) in enumerate(zip(opponents, trained, strict=False)):
        other = by_condition[against][0]
        seen = fingerprint([statement, prompt, sorted([ours.text, other.text])])[:16]
        rounds[turn].append(Pair(seen, trait, statement, message, prompt, against, ours, other))
  # Two opponents may have given the very same reply; then nothing tells the questions apart, and one is asked.
  found: dict[str, Pair] = {}
  for pair in (pair for one in rounds for pair in _spread(one, drawn)):
    found.setdefault(pair.id, pair)
  return list(found.values())


def _replies(run: Run) -> dict[str, tuple[str, str, dict[str, list[Reply]]]]:
  """Trait, prompt and the replies of each condition, by message; of neutral messages none."""
  read = {
    (row.get('id'), row.get('condition'), row.get('sample')): row
    for row in run.behaviour_replies
    if row.get('set') == 'evaluated'
  }
  found: dict[str, tuple[str, str, dict[str, list[Reply]]]] = {}
  for row in run.evaluation_replies:
    if row.get('trait'):
      _, _, replies = found.setdefault(str(row.get('message')), (str(row['trait']), str(row.get('prompt', '')), {}))
      text, same = str(row.get('text', '')), read.get((row.get('message'), row.get('condition'), row.get('sample')), {})
      # What the ranker read is of the evaluation before, where that was made anew since.
      ratio = finite(same.get('likelihood')) if same.get('text') == text else None
      reply = Reply(text, row.get('finish') == 'length', finite(row.get('score')), ratio)
      replies.setdefault(str(row.get('condition')), []).append(reply)
  return found


def _spread(found: Sequence[Pair], drawn: random.Random) -> list[Pair]:
  """The pairs with all traits in every stretch, in an order within it that is drawn anew."""
  queues = [[pair for pair in found if pair.trait == trait] for trait in dict.fromkeys(pair.trait for pair in found)]
  ordered: list[Pair] = []
  for place in range(max((len(queue) for queue in queues), default=0)):
    stretch = [queue[place] for queue in queues if place < len(queue)]
    drawn.shuffle(stretch)
    ordered += stretch
  return ordered
