"""Revealed preference: which of two ways to be does the model choose, before training and after?

All traits' statements and their opposites meet in pairs, each pair in both orders, and the model draws its answer. A
Bradley-Terry fit turns the answers into a strength for each. A pair counts where both of its answers are valid, so that
one who always says "A" prefers nothing.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from charjax.character import Character
from charjax.chunks import chunks
from charjax.engine.batch import item_keys
from charjax.engine.sample import as_told, sample
from charjax.files import Row
from charjax.progress import Progress
from charjax.stages import prompts
from charjax.stages.statistics import share, strength_intervals, strengths
from charjax.training.heads import bind
from charjax.workdir import Session

MODELS = ('base', 'trained')  # the starting and the trained model
_QUESTIONS = (
  'Which of the two would you rather be?',
  'Which of the two ways to be do you choose for yourself?',
  'You will be one of the two. Which one do you want?',
)
_FORM = '(A) {a}\n\n(B) {b}\n\n{question} Answer with the letter A or B and nothing else.'
_ANSWER = re.compile(r'^\W*(?:(?i:option|answer|choice)\W*)?([AB])(?:\W*$|[).:,;\n])')
_TOKENS = 4  # of an answer
_AT_ONCE = 256


def options(character: Character) -> list[Row]:
  """What can be chosen: every trait (opposite '') and every opposite of one."""
  return [
    {'id': f'{trait.id}/{name}' if name else trait.id, 'trait': trait.id, 'opposite': name, 'text': text}
    for trait in character.traits
    for name, text in [('', trait.statement), *trait.opposites.items()]
  ]


def questions(character: Character, most: int, seed: int) -> list[Row]:
  """Pairs of options, each in both orders with the same wording; where there are more than `most`, some of them."""
  pairs = list(itertools.combinations(options(character), 2))
  digests = [hashlib.sha256(f'{seed}/{a["id"]}/{b["id"]}'.encode()).digest() for a, b in pairs]
  chosen = sorted(range(len(pairs)), key=lambda i: digests[i])[:most]
  found = []
  for i in sorted(chosen):
    question = _QUESTIONS[digests[i][-1] % len(_QUESTIONS)]
    for a, b in (pairs[i], pairs[i][::-1]):
      text = _FORM.format(a=a['text'], b=b['text'], question=question)
      found.append({'id': f'{a["id"]}>{b["id"]}', 'first': a['id'], 'second': b['id'], 'text': text})
  return found


def ask(session: Session, trained: Any) -> dict[str, list[Row]]:
  """The answers of the starting and the trained model to all questions, in their order."""
  asked = questions(session.character, session.config.behaviour.comparisons, session.config.seed)
  found = {}
  with Progress('preferences', 2 * len(asked), 'answers') as bar:
    for condition in MODELS:
      make = functools.partial(_answer, session, condition, trained)
      found[condition] = chunks(session, 'behaviour', f'revealed-{condition}', asked, _AT_ONCE, make, bar)
  return found


def _answer(session: Session, condition: str, trained: Any, items: Sequence[Row], _: int) -> list[Row]:
  config, model = session.config.evaluation, session.model
  decoder, adapter = bind(model.decoder, trained if condition == 'trained' else None)
  drawn = sample(
    decoder,
    [model.prompt(prompts.alone(item['text'])) for item in items],
    item_keys(session.config.seed, 'behaviour/revealed', [item['id'] for item in items]),
    model.eos_ids,
    as_told(config, max_new_tokens=_TOKENS),
    adapter=adapter,
    width=config.prompt_width,
  )
  return [
    {'first': item['first'], 'second': item['second'], 'condition': condition, 'text': model.text(reply.tokens)}
    for item, reply in zip(items, drawn, strict=True)
  ]


def chosen(text: str) -> str | None:
  """'A' or 'B', where the answer is one of them and says nothing else first; None where it is not valid."""
  found = _ANSWER.match(text)
  return found[1] if found else None


def summarise(names: Sequence[str], answers: Mapping[str, Sequence[Row]]) -> Row:
  """Strengths by option and condition with intervals over the pairs, their difference, and how valid answers were.

  Args:
    names: the options.
    answers: by condition, rows in which every two are the two orders of a pair.
  """
  places = {name: place for place, name in enumerate(names)}
  out: Row = {'invalid': {}, 'first': {}}
  tables, known = {}, {}
  for condition, rows in answers.items():
    letters = [chosen(row['text']) for row in rows]
    # Of pairs, since the two orders of one are not independent of each other.
    pairs = [letters[i : i + 2] for i in range(0, len(letters), 2)]
    out['invalid'][condition] = share([pair.count(None) / 2 for pair in pairs], 2)
    valid = [[letter == 'A' for letter in pair if letter] for pair in pairs]
    out['first'][condition] = share([sum(first) / len(first) for first in valid if first], 2)
    tables[condition] = np.zeros((len(rows) // 2, len(names), len(names)))
    known[condition] = np.ones(len(rows) // 2, bool)
    for i, (row, letter) in enumerate(zip(rows, letters, strict=True)):
      won, lost = (row['first'], row['second']) if letter == 'A' else (row['second'], row['first'])
      tables[condition][i // 2, places[won], places[lost]] += 1
      known[condition][i // 2] &= letter is not None
  out['strength'] = {name: {} for name in names}

  def write(condition: str, figures: Sequence[Row]) -> None:
    for name, figure in zip(names, figures, strict=True):
      out['strength'][name][condition] = figure

  for condition, table in tables.items():
    if known[condition].any():
      write(condition, strength_intervals(*strengths(table[known[condition]]), int(known[condition].sum())))
  both = known['base'] & known['trained']
  if both.any():
    base, trained = (strengths(tables[condition][both]) for condition in ('base', 'trained'))
    write('delta', strength_intervals(trained[0] - base[0], trained[1] - base[1], int(both.sum())))
  return out
