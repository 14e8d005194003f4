#!/usr/bin/env bash
# The smoke run in a bucket, of an emulator on this machine (tests/bucket_emulator.py), beside one in a folder. The one in the
# bucket is killed with SIGKILL once its policy has a checkpoint; started again, it waits until its lock has no owner, and
# goes on. What both hold in the end is compared: JSON Lines byte for byte, weights bit for bit; and so is what is exported
# from them. What it does not show: that Google's own service behaves as the emulator does. Run it after
# ./scripts/test.sh. WORKDIR keeps the folders.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/contents.sh
[[ -n ${STORAGE_EMULATOR_HOST:-} ]] || exec .venv/bin/python tests/bucket_emulator.py bash scripts/verify_gs.sh

folder=${WORKDIR:-}
if [[ -z $folder ]]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
bucket=gs://tests/run

run() {
  .venv/bin/charjax run --config=configs/smoke.py --workdir="$1"
}

in_bucket() {
  curl --silent --fail --output /dev/null "$STORAGE_EMULATOR_HOST/storage/v1/b/tests/o/run%2F${1//\//%2F}"
}

run "$folder/here" >"$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
contents "$folder/here" >"$folder/expected"
echo 'in a folder: done' >&2

# Without exec it would be a shell that is killed, and the run would live on.
(exec .venv/bin/charjax run --config=configs/smoke.py --workdir="$bucket") >"$folder/log" 2>&1 &
process=$!
until in_bucket policy/checkpoints/2/commit_success.txt; do
  kill -0 "$process" 2>/dev/null || { cat "$folder/log" >&2; exit 1; }
  sleep 0.1
done
kill -KILL "$process"
wait "$process" 2>/dev/null || true
! in_bucket policy/stage.json || { echo 'the policy was done before it could be killed' >&2; exit 1; }
echo 'in a bucket: killed while the policy is trained' >&2

run "$bucket" >"$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 1; }
grep -q 'waiting up to 90 s' "$folder/log" && grep -q 'policy: going on where it was cut off' "$folder/log"
! in_bucket .lock || { echo 'the lock was not let go' >&2; exit 1; }
rm -rf "$folder/there"
.venv/bin/python -c 'import sys, fsspec; fsspec.filesystem("gs").get(sys.argv[1], sys.argv[2], recursive=True)' \
  "$bucket" "$folder/there"
contents "$folder/there" >"$folder/found"
diff "$folder/expected" "$folder/found" || { echo 'they differ' >&2; exit 1; }
for place in "$folder/here" "$bucket"; do
  rm -rf "$folder/export-${place##*/}"
  .venv/bin/charjax export "$place" --output="$folder/export-${place##*/}" >"$folder/log" 2>&1 ||
    { cat "$folder/log" >&2; exit 1; }
done
cmp "$folder/export-here/model.safetensors" "$folder/export-run/model.safetensors"
echo "every product in the bucket as in the folder ($(wc -l <"$folder/expected") files), and so the exported weights"
