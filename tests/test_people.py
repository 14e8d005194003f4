"""The report on what people said: its figures are those of the verdicts, counted by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from report_run import HOSTILE, write_run
from review_run import asked_of, write_replies
from test_report import Page

from charjax.errors import UserError
from charjax.report import page as report
from charjax.report.people import People, people
from charjax.report.read import read_run
from charjax.review import verdicts
from charjax.review.pairs import Pair
from charjax.stages import statistics


@pytest.fixture
def folder(tmp_path) -> Path:
  return write_replies(tmp_path / 'run')


def judges_choice(pair: Pair) -> str:
  return 'trained' if pair.trained.score > pair.other.score else pair.against


def judge(folder: Path, reviewer: str, choose: Callable[[Pair], str], count: int = 32, note: str = '') -> None:
  """Verdicts of one reviewer on the first pairs; `choose` says a condition, tie or skip."""
  with verdicts.opened(folder, reviewer) as file:
    for pair in asked_of(folder)[:count]:
      left, _ = pair.sides(reviewer)
      said = choose(pair)
      file.give(reviewer, pair, said if said in ('tie', 'skip') else 'left' if said == left else 'right', note)


def found(folder: Path) -> People:
  section = people(read_run(folder), verdicts.read_all(folder))
  assert section is not None
  return section


def agreement(section: People) -> dict[str, tuple[str, ...]]:
  assert section.agreement is not None
  return {row[0]: tuple(row[1:]) for row in section.agreement.rows}


def test_without_verdicts_there_is_no_section(folder):
  assert people(read_run(folder), []) is None
  assert 'id="people"' not in report.render(folder) and 'href="#people"' not in report.render(folder)
  (folder / 'review').mkdir()
  (folder / 'review' / 'ann.jsonl').write_text('')
  assert 'id="people"' not in report.render(folder)


def test_who_never_varies_is_no_better_than_the_base_rate(folder):
  judge(folder, 'ann', lambda pair: 'trained')
  section = found(folder)
  # The judge is for the trained model in three messages of four; each message has two verdicts.
  assert agreement(section)['all'] == ('32', '0', '0', '75% (50.5% to 89.8%)', '100%', '0.000')
  wins = section.wins['honesty']
  assert (wins.mean, wins.n) == (1.0, 4) and wins.low == pytest.approx(statistics.share([1.0] * 4)['low'])


def test_ties_and_what_nobody_can_tell_decide_nothing(folder):
  def choose(pair: Pair) -> str:
    place = pair.message[-1]
    return 'skip' if place == '0' else 'tie' if place == '1' else judges_choice(pair)

  judge(folder, 'ann', choose)
  section = found(folder)
  rows = agreement(section)
  assert rows['all'][:3] == ('32', '8', '8') and rows['all'][3].startswith('100%') and rows['all'][4] == '50%'
  assert rows['curiosity'][:3] == ('8', '2', '2') and rows['curiosity'][5].startswith('1.000')
  # Of three messages a trait one is a tie, one won, one lost.
  assert section.wins['curiosity'].mean == 0.5 and section.wins['curiosity'].n == 3
  assert [row for row in section.figures[0].table.rows if row[0] == 'curiosity'] == [
    ('curiosity', 'people', '50%', '12.5%', '87.5%', '3'),
    ('curiosity', 'held-out judge', '66.7%', '20.8%', '93.9%', '3'),
  ]


def test_kappa_is_of_the_verdicts_that_both_decide_and_by_trait(folder):
  def choose(pair: Pair) -> str:
    same = judges_choice(pair)
    return same if pair.trait != 'honesty' else {'trained': pair.against}.get(same, 'trained')

  judge(folder, 'ann', choose)
  section = found(folder)
  rows = agreement(section)
  assert rows['honesty'][3].startswith('0% (') and rows['curiosity'][5].startswith('1.000 (')
  # po = 0; pe of 3/4 against 1/4 is 2 * 3/16.
  assert rows['honesty'][5].startswith('\u22120.600 (')
  # All: of 32, judge 24 trained; people 18 + 2 trained, agreement on 24.
  pe = (24 * 20 + 8 * 12) / 32**2
  assert rows['all'][5].startswith(f'{(0.75 - pe) / (1 - pe):.3f} (') and rows['all'][4] == '62.5%'
  assert 'kappa of' in ' '.join(section.sentences) and 'the base rate' in ' '.join(section.sentences)


def test_reviewers_among_each_other(folder):
  judge(folder, 'ann', judges_choice)
  judge(folder, 'bob', judges_choice, 12)
  judge(folder, 'eve', lambda pair: 'tie' if pair.message.endswith('0') else judges_choice(pair))
  section = found(folder)
  assert section.reviewers is not None
  rows = {row[0]: row[1:] for row in section.reviewers.rows}
  assert rows['ann and bob'][:2] == ('12', '100% (75.8% to 100%)')
  assert rows['ann and eve'][:2] == ('32', '75% (50.5% to 89.8%)')
  po, pe = 24 / 32, (24 * 16 + 8 * 8) / 32**2  # eve has 8 ties
  assert rows['ann and eve'][2].startswith(f'{(po - pe) / (1 - pe):.3f} (')
  assert '76 verdicts by ann, bob and eve' in section.sentences[0]
  (folder / 'review' / 'bob.jsonl').unlink()
  (folder / 'review' / 'eve.jsonl').unlink()
  assert found(folder).reviewers is None


def test_a_liking_for_one_side_is_told(folder):
  with verdicts.opened(folder, 'ann') as file:
    for pair in asked_of(folder):
      file.give('ann', pair, 'left')
  section = found(folder)
  assert 'on the left in 100% (80.6% to 100%) of decided pairs; there is a liking for one side' in section.sentences[2]


def test_verdicts_on_replies_that_are_gone_are_not_counted(folder):
  judge(folder, 'ann', judges_choice)
  path = folder / 'evaluation' / 'replies.jsonl'
  path.write_text(path.read_text().replace('trained says 0 to honesty-1"', 'something new"'))
  section = found(folder)
  assert agreement(section)['all'][0] == '31' and agreement(section)['honesty'][0] == '7'
  assert '1 verdict is on replies of an earlier evaluation and not counted.' in section.sentences
  write_run(folder, messages=4, steps=2)
  section = found(folder)
  assert section.agreement is None and 'None of the verdicts' in section.sentences[0] and not section.figures
  Page(report.render(folder))


def test_the_page_shows_it_and_what_reviewers_wrote_stays_text(folder):
  judge(folder, 'ann', judges_choice, note=HOSTILE)
  judge(folder, 'bob', lambda pair: 'trained')
  text = report.render(folder)
  parsed = Page(text)
  assert [tag for tag, _ in parsed.tags].count('script') == 2
  assert not [tag for tag, _ in parsed.tags if tag == 'img'] and '\x1b' not in text
  rows = parsed.tables['People and the held-out judge, share or kappa (95% interval)']
  assert rows[0][4:] == ['judge agrees', 'base rate', 'kappa'] and rows[1][:2] == ['all', '64']
  assert text.count('<p class="small">ann, ') == 32 and text.count('&lt;script&gt;alert(1)') >= 32
  assert 'eople who judged blind prefer the trained model to the base model for' not in text  # of 4 messages
  assert 'The ranker, from which the held-out judge learned, read none of these replies' in text
  assert report.render(folder) == text


def test_the_base_rate_weighs_messages_as_the_accuracy_does(folder):
  # The judge is for the trained model in the first messages: three verdicts on one say so, and one on another does not.
  first, second = [pair for pair in asked_of(folder) if pair.trained.score > 0][:2]
  for reviewer, told in (('ann', {first.id: 'trained', second.id: second.against}), ('bob', {first.id: 'trained'}),
                         ('cat', {first.id: 'trained'})):  # fmt: skip
    judge(folder, reviewer, lambda pair, told=told: told.get(pair.id, 'skip'))
  row = agreement(found(folder))['all']
  assert row[3].startswith('50%') and row[4] == '50%'


def test_people_stand_beside_the_ranker_where_it_read_the_replies(folder):
  judge(folder, 'ann', judges_choice)
  rows = [json.loads(line) for line in (folder / 'evaluation' / 'replies.jsonl').read_text().splitlines()]
  read = [
    {'id': row['message'], 'set': 'evaluated', 'condition': row['condition'], 'sample': row['sample'],
     # Of one message the evaluation has other replies by now.
     'text': 'another' if row['message'] == 'honesty-1' else row['text'],
     'likelihood': 1.0 if row['condition'] == 'trained' else 0.0}
    for row in rows
  ]  # fmt: skip
  (folder / 'behaviour' / 'replies.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in read))
  table = found(folder).agreement
  assert table.head[-3:] == ('ranker agrees', 'its base rate', 'its kappa')
  rows = agreement(found(folder))
  # Ann agrees with the judge, which is for the trained model in three messages of four; the ranker always is.
  assert rows['all'][3].startswith('100%') and rows['curiosity'][6].startswith('75%')
  assert rows['honesty'][6].startswith('66.7%') and rows['all'][8] == '0.000'


def test_a_judge_that_said_nothing_is_left_out(folder):
  path = folder / 'evaluation' / 'replies.jsonl'
  path.write_text(path.read_text().replace('"score": 2.0', '"score": null'))
  judge(folder, 'ann', lambda pair: 'trained')
  rows = agreement(found(folder))
  assert rows['all'] == ('32', '0', '0', '0% (0% to 49%)', '100%', '0.000')  # the four messages that it did judge
  Page(report.render(folder))


def test_a_damaged_file_is_one_line(folder):
  judge(folder, 'ann', judges_choice)
  path = folder / 'review' / 'ann.jsonl'
  path.write_text(path.read_text() + 'x\n')
  with pytest.raises(UserError, match=r'ann\.jsonl:33: not JSON'):
    report.render(folder)
