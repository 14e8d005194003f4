"""The report: it says what the files say, shows untrusted text as text, and stands without anything else."""

import base64
import csv
import hashlib
import html
import io
import json
import re
import types
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup
from report_run import HOSTILE, SECOND, write_run

from charjax.errors import UserError
from charjax.main import main
from charjax.report import figures, phrases, plots, words
from charjax.report.read import Estimate, estimate, read_run
from charjax.report.replies import exchanges, typical
from charjax.stages import report
from charjax.workdir import file_fingerprint, fingerprint

_VOID = {'meta', 'br', 'input', 'link', 'img', 'hr'}


class Page(HTMLParser):
  """Checks that every element is closed in order, and collects what the tests ask about."""

  def __init__(self, text: str):
    super().__init__(convert_charrefs=True)
    self.open: list[str] = []
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self.tables: dict[str, list[list[str]]] = {}
    self.scripts: list[str] = []
    self.styles: list[str] = []
    self.ids: list[str] = []
    self._caption = ''
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    names = [name for name, _ in attrs]
    assert len(names) == len(set(names)), f'{tag} has an attribute twice'
    self.tags.append((tag, dict(attrs)))
    self.ids += [value for name, value in attrs if name == 'id' and value]
    if tag not in _VOID:
      self.open.append(tag)
    if tag == 'table':
      self._caption = f'table {len(self.tables)}'
      self.tables[self._caption] = []
    if tag == 'caption':
      self.tables.pop(self._caption)
      self._caption = ''
    if tag == 'tr':
      self.tables.setdefault(self._caption, []).append([])
    if tag in ('th', 'td'):
      self.tables[self._caption][-1].append('')

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open and self.open[-1] == tag, f'</{tag}> closes {self.open[-1:]} at {self.getpos()}'
    self.open.pop()

  def handle_data(self, data):
    where = self.open[-1] if self.open else ''
    if where == 'caption':
      self._caption += data
    elif where in ('th', 'td'):
      self.tables[self._caption][-1][-1] += data
    elif where == 'script':
      self.scripts.append(data)
    elif where == 'style':
      self.styles.append(data)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
  return write_run(tmp_path_factory.mktemp('run'))


@pytest.fixture(scope='module')
def page(folder) -> str:
  return report.render(folder)


def test_well_formed(page):
  parsed = Page(page)
  assert len(parsed.ids) == len(set(parsed.ids))
  targets = {(attrs.get('href') or '')[1:] for tag, attrs in parsed.tags if tag == 'a' and 'download' not in attrs}
  assert targets <= set(parsed.ids)


def test_text_of_models_stays_text(page):
  parsed = Page(page)
  assert [tag for tag, _ in parsed.tags].count('script') == 2
  assert not [tag for tag, _ in parsed.tags if tag in ('img', 'iframe', 'object', 'embed', 'link', 'form')]
  assert not [name for _, attrs in parsed.tags for name in attrs if name.startswith('on') or name == 'style']
  assert '&lt;script&gt;alert(1)' in page and '{{ 7 * 7 }}' in page and '\x1b' not in page
  page.encode('utf-8')


def test_hostile_everywhere(tmp_path):
  """Every string of the run, keys included, may be hostile; the page stays two scripts of ours."""
  folder = write_run(tmp_path, messages=4, steps=8)

  def spoil(value):
    if isinstance(value, dict):
      return {key: spoil(item) for key, item in value.items()} | {HOSTILE: HOSTILE}
    if isinstance(value, list):
      return [spoil(item) for item in value]
    return HOSTILE if isinstance(value, str) else value

  for path in folder.rglob('*.json*'):
    texts = path.read_text().splitlines() if path.suffix == '.jsonl' else [path.read_text()]
    path.write_text('\n'.join(json.dumps(spoil(json.loads(text))) for text in texts))
  path = folder / 'behaviour' / 'summary.json'
  summary = json.loads(path.read_text())
  for part in ('rigidity', 'robustness', 'side_effects'):
    summary[part][HOSTILE] = next(iter(summary[part].values()))
  path.write_text(json.dumps(summary))
  summary = json.loads((folder / 'evaluation' / 'summary.json').read_text())
  for part in ('traits', 'probes', 'neutral', 'side_effects'):
    summary[part][HOSTILE] = next(iter(summary[part].values()))
  (folder / 'evaluation' / 'summary.json').write_text(json.dumps(summary))
  text = report.render(folder)
  parsed = Page(text)
  assert [tag for tag, _ in parsed.tags].count('script') == 2
  assert not [tag for tag, _ in parsed.tags if tag == 'img']
  assert '\x1b' not in report.console_summary(folder)


def test_nothing_outside_the_run_is_read(tmp_path):
  folder = write_run(tmp_path, messages=2, steps=2)
  for stage in ('messages', 'replies'):
    record(folder, stage, products={'/dev/zero': ''}, inputs={'messages': 'x'})
  report.render(folder)


def test_embedded_figures_equal_the_file(page, folder):
  block = re.search(r'<script type="application/json" id="summary">(.*?)</script>', page, re.DOTALL)
  assert block and '<' not in block[1]
  files = {'evaluation': 'summary', 'behaviour': 'summary', 'rankings': 'audit', 'preference': 'report'}
  for stage, name in files.items():
    assert json.loads(block[1])[stage] == json.loads((folder / stage / f'{name}.json').read_text()), stage


def test_self_contained_and_locked_down(page):
  parsed = Page(page)
  for tag, attrs in parsed.tags:
    assert not {'src', 'srcset', 'data', 'action', 'poster', 'xlink:href'} & set(attrs), tag
    assert (attrs.get('href') or '#').startswith('data:text/csv;' if 'download' in attrs else '#')
  style, script = parsed.styles[0], parsed.scripts[-1]
  assert 'url(' not in style and '@import' not in style and '//' not in style
  assert 'http' not in script and 'fetch' not in script and 'innerHTML' not in script
  policy = next(attrs['content'] for tag, attrs in parsed.tags if attrs.get('http-equiv') == 'Content-Security-Policy')
  for text, source in ((style, 'style-src'), (script, 'script-src')):
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert f"{source} 'sha256-{digest}'" in policy
  assert "default-src 'none'" in policy and 'unsafe' not in policy


def test_shown_numbers_equal_the_files(page, folder):
  summary = json.loads((folder / 'evaluation' / 'summary.json').read_text())
  tables = Page(page).tables

  def number(cell: str) -> float:
    return float(cell.replace(words.MINUS, '-').replace(',', '').rstrip('%')) / (100 if '%' in cell else 1)

  rows = {row[0]: row[1:] for row in tables['Margin on kept pairs: trained \u2212 base, nats per token'][1:]}
  for trait, metrics in summary['traits'].items():
    delta = metrics['margin']['delta']
    assert [number(cell) for cell in rows[words.spoken(trait)]] == pytest.approx(
      [delta['mean'], delta['low'], delta['high'], delta['n']], abs=5.1e-4
    )
  rows = {row[0]: row[1:] for row in tables['Win rate against base: trained, share of replies'][1:]}
  for trait, metrics in summary['traits'].items():
    rate = metrics['win_rate']['trained']
    assert [number(cell) for cell in rows[words.spoken(trait)][:3]] == pytest.approx(
      [rate['mean'], rate['low'], rate['high']], abs=5.1e-4
    )
  rows = {row[0]: row[1:] for row in tables['Length of a reply, tokens'][1:]}
  for condition in ('base', 'prompted', 'prompted_examples', 'trained'):
    value = summary['side_effects']['length'][condition]
    assert number(rows[words.CONDITION_NAMES[condition]][0]) == pytest.approx(value['mean'], abs=0.051)
  audit = json.loads((folder / 'rankings' / 'audit.json').read_text())
  rows = {(row[0], row[1]): row[2] for row in tables['Likelihood (the one used), right on kept pairs'][1:]}
  for trait, rankers in audit['traits'].items():
    accuracy = rankers['likelihood']['examples']['accuracy']['mean']
    assert number(rows[words.spoken(trait), 'with examples']) == pytest.approx(accuracy, abs=5.1e-4)
  metrics = [json.loads(line) for line in (folder / 'policy' / 'metrics.jsonl').read_text().splitlines()]
  reward = tables['Reward, preference-model score'][1:]
  assert (reward[0][0], reward[-1][0]) == ('0', str(metrics[-1]['step']))
  assert number(reward[-1][1]) == pytest.approx(metrics[-1]['reward'], abs=5.1e-4)


def test_every_plot_can_be_downloaded_as_it_is_drawn(page, folder):
  parsed = Page(page)
  plots_drawn = [tag for tag, attrs in parsed.tags if tag == 'svg' and 'plot' in (attrs.get('class') or '')]
  files = {attrs['download']: attrs['href'] for tag, attrs in parsed.tags if tag == 'a' and 'download' in attrs}
  assert len([tag for tag, attrs in parsed.tags if 'download' in attrs]) == len(plots_drawn) > 10

  def rows(name: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(base64.b64decode(files[name].split(',')[1]).decode())))

  summary = json.loads((folder / 'evaluation' / 'summary.json').read_text())
  found = rows('margin-on-kept-pairs-trained-base.csv')
  assert found[0] == ['trait', 'mean', 'low', 'high', 'n']
  for (name, *numbers), (trait, metrics) in zip(found[1:], summary['traits'].items(), strict=True):
    delta = metrics['margin']['delta']
    assert name == words.spoken(trait) and [float(n) for n in numbers] == [
      delta[k] for k in ('mean', 'low', 'high', 'n')
    ]
  metrics = [json.loads(line) for line in (folder / 'policy' / 'metrics.jsonl').read_text().splitlines()]
  assert [float(row[1]) for row in rows('reward.csv')[1:]] == [row['reward'] for row in metrics]


def test_what_the_behaviour_stage_found_is_shown_as_it_stands(page, folder):
  summary, tables = json.loads((folder / 'behaviour' / 'summary.json').read_text()), Page(page).tables
  rows = tables['Trait in replies, by likelihood ratio: trained \u2212 base, nats a token'][1:]
  wanted = [(trait, group) for trait in summary['rigidity'] for group in ('own', 'plain', 'unrelated')]
  for row, (trait, group) in zip(rows, wanted, strict=True):
    mean = summary['rigidity'][trait][group]['likelihood']['delta']['mean']
    assert row[0] == words.spoken(trait) and row[2] == words.figure(mean)
  table = tables['Trait by form of the prompt, by likelihood ratio: trained \u2212 base, nats a token']
  assert [row[0] for row in table[1:]] == ['the message alone', *list(summary['robustness']['honesty'])[1:]]
  mean = summary['robustness']['honesty']['as JSON']['likelihood']['delta']['mean']
  assert table[4][4].startswith(words.figure(mean, signed=True))
  rows = tables['Turn by turn: trained \u2212 base, nats a token'][1:]
  assert [float(row[0]) for row in rows] == list(range(1, 11))
  rows = tables['What it would rather be, Bradley-Terry strength, in logits'][1:]
  trained = {
    words.spoken(n.replace('/', ': ')): f['trained']['mean'] for n, f in summary['preference']['strength'].items()
  }
  assert [row[0] for row in rows[::2]] == sorted(trained, key=lambda name: -trained[name])
  assert 'of its effect on its own messages' in page and 'No share is given for' in page


def test_grown_phrases_are_measured_on_other_messages_than_those_that_chose_them():
  texts = {
    f'm{i}': {
      'base': ['the old way is good', 'a b c'],
      'trained': ['I am an AI', 'a b c' if i % 2 else 'only here now'],
    }
    for i in range(20)
  }
  found = phrases.grown(texts, 2)
  assert list(found) == ['am an ai', 'i am an'] and found['i am an']['mean'] == 0.5 and found['i am an']['n'] == 10
  assert phrases.grown(texts, 3)['only here now']['mean'] == 0  # which alone the choosing half says
  assert phrases.variety(['a b', 'b a', 'c d']) == pytest.approx(2 / 3) and phrases.variety(['', '']) == 0


def test_what_a_spreadsheet_would_compute_is_text():
  table = figures.Table(('', 'x'), [('=1+1', '\u22120.5'), ('@SUM(A1)', '2'), ('-2+3', '<script>')])
  figure = figures.Figure('A: "b"/c', '', Markup(''), table)
  text = base64.b64decode(figure.download.split(',')[1]).decode()
  assert text.splitlines() == [',x', "'=1+1,\u22120.5", "'@SUM(A1),2", "'-2+3,<script>"] and figure.file == 'a-b-c.csv'


def test_says_what_the_intervals_carry(page):
  text = html.unescape(re.sub(r'\s+', ' ', page))
  assert 'Training moved 3 of 4 traits clearly towards the character.' in text
  assert 'the change is not clear of zero for honesty' in text
  assert 'not told from chance on its choosing pairs' in text and 'left out of the reward' in text
  assert 'I was not trained' not in text  # a trait of the character that this run left out


def test_says_what_the_rankings_of_sampled_replies_followed(page):
  text = html.unescape(re.sub(r'\s+', ' ', page))
  assert 'follows length at r = \u22120.310; taken out of the labels (r = 0.000)' in text
  assert 'shown over opposed 98%' in text and 'this is circular' in text


def test_the_first_reply_to_every_message_stands_in_the_page(page, folder):
  rows = [json.loads(line) for line in (folder / 'evaluation' / 'replies.jsonl').read_text().splitlines()]
  section = page[page.index('<section id="replies">') :]
  section = section[: section.index('<section id="provenance">')]
  assert section.count('class="reply ') == sum(row['sample'] == 0 for row in rows) < len(rows)
  assert SECOND not in page


@pytest.mark.parametrize('missing', [
  'character.toml', 'config.json', 'messages', 'replies', 'rankings', 'preference', 'policy', 'evaluation',
  'evaluation/summary.json', 'evaluation/replies.jsonl', 'behaviour', 'policy/samples.jsonl',
  'preference/metrics.jsonl',
])  # fmt: skip
def test_missing_pieces(tmp_path, missing):
  folder = write_run(tmp_path / 'run', messages=4, steps=3)
  path = folder / missing
  (path.rename if path.exists() else pytest.fail)(tmp_path / 'elsewhere')
  Page(report.render(folder))
  assert str(folder) in report.console_summary(folder)


def test_an_empty_run_says_so(tmp_path):
  assert 'has not been evaluated yet' in report.render(tmp_path)
  assert report.console_summary(tmp_path).endswith('index.html')


def test_a_trait_s_weight_is_told_where_it_is_not_the_usual_one(tmp_path):
  folder = write_run(tmp_path / 'run', messages=4, steps=3)
  assert 'class="tag">weight' not in report.render(folder)
  config = json.loads((folder / 'config.json').read_text())
  config['config']['character'] = {'traits': ['honesty:2.5', 'curiosity']}
  (folder / 'config.json').write_text(json.dumps(config))
  assert report.render(folder).count('class="tag">weight 2.5<') == 1


def test_an_unproven_trait_is_left_out_of_the_reward_unless_the_config_keeps_it(tmp_path):
  folder = write_run(tmp_path / 'run', messages=4, steps=3)
  assert report.render(folder).count('left out of the reward') == 2
  config = json.loads((folder / 'config.json').read_text())
  config['config']['policy']['keep_unproven_traits'] = True
  (folder / 'config.json').write_text(json.dumps(config))
  page = report.render(folder)
  assert page.count('rewarded all the same') == 2 and 'left out of the reward' not in page


def test_the_policy_that_the_judge_chose_is_marked(tmp_path, page):
  assert 'At the ring, where the policy was kept (drawn before its last step, 60)' in page
  assert 'Which checkpoint is the policy' not in page
  folder = write_run(tmp_path, messages=4)

  def figure(mean: float) -> dict[str, float]:
    return {'mean': mean, 'low': mean - 0.1, 'high': mean + 0.1, 'n': 40}

  candidates = [{'step': step, 'judge': figure(gain), 'over_last': figure(gain - 0.4)}
                for step, gain in ((20, 0.3), (38, 0.71), (60, 0.4))]  # fmt: skip
  choice = {'messages': 40, 'chosen': 38, 'candidates': candidates}
  (folder / 'policy' / 'choice.json').write_text(json.dumps(choice))
  text = report.render(folder)
  assert 'nearest to the policy that was chosen, after step 38 (drawn before step 40)' in text
  rows = Page(text).tables[
    'Which checkpoint is the policy, score less that of all candidates, in spreads, over the training steps'
  ][1:]
  assert [row[0] for row in rows] == ['20', '38', '60'] and rows[1][2].startswith('+0.310')
  assert rows[2][2] == '\u2013' and 'kept pairs and held-out messages had no part in it' in text


def test_the_length_that_was_taken_out_of_a_reward_is_told(page):
  told = re.search(r'Length was taken out of the score of the model trained against: .*?\.(?=<)', page)
  assert told and 'honesty from 0.380 to 0.000 on messages it was trained on' in told[0] and 'uriosity' not in told[0]
  assert 'r is 0.270 in place of 0.410' in told[0]


def test_null_and_bare_numbers(tmp_path):
  folder = write_run(tmp_path, messages=4, steps=3)
  path = folder / 'evaluation' / 'summary.json'
  summary = json.loads(path.read_text())
  summary['traits']['honesty'] = {
    'margin': None,
    'win_rate': {'trained': 0.5},
    'new_metric': {'base': float('nan')},
  }
  summary['side_effects']['length'] = {'base': 3, 'trained': 4}
  summary['side_effects']['praise'] = {'base': 10**400}  # more than a float holds
  summary['internalisation'] = None
  path.write_text(json.dumps(summary))
  text = report.render(folder)
  Page(text)
  assert 'The margin on the kept pairs was not measured.' in text


@pytest.mark.parametrize('name, text, where', [
  ('evaluation/summary.json', '{"traits": ', 'summary.json'),
  ('evaluation/replies.jsonl', '{}\n{"a": \n', 'replies.jsonl:2'),
  ('character.toml', 'name = ', 'character.toml'),
  ('config.json', '[]', 'config.json'),
  ('character.toml', f'name = {"1" * 5000}', 'character.toml'),
  ('character.toml', f'name = {"[" * 5000}', 'character.toml'),
])  # fmt: skip
def test_a_broken_file_is_one_line(tmp_path, name, text, where):
  folder = write_run(tmp_path, messages=2, steps=2)
  (folder / name).write_text(text)
  with pytest.raises(UserError) as caught:
    report.render(folder)
  assert where in str(caught.value) and '\n' not in str(caught.value)


def test_the_page_of_a_run_is_made_from_its_folder_alone(tmp_path, capsys):
  folder = write_run(tmp_path / 'run')
  assert main(['report', f'--workdir={folder}']) == 0
  assert f'Report: {folder}/report/index.html' in capsys.readouterr().out
  assert (folder / 'report' / 'index.html').read_text() == report.render(folder)
  # The run still knows the folder for its own.
  assert not (folder / 'report' / 'stage.json').exists() and (folder / 'report' / 'unfinished.json').exists()
  (folder / 'evaluation' / 'summary.json').write_text('{"traits":')
  assert main(['report', f'--workdir={folder}']) == 2
  assert 'evaluation/summary.json: not JSON' in capsys.readouterr().err
  (tmp_path / 'model').mkdir()
  (tmp_path / 'model' / 'config.json').write_text('{"model_type": "llama"}')
  for name in ('none', 'model'):
    assert main(['report', f'--workdir={tmp_path / name}']) == 2
    assert f'{name}: no run was begun there' in capsys.readouterr().err
  assert not (tmp_path / 'model' / 'report').exists()


def record(folder, stage, **fields):
  """Changes a stage's record."""
  path = folder / stage / 'stage.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_effects_of_a_policy_that_is_there_no_more_are_left_out(tmp_path):
  folder = write_run(tmp_path / 'run')
  (folder / 'policy' / 'fingerprint.json').write_text('{"policy": "now"}')
  record(folder, 'policy', products={'fingerprint.json': 'as it was when it was made'})
  now = fingerprint({'fingerprint.json': file_fingerprint(folder / 'policy' / 'fingerprint.json')})
  record(folder, 'evaluation', inputs={'policy': now})
  record(folder, 'behaviour', inputs={'policy': now})
  assert read_run(folder).outdated == [] and read_run(folder).summary
  (folder / 'policy' / 'fingerprint.json').write_text('{"policy": "another"}')
  run = read_run(folder)
  assert run.outdated == ['evaluation', 'behaviour'] and not (run.summary or run.behaviour or run.margins)
  page = report.render(folder)
  assert 'has not been evaluated yet' in page
  assert 'Evaluation and behaviour were made from what earlier stages held before' in page
  # As while it is being trained anew.
  (folder / 'policy' / 'stage.json').unlink()
  (folder / 'policy' / 'unfinished.json').write_text('{}')
  assert read_run(folder).outdated == ['evaluation', 'behaviour']


def test_settings_are_those_that_finished_stages_were_made_with(tmp_path):
  folder = write_run(tmp_path / 'run')
  made_with = {'seed': 7, 'policy.kl': 0.25, 'model.path': 'contents 01', 'evaluation.probes': 'contents 02'}
  record(folder, 'policy', config_values=made_with)
  config = read_run(folder).config
  assert config['seed'] == config['config']['seed'] == 7
  assert config['config']['policy']['kl'] == 0.25 and config['config']['policy']['steps'] == 60
  assert config['config']['model']['path'] == 'smollm2-135m-instruct' and not config['config']['evaluation']['probes']


def test_the_time_of_a_stage_that_was_cut_off_is_at_least_what_is_known(tmp_path):
  folder = write_run(tmp_path / 'run')
  assert 'the stages took at least' not in report.render(folder)
  record(folder, 'policy', resumed=True)
  page = report.render(folder)
  assert 'the stages took at least' in page
  assert 'Cut off and gone on with: policy. Of these the time since is counted.' in page


def test_a_line_of_metrics_that_a_kill_cut_short_is_passed_over(tmp_path):
  folder = write_run(tmp_path / 'run')
  with (folder / 'policy' / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 61, "rew')
  assert len(read_run(folder).policy_metrics) == 60


def test_without_kept_pairs_the_judge_says_what_training_changed(tmp_path):
  folder = write_run(tmp_path / 'run')
  path = folder / 'evaluation' / 'summary.json'
  summary = json.loads(path.read_text())
  for metrics in summary['traits'].values():
    metrics['margin'] = dict.fromkeys(metrics['margin'])
  path.write_text(json.dumps(summary))
  page = report.render(folder)
  assert 'has no kept pairs, so that the held-out judge alone says' in page and 'not been evaluated' not in page


def test_the_cost_has_its_interval(tmp_path):
  folder = write_run(tmp_path / 'run')
  path = folder / 'evaluation' / 'summary.json'
  summary = json.loads(path.read_text())
  summary['neutral']['log_prob'] |= {
    'base': {'mean': -2.0, 'low': -2.2, 'high': -1.8, 'n': 20}, 'delta': {'mean': -0.04, 'low': -0.07, 'high': 0.01}
  }  # fmt: skip
  path.write_text(json.dumps(summary))
  assert 'reference answers lost 2% (\u22120.5% to 3.5%) of their log-probability, not clear of zero' in report.render(
    folder
  )


def test_the_diagonal_is_where_x_and_y_are_the_same():
  points = [(0.95, plots.Mark(0.7, 0.6, 0.78, 'trained', '')), (0.1, plots.Mark(0.1, 0.05, 0.2, 'trained', ''))]
  svg = plots.trails([plots.Trail('model', points)], 'x', 'y', 'calibration', diagonal=True)
  line = re.search(r'class="reference" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', svg)
  left, bottom, right, top = map(float, line.groups())
  tick = '<text class="tick" x="([\\d.]+)" y="([\\d.]+)" text-anchor="{}">{}</text>'
  across = float(re.search(tick.format('middle', 0.5), svg)[1])
  up = float(re.search(tick.format('end', 0.4), svg)[2]) - 4
  assert (bottom - up) / (bottom - top) / 0.4 == pytest.approx((across - left) / (right - left) / 0.5, rel=0.01)


def test_a_judge_that_is_none_is_told_of(tmp_path):
  folder = write_run(tmp_path / 'run')
  said = 'On the written pairs of AI nature'
  assert said not in report.render(folder)
  path = folder / 'preference' / 'report.json'
  found = json.loads(path.read_text())
  found['judge']['kept']['ai_nature'] = {'mean': 0.4, 'low': 0.2, 'high': 0.6, 'n': 16}
  path.write_text(json.dumps(found))
  page = report.render(folder)
  assert f'{said} (40% right, 20% to 60%) the judge is not told from chance' in page
  # Of perspectives and honesty, too, where nobody wins clearly.
  assert page.count('held-out judge not told from chance on its kept pairs') == 3


def test_no_such_folder(tmp_path):
  with pytest.raises(UserError, match='no such run folder'):
    report.render(tmp_path / 'nowhere')


def test_the_stage_writes_the_page_twice_alike(folder):
  session = types.SimpleNamespace(workdir=folder, folder=lambda name: folder / name)
  counts = report.run(session)
  first = (folder / 'report' / 'index.html').read_bytes()
  assert counts == {'bytes': len(first)}
  report.run(session)
  assert (folder / 'report' / 'index.html').read_bytes() == first


def test_console_summary(folder):
  text = report.console_summary(folder)
  assert str(folder / 'report' / 'index.html') in text
  assert text.count('before ') == 3 + 1 and '\x1b' not in text  # three replies and the heading
  assert max(len(line) for line in text.splitlines()[1:]) <= 96


def test_the_typical_reply_is_the_median():
  rows = [
    {'trait': 't', 'message': f'm{i}', 'prompt': '?', 'condition': condition, 'text': 'x', 'score': score}
    for i, change in enumerate([5.0, -1.0, 0.5])
    for condition, score in (('trained', change), ('base', 0.0))
  ]
  found = exchanges(rows)['t']
  assert [reply.condition for reply in found[0].replies] == ['base', 'trained']
  chosen = typical(found)
  assert chosen is not None and chosen.message == 'm2'


def test_intervals_and_verdicts():
  assert [Estimate(0.1, low, high).side_of(0) for low, high in ((0.05, 0.2), (-0.1, 0.2), (-0.2, -0.1))] == [
    1,
    0,
    -1,
  ]
  assert estimate({'mean': float('nan')}) is None and estimate(True) is None and estimate('1') is None
  assert words.verdict(Estimate(0.1, -0.1, 0.3)) == ('unclear', 'not clear of zero')
  assert 'not clear of 50%' in words.win_sentence(Estimate(0.55, 0.4, 0.7, 20), None)
  assert words.difference(Estimate(-0.101, -0.111, -0.091), share=True) == '\u221210.1 points (\u221211.1 to \u22129.1)'


def test_plots_escape_and_stay_inside():
  rows = [plots.Row('<b>"&', [plots.Mark(5.0, -9.0, 1e9, 'a" onload="x', '</svg>')]), plots.Row('none', [])]
  svg = plots.whiskers(rows, '<i>', '"><script>', reference=0.0)
  for text in (
    svg,
    plots.lines([plots.Line('<b>', 'x', [3], [2.0])], 'x', 'y', 'd'),
    plots.bars([('<', 0.0, '>')], 'a', 'd'),
  ):
    tags = [tag for tag, _ in Page(text).tags]
    assert tags.count('svg') == 1 and not {'b', 'i', 'script'} & set(tags)
  assert all(float(x) <= plots.WIDTH for x in re.findall(r'cx="([\d.]+)"', svg))


@pytest.mark.parametrize('low, high', [(0, 1), (-0.031, 0.2), (1e-7, 3e-7), (1234, 98765), (-5, -4.9)])
def test_ticks_are_few_and_cover(low, high):
  ticks = plots.ticks_between(low, high)
  assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12 and 3 <= len(ticks) <= 8


def test_what_rounding_leaves_of_nothing_is_nothing():
  assert words.figure(-1.6e-16) == words.figure(0.0) == '0.000' and words.figure(4.5e-4) == '0.00045'
