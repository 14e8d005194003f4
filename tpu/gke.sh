#!/usr/bin/env bash
# Gives a run to a GKE cluster by xpk (pip install xpk), which restarts it when it is preempted or loses a worker:
# tpu/gke.sh --cluster=NAME [flags] -- run --config=... --workdir=... Each start installs charjax anew, from this checkout.
# With --slices=N it runs on N slices, between which data alone is split: give it --config.mesh=(N, -1, 1), say.
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
cluster=
parse 'cluster accelerator price' "$@"
source "$tpu/command.sh"
[[ -n $cluster ]] || fail 'which cluster? give --cluster=NAME, as you called it in xpk cluster create'

cost 'the nodes of the cluster are gone'
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
pack "$folder"
mkdir "$folder/charjax"
tar -xzf "$folder/charjax.tar.gz" -C "$folder/charjax"
# Exit codes from 127 on restart it anyway: 134, 137 and 143.
try xpk workload create --cluster="$cluster" --workload="$name" "${where[@]}" --tpu-type="$accelerator" --num-slices="$slices" \
  --base-docker-image=python:3.11 --script-dir="$folder/charjax" --max-restarts=100 --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=30 --command="./tpu/install.sh && .venv/bin/charjax$(printf ' %q' "${rest[@]}")"
