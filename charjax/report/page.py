"""The report's page: from a run folder to one self-contained HTML document."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from charjax.progress import duration
from charjax.report import behaviour, document, figures, panels, words
from charjax.report.columns import seed_of
from charjax.report.figures import Figure, Table
from charjax.report.people import People, people
from charjax.report.phrases import phrases
from charjax.report.provenance import provenance
from charjax.report.read import Estimate, Run, cut_off, estimate, finite, listed, read_run, seconds, section
from charjax.report.replies import Exchange, exchanges, samples_over_time, typical
from charjax.review import verdicts


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
    in_short=_in_short(run),
    overview=_overview(run),
    traits=_traits(run, groups, judged),
    people=judged,
    groups=groups,
    provenance=provenance(run, {group.trait: group.exchanges for group in groups}),
    rigidity=behaviour.rigidity(run),
    robustness=behaviour.robustness(run),
    drift=behaviour.drift(run),
    side_effects=_side_effects(run),
    revealed=behaviour.preference(run),
    neutral=panels.conditions(section(run.summary, 'neutral')),
    probes=panels.probes(run),
    ranker=panels.ranker(run),
    preference=panels.preference(run),
    policy_panel=panels.policy(run),
    over_optimisation=panels.over_optimisation(run),
    samples=samples_over_time(run),
    made=panels.made(run),
    settings=panels.settings(run),
    figures_json=without_nan(
      {
        'evaluation': run.summary,
        'behaviour': run.behaviour,
        'rankings': run.audit,
        'preference': run.preference,
        'policy': run.choice,
      }
    ),
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
  model, known = section(run.config, 'config', 'model').get('path'), run.config.get('seed') is not None
  parts = [f'model {model}' if model else '', f'run {run.name}', f'seed {seed_of(run)}' if known else '']
  return [part for part in parts if part]


def _answer(run: Run, judged: People | None) -> list[str]:
  """What training did, in a few sentences; the first is the answer."""
  margins, wins = _metric(run, 'margin', 'delta'), _metric(run, 'win_rate', 'trained')
  old = words.outdated_sentence(run.outdated)
  if not section(run.summary, 'traits'):
    return ['This run has not been evaluated yet, so the page cannot say what training changed.', *filter(None, [old])]
  known = [value for value in margins.values() if value is not None]
  if known:
    rose = sum(value.side_of(0.0) == 1 for value in known)
    of = f'{rose} of {len(known)} traits' if len(known) > 1 else ('the one trait' if rose else 'no trait')
    sentences = [f'Training moved {of} clearly towards the character.']
    sentences.append(words.count_sentence(
      margins, 0.0, 'in-character replies became likelier for', 'the change is not clear of zero for',
      'in-character replies became less likely for',
    ))  # fmt: skip
  else:
    sentences = ['The character has no kept pairs, so that the held-out judge alone says what training changed.']
  by_judge = words.count_sentence(
    wins, 0.5, 'a held-out judge prefers the trained model to the base model for', 'the judge is undecided for',
    'the judge prefers the base model for',
  )  # fmt: skip
  unsure = [
    f'{words.spoken(trait)} ({words.percent(kept.mean)} right{of and f", {of}"})'
    for trait, kept in panels.unsure_judge(run).items()
    if (value := wins.get(trait)) is not None and value.side_of(0.5)
    for of in [words.interval(kept, share=True)]
  ]
  if unsure:
    by_judge += (
      f' On the written pairs of {words.together(unsure)} the judge is not told from chance, so what it prefers there '
      'says little.'
    )
  by_people = words.count_sentence(
    judged.wins if judged else {}, 0.5, 'people who judged blind prefer the trained model to the base model for',
    'people are undecided for', 'people prefer the base model for',
  )  # fmt: skip
  sentences += [by_judge, by_people]
  sentences += [_neutral_sentence(run), _cost_sentence(run), old]
  return [sentence for sentence in sentences if sentence]


@dataclasses.dataclass(frozen=True)
class Line:
  """A trait in one sentence."""

  name: str
  anchor: str
  sentence: str


def _in_short(run: Run) -> list[Line]:
  margins, wins = _metric(run, 'margin', 'delta'), _metric(run, 'win_rate', 'trained')
  return [
    Line(words.spoken(trait), f'trait-{place}', sentence)
    for place, trait in enumerate(_ids(run))
    if (sentence := words.in_short(margins[trait], wins[trait]))
  ]


def _cost_sentence(run: Run) -> str:
  """How far the policy went, how long its replies are, and how long all took."""
  told = []
  if kl := estimate(section(run.summary, 'distance', 'kl').get('trained')):
    told.append(f'the policy is {words.cell(kl, False)} nats a token from the starting model')
  length = figures.estimates(section(run.summary, 'side_effects').get('length'))
  before, after = length['base'], length['trained']
  if before and after:
    told.append(f'its replies have {words.cell(after, False)} tokens, and {words.cell(before, False)} before')
  if took := sum(seconds(run).values()):
    told.append(f'the stages took {"at least " if cut_off(run) else ""}{duration(took)} in all')
  text = '; '.join(told)
  return text[:1].upper() + text[1:] + '.' if text else ''


def _neutral_sentence(run: Run) -> str:
  neutral = section(run.summary, 'neutral')
  found = section(neutral, 'log_prob')
  delta, base = estimate(found.get('delta')), estimate(found.get('base'))
  if delta is None or base is None or not base.mean:
    return ''
  direction, sign = ('lost', -1) if delta.mean < 0 else ('gained', 1)
  low, high = (None if end is None else sign * end / abs(base.mean) for end in (delta.low, delta.high)[::sign])
  share = Estimate(abs(delta.mean / base.mean), low, high)
  clear = '' if delta.side_of(0.0) else ', not clear of zero'
  size = words.cell(share, True)
  return f'On neutral requests, reference answers {direction} {size} of their log-probability{clear}.'


def _side_effects(run: Run) -> panels.Panel:
  """What was counted on the held-out messages, and on prompts that were written for it."""
  found = panels.conditions(section(run.summary, 'side_effects') | section(run.behaviour, 'side_effects'))
  return dataclasses.replace(found, figures=[*found.figures, *phrases(run)])


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


# Of each trait, in every condition.
_SHOWN = ('margin', 'win_rate', 'judge', 'likelihood')


def _traits(run: Run, groups: Sequence['Group'], judged: People | None) -> list[TraitView]:
  weak, left_out = listed(run.audit, 'weak_traits'), listed(run.preference, 'left_out')
  rewarded = listed(section(run.config, 'config', 'policy'), 'traits')
  unsure, views = panels.unsure_judge(run), []
  for trait in run.traits:
    name = str(trait['id'])
    metrics = section(run.summary, 'traits', name) | {'likelihood': section(run.behaviour, 'likelihood').get(name)}
    margin, win = figures.estimates(metrics.get('margin')), figures.estimates(metrics.get('win_rate'))
    against_prompted = estimate(section(metrics, 'win_rate_vs_prompted').get('trained'))
    internal = section(run.summary, 'internalisation', name)
    sentences = [
      words.change_sentence(margin['delta']),
      words.share_sentence(margin['delta'], internal),
      words.win_sentence(win['trained'], against_prompted),
      words.people_sentence(judged.wins.get(name) if judged else None),
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
        *(['held-out judge not told from chance on its kept pairs'] if name in unsure else []),
        *([f'not told from chance without its text: {panels.unproven(run)}'] if name in left_out else []),
      ],
      sentences=[sentence for sentence in sentences if sentence],
      figures=figures.present(
        figures.conditions(words.measure(metric), metrics.get(metric)) for metric in _SHOWN
      ),
      table=panels.metrics_table(metrics),
      typical=typical(group.exchanges) if group else None,
      anchor=group.anchor if group else '',
    ))  # fmt: skip
  return views


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


def without_nan(value: Any) -> Any:
  """The same value with NaN and infinities as null: they are no JSON."""
  if isinstance(value, Mapping):
    return {key: without_nan(item) for key, item in value.items()}
  if isinstance(value, list):
    return [without_nan(item) for item in value]
  return finite(value) if isinstance(value, float) else value
