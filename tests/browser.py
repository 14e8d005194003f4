"""Chromium without a window, driven as a person would: real keys and clicks, through the DevTools protocol.

The browser reads and writes JSON messages ended by a zero byte at its file descriptors 3 and 4: no driver, no port.
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
_FLAGS = (
  '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
  '--hide-scrollbars', '--remote-debugging-pipe',
)  # fmt: skip
_PATIENCE = 60  # seconds; the machine may be busy
_NAMED = {  # key: (code, virtual key code)
  'ArrowLeft': ('ArrowLeft', 37), 'ArrowRight': ('ArrowRight', 39), 'Backspace': ('Backspace', 8),
  'Enter': ('Enter', 13), 'Escape': ('Escape', 27), 'Tab': ('Tab', 9), ' ': ('Space', 32),
}  # fmt: skip


class Browser:
  """One page of a browser.

  Attributes:
    problems: what the page's console said is wrong, and uncaught errors.
  """

  def __init__(self, send: int, receive: int):
    self._send, self._receive = send, receive
    self._buffer = b''
    self._count = self._loads = 0
    self._session: str | None = None
    self.problems: list[str] = []
    target = self.call('Target.createTarget', url='about:blank')['targetId']
    self._session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    for domain in ('Page', 'Runtime', 'Log'):
      self.call(f'{domain}.enable')

  def call(self, method: str, **params: Any) -> dict[str, Any]:
    """Calls a method of the protocol and waits for its answer."""
    self._count += 1
    message = {'id': self._count, 'method': method, 'params': params}
    os.write(self._send, json.dumps(message | ({'sessionId': self._session} if self._session else {})).encode() + b'\0')
    while True:
      answer = self._next()
      if answer.get('id') == self._count:
        assert 'error' not in answer, f'{method}: {answer["error"]}'
        return answer['result']
      self._note(answer)

  def _next(self) -> dict[str, Any]:
    while b'\0' not in self._buffer:
      ready, _, _ = select.select([self._receive], [], [], _PATIENCE)
      block = os.read(self._receive, 1 << 20) if ready else b''
      assert block, 'the browser says nothing'
      self._buffer += block
    message, self._buffer = self._buffer.split(b'\0', 1)
    return json.loads(message)

  def _note(self, event: dict[str, Any]) -> None:
    self._loads += event.get('method') == 'Page.loadEventFired'
    if event.get('method') == 'Runtime.exceptionThrown':
      self.problems.append(str(event['params']['exceptionDetails']))
    if event.get('method') == 'Log.entryAdded' and event['params']['entry']['level'] in ('error', 'warning'):
      self.problems.append(event['params']['entry']['text'])

  def open(self, address: str) -> None:
    self._load('Page.navigate', url=address)

  def reload(self) -> None:
    self._load('Page.reload')

  def _load(self, method: str, **params: Any) -> None:
    before = self._loads
    self.call(method, **params)
    while self._loads == before:
      self._note(self._next())

  def evaluate(self, expression: str) -> Any:
    """The value of a JavaScript expression in the page."""
    answer = self.call('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
    assert 'exceptionDetails' not in answer, answer['exceptionDetails']
    return answer['result'].get('value')

  def wait(self, expression: str) -> None:
    """Waits until it is true."""
    end = time.monotonic() + _PATIENCE
    while not self.evaluate(f'!!({expression})'):
      assert time.monotonic() < end, f'never came true: {expression}'
      time.sleep(0.02)

  def text(self, selector: str) -> str:
    return self.evaluate(f'document.querySelector({json.dumps(selector)}).textContent')

  def press(self, key: str, modifiers: int = 0, repeat: bool = False) -> None:
    """A key, down and up; modifiers are 1 for Alt, 2 for Ctrl, 4 for Meta, 8 for Shift, added."""
    code, number = _NAMED[key] if key in _NAMED else (f'Key{key.upper()}', ord(key.upper()))
    typed = {'text': '\r' if key == 'Enter' else key} if len(key) == 1 or key == 'Enter' else {}
    sent = {'key': key, 'code': code, 'windowsVirtualKeyCode': number, 'modifiers': modifiers}
    self.call('Input.dispatchKeyEvent', type='keyDown', autoRepeat=repeat, **sent, **({} if modifiers else typed))
    self.call('Input.dispatchKeyEvent', type='keyUp', **sent)

  def write(self, text: str) -> None:
    for character in text:
      self.press(character)

  def click(self, selector: str) -> None:
    """A click in the middle of an element, wherever that is on the screen."""
    box = self.evaluate(
      f'(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();'
      'return [box.x + box.width / 2, box.y + box.height / 2] })()'
    )
    place = {'x': box[0], 'y': box[1], 'button': 'left', 'clickCount': 1}
    for kind in ('mousePressed', 'mouseReleased'):
      self.call('Input.dispatchMouseEvent', type=kind, **place)

  def look(self, width: int, height: int, dark: bool = False) -> None:
    """Sets the size of the window and the colours that the person prefers."""
    self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)
    scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
    self.call('Emulation.setEmulatedMedia', features=[scheme])

  def screenshot(self, path: Path) -> None:
    path.write_bytes(base64.b64decode(self.call('Page.captureScreenshot')['data']))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
  """A browser with a fresh profile in `folder`, ended with the block."""
  assert CHROMIUM
  theirs_in, ours_out = os.pipe()
  ours_in, theirs_out = os.pipe()
  # Numbers that are not 3 or 4, which the shell gives them.
  given = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
  script = f'exec "$@" 3<&{given[0]} 4>&{given[1]}'
  command = ['bash', '-c', script, 'bash', CHROMIUM, *_FLAGS, f'--user-data-dir={folder}']
  with (folder / 'stderr.txt').open('w') as said:
    process = subprocess.Popen(command, pass_fds=given, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
  for end in (theirs_in, theirs_out, *given):
    os.close(end)
  try:
    page = Browser(ours_out, ours_in)
    yield page
    page._session = None
    page.call('Browser.close')
    process.wait(_PATIENCE)
  finally:
    process.kill()
    process.wait()
    os.close(ours_out)
    os.close(ours_in)
