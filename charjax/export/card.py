"""The model card: what a run folder says of the model, with the uncertainty it says it with, and nothing beyond."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import charjax
from charjax.report.read import STAGES, Estimate, Run, estimate, finite, listed, section

_SIDE_EFFECTS = {
  'length': 'tokens a reply',
  'cut_off': 'cut off at the limit',
  'exclamation_marks': 'exclamation marks a reply',
  'praise': 'praises the person or the question',
  'closing_questions': 'ends with a question',
  'distinct_2': 'share of pairs of words that are different',
}


def of_start(base: str, family: str, dtype: str) -> str:
  """The card of a model that was converted and not trained.

  Args:
    base: the model's name.
    family: its model_type.
    dtype: of the weights.
  """
  return _joined(
    _front('text-generation', 'charjax'),
    f'# {_line(base)}',
    f'The weights of {_code(base)} ({family}), converted to {dtype} by charjax {charjax.__version__}, which did not '
    'train them.',
  )


def of_policy(run: Run, base: str, family: str, dtype: str, thinks: bool) -> str:
  """The card of a policy.

  Args:
    run: its run folder; without a summary, nothing is said of effects.
    base: the name of the model it was trained from.
    family: the model_type of both.
    dtype: of the weights.
    thinks: whether the chat template can have the model think before it answers.
  """
  traits = [trait['id'] for trait in run.traits]
  plain = ' It was trained with `enable_thinking=False` given to the chat template.' if thinks else ''
  return _joined(
    _front('text-generation', 'charjax', 'character-training'),
    f'# {_title(run)}: {_line(base)} trained into a character',
    _description(run),
    f'A {family} model, trained from {_code(base)} by charjax {charjax.__version__} (character training: AI feedback '
    f"on the model's own replies), exported as {dtype}, adapters merged into the weights.{plain}",
    _character(run),
    _data(run),
    _effects(run, traits),
    '## Use',
    _fenced(
      'from transformers import AutoModelForCausalLM, AutoTokenizer',
      '',
      'tokenizer = AutoTokenizer.from_pretrained(folder)',
      'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")',
    ),
  )


def of_reward(run: Run, base: str, family: str, dtype: str, thinks: bool, kind: str, layers: tuple[int, int]) -> str:
  """The card of a preference model.

  Args:
    run: its run folder.
    base: the name of the model whose lower layers it is.
    family: the model_type of those.
    dtype: of the trunk's weights.
    thinks: whether the chat template can have the model think before it answers.
    kind: 'preference' or 'judge'.
    layers: how many layers it has, and the model had.
  """
  role = (
    'The preference model that rewarded the policy.'
    if kind == 'preference'
    else 'The held-out judge: it judged the policy and did not reward it. It was trained on other messages than the '
    'preference model, but shares its ranker and its starting weights.'
  )
  return _joined(
    _front('text-classification', 'charjax', 'character-training'),
    f'# {_title(run)}: {"preference model" if kind == "preference" else "held-out judge"}',
    _description(run),
    f'{role} Trained by charjax {charjax.__version__} on rankings of replies; {dtype} trunk, float32 head.',
    '## What it reads',
    f'The lower {layers[0]} of the {layers[1]} layers of {_code(base)} ({family}) and its final norm. The reward for '
    'a trait is the inner product of a direction with the mean of the final-normed states over the tokens of the '
    '**last reply** in the conversation, its end-of-turn token included. The reply is what follows the last assistant '
    'header (`reply_header` in config.json) up to the first end of turn; or give `reply_mask`, 1 at its tokens. '
    'Batches may be padded on either side; give `attention_mask`.',
    'The logits are rewards, one a trait in the order of `id2label`, without upper or lower bound. Only differences '
    'between replies to the same message were learned. It never saw the text of a trait, and was trained on single '
    'messages without a system prompt.',
    _fenced(
      'from transformers import AutoModelForSequenceClassification, AutoTokenizer',
      '',
      'tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)',
      'model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, dtype="float32")',
      'said = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
      'ids = tokenizer.apply_chat_template(',
      f'    said, return_tensors="pt", return_dict=True{", enable_thinking=False" if thinks else ""}',
      ')["input_ids"]',
      'rewards = model(ids).logits',
    ),
    _character(run),
    _data(run),
    _accuracy(run, 'train' if kind == 'preference' else 'judge'),
  )


# ---- parts ----


def _front(task: str, *tags: str) -> str:
  return '\n'.join(
    ['---', 'library_name: transformers', f'pipeline_tag: {task}', 'tags:', *(f'- {t}' for t in tags), '---']
  )


def _title(run: Run) -> str:
  return _line(str(run.character.get('name') or run.name))


def _description(run: Run) -> str:
  return _line(str(run.character.get('description') or ''))


def _character(run: Run) -> str:
  rows = [
    (
      f'`{_line(trait["id"])}`',
      f'{finite(trait.get("weight", 1.0)) or 0.0:g}',
      _line(str(trait.get('statement') or '')),
    )
    for trait in run.traits
  ]
  return _joined('## Character', _table(('trait', 'weight', 'statement'), rows))


def _data(run: Run) -> str:
  rows = [
    (name, '; '.join(f'{key}: {value}' for key, value in _flat(section(run.stages.get(name), 'counts'))))
    for name in STAGES
    if name in run.stages
  ]
  seed = run.config.get('seed')
  return _joined('## Data', f'What the stages of the run counted (seed {seed}):', _table(('stage', 'counts'), rows))


def _flat(counts: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, str]]:
  for key, value in counts.items():
    name = prefix + _line(str(key).replace('_', ' '))
    if isinstance(value, Mapping):
      yield from _flat(value, f'{name}, ')
    elif isinstance(value, list):
      yield name, ', '.join(_code(str(item)) for item in value) or 'none'
    else:
      yield name, _line(str(value))


def _effects(run: Run, traits: Sequence[str]) -> str:
  if not run.summary:
    return _joined('## Measured effects', 'This policy was not evaluated when it was exported.')
  model, chosen = section(run.config, 'config', 'model'), finite(run.choice.get('chosen'))
  rows, sides = [], {1: list[str](), 0: list[str](), -1: list[str]()}
  for trait in traits:
    found = section(run.summary, 'traits', trait)
    cells = [
      _judged(estimate(section(found, 'margin').get('delta')), 0.0, _signed),
      _judged(estimate(section(found, 'win_rate').get('trained')), 0.5, _percent),
      _judged(estimate(section(found, 'judge').get('delta')), 0.0, _signed),
    ]
    rows.append((_code(trait), *(text for text, _ in cells)))
    for name, (_, side) in zip(('margin', 'wins', "judge's score"), cells, strict=True):
      if side is not None:
        sides[side].append(f'{_code(trait)} ({name})')
  return _joined(
    '## Measured effects',
    'The trained model beside the one it was trained from, on messages and written pairs that were not trained on; '
    f'95% intervals. Measured in the run, computing in {_line(str(model.get("compute_dtype", "its own type")))}, '
    'before the export; these files were not measured again.',
    _table(
      ('trait', 'margin on written pairs, nats a token', 'replies that win by the held-out judge', "judge's score"),
      rows,
    ),
    ' '.join(
      f'{said}: {", ".join(sides[side])}.'
      for said, side in (('Higher', 1), ('**Not told from chance**', 0), ('**Lower**', -1))
      if sides[side]
    ),
    'The margin is how much the log-prob of a written reply in character rose against one out of character. The judge '
    'shares its ranker and its starting weights with the model that rewarded the policy, so that what it says is no '
    'evidence that the ranker is right.'
    + (f' It also chose this checkpoint, after step {chosen:g}, by replies to training messages.' if chosen else ''),
    _elsewhere(run),
  )


def _elsewhere(run: Run) -> str:
  """What should not have changed."""
  neutral, effects = section(run.summary, 'neutral'), section(run.summary, 'side_effects')
  rows = []
  measured = {
    'log-prob a token of reference answers to neutral requests': (section(neutral, 'log_prob'), _signed),
    'greedy answers to neutral requests that hold what they should': (section(neutral, 'accuracy'), _percent),
    **{text: (section(effects, name), _amount) for name, text in _SIDE_EFFECTS.items()},
  }
  for text, (found, show) in measured.items():
    base, trained = estimate(found.get('base')), estimate(found.get('trained'))
    delta, _ = _judged(estimate(found.get('delta')), 0.0, _signed)
    if base and trained:
      rows.append((text, show(base.mean), show(trained.mean), delta))
  said = []
  for whose, found in (
    ('from the starting model on its own neutral', neutral),
    ('to the starting model on the trained one\u2019s', section(run.summary, 'distance')),
  ):
    if kl := estimate(section(found, 'kl').get('trained')):
      said.append(f'KL {whose} replies: {_between(kl, _amount)} nats a token.')
  return _joined(
    '### Elsewhere',
    _table(('', 'before', 'after', 'change'), rows),
    ' '.join(said),
    'Other abilities and safety were not measured.',
  )


def _accuracy(run: Run, name: str) -> str:
  found = section(run.preference, name)
  rows = [(_code(trait), _judged(estimate(value), 0.5, _percent)[0]) for trait, value in section(found, 'kept').items()]
  overall = estimate(found.get('kept_overall'))
  left = ', '.join(_code(str(trait)) for trait in listed(run.preference, 'left_out')) if name == 'train' else ''
  said = [
    f'Over all traits: {_between(overall, _percent)}.' if overall else '',
    f'Not told from chance by the preference model: {left}.' if left else '',
    *(
      f'{text}: {_amount(value)}.'
      for text, value in (
        ('Log-loss on replies to unseen messages', finite(found.get('log_loss'))),
        ('Expected calibration error', finite(found.get('calibration_error'))),
        ('Correlation of reward and length of a reply', finite(found.get('length_correlation'))),
      )
      if value is not None
    ),
  ]
  return _joined(
    '## Measured accuracy',
    'Written pairs of replies, never trained on, of which it rates the one in character higher; 95% intervals.',
    _table(('trait', 'right'), rows),
    ' '.join(filter(None, said)),
  )


# ---- figures ----


def _judged(value: Estimate | None, chance: float, show: Any) -> tuple[str, int | None]:
  """The figure in words, and which side of chance it is on; None where it was not measured."""
  if value is None:
    return 'not measured', None
  side = value.side_of(chance)
  return _between(value, show) + ('' if side else ', not clear of chance'), side


def _between(value: Estimate, show: Any) -> str:
  if value.low is None or value.high is None:
    return f'{show(value.mean)} (no interval)'
  count = f', n = {value.n}' if value.n is not None else ''
  return f'{show(value.mean)} ({show(value.low)} to {show(value.high)}{count})'


def _signed(value: float) -> str:
  return f'{value:+.3f}'


def _amount(value: float) -> str:
  return f'{value:.3g}'


def _percent(value: float) -> str:
  return f'{value:.0%}'


# ---- Markdown ----


def _line(text: str) -> str:
  """Text of others as part of a line or of a cell."""
  text = ' '.join(text.split())
  for c in '\\`*_|[]<>':
    text = text.replace(c, f'\\{c}' if c not in '`<>' else {'`': "'", '<': '&lt;', '>': '&gt;'}[c])
  return text


def _code(text: str) -> str:
  """A name of others as it is."""
  return '`' + ' '.join(text.split()).replace('`', "'").replace('|', '/') + '`'


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  lines = [titles, ['---'] * len(titles), *rows]
  return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines) if len(lines) > 2 else ''


def _fenced(*lines: str) -> str:
  return '\n'.join(['```python', *lines, '```'])


def _joined(*parts: str) -> str:
  return '\n\n'.join(part.strip('\n') for part in parts if part) + '\n'
