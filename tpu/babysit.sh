#!/usr/bin/env bash
# Sees a run to its end: asks for the slice if there is none, sets it up, starts the run, and does so again when the slice
# was taken away or a worker was lost. tpu/babysit.sh [flags] -- run --config=... --workdir=...
# Flags are those of create.sh and setup.sh; --every=60 seconds it looks; --delete: the slice, when the run is over.
# It can be stopped and started again at any time, and may run anywhere. Exits with 0 when the run is done, 2 when it
# ended by a mistake or gcloud may not be asked, 1 when it ended by an error for the second time within an hour, 75 when
# five starts in a row did not last an hour or ten requests in a row were refused, and else as the run did.
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
every=60 delete=
parse 'accelerator spot runtime price install every delete' "$@"
source "$tpu/command.sh"
[[ $every =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--every=$every: give seconds"

# For the scripts that it calls.
export TPU_NAME=$name TPU_ZONE=$zone TPU_PROJECT=$project TPU_ACCELERATOR=$accelerator TPU_SLICES=$slices TPU_SPOT=$spot \
  TPU_RUNTIME=$runtime TPU_INSTALL=$install TPU_DRY_RUN=$dry_run
[[ $price_note != you* ]] || export TPU_PRICE=$price
cost
export TPU_TOLD=1
exec </dev/null # Nobody is there to be asked.
export CLOUDSDK_CORE_DISABLE_PROMPTS=1

if [[ -n $dry_run ]]; then
  for step in create setup; do "$tpu/$step.sh"; done
  "$tpu/run.sh" -- "${rest[@]}"
  on all 'charjax/tpu/worker.sh state'
  exit
fi

errors=$(mktemp)
trap 'rm -f "$errors"' EXIT

say() { echo "$(date +%H:%M:%S) $*" >&2; }

# The state of the queued resource, or: absent, forbidden (which waiting does not mend), unknown.
slice() {
  if gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>"$errors"; then
    return
  elif grep -q NOT_FOUND "$errors"; then
    echo absent
  else
    cat "$errors" >&2
    if grep -qE 'PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT' "$errors"; then echo forbidden; else echo unknown; fi
  fi
}

# Of the run on all workers: running, done, again (cut off), new, unset (not set up, or not to the end), unreachable, or an exit code.
run() {
  local found states patience=(timeout --foreground 300)
  found=$(on all 'if [ -e charjax/tpu/worker.sh ]; then charjax/tpu/worker.sh state; else echo charjax-state unset; fi' \
    2>/dev/null) || { echo unreachable; return; }
  states=$(sed -n 's/^charjax-state //p' <<<"$found" | sort -u)
  case " ${states//$'\n'/ } " in
    '  ') echo unreachable ;;
    *' running '*) echo running ;;
    *' unset '*) echo unset ;;
    ' none ') echo new ;;
    ' 0 ') echo 'done' ;;
    *' 2 '*) echo 2 ;;
    # Lost or stuck; SIGTERM, SIGABRT of JAX, SIGKILL; a machine that began anew.
    *' 75 '* | *' 143 '* | *' 134 '* | *' 137 '* | *' lost '* | *' none '*) echo again ;;
    *) tail -n 1 <<<"$states" ;;
  esac
}

# Ends with a code and a reason.
over() {
  say "$2"
  [[ $(slice) != absent ]] || exit "$1"
  if [[ -n $delete ]]; then
    for attempt in 1 2 3 4 5; do
      if "$tpu/delete.sh"; then exit "$1"; fi
      say "it could not be deleted, attempt $attempt of 5"
      sleep "$every"
    done
  fi
  TPU_TOLD='' cost
  exit "$1"
}

# Process 0 tells why a run ended.
last_words() { on 0 'tail --lines=3 charjax-run/log' >&2 2>/dev/null || true; }

remove() { gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet || true; }

failures=0 refused=0 unreachable=0 started='' erred='' counted=
# A start that was cut off, and not by a preemption: five in a row that did not last are enough. It takes a run twenty
# minutes to find that it is stuck, and that is not to be paid for again and again.
cut_off() {
  counted=
  if [[ -z $started ]] || ((SECONDS - started < 3600)); then failures=$((failures + 1)) counted=1; else failures=0; fi
  started=
  ((failures < 5)) || over 75 'five starts in a row did not last an hour; logs.sh --worker=all tells why'
}

# A request that came to nothing.
refuse() {
  refused=$((refused + 1))
  ((refused < 10)) || over 75 'ten requests in a row were refused; is there quota, and is the zone one that has them?'
}

start() {
  started=$SECONDS before=
  "$tpu/run.sh" -- "${rest[@]}" || say 'it did not start on all workers'
}

say 'watching; this script can be stopped and started again'
before=
while true; do
  state=$(slice)
  [[ $state != ACTIVE ]] || state=$(run)
  [[ $state == "$before" ]] || say "$name: $state"
  before=$state
  [[ $state == unreachable ]] || unreachable=0
  # Only a slice that was there says that requests are granted: each of those refused was on its way before.
  case $state in absent | unknown | [A-Z]*) ;; *) refused=0 ;; esac
  case $state in
    absent) "$tpu/create.sh" || { say 'it could not be asked for'; refuse; } ;;
    forbidden)
      say 'gcloud may not ask for it; mend what it says above, and start this again'
      exit 2
      ;;
    SUSPENDED) # A preemption, of which there may be any number: it was what ended the start before, if one was just counted.
      [[ -z $counted ]] || failures=$((failures - 1))
      started='' counted=''
      remove
      ;;
    FAILED)
      refuse
      remove
      ;;
    unset) if "$tpu/setup.sh"; then start; else cut_off; fi ;;
    new)
      [[ -z $started ]] || cut_off
      start
      ;;
    again)
      last_words
      cut_off
      start
      ;;
    unreachable)
      # For a while after a start, or when the slice is just being taken away.
      unreachable=$((unreachable + 1))
      ((unreachable < 10)) || { unreachable=0; cut_off; remove; }
      ;;
    'done') over 0 'the run is done' ;;
    1)
      # An error that nobody foresaw, such as one of the network: it may not come again.
      last_words
      if [[ -n $erred ]] && ((SECONDS - ${started:-$SECONDS} < 3600)); then
        over 1 'the run ended with 1, for the second time within an hour'
      fi
      cut_off
      erred=1
      start
      ;;
    [0-9]*)
      last_words
      over "$state" "the run ended with $state"
      ;;
    running) started=${started:-$SECONDS} counted= ;;
    *) ;; # on its way
  esac
  sleep "$every"
done
