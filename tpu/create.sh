#!/usr/bin/env bash
# Asks for a TPU slice: a queued resource, on demand or, with --spot, one that may be taken away.
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse 'accelerator spot runtime price' "$@"

cost
request=(--node-id="$name" --accelerator-type="$accelerator" --runtime-version="$runtime")
[[ -z $spot ]] || request+=(--spot)
try gcloud compute tpus queued-resources create "$name" "${where[@]}" "${request[@]}"
