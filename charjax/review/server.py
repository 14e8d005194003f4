"""The page on which people judge: served to this machine alone, it asks for one verdict after another.

Whoever can open the page can add verdicts, so its address holds a secret; other pages of the same browser reach neither
it (the secret, and the names it answers to) nor what it shows. Which reply is whose never leaves this process.
"""

import json
import os
import re
import secrets
import socketserver
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from etils import epath

from charjax.errors import UserError
from charjax.files import Row
from charjax.report.read import read_run
from charjax.report.words import outdated_sentence, spoken
from charjax.review.pairs import Pair, Reply, pairs
from charjax.review.verdicts import CHOICES, Verdicts, opened, reviewer_name

_LONGEST_NOTE = 2000  # characters, as in page.html
_LARGEST_BODY = 1 << 16  # bytes; such a note takes 12,000 as JSON
_PAGE = {
  '': ('page.html', 'text/html'),
  'page.css': ('page.css', 'text/css'),
  'page.js': ('page.js', 'text/javascript'),
}
_HEADERS = {
  'Content-Security-Policy': "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
  'Cache-Control': 'no-store',
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Resource-Policy': 'same-origin',
  'Referrer-Policy': 'no-referrer',
  'X-Content-Type-Options': 'nosniff',
}


def serve(workdir: epath.Path, reviewer: str, port: int) -> None:
  """Serves the page of one reviewer until Ctrl-C, and says where it is and what was kept.

  Raises:
    UserError: there is nothing to judge, the reviewer's verdicts cannot be kept, or the port cannot be had.
  """
  reviewer = reviewer_name(reviewer)
  asked = _pairs_to_judge(workdir)
  with opened(workdir, reviewer) as verdicts:
    review = Review(asked, verdicts, reviewer, os.path.basename(os.path.abspath(workdir)))
    try:
      server = Server(review, port)
    except OSError as error:
      raise UserError(f'--port={port}: {error.strerror or error}; give another, or leave it out') from error
    with server:
      if verdicts.dropped:
        print(f'{verdicts.path}: its last line was cut short, and is dropped')
      state = review.state()
      print(f'{reviewer} has judged {state["done"]} of {state["total"]} pairs. Ctrl-C ends; the same command goes on.')
      print(server.address, flush=True)
      try:
        server.serve_forever()
      except KeyboardInterrupt:
        review.lock.acquire()  # For good: what is not written now never is.
        count = len(verdicts.standing)
        print(f'\n{count} verdict{"" if count == 1 else "s"} of {reviewer} stand in {verdicts.path}')


def _pairs_to_judge(workdir: epath.Path) -> list[Pair]:
  run = read_run(workdir)
  if not (workdir / 'evaluation' / 'stage.json').exists():
    raise UserError(f'{workdir}: its evaluation is not finished; run charjax evaluation first')
  if 'evaluation' in run.outdated:
    raise UserError(f'{workdir}: {outdated_sentence(["evaluation"])}')
  asked = pairs(run)
  if not asked:
    raise UserError(
      f'{workdir / "evaluation" / "replies.jsonl"}: holds no reply of the trained model to a message of a trait and '
      'another to judge it against; run charjax evaluation again'
    )
  silent = next((pair.trait for pair in asked if not pair.statement.strip()), None)
  if silent is not None:
    raise UserError(f'{workdir / "character.toml"}: trait {silent} has no statement; restore the file')
  return asked


class Refused(Exception):
  """A request that is answered by a status and one line."""

  def __init__(self, status: int, line: str):
    super().__init__(line)
    self.status = status


class Review:
  """What one reviewer is asked and has said.

  Attributes:
    lock: held while a verdict is written; a browser asks in several threads.
  """

  def __init__(self, asked: Sequence[Pair], verdicts: Verdicts, reviewer: str, run: str):
    self.lock = threading.RLock()
    self._asked = {pair.id: pair for pair in asked}
    self._verdicts = verdicts
    self._reviewer = reviewer
    self._run = run
    self._notes: dict[str, str] = {}  # of verdicts that were taken back

  def state(self) -> Row:
    """Progress, and the next pair without a word on whose replies they are; None after the last."""
    with self.lock:
      given = [pair for pair in self._verdicts.standing if pair in self._asked]
      following = next((pair for pair in self._asked.values() if pair.id not in self._verdicts.standing), None)
      return {
        'run': self._run,
        'reviewer': self._reviewer,
        'done': len(given),
        'total': len(self._asked),
        'can_undo': bool(given),
        'pair': following and self._shown(following),
      }

  def _shown(self, pair: Pair) -> Row:
    left, right = (pair.reply(condition) for condition in pair.sides(self._reviewer))
    return {
      'id': pair.id,
      'trait': spoken(pair.trait),
      'statement': pair.statement,
      'prompt': pair.prompt,
      'left': _said(left),
      'right': _said(right),
      'note': self._notes.get(pair.id, ''),
    }

  def judge(self, name: Any, verdict: Any, note: Any) -> Row:
    """Keeps a verdict; returns the new state.

    Raises:
      Refused: there is no such pair or verdict, or the pair is judged already (in another window).
      OSError: it cannot be written.
    """
    pair = self._asked.get(name) if isinstance(name, str) else None
    if pair is None:
      raise Refused(404, 'there is no such pair')
    if verdict not in CHOICES:
      raise Refused(400, f'verdict must be one of {", ".join(CHOICES)}')
    if not isinstance(note, str) or len(note) > _LONGEST_NOTE:
      raise Refused(400, f'note must be text of at most {_LONGEST_NOTE} characters')
    with self.lock:
      if pair.id in self._verdicts.standing:
        raise Refused(409, 'this pair is judged already')
      self._verdicts.give(self._reviewer, pair, verdict, note.strip())
      self._notes.pop(pair.id, None)
      return self.state()

  def undo(self) -> Row:
    """Takes the last verdict back; returns the new state, whose pair is that one again.

    Raises:
      Refused: none stands.
      OSError: it cannot be written.
    """
    with self.lock:
      last = next((pair for pair in reversed(self._verdicts.standing) if pair in self._asked), None)
      if last is None:
        raise Refused(409, 'there is no verdict to take back')
      self._notes[last] = self._verdicts.standing[last]['note']
      self._verdicts.give(self._reviewer, self._asked[last], None)
      return self.state() | {'pair': self._shown(self._asked[last])}


def _said(reply: Reply) -> Row:
  return {'text': reply.text, 'cut_off': reply.cut_off}


class Server(ThreadingHTTPServer):
  """Listens on the loopback device alone.

  Attributes:
    review: what it asks about.
    token: the secret in its address.
    address: what the reviewer opens.
  """

  daemon_threads = True

  def __init__(self, review: Review, port: int = 0):
    super().__init__(('127.0.0.1', port), _Handler)
    self.review = review
    self.token = secrets.token_urlsafe(16)
    self.address = f'http://127.0.0.1:{self.server_port}/{self.token}/'

  def server_bind(self) -> None:
    socketserver.TCPServer.server_bind(self)  # Without a name server's word on what this machine is called.
    self.server_name, self.server_port = '127.0.0.1', self.server_address[1]

  def handle_error(self, request: Any, client_address: Any) -> None:
    # A browser that goes away while it is answered is no error.
    if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
      super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
  server: Server
  server_version, sys_version = 'charjax', ''
  timeout = 30  # seconds until a connection that says nothing is closed

  def do_GET(self) -> None:
    self._answer({'state': self.server.review.state})

  def do_POST(self) -> None:
    self._answer({'verdict': self._verdict, 'undo': self._undo})

  def _answer(self, actions: dict[str, Any]) -> None:
    """Sends a file of the page, or what an action says; else why not."""
    try:
      name = self._requested()
      if name in _PAGE and self.command == 'GET':
        file, kind = _PAGE[name]
        self._send(200, kind, (epath.Path(__file__).parent / file).read_bytes())
      elif name in actions:
        self._send(200, 'application/json', json.dumps(actions[name]()).encode())
      else:
        raise Refused(404, 'nothing is here')
    except Refused as refusal:
      self.send_error(refusal.status, str(refusal))
    except OSError as error:
      if isinstance(error, (ConnectionError, TimeoutError)):
        raise
      self.send_error(507, f'the verdict cannot be written: {error.strerror or error}')

  def _requested(self) -> str:
    """What is asked for below the secret.

    Raises:
      Refused: under another name than ours (a page elsewhere may have its own name lead here), without the secret, or
        by a page elsewhere.
    """
    names = {f'{name}:{self.server.server_port}' for name in ('127.0.0.1', 'localhost')}
    if self.headers.get('Host') not in names:
      raise Refused(403, 'this server answers to 127.0.0.1 alone')
    if self.headers.get('Origin') not in (None, *(f'http://{name}' for name in names)):
      raise Refused(403, 'another page asks')
    found = re.fullmatch('/([^/]*)/([^/]*)', self.path)
    if found is None or not secrets.compare_digest(found[1].encode(), self.server.token.encode()):
      raise Refused(404, 'nothing is here; open the address that charjax review printed')
    return found[2]

  def _verdict(self) -> Row:
    body = self._body()
    return self.server.review.judge(body.get('pair'), body.get('verdict'), body.get('note', ''))

  def _undo(self) -> Row:
    self._body()
    return self.server.review.undo()

  def _body(self) -> Row:
    # What a form of another page can send has another type.
    if self.headers.get_content_type() != 'application/json':
      raise Refused(415, 'send application/json')
    length = self.headers.get('Content-Length', '')
    if not length.isascii() or not length.isdigit():
      raise Refused(411, 'Content-Length is missing')
    if len(length) > 9 or int(length) > _LARGEST_BODY:
      raise Refused(413, f'at most {_LARGEST_BODY} bytes')
    try:
      body = json.loads(self.rfile.read(int(length)))
    except (ValueError, RecursionError) as error:
      raise Refused(400, 'the body is no JSON') from error
    if not isinstance(body, dict):
      raise Refused(400, 'the body is no JSON object')
    return body

  def _send(self, status: int, kind: str, content: bytes) -> None:
    self.send_response(status)
    for name, value in _HEADERS.items():
      self.send_header(name, value)
    self.send_header('Content-Type', f'{kind}; charset=utf-8')
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(content)

  def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
    """One line as JSON, also for what the library refuses, such as a method that there is not."""
    code = 405 if code == 501 else code
    self._send(code, 'application/json', json.dumps({'error': message or 'refused'}).encode())

  def log_message(self, *args: Any) -> None:
    """Says nothing: the terminal is the reviewer's."""
