# Sourced by the scripts beside it: makes or reuses .venv in the checkout, and installs into it what is missing.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=$root/.venv

# Large arrays are then backed by huge pages: a fresh buffer fills about five times as fast.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

make_venv() {
  # 3.11 comes first: the requirement files were made for it.
  local candidate candidates=(python3.11 python3 python3.12 python3.13) python=
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if new_enough "$candidate"; then
      python=$candidate
      break
    fi
  done
  if [[ -z $python ]]; then
    echo "charjax needs Python 3.11 or newer, and ${PYTHON:-python3} is not; name one with PYTHON=/path/to/python3.11" >&2
    exit 2
  fi
  echo "Making $venv with $("$python" --version)" >&2
  "$python" -m venv --clear "$venv"
}

# ensure NAME FILE...: runs install_NAME unless it was run here with these very files, and this script, before.
ensure() {
  local name=$1 stamp=$venv/.charjax-$1 now
  shift
  new_enough "$venv/bin/python" || make_venv
  now=$(echo "$root"; sha256sum "$@" pyproject.toml scripts/environment.sh)
  if [[ -f $stamp && $(<"$stamp") == "$now" ]]; then
    return
  fi
  echo "Installing into .venv; this happens once" >&2
  "install_$name"
  # --no-deps: all it needs stands in the requirement files.
  pip_install --no-deps --editable .
  echo "$now" >"$stamp"
}

# Modules are compiled when first imported, which most never are.
pip_install() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-compile "$@"
}
