"""Which checkpoint is the policy: the one that the judge likes best, and what is kept to choose from."""

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from charjax.errors import UserError
from charjax.stages import choice
from charjax.stages.statistics import interval
from charjax.training.checkpoint import Checkpoints, read_trained


@pytest.mark.parametrize(
  ('steps', 'candidates', 'expected'), [(60, 1, [60]), (60, 4, [15, 30, 45, 60]), (5, 2, [3, 5]), (2, 9, [1, 2])]
)
def test_candidates_are_spread_evenly_and_the_last_is_among_them(steps, candidates, expected):
  assert choice.candidate_steps(ConfigDict({'steps': steps, 'candidates': candidates})) == expected


def test_the_best_by_weight_is_chosen_and_told_beside_the_last():
  scores = np.random.default_rng(0).normal(size=(3, 40)) * 0.1 + np.array([0.2, 0.5, 0.3])[:, None]
  found = choice.compare(scores, np.ones(40), [10, 20, 30])
  assert found['chosen'] == 20 and [row['step'] for row in found['candidates']] == [10, 20, 30]
  assert found['candidates'][1] == {
    'step': 20,
    'judge': pytest.approx(interval(scores[1] - scores.mean(0))),
    'over_last': pytest.approx(interval(scores[1] - scores[2])),
  }
  # One trait, which counts for little, gained most of that.
  scores[1, :20] += 2
  scores[1, 20:] -= 1
  assert choice.compare(scores, np.ones(40), [10, 20, 30])['chosen'] == 20
  assert choice.compare(scores, np.repeat([0.2, 1.8], 20), [10, 20, 30])['chosen'] == 30
  # Of equals the one that moved the least.
  assert choice.compare(np.zeros((3, 4)), np.ones(4), [10, 20, 30])['chosen'] == 10


def test_candidates_stay_until_one_is_chosen(tmp_path):
  folder, like = epath.Path(tmp_path), {'adapter': {'q': jnp.zeros(3)}}
  with Checkpoints(folder, 0, [2]) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, {'adapter': {'q': jnp.full(3, float(step))}}, jnp.zeros(1), {'at': step})
    assert sorted(path.name for path in folder.iterdir()) == ['2', '3']
    assert checkpoints.restore(like, jnp.ones(1))[0] == 3
    np.testing.assert_array_equal(checkpoints.load(like, 2)['adapter']['q'], 2)
    checkpoints.keep_only(2)
    with pytest.raises(UserError, match='checkpoint 3 cannot be read'):
      checkpoints.load(like, 3)
  assert [path.name for path in folder.iterdir()] == ['2']
  # Whoever reads the policy finds it without knowing of the choice.
  with Checkpoints(folder, 0) as checkpoints:
    np.testing.assert_array_equal(checkpoints.load(like)['adapter']['q'], 2)
  np.testing.assert_array_equal(read_trained(folder).read('adapter.q', np.float32), 2)
