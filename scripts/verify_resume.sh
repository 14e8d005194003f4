#!/usr/bin/env bash
# Kills the smoke run with SIGKILL at twenty random moments, starting it again each time, and compares what it ends
# with to a run that nobody disturbed: JSON Lines byte for byte, weights bit for bit. Takes two to three minutes on two
# cores after ./scripts/test.sh. KILLS and SEED say how often and when.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/contents.sh

kills=${KILLS:-20}
RANDOM=${SEED:-0}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

run() {
  .venv/bin/charjax run --config=configs/smoke.py --workdir="$1"
}

run "$folder/undisturbed" >"$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
started=$(date +%s%N)
run "$folder/undisturbed" >/dev/null 2>&1
# Of a start that finds everything done: what a process needs before it works.
idle=$((($(date +%s%N) - started) / 1000000))
contents "$folder/undisturbed" >"$folder/expected"

killed=0 round=0
while ((killed < kills)); do
  round=$((round + 1))
  workdir=$folder/killed-$round
  while ((killed < kills)); do
    # Now and then before any work, mostly a few seconds into it.
    milliseconds=$((idle / 2 + RANDOM % (idle / 2 + 5000)))
    # Without exec it would be a shell that is killed, and the run would live on.
    (exec .venv/bin/charjax run --config=configs/smoke.py --workdir="$workdir") >"$folder/log" 2>&1 &
    process=$!
    sleep "$(printf '%d.%03d' $((milliseconds / 1000)) $((milliseconds % 1000)))"
    if ! kill -KILL "$process" 2>/dev/null; then
      break
    fi
    wait "$process" 2>/dev/null || true
    killed=$((killed + 1))
    echo "$killed/$kills: killed after $milliseconds ms; done: $(find "$workdir" -maxdepth 2 -name stage.json 2>/dev/null | wc -l) stages" >&2
  done
  run "$workdir" >"$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
  contents "$workdir" >"$folder/found"
  diff "$folder/expected" "$folder/found" || { echo "run $round differs from the undisturbed one" >&2; exit 1; }
done
echo "$kills kills over $round runs: every product as in the undisturbed run ($(wc -l <"$folder/expected") files)"
