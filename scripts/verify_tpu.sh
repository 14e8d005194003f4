#!/usr/bin/env bash
# The way of a run on a spot TPU slice of four workers, with a stand-in for gcloud, tests/stand_in_gcloud.py, whose workers
# are processes of this machine with one CPU device each: tpu/babysit.sh creates the slice, sets it up and starts the smoke
# config; one worker is killed with SIGKILL, then the slice is preempted, its disks with it; and what stands in the end is
# compared with a run that nobody disturbed, JSON Lines byte for byte, weights bit for bit. What it does not show: that
# Google's own gcloud and machines behave as the stand-in does. It needs two cores of its own, after ./scripts/test.sh: where
# workers get no time to speak, they are taken for lost. WORKDIR keeps the folders.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/contents.sh

folder=${WORKDIR:-}
if [[ -z $folder ]]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
mkdir -p "$folder/bin"
folder=$(cd "$folder" && pwd)
ln -sf "$PWD/tests/stand_in_gcloud.py" "$folder/bin/gcloud"
export PATH=$folder/bin:$PATH STAND_IN=$folder/cloud STAND_IN_WORKERS=4 TPU_ZONE=us-west4-a
export TPU_INSTALL="ln -sfn $PWD/.venv .venv" # the workers have it
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$folder/xla JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export XLA_FLAGS='--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'

smoke() {
  tpu/babysit.sh --name="$1" --spot --every=1 --delete -- run --config=configs/smoke.py --workdir="$folder/$1" \
    '--config.mesh=(-1,1,1)'
}

# charjax on a worker.
at_work() {
  local process
  for process in /proc/[0-9]*; do
    if [[ $(readlink "$process/cwd") == "$STAND_IN/$1/charjax" && $(readlink "$process/exe") == *python* ]]; then
      echo "${process##*/}"
    fi
  done
}

# Waits for a file of the disturbed run.
reached() {
  until compgen -G "$folder/disturbed/$1" >/dev/null; do
    kill -0 "$babysitter" 2>/dev/null || { cat "$folder/log" >&2; exit 1; }
    sleep 0.1
  done
}

smoke undisturbed >"$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
echo 'undisturbed: done' >&2

smoke disturbed >"$folder/log" 2>&1 &
babysitter=$!
reached 'replies/chunks'
at_work disturbed/machines/2 | xargs kill -KILL
echo 'disturbed: worker 2 killed while replies are drawn' >&2
reached 'policy/checkpoints/2'
gcloud stand-in preempt disturbed
echo "disturbed: preempted after $(wc -l <"$folder/disturbed/policy/metrics.jsonl") steps of the policy" >&2
wait "$babysitter" || { cat "$folder/log" >&2; exit 1; }
cat "$folder/log"
(($(grep -c 'queued-resources create disturbed' "$STAND_IN/log") == 2))
diff <(contents "$folder/undisturbed") <(contents "$folder/disturbed") || { echo 'they differ' >&2; exit 1; }
echo "every product as in the undisturbed run ($(contents "$folder/disturbed" | wc -l) files)"
