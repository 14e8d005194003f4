"""Can a trait's contrast pairs be told apart without understanding them?

A pair is only worth something when the trait is the one thing its two replies differ in. This module
looks for the cheap signals: words that give a side away in every trait, replies that are longer on one
side, openings that only one side uses, messages that leak from one use into another. How the traits themselves are
worded stands in character_wording.py; what it finds is told along.

  charjax character check assistant        # or a .toml file; exits 1 when a check fails
"""

import collections
import dataclasses
import re

import numpy as np

from charjax import character_wording
from charjax.character import USES, Character, Pair, Trait

_WORDS_BELOW = 0.65  # accuracy of the word classifier
_LENGTH_RATIO = (0.85, 1.15)  # words in character over words out of character
_LONGER = (0.35, 0.65)  # how often the reply in character is the longer one
_OPENING_GAP = 0.25  # share of pairs by which one first word may prefer a side
_L2 = 1.0
_LEGEND = (
  "words/pair, words/reply: how often a bag of words from the other traits' pairs picks the reply in character, and "
  f'tells single\n  replies apart; from {_WORDS_BELOW:.0%} on a tell-tale word does the work\n'
  f'length: words in character over words out of it, {_LENGTH_RATIO[0]} to {_LENGTH_RATIO[1]}; longer: how often it is '
  f'the longer, {_LONGER[0]:.0%} to {_LONGER[1]:.0%}\n'
  'opens alike: both replies begin with the same word; most telling opening: the first word that prefers a side, to '
  f'{_OPENING_GAP:.0%}'
)


@dataclasses.dataclass(frozen=True)
class Finding:
  """What was measured on one trait; `problems` is empty when all of it is well."""

  trait: str
  pairs: int
  words_pair: float | None  # share of pairs the word classifier orders rightly; None with no other trait
  words_reply: float | None  # share of single replies it labels rightly
  length_ratio: float
  longer: float  # share of pairs whose reply in character is the longer, ties count half
  shared_opening: float  # share of pairs whose replies begin with the same word
  opening_gap: tuple[str, float]  # the first word that prefers a side most, and by what share of pairs
  problems: tuple[str, ...]


def lint(character: Character) -> list[Finding]:
  """One Finding a trait, in the character's order."""
  leaks, worded = _leaks(character), character_wording.problems(character)
  return [_finding(trait, character, worded[trait.id] + leaks[trait.id]) for trait in character.traits]


def format_table(findings: list[Finding]) -> str:
  """The findings as a table for a terminal, what its columns say, and one line for each problem."""
  heads = f'{"pairs":>6}{"words/pair":>12}{"words/reply":>12}{"length":>8}{"longer":>8}{"opens alike":>13}'
  lines = [f'{"trait":<16}{heads}  most telling opening']
  for f in findings:
    word, gap = f.opening_gap
    lines.append(
      f'{f.trait:<16}{f.pairs:>6}{_percent(f.words_pair):>12}{_percent(f.words_reply):>12}{f.length_ratio:>8.2f}'
      f'{_percent(f.longer):>8}{_percent(f.shared_opening):>13}  {word} {_percent(gap)}'
    )
  problems = [f'{f.trait}: {problem}' for f in findings for problem in f.problems]
  return '\n'.join([*lines, '', _LEGEND, '', *(problems or ['No problem was found.'])])


def _finding(trait: Trait, character: Character, more: list[str]) -> Finding:
  others = [pair for other in character.traits if other.id != trait.id for pair in other.pairs]
  words_pair, words_reply = _word_accuracy(others, trait.pairs) if others else (None, None)
  lengths = np.array([[len(_words(p.in_character)), len(_words(p.out_of_character))] for p in trait.pairs])
  ratio = float(lengths[:, 0].sum() / max(lengths[:, 1].sum(), 1))
  longer = float(np.mean((np.sign(lengths[:, 0] - lengths[:, 1]) + 1) / 2))
  openings = [(_first_word(p.in_character), _first_word(p.out_of_character)) for p in trait.pairs]
  shared = sum(a == b for a, b in openings) / len(openings)
  word, count = _telling_opening(openings)
  gap = count / len(openings)

  problems = []
  for name, accuracy in (('order the replies of', words_pair), ('label single replies of', words_reply)):
    if accuracy is not None and accuracy >= _WORDS_BELOW:
      problems.append(
        f'words alone {name} {_percent(accuracy)} of the pairs (under {_percent(_WORDS_BELOW)}): '
        'reword what only one side says'
      )
  if not _LENGTH_RATIO[0] <= ratio <= _LENGTH_RATIO[1]:
    problems.append(f'replies in character are {ratio:.2f} times as long: even the lengths out')
  if not _LONGER[0] <= longer <= _LONGER[1]:
    problems.append(f'the reply in character is the longer in {_percent(longer)} of pairs: lengthen the other side')
  # Two chance repetitions in a handful of pairs are no pattern.
  if gap > _OPENING_GAP and count > 2:
    problems.append(f'the opening "{word}" prefers one side by {_percent(gap)} of pairs: vary it or share it')
  for use in USES:
    missing = set(trait.opposites) - {pair.opposite for pair in trait.pairs_for(use)}
    if trait.pairs_for(use) and missing:
      problems.append(f'no {use} pair for the opposite {", ".join(sorted(missing))}: write one')
  problems += more
  return Finding(
    trait.id, len(trait.pairs), words_pair, words_reply, ratio, longer, shared, (word, gap), tuple(problems)
  )


def _word_accuracy(train: list[Pair], test: tuple[Pair, ...]) -> tuple[float, float]:
  """Accuracy on `test` of L2-regularised logistic regression on the word counts of `train`'s replies.

  Returns:
    The share of pairs in which the reply in character scores higher (ties count half), and the share of
    single replies on the right side of zero.
  """
  replies = [reply for pair in train for reply in (pair.in_character, pair.out_of_character)]
  vocabulary = {word: i for i, word in enumerate(sorted({w for reply in replies for w in _words(reply)}))}
  x = _counts(replies, vocabulary)
  target = np.tile([1.0, 0.0], len(train))
  # Newton's method on the sample side: weights = x.T @ dual, so the system has one row a reply
  # (hundreds) and not one a word (thousands).
  kernel = x @ x.T
  dual = np.zeros(len(replies))
  for _ in range(20):
    score = kernel @ dual
    p = 0.5 * (1 + np.tanh(0.5 * score))  # the sigmoid, with no overflow
    curvature = np.maximum(p * (1 - p), 1e-6)
    step = np.linalg.solve(kernel + _L2 * np.diag(1 / curvature), score + (target - p) / curvature) - dual
    dual += step
    if np.abs(step).max() < 1e-6:
      break
  weights = x.T @ dual
  inside = _counts([pair.in_character for pair in test], vocabulary) @ weights
  outside = _counts([pair.out_of_character for pair in test], vocabulary) @ weights
  by_pair = np.mean((np.sign(inside - outside) + 1) / 2)
  by_reply = np.mean((np.sign(np.concatenate([inside, -outside])) + 1) / 2)
  return float(by_pair), float(by_reply)


def _counts(replies: list[str], vocabulary: dict[str, int]) -> np.ndarray:
  """Word counts [reply, word + 1]; the last column is constant, so that the classifier has an offset."""
  counts = np.zeros((len(replies), len(vocabulary) + 1))
  counts[:, -1] = 1
  for row, reply in enumerate(replies):
    for word in _words(reply):
      if word in vocabulary:
        counts[row, vocabulary[word]] += 1
  return counts


def _words(text: str) -> list[str]:
  return re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text.lower())


def _first_word(text: str) -> str:
  return next(iter(_words(text)), '')


def _telling_opening(openings: list[tuple[str, str]]) -> tuple[str, int]:
  balance: collections.Counter[str] = collections.Counter()
  for inside, outside in openings:
    balance[inside] += 1
    balance[outside] -= 1
  word = max(balance, key=lambda w: abs(balance[w]))
  return word, abs(balance[word])


def _leaks(character: Character) -> dict[str, list[str]]:
  """For each trait, messages that it and any trait (itself too) put to different uses, seeds included."""
  uses: dict[str, set[str]] = collections.defaultdict(set)
  owners: dict[str, set[str]] = collections.defaultdict(set)
  shown: dict[str, str] = {}
  for trait in character.traits:
    for message, use in [(seed, 'seed') for seed in trait.seeds] + [(p.message, p.use) for p in trait.pairs]:
      key = ' '.join(_words(message))
      uses[key].add(use)
      owners[key].add(trait.id)
      shown[key] = message
  leaks: dict[str, list[str]] = {trait.id: [] for trait in character.traits}
  for key, found in uses.items():
    if len(found) > 1:
      for owner in owners[key]:
        leaks[owner].append(f'the message {shown[key][:50]!r} is used as {" and ".join(sorted(found))}: change one')
  return leaks


def _percent(share: float | None) -> str:
  return '-' if share is None else f'{share:.0%}'
