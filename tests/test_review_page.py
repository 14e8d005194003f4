"""The page on which people judge, in a real browser: real keys and clicks, a reload half-way, hostile replies."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, browser
from report_run import HOSTILE
from review_run import asked_of, lines, serving, write_replies

from charjax.report.read import printable

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium')

RIGHT_TO_LEFT = '\u05e9\u05dc\u05d5\u05dd! \u202eabc'
LONG = 'Pneumonoultramicroscopicsilicovolcanoconiosis' * 20 + '\n' + 'And so on. ' * 900


@pytest.fixture(scope='module')
def chromium(tmp_path_factory) -> Iterator[Browser]:
  with browser(tmp_path_factory.mktemp('chromium')) as page:
    yield page


@pytest.fixture
def page(chromium) -> Iterator[Browser]:
  chromium.look(1280, 800)
  yield chromium
  said = [line for line in chromium.problems if 'favicon' not in line]
  chromium.problems.clear()
  assert not said


@pytest.fixture
def folder(tmp_path) -> Path:
  return write_replies(tmp_path / 'run')


def opened(page: Browser, serves) -> None:
  page.open(serves.address)
  page.wait('!document.getElementById("bar").hidden')


def judged(page: Browser, count: int) -> None:
  """Waits until the page says that so many pairs are judged."""
  page.wait(f'document.getElementById("meta").textContent.includes(" {count} of ")')


def test_keys_and_clicks_give_the_verdicts_that_are_written_on_them(page, folder):
  asked = asked_of(folder)
  with serving(folder) as serves:
    opened(page, serves)
    acts = [
      (page.press, 'ArrowLeft', 'left'), (page.press, 'ArrowRight', 'right'), (page.press, 't', 'tie'),
      (page.press, 's', 'skip'), (page.press, '1', 'left'), (page.press, 'b', 'right'),
      (page.click, '[data-verdict=left]', 'left'), (page.click, '[data-verdict=right]', 'right'),
      (page.click, '[data-verdict=tie]', 'tie'), (page.click, '[data-verdict=skip]', 'skip'),
    ]  # fmt: skip
    for place, (act, what, _) in enumerate(acts):
      pair = asked[place]
      assert page.text('#statement') == pair.statement and page.text('#prompt') == pair.prompt
      for side, condition in zip(('left', 'right'), pair.sides('ann'), strict=True):
        assert page.text(f'#{side}') == pair.reply(condition).text
        assert page.evaluate(f'!document.getElementById("cut-{side}").hidden') == pair.reply(condition).cut_off
      act(what)
      judged(page, place + 1)
    # Keys that are the browser's own, or held down, or mean nothing, judge nothing.
    for key, modifiers, repeat in (('ArrowLeft', 1, False), ('t', 2, False), ('s', 4, False), ('q', 0, False),
                                   ('ArrowRight', 0, True)):  # fmt: skip
      page.press(key, modifiers, repeat)
    page.wait('document.readyState === "complete"')
    assert page.evaluate('fetch("state").then(answer => answer.json()).then(state => state.done)') == len(acts)
  found = lines(folder)
  assert [row['verdict'] for row in found] == [verdict for _, _, verdict in acts]
  assert [row['pair'] for row in found] == [pair.id for pair in asked[: len(acts)]]


def test_with_tab_and_enter_alone(page, folder):
  with serving(folder) as serves:
    opened(page, serves)
    for place, verdict in enumerate(('left', 'tie')):
      page.press('Tab')
      assert page.evaluate('document.activeElement.dataset.verdict') == verdict
      page.press('Enter')
      judged(page, place + 1)
  assert [row['verdict'] for row in lines(folder)] == ['left', 'tie']


def test_undo_and_a_note_with_letters_that_are_keys_elsewhere(page, folder):
  with serving(folder) as serves:
    opened(page, serves)
    page.press('n')
    page.write('stub u')
    page.press('Enter')  # ends the note
    assert page.evaluate('document.activeElement === document.body') and not lines(folder)
    page.press('t')
    judged(page, 1)
    assert page.evaluate('document.getElementById("note").value') == ''
    for undo in (lambda: page.press('u'), lambda: page.click('#undo'), lambda: page.press('z', modifiers=2)):
      undo()
      judged(page, 0)
      assert page.evaluate('document.getElementById("note").value') == 'stub u'
      assert page.text('#status') == 'Taken back'
      page.press('s')
      judged(page, 1)
  assert [(row['verdict'], row['note']) for row in lines(folder)] == [
    ('tie', 'stub u'), *[(None, ''), ('skip', 'stub u')] * 3,
  ]  # fmt: skip


def test_a_reload_half_way_and_a_verdict_in_another_window(page, folder):
  asked = asked_of(folder)
  with serving(folder) as serves:
    opened(page, serves)
    page.press('t')
    judged(page, 1)
    page.reload()
    judged(page, 1)
    assert page.text('#prompt') == asked[1].prompt
    serves.review.judge(asked[1].id, 'left', '')
    page.press('ArrowRight')
    judged(page, 2)
    assert page.text('#prompt') == asked[2].prompt
    assert page.evaluate('document.getElementById("problem").hidden')
  assert [row['verdict'] for row in lines(folder)] == ['tie', 'left']
  page.problems.clear()  # That the answer was 409.


def test_it_says_when_nobody_listens_and_keeps_the_pair(page, folder):
  with serving(folder) as serves:
    opened(page, serves)
    before = page.text('#left')
  page.press('ArrowLeft')
  page.wait('!document.getElementById("problem").hidden')
  assert 'Your last key was not kept' in page.text('#problem') and page.text('#left') == before
  assert not lines(folder)
  page.problems.clear()  # That the connection was refused.


def test_the_last_pair_ends_it_and_can_be_taken_back(page, folder):
  asked = asked_of(folder)
  with serving(folder) as serves:
    for pair in asked[:-1]:
      serves.review.judge(pair.id, 'left', '')
    opened(page, serves)
    page.press('ArrowRight')
    judged(page, 32)
    assert page.evaluate('!document.getElementById("end").hidden && document.getElementById("pair").hidden')
    page.press('ArrowLeft')  # judges nothing
    page.press('u')
    judged(page, 31)
    assert page.text('#prompt') == asked[-1].prompt and page.evaluate('document.getElementById("end").hidden')


def test_what_models_write_is_text_and_fits_at_any_width(page, tmp_path):
  hostile = {}
  for trait in ('ai_nature', 'curiosity', 'perspectives', 'honesty'):
    for i, text in enumerate((HOSTILE, RIGHT_TO_LEFT, LONG, '')):
      for condition, samples in (('base', 2), ('trained', 2), ('prompted', 1)):
        for sample in range(samples):
          hostile[f'{trait}-{i}', condition, sample] = text and f'{condition[0]}{sample} {text}'
  folder = write_replies(tmp_path / 'run', hostile)
  path = folder / 'evaluation' / 'replies.jsonl'
  rows = [json.loads(line) for line in path.read_text().split('\n') if line]
  path.write_text(''.join(json.dumps(row | {'prompt': f'{HOSTILE} {row["message"]}'}) + '\n' for row in rows))
  asked, shown = asked_of(folder), set()
  with serving(folder) as serves:
    opened(page, serves)
    for place, pair in enumerate(asked[:16]):
      assert page.text('#prompt') == printable(f'{HOSTILE} {pair.message}')
      for side, condition in zip(('left', 'right'), pair.sides('ann'), strict=True):
        text = pair.reply(condition).text
        assert page.text(f'#{side}') == (text or '(nothing)')
        shown |= {known for known in (HOSTILE, RIGHT_TO_LEFT, LONG) if printable(known) in text}
        if RIGHT_TO_LEFT[:4] in text:
          assert page.evaluate(f'getComputedStyle(document.getElementById("{side}")).unicodeBidi') == 'isolate'
      if place % 4 == 0:
        assert page.evaluate('document.title') == 'Which reply?'
        assert page.evaluate('document.querySelectorAll("script, img, b").length') == 1  # our own script
      for width in (320, 1280) if LONG[:40] in pair.trained.text else ():
        page.look(width, 700)
        assert page.evaluate('document.documentElement.scrollWidth') <= width
        for side in ('left', 'right'):  # Nothing is cut off at the side, either.
          assert page.evaluate(f'(e => e.scrollWidth <= e.clientWidth)(document.getElementById("{side}"))')
        assert page.evaluate('document.documentElement.scrollHeight') > 1400  # all of it can be reached
        box = page.evaluate('document.getElementById("bar").getBoundingClientRect().toJSON()')
        assert box['top'] > 350 and box['bottom'] <= 700.5  # The buttons stay in sight.
      page.press('ArrowLeft')
      judged(page, place + 1)
  assert shown == {HOSTILE, RIGHT_TO_LEFT, LONG}


def test_markup_is_refused_by_the_page_itself(page, folder):
  """Should a later edit set text as HTML, the policy of the page stops it."""
  with serving(folder) as serves:
    opened(page, serves)
    refused = page.evaluate(
      '(() => { try { document.body.innerHTML = "<b>"; return "" } catch (e) { return e.name } })()'
    )
    assert refused == 'TypeError'
    page.evaluate('fetch("http://127.0.0.1:1/").catch(() => 0)')
  assert any('Content Security Policy' in line for line in page.problems)
  page.problems.clear()


@pytest.mark.parametrize('dark', [False, True])
def test_text_stands_out_from_its_ground(page, folder, dark):
  contrast = """(selectors => selectors.map(selector => {
    const light = colour => {
      const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = element => {
      const colour = getComputedStyle(element).backgroundColor;
      return colour === 'rgba(0, 0, 0, 0)' ? ground(element.parentElement) : colour;
    };
    const element = document.querySelector(selector);
    const [low, high] = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }))"""
  selectors = ['#meta', '#statement', '#trait', '#prompt', '#left', '.cut', 'h2', '[data-verdict=left]',
               '[data-verdict=tie]', '#noting', '#status']  # fmt: skip
  with serving(folder) as serves:
    page.look(1280, 800, dark)
    opened(page, serves)
    found = page.evaluate(f'{contrast}({json.dumps(selectors)})')
  assert len(found) == len(selectors) and min(found) >= 4.5, dict(zip(selectors, found, strict=True))
