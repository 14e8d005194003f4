"""From a changed reply to the rankings nearest to it, and back."""

import dataclasses
import json
import math

import numpy as np
import pytest
from report_run import HOSTILE, write_run
from test_report import Page

from charjax.report import page as report
from charjax.report.provenance import nearest, provenance, words_of
from charjax.report.read import read_run
from charjax.report.replies import exchanges


def test_the_nearest_are_those_of_a_dense_table_of_tf_idf():
  rng = np.random.default_rng(0)
  vocabulary = [f'w{i}' for i in range(40)]
  texts = [' '.join(rng.choice(vocabulary, rng.integers(3, 30))) for _ in range(25)]
  queries = [' '.join(rng.choice([*vocabulary, 'unknown', 'words'], 12)) for _ in range(9)]
  known = [*vocabulary, 'unknown', 'words']

  def table(some):
    return np.array([[words_of(text).count(word) for word in known] for text in some], np.float64)

  d = (table(texts) > 0).sum(0)
  idf = np.log((1 + len(texts)) / (1 + d)) + 1
  a, b = table(queries) * idf, table(texts) * idf
  cosine = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
  found = nearest(queries, texts, 4)
  for row, hits in zip(cosine, found, strict=True):
    assert [place for place, _ in hits] == list(np.argsort(-row, kind='stable')[:4])
    assert [value for _, value in hits] == pytest.approx(sorted(row, reverse=True)[:4])


def test_what_has_no_word_in_common_is_not_near():
  assert nearest(['a b', '', '!?'], ['c d', 'b', 'b'], 5) == [[(1, pytest.approx(x := math.sqrt(0.5), rel=0.4)),
                                                              (2, pytest.approx(x, rel=0.4))], [], []]  # fmt: skip
  assert nearest(['a'], [], 3) == [[]]


def test_links_lead_there_and_back_and_show_what_was_trained_on(tmp_path):
  folder = write_run(tmp_path / 'run')
  run = read_run(folder)
  found = provenance(run, exchanges(run.evaluation_replies))
  assert found is not None and 'by chance it would be 25%' in found.sentences[0]
  sources = {source.anchor: source for source in found.sources}
  texts = {row['id']: row['text'] for row in run.replies}
  for key, links in found.near.items():
    assert links == sorted(links, key=lambda link: -link.cosine) and 0 < len(links) <= 3
    for link in links:
      back = [item for item in sources[link.anchor].moved if item.anchor == found.anchors[key]]
      assert len(back) == 1 and back[0].cosine == link.cosine
  source = found.sources[-1]
  place = int(source.anchor.removeprefix('source-'))
  ranking = json.loads((folder / 'rankings' / 'rankings.jsonl').read_text().splitlines()[place])
  # Best first: the second, the first, the third.
  assert [reply.text for reply in source.replies] == [texts[ranking['replies'][i]] for i in (1, 0, 2)]
  assert [reply.favour for reply in source.replies] == pytest.approx([0.8, 0.55, 0.15])
  assert source.probabilities.rows[0] == ('A', '\u2013', '0.700', '0.900')
  assert source.learned_by == ('train', 'judge')[place % 2]
  page = report.render(folder)
  parsed = Page(page)
  assert len(parsed.ids) == len(set(parsed.ids))
  assert {attrs['href'][1:] for tag, attrs in parsed.tags if tag == 'a' and 'download' not in attrs} <= set(parsed.ids)
  assert {*sources, *found.anchors.values()} <= set(parsed.ids)
  assert HOSTILE not in page and page.count('<script') == 2


def test_a_ranking_that_lacks_a_part_is_passed_over(tmp_path):
  folder = write_run(tmp_path / 'run', messages=4, steps=3)
  run = read_run(folder)
  found = exchanges(run.evaluation_replies)
  for broken in (
    {'probabilities': [[0.5, None], [0.5, 0.5]]}, {'probabilities': 3}, {'replies': ['nobody', 'knows']},
    {'message': 'gone'}, {'replies': []}, {'probabilities': [[0.5]]},
  ):  # fmt: skip
    some = provenance(dataclasses.replace(run, rankings=[run.rankings[0], run.rankings[1] | broken]), found)
    assert some is not None and [source.anchor for source in some.sources] == ['source-0'], broken
  assert provenance(dataclasses.replace(run, rankings=[]), found) is None
  (folder / 'rankings' / 'rankings.jsonl').unlink()
  assert 'id="provenance"' not in report.render(folder)
