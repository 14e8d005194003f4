#!/usr/bin/env bash
# Brings this checkout to each worker, into charjax in the home directory, with what git does not ignore, and installs it
# there by --install, a command line that is run in it: ./tpu/install.sh, unless you need more, such as to mount a folder
# that all share.
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
parse 'accelerator price install' "$@"

cost
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
pack "$folder"
if [[ -z $dry_run ]]; then
  states=$(on all 'if [ -e charjax/tpu/worker.sh ]; then charjax/tpu/worker.sh state; fi')
  [[ $states != *running* ]] ||
    fail "a run goes on there, from the code that would be replaced; wait for its end, or delete.sh"
fi
copy() {
  try gcloud compute tpus tpu-vm scp "$folder/charjax.tar.gz" "$1:" "${where[@]}" --worker=all "${alive[@]/#/--scp-flag=}"
}
each_slice copy
# Files that are no more must not be imported; what is installed stays. What is not ready is set up anew.
on all "mkdir -p charjax && cd charjax && find . -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} + &&\
 tar -xzf ../charjax.tar.gz && { $install; } && touch ~/charjax/.ready"
