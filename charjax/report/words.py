"""How the report says numbers: formats, names, and sentences that claim no more than an interval does."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from charjax.report.read import Estimate, estimate

MINUS = '\u2212'

CONDITION_NAMES = {
  'base': 'base',
  'prompted': 'prompted',
  'prompted_examples': 'prompted + examples',
  'trained': 'trained',
}


@dataclasses.dataclass(frozen=True)
class Measure:
  """What a figure is called, its unit, and the value that would mean 'no effect'."""

  title: str
  unit: str
  meaning: str = ''
  share: bool = False  # a fraction, shown as a percentage
  chance: float | None = None


MEASURES = {
  'margin': Measure(
    'Margin on kept pairs',
    'nats per token',
    'Log-probability of the written in-character reply minus that of the out-of-character one. No judge is involved.',
  ),
  'judge': Measure(
    'Held-out judge',
    'score, in logits',
    'What a preference model that the policy was not trained against thinks of the replies.',
  ),
  'likelihood': Measure(
    'Trait in replies, by likelihood ratio',
    'nats per token',
    'How much likelier the base model finds a reply when it is shown the trait than when it is shown an opposite. What '
    'was drawn with the trait shown is so by construction: compare trained with base.',
  ),
  'cut_off': Measure(
    'Cut off', 'share of replies', 'How often a reply was still going on at its last token.', share=True
  ),
  'win_rate': Measure(
    'Win rate against base',
    'share of replies',
    'How often the held-out judge prefers a reply to the base model\u2019s to the same message.',
    share=True,
    chance=0.5,
  ),
  'win_rate_vs_prompted': Measure(
    'Win rate against prompted',
    'share of replies',
    'How often the held-out judge prefers a reply to that of the base model shown the statement.',
    share=True,
    chance=0.5,
  ),
  'accuracy': Measure('Accuracy', 'share right', share=True),
  'log_prob': Measure('Log-probability of reference answers', 'nats per token'),
  'kl': Measure('Distance from the base model (KL)', 'nats per token'),
  'length': Measure('Length of a reply', 'tokens'),
  'exclamation_marks': Measure('Exclamation marks', 'per reply'),
  'praise': Measure('Praise of the user', 'share of replies', share=True),
  'closing_questions': Measure('Ends by asking a question', 'share of replies', share=True),
  'variety': Measure('Difference between replies to one message', 'mean Jaccard distance of words'),
  'flattery': Measure('Praises a sad or a wrong user', 'share of replies', share=True),
  'agrees_with_error': Measure('Agrees with an error', 'share of replies', share=True),
  'corrects_error': Measure('Says what is right of it', 'share of replies', share=True),
  'gives_way_to_sadness': Measure('Agrees with a sad user who is wrong', 'share of replies', share=True),
  'refuses_harmful': Measure('Refuses what is harmful', 'share of replies', share=True),
  'refuses_harmless': Measure('Refuses what is harmless', 'share of replies', share=True),
  'holds_on_to_user': Measure('Holds on to a user who leaves', 'share of replies', share=True),
  'claims_to_be_human': Measure('Claims to be human', 'share of replies', share=True),
  'says_it_is_ai': Measure('Says that it is an AI', 'share of replies', share=True),
  'claims_neutrality': Measure('Claims to have no view', 'share of replies', share=True),
  'bland_middle': Measure('Keeps to a bland middle', 'share of replies', share=True),
  'stance_shift': Measure('Stance follows the user', 'log-odds of Yes', chance=0.0),
  'invalid_answers': Measure('Answers that are not valid', 'share of answers', share=True),
  'first_answers': Measure('Valid answers that choose the first', 'share of answers', share=True, chance=0.5),
  'distinct_2': Measure('Distinct word pairs', 'share of all pairs', share=True),
}


def measure(name: str) -> Measure:
  """The measure's name and unit; one the report does not know is shown under its own name."""
  return MEASURES.get(name) or Measure(spoken(name).capitalize(), 'unit as in the file')


def spoken(identifier: str) -> str:
  """`ai_nature` as people write it: `AI nature`."""
  words = identifier.replace('_', ' ').replace('-', ' ').split()
  return ' '.join({'ai': 'AI', 'kl': 'KL'}.get(word, word) for word in words) or identifier


def plain(value: float) -> str:
  """A number with about three digits that matter and a true minus sign."""
  size = abs(value)
  if value == int(value) and size < 1e6:
    text = f'{int(size):,}'
  elif size >= 100:
    text = f'{size:,.0f}'
  elif size >= 10:
    text = f'{size:.1f}'
  elif size >= 0.01:
    text = f'{size:.3f}'.rstrip('0')
  else:
    text = f'{size:.2g}'
  return (MINUS if value < 0 else '') + text


def percent(value: float) -> str:
  """A fraction as a percentage, one digit after the point where it is not round."""
  digits = f'{abs(100 * value):.1f}'.removesuffix('.0')
  return (MINUS if value < 0 and digits != '0' else '') + digits + '%'


def figure(value: float, share: bool = False, signed: bool = False) -> str:
  """A mean or an end of an interval: three digits after the point, or a percentage."""
  if share:
    text = percent(value)
  else:
    value = value if abs(value) >= 1e-9 else 0.0  # what rounding leaves of nothing
    digits = 3 if abs(value) < 10 else 1
    text = f'{abs(value):,.{digits}f}' if abs(value) >= 5e-3 or value == 0 else f'{abs(value):.2g}'
    text = (MINUS if value < 0 else '') + text
  return '+' + text if signed and value > 0 else text


def difference(value: Estimate, share: bool = False) -> str:
  """`+0.142 (0.110 to 0.174)`; of fractions, in percentage points: `+10.1 points (9.1 to 11.1)`."""
  between = interval(value, share)
  text = figure(value.mean, share, signed=True) + (f' ({between})' if between else '')
  return (
    f'{text.replace("%", "")} points' if share and not between else text.replace('% (', ' points (').replace('%', '')
  )


def interval(value: Estimate, share: bool = False) -> str:
  """`0.05 to 0.19`, or an empty string where the file holds no interval."""
  if value.low is None or value.high is None:
    return ''
  return f'{figure(value.low, share)} to {figure(value.high, share)}'


def cell(value: Estimate | None, share: bool = False, signed: bool = False) -> str:
  """`mean (interval)`, or a dash where nothing was measured."""
  if value is None:
    return '\u2013'
  between = interval(value, share)
  return figure(value.mean, share, signed) + (f' ({between})' if between else '')


def ellipsis(text: str, length: int) -> str:
  return text if len(text) <= length else text[: length - 1].rstrip() + '\u2026'


def together(names: Sequence[str]) -> str:
  """`a`, `a and b`, `a, b and c`."""
  return ' and '.join([*([', '.join(names[:-1])] if len(names) > 1 else []), *names[-1:]])


def outdated_sentence(stages: Sequence[str]) -> str:
  """What must be known of stages that were made from what is there no more; nothing where there are none."""
  if not stages:
    return ''
  was = 'was' if len(stages) == 1 else 'were'
  return (
    f'{together(stages)[:1].upper()}{together(stages)[1:]} {was} made from what earlier stages held before, and tell '
    'nothing of what stands there now; charjax run makes them anew.'
  )


def at_least(stages: Sequence[str]) -> str:
  """Of a time, where stages were cut off on the way; nothing where none was."""
  return f'Cut off and gone on with: {together(stages)}. Of these the time since is counted.' if stages else ''


def by_chance(count: int) -> list[str]:
  """What a reader of many figures must know; nothing of few."""
  if count < 10:
    return []
  return [f'Where there is no effect, about {max(1, round(count / 20))} of {count} would be clear of it by chance.']


def weight(value: object) -> str:
  """How a trait's weight is told: not at all where it is the usual one."""
  try:
    number = float(str(value))
  except ValueError:
    number = 1.0
  return '' if number == 1.0 or not math.isfinite(number) else f'weight {number:g}'


def verdict(value: Estimate | None, reference: float = 0.0) -> tuple[str, str]:
  """(CSS class, words) for an interval against its reference."""
  if value is None:
    return 'absent', 'not measured'
  against = 'zero' if reference == 0 else percent(reference)
  if value.low is None or value.high is None:
    return 'unclear', 'no interval'
  return {
    1: ('up', f'clear of {against}, upwards'),
    -1: ('down', f'clear of {against}, downwards'),
    0: ('unclear', f'not clear of {against}'),
  }[value.side_of(reference)]


def change_sentence(delta: Estimate | None) -> str:
  """What the margin on the kept pairs did, in one sentence."""
  if delta is None:
    return 'The margin on the kept pairs was not measured.'
  over = (
    f'On {delta.n} written pairs kept out of training, the' if delta.n else 'On written pairs kept out of training, the'
  )
  size, between = figure(abs(delta.mean)), interval(delta)
  between = f' (95% interval {between})' if between else ''
  match delta.side_of(0.0):
    case 1:
      return f'{over} margin for the in-character reply rose by {size} nats per token{between}.'
    case -1:
      return f'{over} margin for the in-character reply fell by {size} nats per token{between}.'
  moved = figure(delta.mean, signed=True)
  return f'{over} margin for the in-character reply moved by {moved} nats per token{between}: not clear of zero.'


def win_sentence(against_base: Estimate | None, against_prompted: Estimate | None) -> str:
  """How often the held-out judge preferred the trained model's reply."""
  parts = []
  for rate, other in (
    (against_base, 'the base model\u2019s'),
    (against_prompted, 'the prompted model\u2019s'),
  ):
    if rate is not None:
      between = interval(rate, share=True)
      over = f'; {rate.n} messages' if rate.n else ''
      clear = {1: '', 0: '; not clear of 50%', -1: '; it loses'}[rate.side_of(0.5)]
      parts.append(f'to {other} in {percent(rate.mean)} of cases' + (f' ({between}{over}{clear})' if between else ''))
  return f'The held-out judge prefers the trained reply {", and ".join(parts)}.' if parts else ''


def in_short(margin: Estimate | None, wins: Estimate | None) -> str:
  """What training did to one trait, in one sentence; nothing where nothing was measured."""
  parts = []
  if margin is not None:
    size, between = figure(margin.mean, signed=True), interval(margin)
    did = {1: 'became likelier', 0: 'are not clearly likelier', -1: 'became less likely'}
    told = f'{size} nats a token' + (f', {between}' if between else '')
    parts.append(f'written replies in character {did[margin.side_of(0.0)]} ({told})')
  if wins is not None:
    between = interval(wins, share=True)
    parts.append(
      f'the held-out judge prefers the trained reply in {percent(wins.mean)} of cases'
      + (f' ({between}' + (')' if wins.side_of(0.5) else '; not clear of 50%)') if between else '')
    )
  text = ', and '.join(parts)
  return text[:1].upper() + text[1:] + '.' if text else ''


def people_sentence(wins: Estimate | None) -> str:
  """How often people preferred the trained model's reply, blind; nothing where nobody judged."""
  if wins is None:
    return ''
  between = interval(wins, share=True)
  return f'People who judged blind prefer it to base\u2019s in {percent(wins.mean)} of cases' + (
    f' ({between}; {wins.n} messages).' if between else '.'
  )


def share_sentence(delta: Estimate | None, internalisation: Mapping[str, Any]) -> str:
  """How much of the margin's change under prompting stayed without the prompt; silent where unknown."""
  if delta is None or 'margin' not in internalisation:
    return ''
  share = estimate(internalisation['margin'])
  if share is None:
    return (
      'Showing the statement and worked examples has itself no effect on the margin that is clear of zero, '
      'so no share of it is given.'
    )
  between = interval(share, share=True)
  between = f' ({between})' if between else ''
  return f'That is {percent(share.mean)}{between} of the effect of showing the statement and worked examples.'


def count_sentence(
  outcomes: Mapping[str, Estimate | None], reference: float, rose: str, unclear: str, fell: str
) -> str:
  """`X for a and b; Y for c.` over the traits for which there is a figure."""
  sides: dict[int, list[str]] = {1: [], 0: [], -1: []}
  for name, value in outcomes.items():
    if value is not None:
      sides[value.side_of(reference)].append(spoken(name))
  parts = [f'{words} {together(sides[side])}' for side, words in ((1, rose), (0, unclear), (-1, fell)) if sides[side]]
  text = '; '.join(parts)
  return text[:1].upper() + text[1:] + '.' if text else ''
