"""Over-optimisation: does the held-out judge see the gain that the reward shows, as the policy moves away?

Gao, Schulman and Hilton (2023, arXiv:2210.10760) plot both over the square root of the KL from the starting model:
while the reward climbs, a judge that was not trained against stops climbing, and falls. Here both preference models
read the replies that the policy drew as it learned, and the starting model's plain replies to the same training
messages; the gain is the difference, in spreads of each model's score. Half of the messages are ones that the judge
learned other replies' rankings of, and the other half are those of the model that was trained against.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from charjax.files import Row, read_jsonl
from charjax.mesh import fetch, replicate
from charjax.stages import preference, prompts, replies
from charjax.stages.statistics import interval
from charjax.training.heads import read_rewards, reply_states
from charjax.workdir import Session


def measure(session: Session, judge: Any) -> list[Row]:
  """`curve` of the replies that the policy stage recorded; nothing where these, or plain replies, are missing."""
  samples = [row for row in read_jsonl(session.folder('policy') / 'samples.jsonl') if 'kl' in row]
  asked = {row['message']: row for row in samples}
  plain = [
    {'message': row['message'], 'text': row['text'], 'finish': row['finish']}
    for row in replies.load(session)
    if row['condition'] == 'plain' and row['message'] in asked
  ]
  if not samples or not plain:
    return []
  models = {'reward': preference.load(session, 'train'), 'judge': judge}
  rows = [*samples, *plain]
  traits = [asked[row['message']]['trait'] for row in rows]
  prompted = [session.model.prompt(prompts.alone(asked[row['message']]['prompt'])) for row in rows]
  longest = session.config.policy.max_new_tokens
  said = [session.model.reply(row['text'], row['finish'] == 'stop')[:longest] for row in rows]
  for name, values in scores(session, models, prompted, said, traits).items():
    for row, value in zip(rows, values, strict=True):
      row[name] = value
  return curve(samples, plain)


def scores(
  session: Session, models: Mapping[str, Any], asked: Sequence[Any], said: Sequence[Any], traits: Sequence[str]
) -> dict[str, list[float]]:
  """Each model's score of each reply by its message's own trait, in spreads of that model's scores."""
  report = json.loads((session.folder('preference') / 'report.json').read_text())
  places = {trait.id: place for place, trait in enumerate(session.character.traits)}
  trunk, states, found = preference.trunk(session), None, {}
  for name, model in models.items():
    # Heads on the starting weights read the same states.
    if states is None or model.keys() & {'decoder', 'adapter'}:
      states = reply_states(trunk, model, asked, said)
    spread = report[{'reward': 'train'}.get(name, name)]['reward_std']
    rewards = fetch(read_rewards(model, replicate(states)))
    found[name] = [float(row[places[trait]]) / spread[trait] for row, trait in zip(rewards, traits, strict=True)]
  return found


def curve(samples: Sequence[Row], plain: Sequence[Row]) -> list[Row]:
  """By step, over the messages of the step: how far the policy was, and by how much each model's score had risen.

  Args:
    samples: drawn replies, each with step, message, `kl` (log-ratio of the whole reply), `reward` and `judge`.
    plain: the starting model's replies, each with message, `reward` and `judge`.

  Returns:
    Rows with the step, `kl` in nats a reply, `reward` and `judge` (each drawn less plain, by message) and `gap`, the
    first of the two less the second: intervals as everywhere. Messages without a plain reply are left out.
  """
  before = {key: _means(plain, key) for key in ('reward', 'judge')}
  by_step: dict[int, list[Row]] = defaultdict(list)
  for row in samples:
    if row['message'] in before['reward']:
      by_step[row['step']].append(row)
  found = []
  for step, rows in sorted(by_step.items()):
    kl = _means(rows, 'kl')
    gains = {
      key: np.array([value - before[key][message] for message, value in _means(rows, key).items()]) for key in before
    }
    figures = {key: interval(values) for key, values in gains.items()}
    found.append(
      {'step': step, 'kl': interval(list(kl.values()))} | figures | {'gap': interval(gains['reward'] - gains['judge'])}
    )
  return found


def _means(rows: Sequence[Row], key: str) -> dict[str, float]:
  """By message, in the order in which they come."""
  values: dict[str, list[float]] = defaultdict(list)
  for row in rows:
    values[row['message']].append(float(row[key]))
  return {message: float(np.mean(some)) for message, some in values.items()}
