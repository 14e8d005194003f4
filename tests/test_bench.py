"""scripts/bench.py: no ratio where two sides did not do the same, and the same texts for all."""

import importlib

import bench
import pytest
from bench_workers import tasks
from smoke import ROOT

from charjax.model import checkpoint_source

_DRAWN = {'done': 64, 'mean_length': 8.0, 'greedy': [[1, 2, 3, 4], [5, 6, 7, 8]]}
_SCORED = {'done': 64, 'log_probs': [-1.0, -2.0]}
_LEARNED = {'done': 1, 'tokens': 64, 'entropy': 2.0}


@pytest.mark.parametrize(
  'ours, changes, told',
  [
    (_DRAWN, {}, ''),
    (_DRAWN, {'mean_length': 8.5, 'done': 68, 'greedy': [[1, 2], [5, 6]]}, ''),
    (_DRAWN, {'mean_length': 6.0}, 'replies of 8 and 6 tokens'),
    (_DRAWN, {'greedy': [[1, 2, 0, 0], [0, 0, 0, 0]]}, '25% of the most probable tokens are the same'),
    (_SCORED, {'log_probs': [-1.01, -2.0]}, ''),
    (_SCORED, {'log_probs': [-1.0, -2.5]}, 'log-probs of a sequence differ by 0.500 a token'),
    (_SCORED, {'done': 60}, '64 and 60 done'),
    (_LEARNED, {'entropy': 2.1}, ''),
    (_LEARNED, {'entropy': 3.0}, 'replies of 2.00 and 3.00 nats a token'),
    (_LEARNED, {'tokens': 32}, '64 and 32 tokens drawn'),
  ],
)
def test_unequal_work_is_told(ours, changes, told):
  assert bench.unlike(ours, ours | changes) == told


def test_tasks_are_what_they_say():
  checkpoint = checkpoint_source.load(checkpoint_source.RANDOM)
  made = {task: tasks.make(task, checkpoint) for task in tasks.TASKS}
  assert made['sample'] == tasks.make('sample', checkpoint)
  assert len(made['sample']['prompts']) == 32
  assert len(made['sample_eos']['prompts']) == 128
  assert len({tuple(prompt) for prompt in made['score']['prompts']}) == 256
  assert len(made['score_4']['prompts']) == 256
  assert len({tuple(prompt) for prompt in made['score_4']['prompts']}) == 64
  assert all(len(row['replies']) == 4 for row in made['reward']['train'])


def test_a_step_in_parts_is_the_same_work(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / 'scripts' / 'bench_workers')
  worker = importlib.import_module('with_charjax')
  data = tasks.make('rl', checkpoint_source.load(checkpoint_source.RANDOM), 0.25)
  job = {'task': 'rl', 'data': data, 'model': checkpoint_source.RANDOM}
  whole, parts = (
    worker.Policy(job | {'setting': {'dtype': 'float32', 'rows': 8, 'microbatches': count}}).warm_up()
    for count in (1, 2)
  )
  assert bench.unlike(whole, parts) == ''
  assert parts['tokens'] == 2 * 4 * 64
