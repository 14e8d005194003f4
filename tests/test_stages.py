"""What the stages compute beside the model: openings, labels, calibration, against closed forms and other solvers."""

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from charjax import character as characters
from charjax import defaults
from charjax.errors import UserError
from charjax.stages import prompts, rankings, replies
from charjax.stages.messages import Kept, broken
from charjax.stages.preference import calibration, calibration_error
from charjax.stages.rankers import RANKERS, Answer, Settings
from charjax.stages.rankings import control_length, fit_temperature
from charjax.workdir import Session

# ---- messages ----


def test_an_opening_is_the_beginning_of_a_text_and_never_the_whole():
  texts = ['one two three four five six', 'Who are you?', 'Hello there']
  found = {prompts.opening(0, str(i), texts, 4) for i in range(200)}
  assert found == {'one two', 'one two three', 'one two three four', 'Who are', 'Hello'}
  assert prompts.opening(0, '7', texts, 4) == prompts.opening(0, '7', texts, 4)
  assert prompts.opening(0, '7', texts, 0) == ''
  assert {prompts.opening(0, str(i), texts, 1) for i in range(50)} == {'one', 'Who', 'Hello'}


def test_messages_too_like_another_are_rejected():
  kept = Kept(['Is it ever right to break a promise?'], 0.5)
  assert kept.reject('is it EVER right to break it') == 'near-duplicate'
  assert kept.reject('Is it ever wrong to eat fish on a Friday?') == ''
  assert kept.reject('Is it ever wrong to eat fish on a Sunday?') == 'near-duplicate'


@pytest.mark.parametrize(
  ('text', 'finish', 'reason'),
  [
    ('What is your name, robot?', 'stop', ''),
    ('What is your name, robot?', 'length', 'cut off'),
    ('Hello there', 'stop', 'too short'),
    ('Write a short message about art', 'stop', 'quotes its instructions'),
    ('What is this <|im_start|> thing', 'stop', 'quotes its instructions'),
    ('What is this \ufffd thing', 'stop', 'broken characters'),
    ('no no no no no yes', 'stop', 'repeats itself'),
  ],
)
def test_broken_messages_are_told(text, finish, reason):
  assert broken({'text': text, 'finish': finish}) == reason


# ---- replies ----


def test_every_reply_is_asked_for_once_and_opposed_ones_take_turns(tmp_path):
  config = defaults.get_config()
  config.replies.update(shown=2, plain=1, opposed=3)
  character = characters.select(characters.load('assistant'), ('honesty', 'ai_nature'))
  session = Session(config, character, tmp_path)
  asked = [{'id': f'{t}-{i}', 'trait': t, 'text': 'Hi'} for t in ('honesty', 'ai_nature') for i in range(5)]
  work = list(replies._work(session, asked))
  ids = [item['id'] for *_, items in work for item in items]
  assert len(ids) == len(set(ids)) == 10 * 6
  drawn_from = {name: {item['id'] for item in items} for name, _, _, items in work}
  for i in range(5):
    sides = [f'honesty-{i}/opposed/{k}' in drawn_from['honesty-opposed-flattering'] for k in range(3)]
    # Of two opposites, each in turn.
    assert sides[0] == sides[2] != sides[1]
  assert len(drawn_from['plain']) == 10 and len(drawn_from['ai_nature-opposed-human']) == 15


# ---- rankings ----


def test_replies_without_a_finite_score_are_left_out_and_too_many_stop_the_run(tmp_path, monkeypatch):
  config = defaults.get_config()
  character = characters.select(characters.load('assistant'), ('honesty',))
  monkeypatch.setattr(Session, 'model', None)
  values = np.array([1.0, np.nan, 2.0, np.inf, 3.0, 4.0])
  monkeypatch.setitem(RANKERS, 'likelihood', lambda model, trait, answers, settings: values)
  names = [[f'honesty-{m}/shown/{k}' for k in range(n)] for m, n in ((0, 3), (1, 2), (2, 1))]
  groups = {'honesty': [([Answer('Hi', 'Yes')] * len(ids), ids) for ids in names]}
  session = Session(config, character, tmp_path / 'a')
  # One of three is left out; of two only one would be left, which nothing can be learned from.
  assert rankings._rank(session, groups, Settings(), 'likelihood') == [
    {'message': 'honesty-0', 'replies': ['honesty-0/shown/0', 'honesty-0/shown/2'], 'scores': [1.0, 2.0]}
  ]
  config.rankings.skipped_replies = 3
  session = Session(config, character, tmp_path / 'b')
  with pytest.raises(UserError, match=r'of 4 replies are not finite .* first of them honesty-0/shown/1'):
    rankings._rank(session, groups, Settings(), 'likelihood')


def ranking(rng, n, effect):
  """Messages with 5 replies whose scores follow length and the cut-off flag by `effect`, beside noise."""
  by_id, ranked = {}, []
  for m in range(n):
    names = [f'{m}/{k}' for k in range(5)]
    for name in names:
      tokens = int(rng.integers(5, 40))
      by_id[name] = {'tokens': tokens, 'finish': 'length' if tokens > 30 else 'stop'}
    base = rng.normal() * 10  # what a message adds to all its replies must not count
    scores = [
      base + effect[0] * by_id[n]['tokens'] + effect[1] * (by_id[n]['finish'] == 'length') + rng.normal() for n in names
    ]
    ranked.append({'replies': names, 'scores': scores})
  return ranked, by_id


def test_length_is_taken_out_of_the_scores_where_they_follow_it():
  ranked, by_id = ranking(np.random.default_rng(0), 200, (-0.3, 2.0))
  found = control_length(ranked, by_id, 0.2)
  assert found['before'] < -0.5 and found['after'] == pytest.approx(0, abs=1e-6)
  assert (found['per_token'], found['cut_off']) == (pytest.approx(-0.3, abs=0.02), pytest.approx(2.0, abs=0.3))
  every = np.concatenate([np.array(row['controlled']) - np.mean(row['scores']) for row in ranked])
  lengths = [[by_id[n]['tokens'] for n in row['replies']] for row in ranked]
  centred = np.concatenate([np.array(some) - np.mean(some) for some in lengths])
  assert abs(scipy.stats.pearsonr(every, centred)[0]) < 1e-3


def test_scores_that_do_not_follow_length_are_left_alone():
  ranked, by_id = ranking(np.random.default_rng(1), 200, (0.0, 0.0))
  found = control_length(ranked, by_id, 0.2)
  assert found['per_token'] == 0 and all(row['controlled'] == pytest.approx(row['scores'], abs=1e-6) for row in ranked)


def test_the_temperature_has_the_least_log_loss():
  margins = np.random.default_rng(0).normal(0.7, 1.5, 80)
  best = scipy.optimize.minimize_scalar(
    lambda log_tau: np.logaddexp(0, -margins / np.exp(log_tau)).mean(), bounds=(-4, 4), method='bounded'
  )
  assert fit_temperature(margins) == pytest.approx(np.exp(best.x), rel=0.03)
  assert fit_temperature(np.zeros(0)) == 1.0 and fit_temperature(np.zeros(3)) > 0


# ---- preference ----


def test_calibration_error_is_the_gap_in_bins():
  rng = np.random.default_rng(0)
  p = rng.uniform(size=1000)
  assert calibration_error(p, p) == pytest.approx(0)
  assert calibration_error(p, np.clip(p + 0.1, 0, 2)) == pytest.approx(0.1)
  rows = calibration(p, p, list(range(1000)))
  assert len(rows) == 10 and all(row['label']['n'] == 100 for row in rows)
  assert all(row['label']['mean'] == pytest.approx(row['predicted']) for row in rows)
  # The pairs of one message count as one.
  assert [row['label']['n'] for row in calibration(p, p, [0] * 1000)] == [1] * 10
  # Labels drawn with these probabilities: close, and twice as sure as they ought to be: not.
  drawn = (rng.uniform(size=1000) < p).astype(float)
  assert calibration_error(p, drawn) < 0.06 < calibration_error(1 / (1 + ((1 - p) / p) ** 4), drawn)
