"""The report's page: from a run folder to one self-contained HTML document."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from charjax.report import document, figures, words
from charjax.report.figures import Figure, Table
from charjax.report.people import People, people
from charjax.report.read import CONDITIONS, STAGES, Estimate, Run, estimate, finite, listed, read_run, section
from charjax.report.replies import Exchange, exchanges, samples_over_time, typical
from charjax.review import verdicts

_LENGTH_CORRELATION_LIMIT = 0.2  # above it, the reward may be paying for length

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
  'grad_norm': ('Gradient norm', 'norm'),
  'skipped': ('Steps left out, not finite', 'share of steps'),
}
_PREFERENCE_CURVES = {
  'loss': ('Loss', 'nats per pair'),
  'accuracy': ('Accuracy on training pairs', 'share of pairs'),
}


@dataclasses.dataclass(frozen=True)
class TraitView:
  """What the page shows of one trait."""

  id: str
  name: str
  statement: str
  opposites: Mapping[str, str]
  verdict: tuple[str, str]
  weight: str
  warnings: Sequence[str]
  sentences: Sequence[str]
  figures: Sequence[Figure]
  table: Table | None
  typical: Exchange | None
  anchor: str


@dataclasses.dataclass(frozen=True)
class Panel:
  """Figures and remarks under one heading; the page leaves out a panel without either."""

  figures: Sequence[Figure]
  notes: Sequence[str] = ()
  table: Table | None = None


def render(workdir: epath.PathLike) -> str:
  """The whole page: of the folder's name and contents, times among them, and nothing else.

  Raises:
    UserError: there is no such folder, or a file in it cannot be read.
  """
  run = read_run(workdir)
  groups = _groups(run)
  judged = people(run, verdicts.read_all(workdir))
  return document.fill(
    'page.html',
    'page.js',
    title=words.spoken(str(run.character.get('name', run.name))),
    description=run.character.get('description', ''),
    meta=_meta(run),
    answer=_answer(run, judged),
    overview=_overview(run),
    traits=_traits(run, groups),
    people=judged,
    groups=groups,
    side_effects=_conditions(section(run.summary, 'side_effects')),
    neutral=_conditions(section(run.summary, 'neutral')),
    probes=_probes(run),
    ranker=_ranker(run),
    preference=_preference(run),
    policy_panel=_policy(run),
    samples=samples_over_time(run),
    made=_made(run),
    settings=_settings(run),
    figures_json=without_nan(run.summary),
    condition_names=words.CONDITION_NAMES,
    spoken=words.spoken,
    judge_figure=lambda value: f'{value:+.2f}'.replace('-', words.MINUS),
  )


def _ids(run: Run) -> list[str]:
  return [str(trait['id']) for trait in run.traits]


def _metric(run: Run, name: str, condition: str) -> dict[str, Estimate | None]:
  """One metric under one condition, for every trait of the run."""
  traits = section(run.summary, 'traits')
  return {trait: estimate(section(traits, trait, name).get(condition)) for trait in _ids(run)}


def _meta(run: Run) -> list[str]:
  model, seed = section(run.config, 'config', 'model').get('path'), run.config.get('seed')
  parts = [f'model {model}' if model else '', f'run {run.name}', f'seed {seed}' if seed is not None else '']
  return [part for part in parts if part]


def _answer(run: Run, judged: People | None) -> list[str]:
  """What training did, in a few sentences; the first is the answer."""
  margins, wins = _metric(run, 'margin', 'delta'), _metric(run, 'win_rate', 'trained')
  known = [value for value in margins.values() if value is not None]
  if not known:
    return ['This run has not been evaluated yet, so the page cannot say what training changed.']
  rose = sum(value.side_of(0.0) == 1 for value in known)
  of = f'{rose} of {len(known)} traits' if len(known) > 1 else ('the one trait' if rose else 'no trait')
  sentences = [f'Training moved {of} clearly towards the character.']
  sentences.append(words.count_sentence(
    margins, 0.0, 'in-character replies became likelier for', 'the change is not clear of zero for',
    'in-character replies became less likely for',
  ))  # fmt: skip
  by_judge = words.count_sentence(
    wins, 0.5, 'a held-out judge prefers the trained model to the base model for', 'the judge is undecided for',
    'the judge prefers the base model for',
  )  # fmt: skip
  by_people = words.count_sentence(
    judged.wins if judged else {}, 0.5, 'people who judged blind prefer the trained model to the base model for',
    'people are undecided for', 'people prefer the base model for',
  )  # fmt: skip
  sentences += [by_judge, by_people]
  sentences.append(_neutral_sentence(run))
  return [sentence for sentence in sentences if sentence]


def _neutral_sentence(run: Run) -> str:
  neutral = section(run.summary, 'neutral')
  found = section(neutral, 'log_prob')
  delta, base = estimate(found.get('delta')), estimate(found.get('base'))
  if delta is None or base is None or not base.mean:
    return ''
  share = delta.mean / abs(base.mean)
  direction = 'lost' if delta.mean < 0 else 'gained'
  clear = '' if delta.side_of(0.0) else ', not clear of zero'
  size = words.percent(abs(share))
  return f'On neutral requests, reference answers {direction} {size} of their log-probability{clear}.'


def _overview(run: Run) -> list[Figure]:
  margin, win = words.measure('margin'), words.measure('win_rate')
  return figures.present(
    [
      figures.by_trait(
        f'{margin.title}: trained {words.MINUS} base',
        margin.unit,
        _metric(run, 'margin', 'delta'),
        note=margin.meaning,
      ),
      figures.by_trait(
        f'{win.title}: trained',
        win.unit,
        _metric(run, 'win_rate', 'trained'),
        reference=0.5,
        share=True,
        note=win.meaning,
      ),
    ]
  )


def _traits(run: Run, groups: Sequence['Group']) -> list[TraitView]:
  weak, left_out = listed(run.audit, 'weak_traits'), listed(run.preference, 'left_out')
  rewarded = listed(section(run.config, 'config', 'policy'), 'traits')
  views = []
  for trait in run.traits:
    name = str(trait['id'])
    metrics = section(run.summary, 'traits', name)
    margin, win = figures.estimates(metrics.get('margin')), figures.estimates(metrics.get('win_rate'))
    against_prompted = estimate(section(metrics, 'win_rate_vs_prompted').get('trained'))
    internal = section(run.summary, 'internalisation', name)
    sentences = [
      words.change_sentence(margin['delta']),
      words.share_sentence(margin['delta'], internal),
      words.win_sentence(win['trained'], against_prompted),
    ]
    group = next((group for group in groups if group.trait == name), None)
    views.append(TraitView(
      id=name,
      name=words.spoken(name),
      statement=str(trait.get('statement', '')),
      opposites={str(key): str(text) for key, text in section(trait, 'opposites').items()},
      verdict=words.verdict(margin['delta']),
      weight=words.weight(trait.get('weight', 1.0)),
      warnings=[
        *(['not rewarded in this run'] if rewarded and name not in rewarded else []),
        *(['not told from chance on its choosing pairs'] if name in weak else []),
        *([f'not told from chance without its text: {_unproven(run)}'] if name in left_out else []),
      ],
      sentences=[sentence for sentence in sentences if sentence],
      figures=figures.present(
        figures.conditions(words.measure(metric), metrics.get(metric)) for metric in ('margin', 'win_rate')
      ),
      table=_metrics_table(metrics),
      typical=typical(group.exchanges) if group else None,
      anchor=group.anchor if group else '',
    ))  # fmt: skip
  return views


def _metrics_table(metrics: Mapping[str, Any]) -> Table | None:
  """Every metric of a trait or probe under every condition, as `mean (interval)`."""
  rows = []
  for name, metric in metrics.items():
    measure, found = words.measure(name), figures.estimates(metric)
    if all(value is None for value in found.values()):
      continue
    delta = found.pop('delta')
    cells = [*(_cell(value, measure.share) for value in found.values()),
             words.difference(delta, measure.share) if delta else '\u2013']  # fmt: skip
    rows.append((f'{measure.title}, {measure.unit}', *cells))
  head = ('', *(words.CONDITION_NAMES[name] for name in CONDITIONS), f'trained {words.MINUS} base')
  return Table(head, rows) if rows else None


def _cell(value: Estimate | None, share: bool) -> str:
  if value is None:
    return '\u2013'
  between = words.interval(value, share)
  return words.figure(value.mean, share) + (f' ({between})' if between else '')


def _conditions(metrics: Mapping[str, Any]) -> Panel:
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


def _probes(run: Run) -> Panel:
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
          for row in ((_metrics_table(section(metrics)) or Table((), ())).rows)]  # fmt: skip
  head = ('trait', 'metric', *words.CONDITION_NAMES.values(), f'trained {words.MINUS} base')
  return Panel(figures.present(drawn), table=Table(head, rows) if rows else None)


def _ranker(run: Run) -> Panel:
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
    f'{words.spoken(side)} {_cell(estimate(value), True)}'
    for side, value in section(audit, 'examples', 'sides').items()
  ]
  return (
    _cell(estimate(section(audit, 'examples').get('accuracy')), True),
    _cell(estimate(section(audit, 'no_examples').get('accuracy')), True),
    '; '.join(sides) or '\u2013',
    _cell(estimate(audit.get('choosing')), True),
    *(_cell(estimate(audit.get(key)), True)
      for key in ('swap_consistency', 'position_bias', 'transitivity')),
  )  # fmt: skip


def _preference(run: Run) -> Panel:
  models = [name for name in ('train', 'judge') if section(run.preference, name)]
  kept = {name: {trait: estimate(value) for trait, value in section(run.preference, name, 'kept').items()}
          for name in models}  # fmt: skip
  drawn: list[Figure | None] = []
  if models:
    drawn.append(figures.paired(
      'Kept pairs told apart, without any trait text', 'right on kept pairs',
      ('trained against', 'train', kept.get('train', {})), ('held-out judge', 'judge', kept.get('judge', {})),
    ))  # fmt: skip
  drawn += [figures.curve(title, unit, run.preference_metrics, key, split='model')
            for key, (title, unit) in _PREFERENCE_CURVES.items()]  # fmt: skip
  notes = []
  for name in models:
    correlation = finite(section(run.preference, name).get('length_correlation'))
    if correlation is not None and abs(correlation) > _LENGTH_CORRELATION_LIMIT:
      role = 'the model trained against' if name == 'train' else 'the held-out judge'
      notes.append(f'The score of {role} follows the reply\u2019s length (r = {words.figure(correlation)}).')
  left_out = [words.spoken(str(trait)) for trait in listed(run.preference, 'left_out')]
  if left_out:
    notes.append(
      f'Not told from chance by the model trained against, and {_unproven(run)}: {words.together(left_out)}.'
    )
  return Panel(figures.present(drawn), notes, _preference_table(run, models))


def _unproven(run: Run) -> str:
  """What became of a trait whose preference model is no better than chance."""
  kept = section(run.config, 'config', 'policy').get('keep_unproven_traits') is True
  return 'rewarded all the same' if kept else 'left out of the reward'


def _preference_table(run: Run, models: Sequence[str]) -> Table | None:
  """Every scalar of preference/report.json, nested names joined by a comma; `kept` has its own figure."""
  flat = {name: _flat({key: value for key, value in section(run.preference, name).items() if key != 'kept'})
          for name in models}  # fmt: skip
  keys = list(dict.fromkeys(key for values in flat.values() for key in values))
  rows = []
  for key in keys:
    cells = [_number_or_text(flat[name].get(key)) for name in models]
    rows.append((', '.join(words.spoken(part) for part in key.split('.')), *cells))
  head = ('', *('trained against' if name == 'train' else 'held-out judge' for name in models))
  return Table(head, rows) if rows else None


def _policy(run: Run) -> Panel:
  found = dict.fromkeys(key for row in run.policy_metrics for key in row if key != 'step')
  keys = [key for key in _POLICY_CURVES if key in found] + [key for key in found if key not in _POLICY_CURVES]
  named = {key: _POLICY_CURVES.get(key, (words.measure(key).title, 'as in the file')) for key in keys}
  return Panel(figures.present(figures.curve(*named[key], run.policy_metrics, key) for key in keys))


@dataclasses.dataclass(frozen=True)
class Group:
  """The replies to one trait's messages; `trait` is '' for neutral messages."""

  trait: str
  name: str
  anchor: str
  exchanges: Sequence[Exchange]


def _groups(run: Run) -> list[Group]:
  found = exchanges(run.evaluation_replies)
  order = [*(trait for trait in _ids(run) if trait in found), *(t for t in found if t and t not in _ids(run))]
  order += [''] if '' in found else []
  return [
    Group(trait, words.spoken(trait) if trait else 'neutral', f'replies-{index}', found[trait])
    for index, trait in enumerate(order)
  ]


def _made(run: Run) -> Panel:
  """Times and the material: how many messages and replies, and how many of them were cut off."""
  seconds = {name: finite(run.stages[name].get('seconds')) for name in STAGES if name in run.stages}
  split = Counter((str(row.get('trait') or 'neutral'), str(row.get('split'))) for row in run.messages)
  traits = list(dict.fromkeys(trait for trait, _ in split))
  rows = [(words.spoken(trait), str(split[trait, 'train']), str(split[trait, 'heldout'])) for trait in traits]
  finish = Counter((str(row.get('condition')), row.get('finish') == 'length') for row in run.replies)
  notes = [
    f'Replies written, {condition}: {sum(cut)}, {words.percent(cut[1] / sum(cut))} of them cut off by length.'
    for condition in dict.fromkeys(condition for condition, _ in finish)
    for cut in [(finish[condition, False], finish[condition, True])]
  ]
  known = {name: length for name, length in seconds.items() if length is not None}
  drawn = figures.durations('Time of each stage', known)
  table = Table(('messages for', 'to train on', 'held out'), rows) if rows else None
  return Panel(figures.present([drawn]), notes, table)


def _settings(run: Run) -> list[tuple[str, Table]]:
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
    return _cell(found, False) if found else '\u2013'
  number = finite(value)
  return words.figure(number) if number is not None and not exact else str(value)


def without_nan(value: Any) -> Any:
  """The same value with NaN and infinities as null: they are no JSON."""
  if isinstance(value, Mapping):
    return {key: without_nan(item) for key, item in value.items()}
  if isinstance(value, list):
    return [without_nan(item) for item in value]
  return finite(value) if isinstance(value, float) else value
