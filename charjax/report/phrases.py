"""Stock phrases: which runs of words grew most, and are replies to one message still different from each other?"""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from charjax.report import figures, words
from charjax.report.figures import Figure
from charjax.report.provenance import words_of
from charjax.report.read import Run, estimate
from charjax.report.words import MINUS
from charjax.stages.statistics import interval

_LENGTH = 3  # words of a phrase
_SHOWN = 12
_Texts = dict[str, dict[str, list[str]]]  # by message and condition


def phrases(run: Run) -> list[Figure]:
  """Figures over the evaluation's replies; none where too few messages were answered by both models."""
  texts: _Texts = defaultdict(lambda: defaultdict(list))
  for row in run.evaluation_replies:
    if row.get('condition') in ('base', 'trained'):
      texts[str(row.get('message'))][str(row['condition'])].append(str(row.get('text', '')))
  both = {message: by for message, by in texts.items() if by['base'] and by['trained']}
  if len(both) < 4:
    return []
  return figures.present([_grown(both), _variety(both)])


def grams(text: str) -> set[tuple[str, ...]]:
  """Its runs of three words."""
  found = words_of(text)
  return set(zip(*(found[i:] for i in range(_LENGTH)), strict=False))


def _share(texts: Sequence[str], phrase: tuple[str, ...]) -> float:
  return sum(phrase in grams(text) for text in texts) / len(texts)


def grown(texts: Mapping[str, Mapping[str, Sequence[str]]], most: int) -> dict[str, Any]:
  """The phrases whose share of replies grew most, by growth, each with its interval over messages.

  They are chosen on every other message and measured on the rest: else the choice itself would make them grow.
  """
  items = list(texts.values())
  growth: dict[tuple[str, ...], float] = defaultdict(float)
  for by in items[::2]:
    for condition, sign in (('trained', 1), ('base', -1)):
      for text in by[condition]:
        for phrase in grams(text):
          growth[phrase] += sign / len(by[condition])
  chosen = sorted((phrase for phrase, by in growth.items() if by > 0), key=lambda phrase: (-growth[phrase], phrase))[
    :most
  ]
  return {
    ' '.join(phrase): interval([_share(by['trained'], phrase) - _share(by['base'], phrase) for by in items[1::2]])
    for phrase in chosen
  }


def _grown(texts: _Texts) -> Figure | None:
  note = 'Three words each; chosen on every other message, measured on the rest.'
  values = {phrase: estimate(value) for phrase, value in grown(texts, _SHOWN).items()}
  title, unit = f'Phrases that grew most: trained {MINUS} base', 'share of replies'
  return figures.by_name('phrase', title, unit, values, share=True, note=note)


def variety(texts: Sequence[str]) -> float:
  """Mean Jaccard distance between the word sets of two replies: 0 where all are alike, 1 where none shares a word."""
  sets = [set(words_of(text)) for text in texts]
  distances = [1 - len(a & b) / len(a | b) if a | b else 0.0 for a, b in itertools.combinations(sets, 2)]
  return sum(distances) / len(distances)


def _variety(texts: _Texts) -> Figure | None:
  """Over the messages that both models answered more than once."""
  some = [by for by in texts.values() if min(len(by['base']), len(by['trained'])) > 1]
  if not some:
    return None
  base, trained = ([variety(by[condition]) for by in some] for condition in ('base', 'trained'))
  metric = {'base': interval(base), 'trained': interval(trained),
            'delta': interval([b - a for a, b in zip(base, trained, strict=True)])}  # fmt: skip
  return figures.conditions(words.measure('variety'), metric)
