#!/usr/bin/env bash
# A sweep of four trials, two at a time, is killed with SIGKILL at random moments (the sweep alone, or its trials as well)
# and started again each time; then each trial is compared with a run of its own that nobody disturbed and that shared
# nothing: JSON Lines byte for byte, weights bit for bit. Takes about five minutes on two cores after ./scripts/test.sh.
# KILLS and SEED say how often and when; WORKDIR keeps the folders, the comparison page among them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/contents.sh

kills=${KILLS:-8}
RANDOM=${SEED:-0}
folder=${WORKDIR:-}
if [[ -z $folder ]]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
mkdir -p "$folder"
charjax=(.venv/bin/python -m charjax.main)
sweep=("${charjax[@]}" sweep --config=configs/sweeps/kl.py:smoke --parallel=2)

"${sweep[@]}" --workdir="$folder/alone" --launch="$folder/commands.txt" >/dev/null
while read -r _ command; do
  started=$(date +%s%N)
  # The words of these commands are quoted where they must be.
  eval "\"\${charjax[@]}\" $command" >"$folder/log" 2>&1 </dev/null || { cat "$folder/log" >&2; exit 1; }
  run=$((($(date +%s%N) - started) / 1000000))
done <"$folder/commands.txt"

for ((killed = 1; killed <= kills; killed++)); do
  # From before any work to about the end of a trial.
  milliseconds=$((run / 4 + RANDOM % run))
  "${sweep[@]}" --workdir="$folder/swept" >"$folder/log" 2>&1 &
  process=$!
  sleep "$(printf '%d.%03d' $((milliseconds / 1000)) $((milliseconds % 1000)))"
  victims=("$process")
  if ((RANDOM % 2)); then
    for lock in "$folder"/swept/kl=*/.lock; do
      [[ -s $lock ]] && victims+=("$(<"$lock")")
    done
  fi
  kill -KILL "$process" 2>/dev/null || { echo "over before $milliseconds ms were" >&2; break; }
  # Those of trials that are over are nobody's any more.
  for victim in "${victims[@]:1}"; do
    [[ -r /proc/$victim/cmdline ]] && tr '\0' ' ' <"/proc/$victim/cmdline" | grep -q "$folder/swept" &&
      kill -KILL "$victim" 2>/dev/null
  done
  wait "$process" 2>/dev/null || true
  echo "$killed/$kills: $([[ ${#victims[@]} -gt 1 ]] && echo 'sweep and trials' || echo 'sweep') killed after $milliseconds ms;" \
    "stages done: $(find "$folder/swept" -name stage.json 2>/dev/null | wc -l)" >&2
done
"${sweep[@]}" --workdir="$folder/swept" >"$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
for trial in "$folder"/alone/kl=*; do
  name=$(basename "$trial")
  diff <(contents "$trial") <(contents "$folder/swept/$name") || { echo "$name differs" >&2; exit 1; }
done
grep -q '4 runs side by side' "$folder/swept/comparison/index.html"
sed -n '/margin on kept pairs/,$p' "$folder/log"
echo "every product of every trial as in a run of its own ($(contents "$trial" | wc -l) files each)"
