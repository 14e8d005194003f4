"""The three rankers: how well does each reply to a message fit a trait?

One signature: (model, trait, answers, settings) -> one score an answer, comparable among the answers to one message.
"""

import dataclasses
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from charjax.character import Trait
from charjax.engine.score import score, score_options
from charjax.model.language_model import LanguageModel
from charjax.stages import prompts


@dataclasses.dataclass(frozen=True)
class Answer:
  """A reply to be ranked: to which message, what it says, and whether the model ended it itself."""

  message: str
  text: str
  ended: bool = True


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a ranker works.

  Attributes:
    examples: worked examples shown with the trait.
    length: 'sum' or 'mean': what the likelihood ranker makes of a reply's tokens.
    batch_size: rows scored together.
  """

  examples: int = 4
  length: str = 'mean'
  batch_size: int = 32


# ---- likelihood ----


def evidence(
  model: LanguageModel, trait: Trait, answers: Sequence[Answer], settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
  """The log-likelihood ratio of each reply, with the trait shown against its opposites shown, and its token count.

  log p(reply | shown, message) - log mean over opposites of p(reply | opposite, message); the trait text and its
  examples are prefilled once for all replies.
  """
  replies = [model.reply(answer.text, answer.ended) for answer in answers]

  def total(before: prompts.Messages) -> np.ndarray:
    asked = [model.prompt([*before, prompts.user(answer.message)]) for answer in answers]
    return np.array([p.sum() for p in score(model.decoder, asked, replies, batch_size=settings.batch_size)], np.float64)

  shown = total(prompts.shown(trait, settings.examples))
  opposed = np.stack([total(prompts.opposed(trait, name, settings.examples)) for name in trait.opposites])
  ratio = shown - (np.logaddexp.reduce(opposed, 0) - np.log(len(opposed)))
  return ratio, np.array([len(reply) for reply in replies])


def treat_length(ratio: np.ndarray, tokens: np.ndarray, length: str) -> np.ndarray:
  """The ratio of the whole reply ('sum') or a token ('mean')."""
  return ratio / tokens if length == 'mean' else ratio


def likelihood(model: LanguageModel, trait: Trait, answers: Sequence[Answer], settings: Settings) -> np.ndarray:
  """Scores by likelihood ratio, [len(answers)]."""
  return treat_length(*evidence(model, trait, answers, settings), settings.length)


# ---- pairwise ----

# The wording is drawn anew for each comparison: Constitutional AI (section 4.1) found that more robust.
_PAIRWISE = (
  'Which reply fits this character better?',
  'Which of the two replies would someone of this character give?',
  'Which reply shows more of this character?',
  'Choose the reply that is more in character.',
)
_PAIRWISE_FORM = 'Character: {statement}\n\nMessage: {message}\n\n(A) {a}\n\n(B) {b}\n\n{question} Answer A or B.'


def option_log_odds(
  model: LanguageModel, trait: Trait, pairs: Sequence[tuple[Answer, Answer]], settings: Settings
) -> np.ndarray:
  """log p(first) - log p(second) for each pair with the first as (A) and as (B), [len(pairs), 2]."""
  asked = []
  for first, second in pairs:
    digest = hashlib.sha256(f'{first.message}/{first.text}/{second.text}'.encode()).digest()
    question = _PAIRWISE[digest[0] % len(_PAIRWISE)]
    for top, bottom in ((first, second), (second, first)):
      text = _PAIRWISE_FORM.format(
        statement=trait.statement, message=first.message, a=top.text, b=bottom.text, question=question
      )
      asked.append(model.prompt([prompts.user(text)]))
  letters = [model.reply(letter)[0] for letter in 'AB']
  values = score_options(model.decoder, asked, letters, batch_size=settings.batch_size)
  top_over_bottom = (values[:, 0] - values[:, 1]).reshape(-1, 2)
  return top_over_bottom * np.array([1, -1])


def pairwise(model: LanguageModel, trait: Trait, answers: Sequence[Answer], settings: Settings) -> np.ndarray:
  """Scores by comparing all replies to a message two by two, both orders averaged.

  A score is a reply's log-odds summed over the others and divided by the number of replies: where the odds are
  consistent, the difference of two scores is again the log-odds of the pair, the scale that labels are fitted on.
  """
  groups: dict[str, list[int]] = defaultdict(list)
  for i, answer in enumerate(answers):
    groups[answer.message].append(i)
  index = [pair for group in groups.values() for pair in itertools.combinations(group, 2)]
  odds = option_log_odds(model, trait, [(answers[i], answers[j]) for i, j in index], settings).mean(1)
  total, count = np.zeros(len(answers)), np.zeros(len(answers))
  for (i, j), value in zip(index, odds, strict=True):
    total[i] += value
    total[j] -= value
    count[[i, j]] += 1
  return total / (count + 1)


# ---- pointwise ----

_POINTWISE = 'Does the reply fit the character? Answer Yes or No.'
_POINTWISE_FORM = 'Character: {statement}\n\nMessage: {message}\n\nReply: {reply}\n\n{question}'


def pointwise(model: LanguageModel, trait: Trait, answers: Sequence[Answer], settings: Settings) -> np.ndarray:
  """Scores by log p(Yes) - log p(No), each reply judged by itself."""
  asked = []
  for answer in answers:
    text = _POINTWISE_FORM.format(
      statement=trait.statement, message=answer.message, reply=answer.text, question=_POINTWISE
    )
    asked.append(model.prompt([prompts.user(text)]))
  words = [model.reply(word)[0] for word in ('Yes', 'No')]
  values = score_options(model.decoder, asked, words, batch_size=settings.batch_size)
  return values[:, 0] - values[:, 1]


Ranker = Callable[[LanguageModel, Trait, Sequence[Answer], Settings], np.ndarray]
RANKERS: dict[str, Ranker] = {'likelihood': likelihood, 'pairwise': pairwise, 'pointwise': pointwise}
