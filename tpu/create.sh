#!/usr/bin/env bash
# Asks for a TPU slice: a queued resource, on demand or, with --spot, one that may be taken away. With --slices=N for as
# many at once, to all of whose workers the other scripts then speak: give them --slices=N, too, or set TPU_SLICES.
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse 'accelerator spot runtime price' "$@"

cost
if ((slices == 1)); then request=(--node-id="$name"); else request=(--node-count="$slices" --node-prefix="$name"); fi
request+=(--accelerator-type="$accelerator" --runtime-version="$runtime")
[[ -z $spot ]] || request+=(--spot)
try gcloud compute tpus queued-resources create "$name" "${where[@]}" "${request[@]}"
