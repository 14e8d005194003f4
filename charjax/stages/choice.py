"""Which checkpoint of a run is its policy, where the held-out judge chooses: that whose replies it likes best.

What is trained against a preference model goes on to please it when others are pleased no more (Gao, Schulman and
Hilton 2023, arXiv:2210.10760), and a judge that the policy never saw tells where that begins. Each candidate answers
the same training messages, those that the judge was not fitted to, with the same keys: what differs is the policy. The
kept pairs and the held-out messages have no part in it, they only measure. The same judge counts the wins in the
evaluation, on other messages; what a candidate owes to its liking for this very judge is in both.

Writes policy/candidates.jsonl (the replies and their scores) and policy/choice.json.
"""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from charjax import hosts
from charjax.chunks import chunks
from charjax.engine.batch import item_keys
from charjax.engine.sample import sample
from charjax.errors import UserError
from charjax.files import Row, write_jsonl, write_text
from charjax.progress import Progress
from charjax.stages import over_optimisation, preference
from charjax.stages.rollouts import drawing
from charjax.stages.statistics import interval
from charjax.training.heads import bind
from charjax.workdir import Session


def candidate_steps(config: Any) -> list[int]:
  """The steps after which the policy is a candidate: `config.policy.candidates` of them, evenly spread, the last among
  them."""
  return sorted({math.ceil(config.steps * i / config.candidates) for i in range(1, config.candidates + 1)})


def read(folder: epath.Path) -> int | None:
  """The step that was chosen, of a stage that goes on after it was; None where nothing was chosen."""
  path = folder / 'choice.json'
  return hosts.first(lambda: json.loads(path.read_text())['chosen'] if path.exists() else None)


def choose(session: Session, asked: Sequence[Row], steps: Sequence[int], load: Callable[[int], Any]) -> int:
  """The step of the candidate that the judge likes best.

  Args:
    session: of the run.
    asked: the training messages, each with id, trait, prompt and weight.
    steps: of the candidates, the last step last.
    load: the trainable as it was after a step.

  Raises:
    UserError: the judge was fitted to all of the messages.
  """
  config, folder = session.config.policy, session.folder('policy')
  report = hosts.first(lambda: json.loads((session.folder('preference') / 'report.json').read_text()))
  known = set(report['learned_from']['judge'])
  items = preference.spread([item for item in asked if item['id'] not in known], config.candidate_messages)
  if not items:
    raise UserError(
      'policy: the held-out judge was fitted to every message that it would choose a checkpoint by; set '
      'config.policy.candidates to 1, or raise config.messages.train_per_trait'
    )
  judge, rows = preference.load(session, 'judge'), []
  with Progress('candidates', len(steps) * len(items), 'replies') as bar:
    for step in steps:
      policy = load(step)

      def make(some: Sequence[Row], _: int, step: int = step, policy: Any = policy) -> list[Row]:
        return _judged(session, judge, policy, step, some)

      rows += chunks(session, 'policy', f'candidate-{step:06d}', items, drawing(config).batch_size, make, bar)
  write_jsonl(folder / 'candidates.jsonl', rows)
  scores = np.array([row['score'] for row in rows]).reshape(len(steps), len(items))
  found = compare(scores, [item['weight'] for item in items], steps)
  write_text(folder / 'choice.json', json.dumps({'messages': len(items)} | found, indent=2))
  session.log(f'policy: the held-out judge likes it best after step {found["chosen"]} of {steps[-1]}')
  return int(found['chosen'])


def compare(scores: np.ndarray, weights: Sequence[float], steps: Sequence[int]) -> Row:
  """The chosen step and what speaks for it.

  Args:
    scores: [candidates, messages] of the judge, in its spreads.
    weights: of the messages.
    steps: of the candidates, the last step last.

  Returns:
    `chosen`, and `candidates` with step, `judge` (less what the judge gives to all candidates' replies to the message,
    which differs more by message than by candidate) and `over_last` (less what it gives to the last one's).
  """
  weighed = (scores - scores.mean(0)) * np.asarray(weights)
  # Of equals the one that moved the least.
  best = int(weighed.mean(1).argmax())
  rows = [
    {'step': step, 'judge': interval(values), 'over_last': interval(values - weighed[-1])}
    for step, values in zip(steps, weighed, strict=True)
  ]
  return {'chosen': steps[best], 'candidates': rows}


def _judged(session: Session, judge: Any, policy: Any, step: int, items: Sequence[Row]) -> list[Row]:
  """A reply by the policy to each message, drawn as it is trained, with its score."""
  config, model = session.config.policy, session.model
  used, adapter = bind(model.decoder, policy)
  asked = [item['prompt'] for item in items]
  drawn = sample(
    used, asked, item_keys(session.config.seed, 'policy/candidates', [item['id'] for item in items]), model.eos_ids,
    drawing(config), adapter=adapter, width=config.prompt_width,
  )  # fmt: skip
  said = [reply.tokens for reply in drawn]
  traits = [item['trait'] for item in items]
  scores = over_optimisation.scores(session, {'judge': judge}, asked, said, traits)['judge']
  return [
    {'step': step, 'message': item['id'], 'trait': item['trait'], 'text': model.text(reply.tokens), 'score': score}
    for item, reply, score in zip(items, drawn, scores, strict=True)
  ]
