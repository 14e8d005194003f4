"""Programs of others end, in any thread, and what they are ended for does not spoil the next answer."""

import threading

import pytest

from charjax import bounded


def test_one_that_was_ended_is_followed_by_one_that_answers():
  for _ in range(2):
    with pytest.raises(bounded.Refused, match='did not come to an end within'):
      bounded.render("{{ 'x' * 10 ** 10 }}", {})
    assert bounded.render('{{ word }}', {'word': 'grün\ud800\u2028"'}) == 'grün\ud800\u2028"'


def test_a_search_off_the_main_thread_ends_too():
  found: list[object] = []

  def search() -> None:
    try:
      bounded.search('(a+)+$', 'a' * 60 + '!')
    except bounded.Refused as error:
      found.append(error)

  threads = [threading.Thread(target=search) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(120)
  assert len(found) == 2
  assert bounded.search('A+', 'aaa') and not bounded.search('b', 'aaa')


def test_what_is_wrong_is_said():
  for source, reason in (('{% if %}', 'Expected an expression'), ("{{ raise_exception('a\\nb') }}", 'a b')):
    with pytest.raises(bounded.Refused, match=reason):
      bounded.render(source, {})
  with pytest.raises(bounded.Refused, match='unterminated'):
    bounded.search('[a', '')
