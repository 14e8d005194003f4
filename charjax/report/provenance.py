"""Where a changed reply came from: the training messages nearest to it, their ranked replies, and the way back.

Nearness is the cosine of tf-idf vectors (Salton and Buckley 1988) of the words of a message and one reply to it: of a
held-out message with the trained model's reply, and of a training message with the reply that its ranking favours. It
finds the rankings that speak of the same things in the same words; that these moved the reply it cannot prove.
"""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from charjax.report.figures import Table
from charjax.report.read import Run, estimate, finite, listed, section
from charjax.report.replies import Exchange
from charjax.report.words import ellipsis, figure, interval, percent, spoken
from charjax.stages.statistics import share

_NEAREST = 3
_LONGEST = 600  # characters of a ranked reply that are shown

Key = tuple[str, str]  # trait ('' for neutral) and message of an exchange


@dataclasses.dataclass(frozen=True)
class Link:
  """From a reply to a message or back: where it stands in the page, its text and trait, and how near the two are."""

  anchor: str
  text: str
  trait: str
  cosine: float
  change: float | None = None  # of the held-out judge's score, where the link leads to a reply


@dataclasses.dataclass(frozen=True)
class Ranked:
  """One ranked reply: the letter it is called by, what it was drawn with, and how surely it beats the others on
  average."""

  letter: str
  condition: str
  text: str
  favour: float


@dataclasses.dataclass(frozen=True)
class Source:
  """A training message: its ranked replies, best first, what was trained on, and the replies it is near to."""

  anchor: str
  trait: str
  text: str
  learned_by: str
  replies: Sequence[Ranked]
  probabilities: Table
  moved: Sequence[Link]


@dataclasses.dataclass(frozen=True)
class Provenance:
  """The section of the report.

  Attributes:
    anchors: the name in the page of each exchange that has sources.
    near: the nearest training messages of each.
  """

  sentences: Sequence[str]
  anchors: Mapping[Key, str]
  near: Mapping[Key, Sequence[Link]]
  sources: Sequence[Source]


def provenance(run: Run, found: Mapping[str, Sequence[Exchange]]) -> Provenance | None:
  """Links between the exchanges of the evaluation, by trait, and the run's rankings; None without either."""
  rankings = _rankings(run)
  changed: dict[Key, tuple[Exchange, str]] = {}
  for trait, items in found.items():
    for item in items:
      base, trained = item.reply('base'), item.reply('trained')
      if base is not None and trained is not None and trained.text != base.text:
        changed[trait, item.message] = (item, trained.text)
  if not rankings or not changed:
    return None
  documents = [f'{text} {replies[0].text}' for _, _, text, replies, _ in rankings]
  queries = [f'{item.prompt} {text}' for item, text in changed.values()]
  anchors = {key: f'reply-{number}' for number, key in enumerate(changed)}
  near: dict[Key, list[Link]] = {}
  moved: dict[int, list[Link]] = defaultdict(list)
  own = []
  for (key, (item, _)), hits in zip(changed.items(), nearest(queries, documents, _NEAREST), strict=True):
    near[key] = []
    for place, cosine in hits:
      _, trait, text, *_ = rankings[place]
      near[key].append(Link(f'source-{place}', text, _name(trait), cosine))
      moved[place].append(Link(anchors[key], item.prompt, _name(key[0]), cosine, item.change))
    if key[0] and hits:
      own.append((key[0], rankings[hits[0][0]][1]))
  learned = {
    str(name): model for model in ('train', 'judge') for name in listed(section(run.preference, 'learned_from'), model)
  }
  sources = []
  for place, (name, trait, text, replies, table) in enumerate(rankings):
    if place in moved:
      links = sorted(moved[place], key=lambda link: -link.cosine)
      sources.append(Source(f'source-{place}', _name(trait), text, learned.get(name, ''), replies, table, links))
  return Provenance(_sentences(own, [trait for _, trait, *_ in rankings]), anchors, near, sources)


def _sentences(own: Sequence[tuple[str, str]], ranked: Sequence[str]) -> list[str]:
  """Whether nearness tells the traits apart at all: of each reply its trait and that of the message nearest to it."""
  found = estimate(share([float(trait == nearest) for trait, nearest in own]))
  if found is None or len(set(ranked)) < 2:
    return []
  chance = sum(ranked.count(trait) for trait, _ in own) / len(ranked) / len(own)
  return [
    f'Of {found.n} changed replies to the traits\u2019 messages, {percent(found.mean)} ({interval(found, True)}) are '
    f'nearest to a training message of their own trait; by chance it would be {percent(chance)}.'
  ]


def _name(trait: str) -> str:
  return spoken(trait) if trait else 'neutral'


def _rankings(run: Run) -> list[tuple[str, str, str, list[Ranked], Table]]:
  """Of each ranked message: its id, trait and text, its replies from the most to the least favoured, and how surely
  each is better than each other; rankings that lack a part are passed over."""
  messages = {str(row.get('id')): row for row in run.messages}
  replies = {str(row.get('id')): row for row in run.replies}
  found = []
  for row in run.rankings:
    message, names = messages.get(str(row.get('message'))), [str(name) for name in listed(row, 'replies')]
    table = _square(row.get('probabilities'), len(names))
    if message is None or table is None or len(names) < 2 or any(name not in replies for name in names):
      continue
    favour = (table.sum(1) - np.diag(table)) / (len(names) - 1)
    order = [int(place) for place in np.argsort(-favour, kind='stable')]
    letters = [_letter(place) for place in range(len(order))]
    ranked = [
      Ranked(
        letter,
        str(replies[names[place]].get('condition')),
        ellipsis(str(replies[names[place]].get('text', '')), _LONGEST),
        float(favour[place]),
      )
      for letter, place in zip(letters, order, strict=True)
    ]
    rows = [
      (letter, *('\u2013' if i == j else figure(float(table[i, j])) for j in order))
      for letter, i in zip(letters, order, strict=True)
    ]
    head = ('P(row is better than column)', *letters)
    trait, text = str(message.get('trait') or ''), str(message.get('text', ''))
    found.append((str(message['id']), trait, text, ranked, Table(head, rows)))
  return found


def _square(value: Any, size: int) -> np.ndarray | None:
  """Probabilities [size, size] of a file, or None where it holds none."""
  rows = value if isinstance(value, list) and len(value) == size else []
  if not rows or any(not isinstance(row, list) or len(row) != size for row in rows):
    return None
  numbers = [[finite(cell) for cell in row] for row in rows]
  if any(cell is None for row in numbers for cell in row):
    return None
  return np.array(numbers, np.float64)


def _letter(place: int) -> str:
  """A, B, ... Z, AA, AB, ..."""
  return (_letter(place // 26 - 1) if place >= 26 else '') + chr(ord('A') + place % 26)


# ---- nearness ----


def words_of(text: str) -> list[str]:
  """Its words in lower case."""
  return re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text.lower())


def nearest(queries: Sequence[str], documents: Sequence[str], count: int) -> list[list[tuple[int, float]]]:
  """For each query the places of up to `count` documents nearest to it, with their cosines, the nearest first.

  A word's weight in a text is how often it stands there times ln((1 + D) / (1 + d)) + 1, for d of D documents that
  hold it. Documents without a word in common are left out; of two that are as near, the one that stands first counts.
  """
  counts = [Counter(words_of(text)) for text in documents]
  spread = Counter(word for some in counts for word in some)
  weight = {word: math.log((1 + len(documents)) / (1 + d)) + 1 for word, d in spread.items()}
  unknown = math.log(1 + len(documents)) + 1
  places: dict[str, list[int]] = defaultdict(list)
  values: dict[str, list[float]] = defaultdict(list)
  for place, some in enumerate(counts):
    norm = math.sqrt(sum((n * weight[word]) ** 2 for word, n in some.items()))
    for word, n in some.items():
      places[word].append(place)
      values[word].append(n * weight[word] / norm)
  index = {word: (np.array(where), np.array(values[word])) for word, where in places.items()}
  found = []
  for text in queries:
    asked = {word: n * weight.get(word, unknown) for word, n in Counter(words_of(text)).items()}
    norm = math.sqrt(sum(value**2 for value in asked.values()))
    cosine = np.zeros(len(documents))
    for word, value in asked.items():
      if word in index:
        where, values_there = index[word]
        cosine[where] += values_there * value / norm
    best = np.argsort(-cosine, kind='stable')[:count]
    found.append([(int(place), float(cosine[place])) for place in best if cosine[place] > 0])
  return found
