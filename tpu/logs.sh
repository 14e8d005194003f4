#!/usr/bin/env bash
# Shows what charjax says on a worker: --worker=0, which tells of progress, unless another is given; --lines=50; --follow.
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
worker=0 lines=50 follow=
parse 'worker lines follow accelerator price' "$@"
[[ $worker =~ ^(all|[0-9]+)$ ]] || fail "--worker=$worker: give a number from 0, or all"
[[ $lines =~ ^[0-9]+$ ]] || fail "--lines=$lines: give a number"

cost
on "$worker" "tail --lines=$lines${follow:+ --follow} charjax-run/log"
