"""Runs side by side: what differs and what it did, figures pooled and paired, and a page that stands by itself."""

import base64
import json
import math
import re
import shutil

import numpy as np
import pytest
from etils import epath
from report_run import HOSTILE, TRAITS, write_run
from test_report import Page

from charjax.errors import UserError
from charjax.main import main
from charjax.report import compare, differences, words
from charjax.report.columns import head_to_head, margin_apart, read_columns, seed_of
from charjax.report.read import read_run
from charjax.review import verdicts
from charjax.review.pairs import pairs
from charjax.stages import statistics

WEAK, STRONG = dict.fromkeys(TRAITS, 0.01), dict.fromkeys(TRAITS, 0.2)


@pytest.fixture
def runs(tmp_path):
  """Two that differ in strength, one of which is reworded, and one that was only begun."""
  found = [
    write_run(tmp_path / 'weak', settings={'policy': {'kl': 0.4}}, effects=WEAK),
    write_run(tmp_path / 'strong', settings={'policy': {'kl': 0.02}}, effects=STRONG),
    write_run(tmp_path / 'begun', settings={'policy': {'kl': 0.1}}),
  ]
  text = (found[1] / 'character.toml').read_text()
  (found[1] / 'character.toml').write_text(text.replace('I have no body', 'I am a program'))
  for stage in ('rankings', 'preference', 'baseline', 'policy', 'evaluation', 'behaviour'):
    shutil.rmtree(found[2] / stage)
  return [epath.Path(run) for run in found]


def page_of(folders, tmp_path) -> tuple[Page, str]:
  output = epath.Path(tmp_path / 'out' / 'page.html')
  compare.write(folders, output)
  return Page(output.read_text()), output.read_text()


def test_the_page_says_what_differs_and_what_it_did(runs, tmp_path):
  page, text = page_of(runs, tmp_path)
  assert 'On the mean over 4 traits, training moved the margin clearly towards the character in strong.' in text
  assert 'Traits that moved clearly towards the character: 4 of 4 in strong.' in text
  assert 'On the mean over 4 traits, the margin is above that of weak in strong by +0.2' in text
  assert 'begun is not evaluated yet (finished: messages and replies); its figures are missing.' in text
  assert page.tables['Settings that are not the same in all runs'][0] == ['run', 'policy.kl']
  assert 'I <del>have no body,</del> <ins>am a program,</ins> and I say so' in text.replace('AI: ', '')
  summary = page.tables['Side by side, mean (95% interval)']
  assert [row[0] for row in summary[1:]] == ['weak', 'strong', 'begun']
  # A table behind every plot, with a row a run.
  plots = [attrs for tag, attrs in page.tags if tag == 'svg']
  assert len(plots) == text.count('<details><summary>Numbers') > 10
  assert page.tables['curiosity, mean (95% interval)'][2][0] == 'strong'


def test_what_a_run_was_asked_besides_stands_beside_the_others(runs, tmp_path):
  """Also what people said, of whom only one run has any; and a run without a behaviour stage has dashes."""
  for pair in pairs(read_run(runs[1])):
    with verdicts.opened(runs[1], 'ann') as file:
      file.give('ann', pair, 'left' if pair.sides('ann')[0] == 'trained' else 'right')
  (runs[0] / 'behaviour' / 'summary.json').unlink()
  found = json.loads((runs[1] / 'behaviour' / 'summary.json').read_text())
  damaged = found | {'preference': found['preference'] | {'options': ['?', {}, *found['preference']['options']]}}
  (runs[1] / 'behaviour' / 'summary.json').write_text(json.dumps(damaged))
  runs[1] = runs[1].rename(runs[1].parent / 'kl_0.02-strong')
  page, text = page_of(runs, tmp_path)
  head, *rows = page.tables['honesty, mean (95% interval)']
  weak, strong = (dict(zip(head, row, strict=True)) for row in rows)
  ratio = found['rigidity']['honesty']['unrelated']['likelihood']['delta']['mean']
  assert strong['ratio on unrelated requests'].startswith(words.figure(ratio, signed=True))
  assert strong['wins by people'].startswith('100% (') and weak['margin, trained \u2212 base'] != '\u2013'
  assert weak['ratio on unrelated requests'] == weak['wins by people'] == '\u2013'
  forms = next(rows for name, rows in page.tables.items() if name.startswith('Under other forms'))
  assert [row[0] for row in forms[1:]] == ['weak', 'kl_0.02-strong']
  means = [trait['as JSON']['likelihood']['delta']['mean'] for trait in found['robustness'].values()]
  assert dict(zip(forms[0], forms[2], strict=True))['as JSON'].startswith(words.figure(np.mean(means), signed=True))
  assert 'href="#behaviour"' in text and 'Claims to be human: trained' in text


def test_stages_that_are_gone_and_judges_that_are_none_are_told_of(runs, tmp_path):
  shutil.rmtree(runs[1] / 'policy')
  _, text = page_of(runs, tmp_path)
  assert 'strong has no finished policy; what that would tell is missing.' in text
  assert (
    'The held-out judge of all runs is not told from chance on the written pairs of perspectives and honesty.' in text
  )


def test_the_page_stands_by_itself(runs, tmp_path):
  # Whatever the files say.
  summary = json.loads((runs[1] / 'evaluation' / 'summary.json').read_text())
  summary['traits'][HOSTILE] = summary['traits']['honesty']
  summary['side_effects'][HOSTILE] = summary['side_effects']['length']
  (runs[1] / 'evaluation' / 'summary.json').write_text(json.dumps(summary))
  record = json.loads((runs[0] / 'config.json').read_text())
  record['config']['model']['path'] = HOSTILE
  (runs[0] / 'config.json').write_text(json.dumps(record))
  (runs[0] / 'report').mkdir()
  (runs[0] / 'report' / 'index.html').write_text('')
  page, text = page_of(runs, tmp_path)
  assert len(page.ids) == len(set(page.ids))
  targets = {attrs['href'] for tag, attrs in page.tags if tag == 'a'}
  links = {target for target in targets if not target.startswith(('#', 'data:'))}
  assert links == {'../weak/report/index.html'} and {t[1:] for t in targets if t.startswith('#')} <= set(page.ids)
  assert not [tag for tag, _ in page.tags if tag in ('script', 'img', 'iframe', 'link', 'form')]
  assert not [name for _, attrs in page.tags for name in attrs if name.startswith('on') or name == 'style']
  policy = next(attrs['content'] for tag, attrs in page.tags if attrs.get('http-equiv') == 'Content-Security-Policy')
  assert policy.startswith("default-src 'none'") and 'script-src' not in policy and '://' not in text
  data = next(target for target in targets if target.startswith('data:application/json')).split(',')[1]
  assert json.loads(base64.b64decode(data))[str(runs[0])]['settings']['policy.kl'] == 0.4


def test_differences_are_taken_pair_by_pair_and_message_by_message(runs):
  weak, strong, _ = read_columns(runs)
  found = margin_apart(weak, strong, 'honesty')
  moved = [
    {row['pair']: row['trained'] - row['base'] for row in column.first.margins if row['trait'] == 'honesty'}
    for column in (weak, strong)
  ]
  expected = statistics.interval([moved[1][pair] - moved[0][pair] for pair in moved[0]])
  assert (found.mean, found.low, found.high) == (expected['mean'], expected['low'], expected['high'])
  # Without the pairs, the two intervals as if they were independent.
  for run in runs[:2]:
    (run / 'evaluation' / 'margins.jsonl').unlink()
  weak, strong, _ = read_columns(runs)
  one, other = weak.margin('honesty'), strong.margin('honesty')
  apart = margin_apart(weak, strong, 'honesty')
  assert apart.mean == pytest.approx(other.mean - one.mean)
  assert apart.high - apart.mean == pytest.approx(math.hypot(one.mean - one.low, other.high - other.mean))

  hits = []
  for message in {row['message'] for row in weak.first.evaluation_replies if row['trait'] == 'honesty'}:
    scores = [
      [row['score'] for row in column.first.evaluation_replies
       if row['message'] == message and row['condition'] == 'trained']
      for column in (weak, strong)
    ]  # fmt: skip
    hits.append(np.mean([[b > a for b in scores[1]] for a in scores[0]]))
  assert head_to_head(weak, strong, 'honesty').mean == pytest.approx(np.mean(hits))
  # Another judge cannot compare them.
  stage = runs[1] / 'preference' / 'stage.json'
  stage.write_text(stage.read_text().replace('preference 0', 'preference 1'))
  assert head_to_head(*read_columns(runs)[:2], 'honesty') is None


def test_seeds_are_pooled(tmp_path):
  folders = [epath.Path(write_run(tmp_path / f'kl=0.1,seed={seed}', seed=seed)) for seed in (0, 1, 2)]
  folders.append(epath.Path(write_run(tmp_path / 'other', settings={'policy': {'kl': 0.5}})))
  pooled, other = read_columns(folders)
  assert (pooled.name, len(pooled.runs), other.name) == ('kl=0.1 (3 seeds)', 3, 'other')
  means = [
    json.loads((folder / 'evaluation' / 'summary.json').read_text())['traits']['honesty']['judge']['delta']['mean']
    for folder in folders[:3]
  ]
  found = pooled.figure('traits', 'honesty', 'judge', 'delta')
  assert found.mean == pytest.approx(np.mean(means)) and found.n == 3
  assert found.high - found.mean == pytest.approx(4.3027 * np.std(means, ddof=1) / np.sqrt(3), rel=1e-4)
  assert differences.fields([pooled, other]) == {'seed': ['0 / 1 / 2', '0'], 'policy.kl': ['0.04', '0.5']}
  assert 'Student\u2019s t over the seeds' in page_of(folders, tmp_path)[1]
  # Other policies from the same data are pooled, too, and the luck of the messages stays in the interval.
  again = [epath.Path(write_run(tmp_path / f'again-{n}', settings={'policy': {'seed': n}})) for n in (7, 8)]
  [pooled] = read_columns([folders[0], *again])
  assert [seed_of(run) for run in pooled.runs] == ['0', '0+7', '0+8']
  judge = [run.summary['traits']['honesty']['judge']['delta'] for run in pooled.runs]
  found = pooled.figure('traits', 'honesty', 'judge', 'delta')
  assert found.high - found.low > 0.9 * min(row['high'] - row['low'] for row in judge)
  # Those of several data are not independent of each other.
  assert len(read_columns([*folders[:2], *again])) == 4


def test_groups_of_seeds_whose_names_begin_alike_stay_two(tmp_path):
  folders = [
    write_run(tmp_path / f'run-{name}', seed, settings={'policy': {'kl': kl}}, effects=effects)
    for name, seed, kl, effects in ((1, 0, 0.4, WEAK), (2, 1, 0.4, WEAK), (3, 0, 0.1, STRONG), (4, 1, 0.1, STRONG))
  ]
  columns = read_columns([epath.Path(folder) for folder in folders])
  assert [column.name for column in columns] == ['run (2 seeds)', 'run-3 (2 seeds)']
  assert columns[0].margin('honesty').mean < 0.1 < columns[1].margin('honesty').mean


def test_the_luck_of_a_seed_is_in_all_its_traits(tmp_path):
  """Two seeds, of which one moved every trait by twice as much: the mean over traits is no surer than each."""
  effects = [dict.fromkeys(TRAITS, size) for size in (0.1, 0.2)]
  folders = [epath.Path(write_run(tmp_path / f's-{seed}', seed, effects=effects[seed])) for seed in (0, 1)]
  (column,) = read_columns(folders)
  mean, one = column.mean(list(TRAITS), 'margin'), column.margin('honesty')
  # Student's t of two runs a tenth apart: 12.7 times 0.05.
  assert mean.high - mean.mean > 0.55 and mean.high - mean.mean == pytest.approx(one.high - one.mean, rel=0.25)
  paths = [('robustness', trait, 'as an email', 'likelihood', 'delta') for trait in TRAITS]
  mean, one = column.behaviour(*paths), column.behaviour(paths[0])
  assert mean.high - mean.mean > 0.5 and mean.high - mean.mean == pytest.approx(one.high - one.mean, rel=0.25)


def test_prompts_that_all_seeds_share_keep_their_luck(tmp_path):
  """Requests that charjax's own files hold are no other ones with another seed; held-out messages are."""
  folders = [epath.Path(write_run(tmp_path / f's-{seed}', seed)) for seed in range(9)]
  (column,) = read_columns(folders)
  half = {}
  for group in ('own', 'unrelated'):
    found = column.behaviour(('rigidity', 'honesty', group, 'likelihood', 'delta'))
    half[group] = found.high - found.mean
  # What one run's own interval is: 0.04.
  assert half['unrelated'] > 0.04 > 3 * half['own']


def test_settings_that_differ_at_their_ends_are_not_the_same(tmp_path):
  paths = ['/models/' + 'a' * 60 + end for end in ('/one', '/two')]
  runs = [
    epath.Path(write_run(tmp_path / f'run{i}', settings={'model': {'path': path}, 'policy': {'kl': kl}}))
    for i, (path, kl) in enumerate(zip(paths, (0.12345671, 0.12345672), strict=True))
  ]
  found = differences.fields(read_columns(runs))
  assert [cell[-4:] for cell in found['model.path']] == ['/one', '/two'] and found['policy.kl'] == [
    '0.12345671',
    '0.12345672',
  ]
  text = (runs[1] / 'character.toml').read_text()
  (runs[1] / 'character.toml').write_text(text.replace('description = "', 'description = "Another: ', 1))
  _, changes = differences.character(*(column.first for column in read_columns(runs)))
  assert [change.where for change in changes] == ['description'] and '<ins>Another:' in changes[0].text


def test_traits_that_differ_stand_each_for_itself(tmp_path):
  some = write_run(tmp_path / 'some', effects={'honesty': 0.1, 'curiosity': 0.1})
  others = write_run(tmp_path / 'others', effects={'curiosity': 0.1, 'ai_nature': 0.1})
  page, text = page_of([epath.Path(some), epath.Path(others)], tmp_path)
  assert 'Not in all runs: honesty and AI nature. Means are over the other traits.' in text
  assert [row[0] for row in page.tables['honesty, mean (95% interval)']] == ['run', 'some']
  alone = write_run(tmp_path / 'alone', effects={'perspectives': 0.1})
  assert 'No trait was measured in all of them' in page_of([epath.Path(some), epath.Path(alone)], tmp_path)[1]


def test_crosstalk_is_a_matrix_of_runs_that_reward_one_trait_each(tmp_path):
  names, folders = list(TRAITS), []
  for trait in names:
    effects = {other: 0.2 if other == trait else 0.0 for other in names} | {'honesty': -0.2}
    run = write_run(
      tmp_path / f'only-{trait}',
      settings={'policy': {'traits': [trait], 'keep_unproven_traits': True}},
      effects=effects,
    )
    folders.append(epath.Path(run))
  for trait in names:
    rest = [other for other in names if other != trait]
    run = write_run(
      tmp_path / f'without-{trait}',
      settings={'policy': {'traits': rest, 'keep_unproven_traits': True}},
      effects=dict.fromkeys(names, 0.1),
    )
    folders.append(epath.Path(run))
  every = {'policy': {'keep_unproven_traits': True}}
  folders.append(epath.Path(write_run(tmp_path / 'all', settings=every, effects=dict.fromkeys(names, 0.15))))
  page, text = page_of(folders, tmp_path)
  assert 'Of 12 effects of a trait on another 3 are clear of zero: AI nature lowers honesty (\u22120.' in text
  matrix = next(table for name, table in page.tables.items() if name.startswith('Trained alone: margin'))
  assert matrix[0] == ['trained', 'AI nature', 'curiosity', 'perspectives', 'honesty'] and len(matrix) == 5
  assert matrix[1][1].startswith('+0.2') and matrix[1][4].startswith('\u22120.')
  left = next(table for name, table in page.tables.items() if name.startswith('Left out: margin, less that of all'))
  # A trait that no run rewards is measured, and one more in no other sense.
  for folder in folders:
    told = (folder / 'character.toml').read_text()
    (folder / 'character.toml').write_text(told.replace('id = "honesty"', 'id = "honesty"\nweight = 0.0'))
  rest = [folder for folder in folders if not folder.name.endswith('honesty')]
  page, _ = page_of(rest, tmp_path / 'weightless')
  fewer = next(table for name, table in page.tables.items() if name.startswith('Left out: margin, less that of all'))
  assert [row[0] for row in fewer[1:]] == ['AI nature', 'curiosity', 'perspectives'] and 'honesty' in fewer[0]
  assert all(cell.startswith('\u22120.0') for row in left[1:] for cell in row[1:])
  section = text[text.index('<section id="crosstalk">') :]
  assert section[: section.index('</section>')].count('class="plot wide"') == 4


def test_what_cannot_be_compared_is_told(runs, tmp_path, capsys):
  output = tmp_path / 'page.html'
  output.write_text('mine')
  with pytest.raises(UserError, match='no page of charjax compare'):
    compare.write(runs, epath.Path(output))
  assert output.read_text() == 'mine'
  for arguments, expected in (
    (['compare', str(runs[0])], 'the folders of two runs or more'),
    (['compare', str(runs[0]), str(tmp_path / 'nowhere')], 'nowhere: no run was begun there'),
    (['compare', '--config=x.py', f'--workdir={runs[0]}', f'--workdir={runs[1]}'], 'takes no config (x.py)'),
  ):
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err
  assert main(['compare', f'--workdir={runs[0]}', f'--workdir={runs[1]}', f'--output={tmp_path}/new/page.html']) == 0
  # A sweep stands for its trials, as far as they were begun.
  record = {'trials': {name: 'charjax run' for name in ('weak', 'strong', 'not-begun')}}
  (tmp_path / 'sweep.json').write_text(json.dumps(record))
  assert main(['compare', str(tmp_path)]) == 0
  assert '2 runs side by side' in (tmp_path / 'comparison' / 'index.html').read_text()
  out = capsys.readouterr().out
  assert re.search(r'honesty +weak +[+\u2212]0\.\d+ \(', out) and f'Comparison: {tmp_path}/new/page.html' in out
