"""The whole loop through the command line, in real processes, on the tiny random model of configs/smoke.py."""

import json
import math
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from smoke import ROOT, command, environment, run

STAGES = ('messages', 'replies', 'rankings', 'preference', 'policy', 'evaluation', 'report')
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
  'evaluation/replies.jsonl',
  'evaluation/summary.json',
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
    assert not (workdir / stage / 'chunks').exists()
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


def test_a_changed_field_redoes_what_depends_on_it(finished, tmp_path):
  workdir, _ = finished
  copy = tmp_path / 'copy'
  shutil.copytree(workdir, copy)
  changed = run(copy, '--config.policy.steps=2')
  assert changed.returncode == 0, changed.stderr[-3000:]
  assert all(f'{stage}: done already' in changed.stdout for stage in STAGES[:4])
  assert 'policy: made anew, since config field policy.steps changed from 4 to 2' in changed.stdout
  assert 'evaluation: made anew, since policy changed' in changed.stdout


def test_numbers_that_are_not_finite_stop_a_run_and_spare_what_was_made(finished, tmp_path):
  workdir, _ = finished
  copy = tmp_path / 'copy'
  shutil.copytree(workdir, copy)
  stopped = run(copy, '--config.policy.learning_rate=1e30', '--config.policy.skipped_steps=2')
  assert stopped.returncode == 2 and 'Traceback' not in stopped.stderr, stopped.stderr[-3000:]
  assert 'the loss or its gradient was not a finite number' in stopped.stderr.splitlines()[-1]
  assert list((copy / 'policy' / 'not_finite').iterdir())
  again = run(copy)
  assert again.returncode == 0, again.stderr[-3000:]
  assert all(f'{stage}: done already' in again.stdout for stage in STAGES[:4])
  assert contents(copy) == contents(workdir)


def test_killed_and_started_again_it_ends_the_same(finished, tmp_path):
  workdir, _ = finished
  killed = tmp_path / 'killed'
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
