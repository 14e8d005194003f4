#!/usr/bin/env bash
# Deletes the slice with all that is on its disks, and the request for it: from then on it costs nothing. What stands in
# --workdir stays, and costs what its storage costs.
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse 'accelerator price' "$@"

try gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
[[ -n $dry_run ]] || echo "$name is deleted, and costs nothing any more" >&2
