"""Panels of the report: what a stage measured or counted, as figures, remarks and a table under one heading."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from charjax.report import figures, plots, words
from charjax.report.figures import Figure, Table
from charjax.report.read import CONDITIONS, Estimate, Run, cut_off, estimate, finite, listed, seconds, section
from charjax.report.words import cell

_LENGTH_CORRELATION_LIMIT = 0.2  # above it, the reward may be paying for length

_ENDS = ('mean', 'low', 'high')

# The rest of metrics.jsonl follows these under its own names.
_POLICY_CURVES = {
  'reward': ('Reward', 'preference-model score'),
  'kl': ('Distance from the starting model', 'nats per token'),
  'neutral_kl': ('Distance on neutral messages', 'nats per token'),
  'penalised_reward': ('Reward less the KL penalty', 'preference-model score'),
  'length': ('Length of a sampled reply', 'tokens'),
  'ended': ('Replies that ended', 'share of replies'),
  'entropy': ('Entropy of the policy', 'nats per token'),
  'loss': ('Loss', 'loss'),
  'clip_fraction': ('Clipped ratios', 'share of tokens'),
  'ranked_loss': ('Preference loss on ranked replies', 'nats per pair'),
  'ranked_accuracy': ('Ranked pairs in the right order', 'share of pairs'),
  'logprob_gap': ('Sampler against trainer', 'log-prob gap, nats per token'),
  'tokens_drawn': ('Tokens of replies that were drawn', 'tokens'),
  'tokens_read': ('Tokens of replies that were learned from', 'tokens'),
  'grad_norm': ('Gradient norm', 'norm'),
  'skipped': ('Steps left out, not finite', 'share of steps'),
}
_PREFERENCE_CURVES = {
  'loss': ('Loss', 'nats per pair'),
  'accuracy': ('Accuracy on training pairs', 'share of pairs'),
}


@dataclasses.dataclass(frozen=True)
class Panel:
  """Figures and remarks under one heading; the page leaves out a panel without either."""

  figures: Sequence[Figure]
  notes: Sequence[str] = ()
  table: Table | None = None


def metrics_table(metrics: Mapping[str, Any]) -> Table | None:
  """Every metric of a trait or probe under every condition, as `mean (interval)`."""
  rows = []
  for name, metric in metrics.items():
    measure, found = words.measure(name), figures.estimates(metric)
    if all(value is None for value in found.values()):
      continue
    delta = found.pop('delta')
    cells = [*(cell(value, measure.share) for value in found.values()),
             words.difference(delta, measure.share) if delta else '\u2013']  # fmt: skip
    rows.append((f'{measure.title}, {measure.unit}', *cells))
  head = ('', *(words.CONDITION_NAMES[name] for name in CONDITIONS), f'trained {words.MINUS} base')
  return Table(head, rows) if rows else None


def conditions(metrics: Mapping[str, Any]) -> Panel:
  """Metrics under each condition, and which of them moved clear of zero."""
  found = [figures.conditions(words.measure(name), metric) for name, metric in metrics.items()]
  moved = []
  for name, metric in metrics.items():
    delta = figures.estimates(metric)['delta']
    if delta is not None and delta.side_of(0.0):
      measure = words.measure(name)
      unit = '' if measure.share else f' {measure.unit}'
      moved.append(f'{measure.title.lower()} {words.difference(Estimate(delta.mean), measure.share)}{unit}')
  notes = []
  if any(figures.estimates(metric)['delta'] for metric in metrics.values()):
    notes = ['Clear of zero: ' + '; '.join(moved) + '.' if moved else 'No difference is clear of zero.']
  return Panel(figures.present(found), notes)


def probes(run: Run) -> Panel:
  """Probes from outside: also for traits that the run did not train."""
  probes = section(run.summary, 'probes')
  names = list(dict.fromkeys(metric for trait in probes.values() for metric in section(trait)))
  drawn = []
  for name in names:
    measure = words.measure(name)
    title = f'{"Margin on probes" if name == "margin" else measure.title}: trained {words.MINUS} base'
    deltas = {trait: estimate(section(probes, trait, name).get('delta')) for trait in probes}
    drawn.append(figures.by_trait(title, measure.unit, deltas, share=measure.share))
  rows = [(words.spoken(trait), *row) for trait, metrics in probes.items()
          for row in ((metrics_table(section(metrics)) or Table((), ())).rows)]  # fmt: skip
  head = ('trait', 'metric', *words.CONDITION_NAMES.values(), f'trained {words.MINUS} base')
  return Panel(figures.present(drawn), table=Table(head, rows) if rows else None)


def ranker(run: Run) -> Panel:
  """How well each ranker tells written replies in character from replies out of character."""
  traits, overall = section(run.audit, 'traits'), section(run.audit, 'overall')
  used = str(run.audit.get('ranker', ''))
  names = list(dict.fromkeys([*overall, *(ranker for audit in traits.values() for ranker in section(audit))]))
  names.sort(key=lambda name: name != used)
  drawn, rows = [], []
  for name in names:
    audited = {trait: section(audit, name) for trait, audit in traits.items()}
    with_examples = {t: estimate(section(a, 'examples').get('accuracy')) for t, a in audited.items()}
    without = {t: estimate(section(a, 'no_examples').get('accuracy')) for t, a in audited.items()}
    title = words.spoken(name).capitalize() + (' (the one used)' if name == used else '')
    drawn.append(figures.paired(title, 'right on kept pairs', ('with examples', 'with', with_examples),
                                ('without', 'without', without)))  # fmt: skip
    for trait, audit in [('all', section(overall, name)), *audited.items()]:
      if audit:
        rows.append((words.spoken(trait), words.spoken(name), *_audit_cells(audit)))
  head = ('trait', 'ranker', 'kept pairs, with examples', 'without', 'per side', 'choosing pairs',
          'same after a swap', 'position bias', 'transitive')  # fmt: skip
  weak = [words.spoken(str(trait)) for trait in listed(run.audit, 'weak_traits')]
  temperature = finite(run.audit.get('temperature'))
  soft = f'Soft labels: sigmoid of the score difference over {words.figure(temperature or 0)}.'
  notes = [
    f'Used: {words.spoken(used)}. {run.audit.get("why", "")}' if used else '',
    f'Length: {run.audit["length_treatment"]}' if run.audit.get('length_treatment') else '',
    soft if temperature is not None else '',
    f'Not told from chance on the choosing pairs: {words.together(weak)}. What follows for them rests on less.'
    if weak
    else '',
    *_sampled_notes(run.audit),
  ]
  return Panel(figures.present(drawn), [note for note in notes if note], Table(head, rows) if rows else None)


def _sampled_notes(audit: Mapping[str, Any]) -> list[str]:
  """What the rankings of the sampled replies followed: their length, and how they were drawn."""
  notes = []
  control, sampled = section(audit, 'length_control'), section(audit, 'sampled')
  before, after = finite(control.get('before')), finite(control.get('after'))
  if before is not None and after is not None:
    taken_out = f'; taken out of the labels (r = {words.figure(after)})' if control.get('per_token') else ''
    notes.append(f'Among the replies to a message the score follows length at r = {words.figure(before)}{taken_out}.')
  longer = finite(sampled.get('longer_wins'))
  if longer is not None:
    notes.append(f'Of two replies to a message the longer one wins {words.figure(longer, True)} of the time.')
  wins = {name: finite(value) for name, value in section(sampled, 'circular').items()}
  told = [f'{words.spoken(name)} {words.figure(value, True)}' for name, value in wins.items() if value is not None]
  if told:
    notes.append(
      f'Sampled replies, ranked first: {", ".join(told)}. For the likelihood ranker this is circular: what was drawn '
      'with a text shown is likelier under it almost by definition.'
    )
  return notes


def _audit_cells(audit: Mapping[str, Any]) -> tuple[str, ...]:
  sides = [
    f'{words.spoken(side)} {cell(estimate(value), True)}' for side, value in section(audit, 'examples', 'sides').items()
  ]
  return (
    cell(estimate(section(audit, 'examples').get('accuracy')), True),
    cell(estimate(section(audit, 'no_examples').get('accuracy')), True),
    '; '.join(sides) or '\u2013',
    cell(estimate(audit.get('choosing')), True),
    *(cell(estimate(audit.get(key)), True)
      for key in ('swap_consistency', 'position_bias', 'transitivity')),
  )  # fmt: skip


def preference(run: Run) -> Panel:
  """How well both preference models tell written pairs apart, and how their training went."""
  models = [name for name in ('train', 'judge') if section(run.preference, name)]
  kept = {name: {trait: estimate(value) for trait, value in section(run.preference, name, 'kept').items()}
          for name in models}  # fmt: skip
  drawn: list[Figure | None] = []
  if models:
    drawn.append(figures.paired(
      'Kept pairs told apart, without any trait text', 'right on kept pairs',
      ('trained against', 'train', kept.get('train', {})), ('held-out judge', 'judge', kept.get('judge', {})),
    ))  # fmt: skip
  drawn.append(_calibration(run, models))
  drawn += [figures.curve(title, unit, run.preference_metrics, key, split='model')
            for key, (title, unit) in _PREFERENCE_CURVES.items()]  # fmt: skip
  notes = []
  for name in models:
    correlation = finite(section(run.preference, name).get('length_correlation'))
    role = 'model trained against' if name == 'train' else 'held-out judge'
    if correlation is not None and abs(correlation) > _LENGTH_CORRELATION_LIMIT:
      notes.append(f'The score of the {role} follows the reply\u2019s length (r = {words.figure(correlation)}).')
    notes += _length_notes(section(run.preference, name), role)
  left_out = [words.spoken(str(trait)) for trait in listed(run.preference, 'left_out')]
  if left_out:
    notes.append(
      'Not told from chance by the model trained against, on the choosing pairs, and '
      f'{unproven(run)}: {words.together(left_out)}.'
    )
  return Panel(figures.present(drawn), notes, _preference_table(run, models))


def _calibration(run: Run, models: Sequence[str]) -> Figure | None:
  """Of pairs of replies to messages that a model was not trained on: what it predicts, and what the ranker says."""
  names = {'train': 'model trained against', 'judge': 'held-out judge'}
  series, rows = [], []
  for model in models:
    marks = []
    for row in listed(section(run.preference, model), 'calibration'):
      values = section({'': row}, '')
      predicted, label = finite(values.get('predicted')), estimate(values.get('label'))
      if predicted is not None and label is not None:
        # Of few messages Student's interval of a probability may end beyond what is one.
        low, high = (None if end is None else min(max(end, 0.0), 1.0) for end in (label.low, label.high))
        label = dataclasses.replace(label, low=low, high=high)
        text = f'{words.figure(predicted, True)} predicted, {cell(label, True)} by the ranker'
        marks.append((predicted, plots.Mark(label.mean, low, high, model, text)))
        rows.append((names[model], words.figure(predicted, True), cell(label, True), str(label.n or '')))
    if marks:
      series.append(plots.Trail(names[model], marks))
  if not series:
    return None
  title, x, y = (
    'Calibration',
    'chance that the first reply is better, predicted',
    'the same by the ranker\u2019s labels',
  )
  said = '; '.join(f'{name}: {predicted} predicted, {label}' for name, predicted, label, _ in rows)
  svg = plots.trails(series, x, y, f'{title}: {said}', diagonal=True)
  head = ('', 'predicted', 'by the ranker', 'messages')
  note = (
    'Pairs of replies to messages that the model was not trained on, in ten bins. On the dashed line predictions are '
    'as sure as they are right, by the ranker.'
  )
  return Figure(title, f'{y}, over what is predicted', Markup(svg), Table(head, rows), note)


def _length_notes(model: Mapping[str, Any], role: str) -> list[str]:
  """Where the length of replies was taken out of a model's score, and what that did."""
  told = []
  for trait, figures_of in section(model, 'length_control').items():
    before, after = (finite(section({'': figures_of}, '').get(key)) for key in ('before', 'after'))
    if before is not None and after is not None and before != after:
      told.append(f'{words.spoken(trait)} from {words.figure(before)} to {words.figure(after)}')
  was, now = (finite(model.get(f'length_correlation{end}')) for end in ('_before', ''))
  if not told or was is None or now is None:
    return []
  return [
    f'Length was taken out of the score of the {role}: its r among the replies to one message went for '
    f'{words.together(told)} on messages it was trained on. Of unseen replies as they come, r is '
    f'{words.figure(now)} in place of {words.figure(was)}.'
  ]


def unsure_judge(run: Run) -> dict[str, Estimate]:
  """The traits of whose kept pairs the held-out judge is not told from chance, and how many it has right."""
  kept = {trait: estimate(value) for trait, value in section(run.preference, 'judge', 'kept').items()}
  return {trait: value for trait, value in kept.items() if value is not None and value.side_of(0.5) != 1}


def unproven(run: Run) -> str:
  """What became of a trait whose preference model is no better than chance."""
  kept = section(run.config, 'config', 'policy').get('keep_unproven_traits') is True
  return 'rewarded all the same' if kept else 'left out of the reward'


def _preference_table(run: Run, models: Sequence[str]) -> Table | None:
  """Every scalar of preference/report.json, nested names joined by a comma, but for what has a figure of its own."""
  drawn = ('kept', 'choosing', 'calibration')
  flat = {name: _flat({key: value for key, value in section(run.preference, name).items() if key not in drawn})
          for name in models}  # fmt: skip
  keys = list(dict.fromkeys(key for values in flat.values() for key in values))
  rows = []
  for key in keys:
    cells = [_number_or_text(flat[name].get(key)) for name in models]
    rows.append((', '.join(words.spoken(part) for part in key.split('.')), *cells))
  head = ('', *('trained against' if name == 'train' else 'held-out judge' for name in models))
  return Table(head, rows) if rows else None


def policy(run: Run) -> Panel:
  """Each metric of the policy over its steps, and how far it went."""
  found = dict.fromkeys(key for row in run.policy_metrics for key in row if key != 'step')
  keys = [key for key in _POLICY_CURVES if key in found] + [key for key in found if key not in _POLICY_CURVES]
  named = {key: _POLICY_CURVES.get(key, (words.measure(key).title, 'as in the file')) for key in keys}
  notes, kl = [], estimate(section(run.summary, 'distance', 'kl').get('trained'))
  if kl:
    notes.append(
      f'In the end it is {words.figure(kl.mean)} nats a token ({words.interval(kl)}) from the starting model, on its '
      'own replies to held-out messages, drawn as the evaluation draws: KL of the distributions at temperature 1.'
    )
  return Panel(figures.present(figures.curve(*named[key], run.policy_metrics, key) for key in keys), notes)


def over_optimisation(run: Run) -> Panel:
  """What the model trained against and the held-out judge say of the same replies, over the square root of KL; and by
  which figures the judge chose the policy, where it did."""
  points: list[tuple[int, float, list[Estimate]]] = []
  for row in listed(run.summary, 'over_optimisation'):
    values = section({'': row}, '')
    step, kl = finite(values.get('step')), estimate(values.get('kl'))
    gains = [found for key in ('reward', 'judge', 'gap') if (found := estimate(values.get(key)))]
    if step is not None and kl is not None and len(gains) == 3:
      points.append((int(step), math.sqrt(max(kl.mean, 0.0)), gains))
  candidates = figures.present([_candidates(run)])
  if not points:
    return Panel(candidates)
  chosen = finite(run.choice.get('chosen'))
  # What is drawn for a step is drawn by what the steps before it made.
  ringed = len(points) - 1 if chosen is None else min(range(len(points)), key=lambda i: abs(points[i][0] - 1 - chosen))
  names = {'train': 'model trained against', 'judge': 'held-out judge'}
  series = []
  for place, (look, name) in enumerate(names.items()):
    marks = [
      (root, plots.Mark(v[place].mean, v[place].low, v[place].high, look, f'{words.difference(v[place])}, step {step}'))
      for step, root, v in points
    ]
    series.append(plots.Trail(name, marks, ringed))
  x, y = 'square root of KL, nats a reply', 'gain, in spreads of the score'
  said = '; '.join(
    f'step {step}: KL {words.figure(root**2)}, {words.difference(v[0])} and {words.difference(v[1])}'
    for step, root, v in points
  )
  title = 'Reward and held-out judge, as the policy moves away'
  svg = plots.trails(series, x, y, f'{title}: {said}')
  rows = [
    (str(step), words.figure(root**2), words.figure(root), *(words.difference(value) for value in values),
     str(values[0].n or ''))
    for step, root, values in points
  ]  # fmt: skip
  head = ('step', 'KL', 'square root', *names.values(), 'the first less the second', 'messages')
  ends = [f'{key}_{end}' for key in ('reward', 'judge', 'gap') for end in _ENDS]
  data: list[tuple[Any, ...]] = [('step', 'root_kl', *ends)]
  data += [(step, root, *(end for v in values for end in (v.mean, v.low, v.high))) for step, root, values in points]
  gap = points[ringed][2][2]
  more = {1: 'more than', 0: 'not clearly more or less than', -1: 'less than'}[gap.side_of(0.0)]
  if chosen is None:
    where = f'where the policy was kept (drawn before its last step, {points[ringed][0]})'
  else:
    where = f'nearest to the policy that was chosen, after step {chosen:g} (drawn before step {points[ringed][0]})'
  note = (
    f'At the ring, {where}, the model trained against credits it with {more} the held-out judge does: '
    f'{words.difference(gap)} spreads.'
  )
  return Panel([Figure(title, f'{y}, over the {x}', Markup(svg), Table(head, rows), note, data), *candidates])


def _candidates(run: Run) -> Figure | None:
  """The held-out judge's score of each checkpoint among which it chose."""
  found: list[tuple[int, Estimate, Estimate]] = []
  for row in listed(run.choice, 'candidates'):
    values = section({'': row}, '')
    step, judge, over = finite(values.get('step')), estimate(values.get('judge')), estimate(values.get('over_last'))
    if step is not None and judge and over:
      found.append((int(step), judge, over))
  if not found:
    return None
  chosen = finite(run.choice.get('chosen'))
  marks = [
    (float(step), plots.Mark(v.mean, v.low, v.high, 'judge', f'{words.difference(v)}, step {step}'))
    for step, v, _ in found
  ]
  ringed = next((i for i, (step, *_) in enumerate(found) if step == chosen), None)
  title, x, y = 'Which checkpoint is the policy', 'training step', 'score less that of all candidates, in spreads'
  said = '; '.join(f'step {step}: {words.difference(v)}' for step, v, _ in found)
  svg = plots.trails([plots.Trail('held-out judge', marks, ringed)], x, y, f'{title}: {said}')
  rows = [
    (str(step), words.difference(v), '\u2013' if step == found[-1][0] else words.difference(over), str(v.n or ''))
    for step, v, over in found
  ]
  head = ('step', 'held-out judge', 'less that of the last', 'messages')
  note = (
    f'The held-out judge alone chose the policy (ring), by replies of each checkpoint to {run.choice.get("messages")} '
    'training messages that it was not fitted to: kept pairs and held-out messages had no part in it. The best of '
    'several is in part the luckiest, and the same judge counts the wins in this report.'
  )
  data: list[tuple[Any, ...]] = [('step', *(f'{key}_{end}' for key in ('judge', 'over_last') for end in _ENDS))]
  data += [(step, *(getattr(value, end) for value in values for end in _ENDS)) for step, *values in found]
  return Figure(title, f'{y}, over the {x}s', Markup(svg), Table(head, rows), note, data)


def made(run: Run) -> Panel:
  """Times and the material: how many messages and replies, and how many of them were cut off."""
  split = Counter((str(row.get('trait') or 'neutral'), str(row.get('split'))) for row in run.messages)
  traits = list(dict.fromkeys(trait for trait, _ in split))
  rows = [(words.spoken(trait), str(split[trait, 'train']), str(split[trait, 'heldout'])) for trait in traits]
  finish = Counter((str(row.get('condition')), row.get('finish') == 'length') for row in run.replies)
  notes = [
    f'Replies written, {condition}: {sum(cut)}, {words.percent(cut[1] / sum(cut))} of them cut off by length.'
    for condition in dict.fromkeys(condition for condition, _ in finish)
    for cut in [(finish[condition, False], finish[condition, True])]
  ]
  known = seconds(run)
  drawn = figures.durations('Time of each stage', known, words.at_least(cut_off(run)))
  table = Table(('messages for', 'to train on', 'held out'), rows) if rows else None
  return Panel(figures.present([drawn]), notes, table)


def settings(run: Run) -> list[tuple[str, Table]]:
  """Everything config.json and each stage's counts hold, as two-column tables."""
  parts = {key: value for key, value in run.config.items() if isinstance(value, Mapping)}
  scalars = {key: value for key, value in run.config.items() if key not in parts}
  parts = {**({'general': scalars} if scalars else {}), **parts}
  parts |= {f'counts of {name}': section(stage, 'counts') for name, stage in run.stages.items()}
  tables = []
  for name, values in parts.items():
    rows = [(key, _number_or_text(value, exact=True)) for key, value in _flat(values).items()]
    if rows:
      tables.append((name, Table(('field', 'value'), rows)))
  return tables


def _flat(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in values.items():
    if isinstance(value, Mapping) and value and estimate(value) is None:
      flat |= _flat(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def _number_or_text(value: Any, exact: bool = False) -> str:
  if value is None:
    return '\u2013'
  if isinstance(value, Mapping):
    found = estimate(value)
    return cell(found, False) if found else '\u2013'
  number = finite(value)
  return words.figure(number) if number is not None and not exact else str(value)
