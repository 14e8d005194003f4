"""The report in a real browser: links that unfold what they lead to, downloads, and nothing wider than the page."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, browser
from report_run import write_run

from charjax.report import page as report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium')


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
  folder = write_run(tmp_path_factory.mktemp('run'))
  (folder / 'index.html').write_text(report.render(folder))
  return folder


@pytest.fixture(scope='module')
def page(folder, tmp_path_factory) -> Iterator[Browser]:
  with browser(tmp_path_factory.mktemp('chromium')) as page:
    page.look(1280, 800)
    page.open(f'file://{folder}/index.html')
    yield page
    assert not page.problems


def pointed(page: Browser, selector: str) -> None:
  page.evaluate(
    f'document.querySelector({json.dumps(selector)}).scrollIntoView({{block: "center", behavior: "instant"}})'
  )
  page.click(selector)


def test_links_unfold_a_ranking_and_lead_back_to_a_reply_that_a_filter_hid(page):
  shown = 'document.querySelector("#{}").checkVisibility({{contentVisibilityAuto: true}})'
  link = page.evaluate('document.querySelector("#reply-0 .links a").hash').removeprefix('#')
  assert not page.evaluate(f'document.getElementById("{link}").open')
  page.evaluate('document.querySelector("#reply-0 details:has(.links)").open = true')
  pointed(page, '#reply-0 .links a')
  page.wait(f'document.getElementById("{link}").open')
  page.evaluate('document.querySelectorAll("#replies .filter a")[2].click()')
  assert not page.evaluate(shown.format('reply-0'))
  assert page.evaluate(f'document.querySelector("#{link} .links a[href=\'#reply-0\']") !== null')
  page.evaluate(f'document.querySelector("#{link} .links a[href=\'#reply-0\']").focus()')
  page.press('Enter')
  page.wait(shown.format('reply-0'))
  # A search takes what does not match out of the document.
  page.evaluate('location.hash = ""')
  search = 'document.querySelector("#replies .controls input")'
  page.evaluate(f'{search}.value = "matches nothing"; {search}.dispatchEvent(new Event("input"))')
  assert page.evaluate('document.getElementById("reply-0") === null')
  page.evaluate(f'document.querySelector("#{link} .links a[href=\'#reply-0\']").click()')
  page.wait(f'document.getElementById("reply-0") && {shown.format("reply-0")}')
  assert page.evaluate(f'{search}.value') == ''


def test_a_plot_s_data_arrives_as_a_file(page, folder, tmp_path):
  page.call('Browser.setDownloadBehavior', behavior='allow', downloadPath=str(tmp_path))
  page.evaluate('document.querySelector("#answer details").open = true')
  name = page.evaluate('document.querySelector("#answer a.download").download')
  pointed(page, '#answer a.download')
  end = time.monotonic() + 60
  while not (tmp_path / name).exists():
    assert time.monotonic() < end
    time.sleep(0.05)
  summary = json.loads((folder / 'evaluation' / 'summary.json').read_text())
  first = (tmp_path / name).read_text().splitlines()[1].split(',')
  assert float(first[1]) == summary['traits']['ai_nature']['margin']['delta']['mean']


@pytest.mark.parametrize('width', [1280, 380])
def test_nothing_is_wider_than_the_page(page, width):
  page.look(width, 800)
  page.evaluate('document.querySelectorAll("details").forEach(part => part.open = true)')
  wide = """[...document.querySelectorAll('main *')].filter(part => part.getBoundingClientRect().right > innerWidth + 1
    && !part.closest('.scroll, .plots.wide, svg')).map(part => part.outerHTML.slice(0, 80))"""
  assert page.evaluate(wide) == []
