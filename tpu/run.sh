#!/usr/bin/env bash
# Starts charjax on all workers, as one run, and leaves it running: tpu/run.sh [flags] -- run --config=... --workdir=...
# --workdir is a folder that all workers share. The same command goes on with a run that was cut off.
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse 'accelerator price' "$@"
source "$tpu/command.sh"

cost
on all "charjax/tpu/worker.sh start$(printf ' %q' "${rest[@]}")"
