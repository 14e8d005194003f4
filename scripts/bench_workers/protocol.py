"""How bench.py talks to its workers, line by line. Standard library only: it runs in each peer's environment.

A worker reads its job, then one command a line: the name of a method of what it made of the job. It answers each with
the seconds that the method took and what it returned. Methods are `warm_up`, `go` and `measure`; only `go` is timed.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def serve(make: Callable[[dict[str, Any]], Any], compiled: Callable[[], float] = lambda: 0.0) -> None:
  """Makes something of the job, and calls its methods until no more commands come.

  Args:
    make: called with the job.
    compiled: how many seconds were spent on compiling so far. What a command took of them is told.
  """
  # Stopped as it mostly is, it would not see that bench.py is gone.
  ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  # Libraries print to standard output too: what they say goes to the log.
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  worker = make(json.loads(sys.stdin.readline()))
  for line in sys.stdin:
    before, begin = compiled(), time.perf_counter()
    found = getattr(worker, line.strip())()
    told = {'seconds': time.perf_counter() - begin, 'compiled': compiled() - before}
    answers.write(json.dumps(told | (found or {})) + '\n')
    answers.flush()
  # Threads of a library that waits for more must not keep the process.
  os._exit(0)
