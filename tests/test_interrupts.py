"""No interrupt is lost. In training the first one waits until the loop has saved; a second one does not."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from charjax import hosts, interrupts
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


def test_long_work_is_left_where_an_interrupt_comes(sigterm):
  came = threading.Event()
  with pytest.raises(sigterm), Interrupts() as interrupts:
    done, interrupted = interrupts.work(lambda: 3)
    assert done.result() == 3 and not interrupted
    threading.Timer(0.3, send, [signal.SIGTERM]).start()
    left, interrupted = interrupts.work(lambda: came.wait(60))
    assert interrupted and not left.done()
    came.set()
    interrupts.let_through()


_BUSY = """
import hashlib
from charjax import hosts, interrupts
with interrupts.raising(), interrupts.leaving_within(0.5, hosts.exit_now):
  print('at it', flush=True)
  hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)  # in which Python hears of no signal
"""


def test_a_process_is_left_in_time_whatever_it_is_at():
  process = subprocess.Popen([sys.executable, '-c', _BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  assert process.stdout is not None and process.stdout.readline() == 'at it\n'
  time.sleep(1)  # It has said so, and only then begins: until it has, Python hears of a signal.
  process.terminate()
  _, told = process.communicate(timeout=30)
  assert process.returncode == 143 and told.startswith('charjax: not done 0.5 s after SIGTERM')


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


def test_a_pod_that_is_told_to_stop_is_told_once(sigterm, monkeypatch):
  """Each process hears of another's interrupt, and has its own a moment later: that is no second one."""
  told, saved = {}, []
  monkeypatch.setattr(hosts, 'told', told.get)
  monkeypatch.setattr(hosts, 'tell', told.__setitem__)
  with pytest.raises(sigterm), Interrupts() as interrupts:
    told['interrupt'] = signal.SIGTERM  # in another process
    assert interrupts.agreed()
    send(signal.SIGTERM)  # here, while all save
    saved.append(True)
    interrupts.let_through()
    pytest.fail('it was not let through')
  assert saved
  with pytest.raises(sigterm), Interrupts() as interrupts:
    assert interrupts.agreed()
    send(signal.SIGTERM)
    send(signal.SIGTERM)
    pytest.fail('its own second one was held')
