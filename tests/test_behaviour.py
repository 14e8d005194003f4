"""What the behaviour stage makes of replies: paired figures, habits that words give away, and preferences."""

import re

import numpy as np
import pytest
from scipy.optimize import minimize

from charjax import character as characters
from charjax.stages import behaviour, habits, revealed, statistics
from charjax.stages.statistics import bradley_terry, interval, share, strength_intervals, strengths


def replies(name, trait, values, group='own'):
  """Rows of base and trained, each a (likelihood, judge) by prompt."""
  return [
    {'id': f'{group}/{name}/{i}', 'set': group, 'name': name, 'trait': trait, 'condition': condition,
     'message': f'{group == "unrelated"}/{i}', 'likelihood': likelihood, 'judge': judge,
     'turn': int(name) if group == 'drift' else 0}
    for condition, some in values.items() for i, (likelihood, judge) in enumerate(some)
  ]  # fmt: skip


# ---- the figures ----


def test_expression_is_paired_by_prompt_and_spill_is_the_ratio_of_effects():
  rng = np.random.default_rng(0)
  base, luck = rng.normal(size=(3, 30)), 0.05 * rng.normal(size=(3, 30))
  effects = {'own': 0.4, 'unrelated': 0.1, 'plain': 0.2}
  rows = []
  for (group, effect), b, e in zip(effects.items(), base, luck, strict=True):
    rows += replies(
      '', 't', {'base': [(x, 0) for x in b], 'trained': [(x + effect + d, 1) for x, d in zip(b, e, strict=True)]}, group
    )
  rng.shuffle(rows)
  found = behaviour.rigidity(rows)['t']
  for group, b, e in zip(effects, base, luck, strict=True):
    delta = found[group]['likelihood']['delta']
    assert delta['mean'] == pytest.approx(effects[group] + e.mean()) and delta['high'] - delta['low'] < 0.06
    assert found[group]['likelihood']['base']['mean'] == pytest.approx(b.mean())
    assert found[group]['judge']['delta'] == {'mean': 1, 'low': 1, 'high': 1, 'n': 30}
  for group, expected in (('unrelated', 0.25), ('plain', 0.5)):
    assert found['spill'][group]['low'] < expected < found['spill'][group]['high'] < expected + 0.15
  # Where the trait's own effect is not clear of zero there is no share of it.
  none = [row | {'likelihood': rng.normal()} if row['set'] == 'own' else row for row in rows]
  assert behaviour.rigidity(none)['t']['spill'] == {'unrelated': None, 'plain': None}


def test_two_forms_of_a_message_count_once_and_are_resampled_with_the_message():
  rng = np.random.default_rng(1)
  effects = rng.uniform(0.5, 3, 12)  # of each message: forms of it have half of this
  rows = replies('', 't', {'base': [(0, 0)] * 12, 'trained': [(e, 0) for e in effects]})
  for name in ('asked', 'system'):
    rows += replies(name, 't', {'base': [(0, 0)] * 12, 'trained': [(e / 2, 0) for e in effects]}, 'plain')
  rows += replies('', 't', {'base': [(0, 0)] * 12, 'trained': [(e / 2, 0) for e in effects]}, 'unrelated')
  found = behaviour.rigidity(rows)['t']
  assert found['plain']['likelihood']['delta'] == interval(effects / 2)
  # Whatever messages are drawn, half of their effect is half of it; other requests have luck of their own.
  assert found['spill']['plain'] == pytest.approx({'mean': 0.5, 'low': 0.5, 'high': 0.5, 'n': 12})
  assert found['spill']['unrelated']['low'] < 0.4 and found['spill']['unrelated']['high'] > 0.65


def test_drift_is_paired_by_conversation():
  rows = []
  for turn, effect in (('0', 1.0), ('1', 0.5), ('2', 0.25)):
    rows += replies(
      turn, 't', {'base': [(i, 0) for i in range(6)], 'trained': [(i + effect, 2) for i in range(6)]}, 'drift'
    )
  for row in rows:
    row['name'] = row['id'].rsplit('/', 1)[1]
  found = behaviour.drift(rows)
  assert [(t['turn'], t['likelihood']['delta']['mean']) for t in found['turns']] == [(1, 1.0), (2, 0.5), (3, 0.25)]
  assert found['last_less_first'] == {'likelihood': interval([-0.75] * 6), 'judge': interval([0.0] * 6)}
  assert found['traits'] == {'t': found['last_less_first']}
  others = [
    row | {'trait': 'other', 'name': f'other/{row["name"]}', 'likelihood': 2 * row['likelihood']} for row in rows
  ]
  both = behaviour.drift([*rows, *others])
  assert both['traits']['t'] == found['last_less_first'] and both['traits']['other']['likelihood']['mean'] == -1.5
  assert both['last_less_first']['likelihood']['mean'] == pytest.approx(-1.125)
  assert behaviour.drift([]) == {'turns': []}


def test_habits_are_shares_of_the_replies_to_their_own_prompts():
  says = {
    ('users', 'wrong'): ('Yes, you are right, Sydney.', 'No. It is Canberra.'),
    ('users', 'harmless'): ('I cannot help with that.', 'Use kill and its number.'),
    ('views', 'one'): ('There are many opinions, and it depends.', 'I would close the centre.'),
  }
  rows = [
    {'id': f'{name}{i}', 'set': group, 'name': name, 'condition': condition, 'text': text,
     'right': r'\bCanberra\b' if name == 'wrong' else None}
    for (group, name), texts in says.items()
    for condition, text in zip(behaviour.MODELS, texts, strict=True) for i in range(5)
  ]  # fmt: skip
  found = behaviour.side_effects(rows)
  assert found['agrees_with_error']['base'] == share([1.0] * 5) and found['agrees_with_error']['trained'] == share(
    [0.0] * 5
  )
  assert found['corrects_error']['trained']['mean'] == 1 and found['corrects_error']['delta']['mean'] == 1
  assert found['refuses_harmless']['delta']['mean'] == -1 and found['bland_middle']['delta']['mean'] == -1
  assert found['refuses_harmful'] == {c: None for c in found['refuses_harmful']}  # none was asked


def test_two_users_of_a_question_count_once_and_no_change_is_not_certain():
  rows = [
    {'id': f'{user}{i}', 'set': 'views', 'name': user, 'question': str(i), 'condition': condition,
     'text': 'It depends.' if i < 4 or (user == 'one' and condition == 'base') else 'Yes.'}
    for condition in behaviour.MODELS for user in ('one', 'other') for i in range(8)
  ]  # fmt: skip
  found = behaviour.side_effects(rows)['bland_middle']
  assert found['base'] == share([1.0] * 4 + [0.5] * 4, 2) and found['trained'] == share([1.0] * 4 + [0.0] * 4, 2)
  assert found['delta'] == interval([0.0] * 4 + [-0.5] * 4)
  same = behaviour.side_effects([row | {'text': 'It depends.'} for row in rows])
  for habit in ('bland_middle', 'claims_neutrality'):
    delta = same[habit]['delta']
    assert delta['mean'] == 0 and -0.5 < delta['low'] < -0.2 and 0.2 < delta['high'] < 0.5 and delta['n'] == 8


def test_the_authored_prompts_have_the_fields_that_are_told():
  kinds = {'sad', 'wrong', 'harmful', 'harmless', 'goodbye', 'human'}
  for name, fields in (('unrelated', {'message'}), ('forms', {'kind', 'name', 'form'}), ('users', {'kind', 'message'}),
                       ('views', {'question', 'one', 'other'})):  # fmt: skip
    rows = behaviour.read(name)
    assert rows and all(fields <= set(row) <= {*fields, 'system', 'right'} for row in rows)
    assert all(isinstance(value, str) and value.strip() for row in rows for value in row.values())
    texts = [tuple(row.values()) for row in rows]
    assert len(set(texts)) == len(texts)
  assert {row['kind'] for row in behaviour.read('users')} == kinds
  assert all(('right' in row) == (row['kind'] == 'wrong') for row in behaviour.read('users'))
  assert all(re.compile(row['right']) for row in behaviour.read('users') if 'right' in row)
  forms = behaviour.read('forms')
  assert {row['kind'] for row in forms} == {'plain', 'drop', 'format'} and len({row['name'] for row in forms}) == len(
    forms
  )
  assert all('{message}' in row['form'] for row in forms)
  asked = {kind for kinds, _ in habits.HABITS.values() for kind in kinds}
  assert asked == kinds | {'views'}


# ---- preferences ----


def test_two_items_have_the_log_odds_of_their_wins():
  assert bradley_terry(np.array([[0, 9.0], [3, 0]]), spread=1e6) == pytest.approx([np.log(3) / 2, -np.log(3) / 2])


def test_wins_as_often_as_strengths_say_give_these_strengths():
  s = np.array([1.5, 0.2, -0.3, -1.4])
  wins = 10 / (1 + np.exp(s[None] - s[:, None])) * (1 - np.eye(4))
  assert bradley_terry(np.stack([wins, 7 * wins]), spread=1e6) == pytest.approx(np.stack([s, s]), abs=1e-8)


def test_the_fit_is_where_another_optimiser_ends():
  rng = np.random.default_rng(0)
  wins = rng.integers(0, 5, (6, 6)) * (1.0 - np.eye(6))
  wins[2] = 0  # never won
  wins[:, 4] = 0  # never lost

  def loss(s):
    return (wins * np.logaddexp(0, s[None] - s[:, None])).sum() + (s**2).sum() / 18

  found = bradley_terry(wins)
  assert found == pytest.approx(minimize(loss, np.zeros(6), tol=1e-12).x, abs=1e-4)
  assert abs(found.sum()) < 1e-9 and found.argmin() == 2 and found.argmax() == 4


def test_intervals_of_strengths_hold_the_true_ones_and_differences_are_paired(monkeypatch):
  monkeypatch.setattr(statistics, '_FITS', 300)
  rng, true = np.random.default_rng(5), np.array([0.8, 0.0, -0.8])
  pairs = [(0, 1), (0, 2), (1, 2)]

  def play():
    tables = np.zeros((90, 3, 3))
    for q in range(90):
      i, j = pairs[q % 3]
      for _ in range(2):
        won = rng.uniform() < 1 / (1 + np.exp(true[j] - true[i]))
        tables[q][(i, j) if won else (j, i)] += 1
    return tables

  held = []
  for trial in range(300):
    found = strength_intervals(*strengths(play(), seed=trial), 90)
    held += [f['low'] <= t <= f['high'] for f, t in zip(found, true, strict=True)]
  assert 0.93 < np.mean(held) < 0.97
  tables = play()
  one, other = strengths(tables), strengths(tables)
  # With itself none differs in any resample, which is no certainty.
  assert all(f['mean'] == 0 and f['low'] is None for f in strength_intervals(one[0] - other[0], one[1] - other[1], 90))
  assert strength_intervals(*strengths(tables[:1]), 1)[0]['low'] is None


@pytest.mark.parametrize(('text', 'expected'), [
  ('A', 'A'), ('B.', 'B'), ('(A)', 'A'), ('Option B', 'B'), ('Answer: A', 'A'), ('**B**', 'B'), ('A) I am', 'A'),
  ('A good one', None), ('Both', None), ('', None), ('I would', None), ('a', None), ('C', None),
])  # fmt: skip
def test_an_answer_is_valid_where_it_is_a_letter_first(text, expected):
  assert revealed.chosen(text) == expected


def test_questions_are_asked_in_both_orders_and_are_the_same_ones_again():
  stoic = characters.load('stoic')
  options = revealed.options(stoic)
  whole = revealed.questions(stoic, 10**6, 0)
  assert len(whole) == len(options) * (len(options) - 1)
  some = revealed.questions(stoic, 7, 0)
  assert len(some) == 14 and some == revealed.questions(stoic, 7, 0) and all(row in whole for row in some)
  for one, other in zip(some[::2], some[1::2], strict=True):
    assert (one['first'], one['second']) == (other['second'], other['first'])
    assert one['text'].splitlines()[-1] == other['text'].splitlines()[-1]
  assert some != revealed.questions(stoic, 7, 1)


def test_one_who_always_says_a_prefers_nothing_and_invalid_answers_are_shown():
  names = ['x', 'y', 'z']
  orders = [('x', 'y'), ('y', 'x'), ('x', 'z'), ('z', 'x'), ('y', 'z'), ('z', 'y')]

  def rows(answers):
    return [{'first': a, 'second': b, 'text': text} for (a, b), text in zip(orders * 20, answers * 20, strict=True)]

  found = revealed.summarise(names, {'base': rows(['A'] * 6), 'trained': rows(['A', 'B', 'A', 'B', 'hm', 'A'])})
  assert all(abs(f['base']['mean']) < 1e-9 for f in found['strength'].values()) and found['first']['base']['mean'] == 1
  assert found['invalid']['trained']['mean'] == pytest.approx(1 / 6) and found['invalid']['base']['mean'] == 0
  # y and z met in an invalid answer only: the two are alike, and both below x.
  s = {name: f['trained'] for name, f in found['strength'].items()}
  assert s['x']['low'] > 0 > s['y']['high'] and s['y']['mean'] == pytest.approx(s['z']['mean']) and s['x']['n'] == 40
  assert found['strength']['x']['delta']['mean'] == pytest.approx(s['x']['mean'])
