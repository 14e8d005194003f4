"""The whole loop through the command line, in real processes, on the tiny random model of configs/smoke.py."""

import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from smoke import ROOT, command, environment, run

from charjax import limits

STAGES = ('messages', 'replies', 'rankings', 'preference', 'baseline', 'policy', 'evaluation', 'behaviour', 'report')
# All that two runs of the same config must have in common to the byte; the report shows times.
PRODUCTS = (
  'messages/messages.jsonl',
  'replies/replies.jsonl',
  'rankings/rankings.jsonl',
  'rankings/audit.json',
  'preference/metrics.jsonl',
  'preference/report.json',
  'preference/fingerprint.json',
  'policy/metrics.jsonl',
  'policy/samples.jsonl',
  'policy/fingerprint.json',
  'baseline/replies.jsonl',
  'baseline/measures.json',
  'evaluation/replies.jsonl',
  'evaluation/summary.json',
  'behaviour/replies.jsonl',
  'behaviour/summary.json',
)
CONDITIONS = {'base', 'prompted', 'prompted_examples', 'trained', 'delta'}


def contents(workdir: Path) -> dict[str, bytes]:
  return {name: (workdir / name).read_bytes() for name in PRODUCTS}


@pytest.fixture
def finished(smoke_run: tuple[Path, str]) -> tuple[Path, str]:
  return smoke_run


def test_every_stage_leaves_what_the_contract_names(finished):
  workdir, out = finished
  for stage in STAGES:
    record = json.loads((workdir / stage / 'stage.json').read_text())
    assert record['stage'] == stage and record['counts'] is not None
    assert not (workdir / stage / 'unfinished.json').exists()
    assert (workdir / stage / 'chunks').exists() == (stage in ('messages', 'replies', 'rankings', 'baseline'))
  assert (workdir / 'config.json').exists() and (workdir / 'character.toml').exists()
  assert str(workdir / 'report' / 'index.html') in out


def test_summary_has_its_form(finished):
  workdir, _ = finished
  summary = json.loads((workdir / 'evaluation' / 'summary.json').read_text())
  assert set(summary['traits']) == {'ai_nature', 'honesty'}
  for metrics in summary['traits'].values():
    assert {'margin', 'judge', 'win_rate'} <= set(metrics)
    for metric in metrics.values():
      assert set(metric) == CONDITIONS
      for figure in metric.values():
        assert set(figure) == {'mean', 'low', 'high', 'n'} and figure['low'] <= figure['mean'] <= figure['high']
  assert {'neutral', 'side_effects', 'internalisation', 'probes'} <= set(summary)


def test_the_behaviour_stage_looks_into_all_of_its_sets(finished):
  workdir, _ = finished
  summary = json.loads((workdir / 'behaviour' / 'summary.json').read_text())
  assert set(summary) == {'likelihood', 'rigidity', 'robustness', 'drift', 'side_effects', 'preference'}
  rows = [json.loads(line) for line in (workdir / 'behaviour' / 'replies.jsonl').read_text().splitlines()]
  assert {row['set'] for row in rows} == {
    'unrelated',
    'plain',
    'drop',
    'format',
    'drift',
    'users',
    'views',
    'evaluated',
  }
  for trait in ('ai_nature', 'honesty'):
    assert set(summary['rigidity'][trait]) == {'own', 'unrelated', 'plain', 'spill'}
    assert (
      summary['robustness'][trait]['']['likelihood']['base'] == summary['rigidity'][trait]['own']['likelihood']['base']
    )
  curve = json.loads((workdir / 'evaluation' / 'summary.json').read_text())['over_optimisation']
  assert [row['step'] for row in curve] == [1, 2, 4] and abs(curve[0]['kl']['mean']) < 1e-3 < curve[-1]['kl']['n']
  page = (workdir / 'report' / 'index.html').read_text()
  for section in ('provenance', 'rigidity', 'robustness', 'preferences', 'training'):
    assert f'id="{section}"' in page
  assert 'Is the reward being gamed?' in page


def test_what_was_drawn_and_ranked_is_scored_under_its_own_distribution(finished):
  workdir, _ = finished
  first = json.loads((workdir / 'policy' / 'metrics.jsonl').read_text().splitlines()[0])
  # Before the first update the policy is the starting model: one program must say of each token what the others do.
  assert first['logprob_gap'] < 1e-4 and abs(first['kl']) < 1e-4
  # And finds no ranked reply likelier than it was.
  assert first['ranked_loss'] == pytest.approx(math.log(2), abs=1e-4)


def test_messages_are_split_by_message(finished):
  workdir, _ = finished
  rows = [json.loads(line) for line in (workdir / 'messages' / 'messages.jsonl').read_text().splitlines()]
  texts = {split: {row['text'] for row in rows if row['split'] == split} for split in ('train', 'heldout')}
  assert texts['train'] and texts['heldout'] and not texts['train'] & texts['heldout']
  replied = {json.loads(line)['message'] for line in (workdir / 'replies' / 'replies.jsonl').read_text().splitlines()}
  assert replied <= {row['id'] for row in rows if row['split'] == 'train'}


def test_second_start_does_nothing_and_a_moved_run_stays_valid(finished, tmp_path):
  workdir, _ = finished
  moved = tmp_path / 'elsewhere'
  shutil.copytree(workdir, moved)
  again = run(moved)
  assert again.returncode == 0, again.stderr[-3000:]
  assert all(f'{stage}: done already' in again.stdout for stage in STAGES)
  assert contents(moved) == contents(workdir)


def test_numbers_that_are_not_finite_stop_a_run_and_a_changed_field_redoes_what_depends_on_it(finished, tmp_path):
  workdir, _ = finished
  copy = tmp_path / 'copy'
  shutil.copytree(workdir, copy)
  stopped = run(copy, '--config.policy.learning_rate=1e30', '--config.policy.skipped_steps=2')
  assert stopped.returncode == 2 and 'Traceback' not in stopped.stderr, stopped.stderr[-3000:]
  assert 'policy: made anew, since config field policy.learning_rate changed from 0.001 to 1e+30\n' in (stopped.stdout)
  assert 'the loss or its gradient was not a finite number' in stopped.stderr.splitlines()[-1]
  assert list((copy / 'policy' / 'not_finite').iterdir())
  # What was made before is spared, and what is made again is as it was.
  changed = run(copy, '--config.evaluation.samples=1')
  assert changed.returncode == 0, changed.stderr[-3000:]
  assert all(f'{stage}: done already' in changed.stdout for stage in STAGES[:4])
  for stage in ('baseline', 'evaluation'):
    assert f'{stage}: made anew, since config field evaluation.samples changed from 2 to 1' in changed.stdout
  assert 'report: made anew, since evaluation, behaviour changed' in changed.stdout
  expected, found = contents(workdir), contents(copy)
  assert {name for name in PRODUCTS if expected[name] != found[name]} == {
    'baseline/replies.jsonl',
    'evaluation/replies.jsonl',
    'evaluation/summary.json',
    'behaviour/replies.jsonl',  # of the trained model's the second was read again
  }


def test_sigterm_while_training_saves_the_step_it_was_in(finished, tmp_path):
  workdir, _ = finished
  copy = tmp_path / 'copy'
  shutil.copytree(workdir, copy)
  flags = ('--config.policy.steps=1000', '--config.policy.save_every=1000', '--config.policy.samples_every=1000')
  process = subprocess.Popen(command(copy, *flags), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
  metrics, deadline = copy / 'policy' / 'metrics.jsonl', time.monotonic() + 300
  # The folder still holds the four steps of the run before, until the policy is made anew.
  while process.poll() is None and time.monotonic() < deadline:
    if metrics.exists() and len(metrics.read_text().splitlines()) > 5:
      break
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=60)
  assert re.search(r'policy: made anew, since config field policy\.\w+ changed from \d to 1000, and 1 more\n', out)
  assert process.returncode == 143 and 'policy: interrupted; give the same command again to go on from here' in out
  steps = len(metrics.read_text().splitlines())
  saved = [path.name for path in (copy / 'policy' / 'checkpoints').iterdir()]
  assert 5 < steps < 1000 and saved == [str(steps)]


def test_killed_and_started_again_it_ends_the_same(finished, tmp_path):
  workdir, _ = finished
  killed = tmp_path / 'killed'
  shutil.copytree(workdir / 'messages', killed / 'messages')
  # Moments that the run is sure to pass: half-way through chunks of text, and through training.
  moments = ('replies/chunks', 'preference/judge', 'policy/checkpoints/2')
  for moment in moments:
    process = subprocess.Popen(
      command(killed), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not (killed / moment).exists() and process.poll() is None and time.monotonic() < deadline:
      time.sleep(0.02)
    assert process.poll() is None, f'the run was over before {moment} appeared'
    process.send_signal(signal.SIGKILL)
    process.wait()
  last = run(killed)
  assert last.returncode == 0, last.stderr[-3000:]
  assert 'going on where it was cut off' in last.stdout
  expected, found = contents(workdir), contents(killed)
  assert [name for name in PRODUCTS if expected[name] != found[name]] == []


# ---- choices of the recipe ----

# Labels, loss, what is shown, examples, replies (shown, plain, opposed), ranked replies of the policy. With the
# finished run, which is the default, they hold every value, and every pair of labels and loss that differ: a ranking
# heeds no labels. Lines that have the replies of the line before draw and rank none.
DEFAULT = ('soft', 'bradley_terry', 'trait', 4, (4, 2, 1), 3)
GRID = (
  ('soft', 'margin', 'trait', 4, (4, 2, 1), 3),
  ('hard', 'plackett_luce', 'trait', 4, (4, 2, 1), 3),
  ('hard', 'bradley_terry', 'character', 2, (4, 2, 2), 3),
  ('hard', 'margin', 'trait', 0, (1, 1, 0), 2),
)

# One process for all of them: what is compiled for one serves the others. It tells what labels and loss the fit of the
# heads and the train step of each asked for.
_RUN_GRID = """
import json, shutil, sys
from charjax.main import main
from charjax.stages import preference
from charjax.training import heads

asked = []

def watch(module):
  original = module.preference_loss
  def preference_loss(*arguments):
    asked[-1].append([module.__name__, *arguments[-2:]])
    return original(*arguments)
  module.preference_loss = preference_loss

watch(heads)
watch(preference)
for start, workdir, flags in json.load(sys.stdin):
  shutil.copytree(start, workdir)
  asked.append([])
  for stage in ('replies', 'rankings', 'preference', 'policy'):
    if code := main([stage, f'--workdir={workdir}', *flags]):
      sys.exit(f'{workdir}: {stage} ended with {code}')
print(json.dumps(asked))
"""


def runs_of_grid(finished: Path, folder: Path) -> list[tuple[str, str, list[str]]]:
  """For each line of the grid: the folder it starts from, its own, and its flags."""
  runs, before = [], (finished, DEFAULT)
  for number, choices in enumerate(GRID):
    labels, loss, show, examples, replies, ranked = choices
    fields = {
      'preference.labels': labels,
      'preference.loss': loss,
      'replies.show': show,
      **{f'{stage}.examples': examples for stage in ('replies', 'rankings', 'evaluation')},
      **{f'replies.{name}': count for name, count in zip(('shown', 'plain', 'opposed'), replies, strict=True)},
      'policy.ranked_replies': ranked,
      # Of every other one no trait's reward may follow the length of replies, and the judge chooses the policy.
      'preference.length_limit': 0.0 if number % 2 else 1.0,
      'policy.candidates': 2 if number % 2 else 1,
    }
    flags = [f'--config={ROOT / "configs" / "smoke.py"}', *(f'--config.{key}={fields[key]}' for key in fields)]
    start = before[0] if before[1][2:] == choices[2:] else finished
    before = (folder / str(number), choices)
    runs.append((str(start), str(before[0]), flags))
  return runs


@pytest.fixture(scope='module')
def grid(smoke_run: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, list[list[str]]]]:
  """The folder of each line of the grid, its loop run up to the policy, and what its losses were."""
  runs = runs_of_grid(smoke_run[0], tmp_path_factory.mktemp('grid'))
  done = subprocess.run(
    [sys.executable, '-c', _RUN_GRID], input=json.dumps(runs), cwd=ROOT, env=environment(), capture_output=True,
    text=True, timeout=1200, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  asked = json.loads(done.stdout.splitlines()[-1])
  return [(Path(workdir), each) for (_, workdir, _), each in zip(runs, asked, strict=True)]


def test_the_grid_holds_every_choice():
  labels, losses, show, examples, replies, _ = zip(DEFAULT, *GRID, strict=True)
  pairs = {*zip(labels, losses, strict=True), ('soft', 'plackett_luce')}
  assert pairs == set(itertools.product(labels, losses))
  assert {'preference.labels': set(labels), 'preference.loss': set(losses), 'replies.show': set(show)} == {
    name: set(limits.CHOICES[name]) for name in ('preference.labels', 'preference.loss', 'replies.show')
  }
  assert set(examples) == {0, 2, 4} and {sum(each) for each in replies} >= {2, 8}


@pytest.mark.parametrize('number', range(len(GRID)), ids=[f'{line[0]}-{line[1]}' for line in GRID])
def test_every_choice_of_the_recipe_runs(grid, number):
  labels, loss, *_, replies, _ = GRID[number]
  workdir, asked = grid[number]
  used = ('charjax.training.heads', 'charjax.stages.preference')
  assert {tuple(each) for each in asked} == {(module, labels, loss) for module in used}
  rows = [json.loads(line) for line in (workdir / 'rankings' / 'rankings.jsonl').read_text().splitlines()]
  assert max(len(row['replies']) for row in rows) == sum(replies)
  learned = [
    [json.loads(line) for line in (workdir / stage / 'metrics.jsonl').read_text().splitlines()]
    for stage in ('preference', 'policy')
  ]
  # Both models' heads are fitted, then there are two steps of each, and four of the policy.
  assert [len(some) for some in learned] == [2 * (60 + 2), 4]
  assert all(math.isfinite(row['loss']) for some in learned for row in some)
  report = json.loads((workdir / 'preference' / 'report.json').read_text())
  follows = [trait for name in ('train', 'judge') for trait in report[name]['length_control'].values()]
  assert any(abs(trait['before']) > 0.01 for trait in follows)
  kept = [path.name for path in (workdir / 'policy' / 'checkpoints').iterdir()]
  if number % 2:
    assert all(abs(trait['after']) < 1e-6 for trait in follows)
    choice = json.loads((workdir / 'policy' / 'choice.json').read_text())
    assert [row['step'] for row in choice['candidates']] == [2, 4] and kept == [str(choice['chosen'])]
    rows = [json.loads(line) for line in (workdir / 'policy' / 'candidates.jsonl').read_text().splitlines()]
    known = set(report['learned_from']['judge'])
    assert len(rows) == 2 * choice['messages'] > 0 and not known & {row['message'] for row in rows}
  else:
    assert all(trait['after'] == trait['before'] for trait in follows) and kept == ['4']
    assert not (workdir / 'policy' / 'choice.json').exists()
