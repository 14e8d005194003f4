#!/usr/bin/env bash
# Shows what charjax says on a worker: --worker=0, which tells of progress, unless another is given, or all; of the first
# slice, or with all of all slices, unless --slice=1, say, is given; --lines=50; --follow.
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
worker=0 slice='' lines=50 follow=''
parse 'worker slice lines follow accelerator price' "$@"
[[ $worker =~ ^(all|[0-9]+)$ ]] || fail "--worker=$worker: give a number from 0, or all"
[[ -z $slice || ($slice =~ ^(0|[1-9][0-9]{0,2})$ && $slice -lt $slices) ]] ||
  fail "--slice=$slice: give a number from 0, below --slices=$slices"
[[ $lines =~ ^[0-9]+$ ]] || fail "--lines=$lines: give a number"

cost
on "$worker" "tail --lines=$lines${follow:+ --follow} charjax-run/log" "$slice"
