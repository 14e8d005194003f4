"""No interrupt is lost. In training the first one waits until the loop has saved; a second one does not."""

import gc
import os
import signal

import pytest

from charjax import interrupts
from charjax.progress import Progress
from charjax.training.interrupts import Interrupts


@pytest.fixture(autouse=True)
def sigterm():
  class Terminated(Exception):
    pass

  def stop(number, frame):
    raise Terminated

  before = signal.signal(signal.SIGTERM, stop)
  yield Terminated
  signal.signal(signal.SIGTERM, before)


def send(number):
  os.kill(os.getpid(), number)


def test_an_interrupt_is_held_until_it_is_let_through(sigterm, capsys):
  with pytest.raises(sigterm), Interrupts() as interrupts:
    assert not interrupts.agreed()
    interrupts.let_through()
    send(signal.SIGTERM)
    assert interrupts.agreed()
    interrupts.let_through()
  assert 'interrupt again to stop at once' in capsys.readouterr().err
  with pytest.raises(sigterm):  # the handler of before stands again
    send(signal.SIGTERM)


def test_a_second_one_goes_through_at_once_and_a_held_one_at_the_end(sigterm):
  with pytest.raises(sigterm), Interrupts():
    send(signal.SIGTERM)
    send(signal.SIGTERM)
    pytest.fail('the second was held')
  done = []
  with pytest.raises(sigterm), Interrupts():
    send(signal.SIGTERM)
    done.append(True)
  assert done


def test_an_error_is_not_hidden_by_a_held_interrupt(sigterm):
  with pytest.raises(ZeroDivisionError), Interrupts():
    send(signal.SIGTERM)
    raise ZeroDivisionError


@pytest.mark.parametrize(
  ('number', 'raised'), [(signal.SIGTERM, interrupts.Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_an_interrupt_that_python_drops_comes_again(number, raised, capsys):
  # Where tests run in the background, a shell has had Ctrl-C ignored.
  outside = signal.signal(number, signal.default_int_handler)

  def collecting(phase, info):
    if phase == 'start':
      send(number)

  def work():
    gc.callbacks.append(collecting)
    try:
      gc.collect()  # what the handler raises in here is dropped
    finally:
      gc.callbacks.remove(collecting)
    with Progress('work', 2) as bar:
      bar.advance()
      pytest.fail('the work went on')

  try:
    with pytest.raises(raised), interrupts.raising():
      work()
    assert signal.getsignal(number) == signal.default_int_handler and capsys.readouterr().err == ''
  finally:
    signal.signal(number, outside)


def test_an_ignored_interrupt_stays_ignored():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with interrupts.raising():
      send(signal.SIGINT)
  finally:
    signal.signal(signal.SIGINT, before)
