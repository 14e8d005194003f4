"""Steps with numbers that are not finite: counted over restarts, and at last they stop the run."""

import json

import numpy as np
import pytest
from etils import epath

from charjax.errors import UserError
from charjax.training.skipped import Skipped

BATCH = {'rows': {'tokens': np.arange(6).reshape(2, 3)}, 'clip': np.float32(0.2)}


def test_one_step_too_many_stops_the_run_and_keeps_its_batch(tmp_path):
  skipped = Skipped(epath.Path(tmp_path), limit=2)
  skipped.watch(1, {'skipped': False}, BATCH)
  skipped.watch(2, {'skipped': True}, BATCH)
  assert not (tmp_path / 'not_finite').exists()
  with pytest.raises(UserError, match='in 2 steps, the last of them step 5') as caught:
    skipped.watch(5, {'skipped': np.array(1.0)}, BATCH)
  file = tmp_path / 'not_finite' / '000005.npz'
  assert str(file) in str(caught.value) and '\n' not in str(caught.value)
  kept = np.load(file)
  assert {name: kept[name].tolist() for name in kept} == {
    'rows.tokens': [[0, 1, 2], [3, 4, 5]],
    'clip': np.float32(0.2),
  }


def test_steps_skipped_before_a_restart_count(tmp_path):
  rows = [{'step': 1, 'loss': None, 'skipped': 1.0}, {'step': 2, 'loss': 0.5, 'skipped': 0.0}, {'step': 3, 'loss': 0.1}]
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  with pytest.raises(UserError, match='in 2 steps'):
    Skipped(epath.Path(tmp_path), limit=2).watch(4, {'skipped': True}, BATCH)
