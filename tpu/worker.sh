#!/usr/bin/env bash
# Run by the scripts beside it on each worker. `worker.sh start ARGUMENTS` starts charjax with them and leaves it running;
# `worker.sh state` prints "charjax-state" and: running, unset (setup.sh did not come to its end), the exit code of the
# last one, lost (it left none), or none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=~/charjax-run
mkdir -p "$run"
exec 9>"$run/lock"

# The lock is held by what was started, and by all that it started.
if ! flock --nonblock 9; then
  state=running
elif [[ ! -e .ready ]]; then
  state='unset'
elif [[ -e $run/exit ]]; then
  state=$(<"$run/exit")
  state=${state:-lost}
else
  state=none
fi
case ${1:-} in
  state) echo "charjax-state $state" ;;
  start)
    [[ $state != running ]] || { echo "$HOSTNAME: a run goes on here; logs.sh shows it" >&2; exit 1; }
    [[ $state != unset ]] || { echo "$HOSTNAME: not set up; setup.sh does it" >&2; exit 1; }
    shift
    : >"$run/exit"
    (
      trap '' HUP  # of the connection
      trap : TERM  # This shell outlives a SIGTERM to all, and tells how charjax took it.
      .venv/bin/python -m charjax.main "$@" && code=0 || code=$?
      echo "$code" >"$run/exit"
    ) >>"$run/log" 2>&1 </dev/null &
    ;;
  *) echo "worker.sh: give start or state" >&2; exit 2 ;;
esac
