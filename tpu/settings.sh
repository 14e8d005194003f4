# shellcheck disable=SC2034  # What is not used here is used there.
# Sourced by the scripts beside it: what they share. Each setting is a flag, or a variable of the environment.
set -euo pipefail
tpu=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

name=${TPU_NAME:-charjax}                # of the slice, and of the request for it
zone=${TPU_ZONE:-}                       # where it is: us-west4-a
project=${TPU_PROJECT:-}                 # who pays; gcloud's own if empty
accelerator=${TPU_ACCELERATOR:-v5litepod-16}
slices=${TPU_SLICES:-1}                  # of that kind, between which data alone is split
spot=${TPU_SPOT:-}                       # cheaper, and may be taken away at any time
runtime=${TPU_RUNTIME:-}                 # the machines' image; that of the accelerator if empty
price=${TPU_PRICE:-}                     # US dollars a chip-hour; the list's, as below, if empty
install=${TPU_INSTALL:-./tpu/install.sh} # run on each worker in the checkout, once it is there
dry_run=${TPU_DRY_RUN:-}                 # print the commands that would be given
rest=()                                  # what stands behind --

fail() {
  echo "${0##*/}: $1" >&2
  exit 2
}

# parse "FLAGS" "$@": sets the variables of the flags that were given, and checks those above.
parse() {
  local known=" name zone project slices dry_run $1 " key
  shift
  while (($#)); do
    if [[ $1 == -- ]]; then
      rest=("${@:2}")
      break
    fi
    if [[ $1 == --help || $1 == -h ]]; then
      sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
      echo "Flags:$(tr ' ' '\n' <<<"$known" | sed -n 's/^./ --&/p' | tr -d '\n')"
      exit 0
    fi
    key=${1#--}
    key=${key%%=*}
    [[ $1 == --* && $known == *" $key "* ]] || fail "there is no flag $1; --help lists those there are"
    case $key in
      spot | dry_run | delete | follow)
        [[ $1 != *=* ]] || fail "--$key takes no value"
        printf -v "$key" 1
        ;;
      *)
        [[ $1 == *=?* ]] || fail "$1 has no value; write --$key=VALUE"
        printf -v "$key" %s "${1#*=}"
        ;;
    esac
    shift
  done
  [[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "--name=$name: give small letters, digits and hyphens, at most 40"
  [[ -n $zone ]] || fail 'where is it? give --zone=us-west4-a, say, or set TPU_ZONE'
  [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "--zone=$zone: no zone, which is called as us-west4-a is"
  [[ $slices =~ ^[1-9][0-9]{0,2}$ ]] || fail "--slices=$slices: give a whole number from 1"
  nodes=("$name") # as Google calls the slices of one request
  ((slices == 1)) || mapfile -t nodes < <(seq --format="$name-%.0f" 0 $((slices - 1)))
  [[ $accelerator =~ ^(v4|v5litepod|v5p|v6e)-([1-9][0-9]{0,4})$ ]] ||
    fail "--accelerator=$accelerator: give v4-N, v5litepod-N, v5p-N or v6e-N, such as v5litepod-16"
  # Of v4 and v5p the N counts cores, two a chip. On demand in US regions, as cloud.google.com/tpu/pricing was quoted in 2025.
  local list image cores=1
  case $accelerator in
    v4-*) cores=2 list=3.22 image=tpu-ubuntu2204-base ;;
    v5litepod-*) list=1.20 image=v2-alpha-tpuv5-lite ;;
    v5p-*) cores=2 list=4.20 image=v2-alpha-tpuv5 ;;
    v6e-*) list=2.70 image=v2-alpha-tpuv6e ;;
  esac
  ((BASH_REMATCH[2] % cores == 0)) || fail "--accelerator=$accelerator: N counts cores, two a chip; give an even one"
  chips=$((BASH_REMATCH[2] / cores)) runtime=${runtime:-$image}
  price_note='you said' && [[ -n $price ]] || price_note='a list price of 2025, on demand in US regions'
  price=${price:-$list}
  [[ $price =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--price=$price: give US dollars a chip-hour, as 1.20"
  [[ -n $dry_run ]] || command -v gcloud >/dev/null || fail 'gcloud is not there; see cloud.google.com/sdk/docs/install'
  where=(--zone="$zone")
  [[ -z $project ]] || where+=(--project="$project")
}

# pack FOLDER: this checkout in a file of that folder, charjax.tar.gz, with what git does not ignore.
pack() {
  cd "$tpu/.."
  git ls-files -z --cached --others --exclude-standard >"$1/files" 2>/dev/null ||
    fail "$PWD: no git checkout, so that it is not known what to take"
  tar --create --gzip --file="$1/charjax.tar.gz" --ignore-failed-read --null --files-from="$1/files" 2>"$1/errors" ||
    fail "tar: $(tail -n 1 "$1/errors")"
}

# cost [END]: what it costs for as long as it is there, whether it works or not.
cost() {
  [[ -z ${TPU_TOLD:-} ]] || return 0
  local what=$accelerator
  ((slices == 1)) || what="$slices x $accelerator"
  LC_ALL=C awk -v chips="$((chips * slices))" -v price="$price" -v what="$what" -v note="$price_note" -v end="${1:-tpu/delete.sh}" 'BEGIN {
    printf "%s, %d chips: about $%.2f an hour, $%.0f a day, until %s, at $%s a chip-hour (%s)\n",
      what, chips, chips * price, 24 * chips * price, end, price, note }' >&2
  [[ $price_note == you* ]] || echo "prices change, and spot costs less: see cloud.google.com/tpu/pricing, and give --price=" >&2
}

# Does it, or says what it would do.
try() {
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# A machine that is gone answers nothing, for hours if need be.
alive=(-oConnectTimeout=10 -oServerAliveInterval=15 -oServerAliveCountMax=4)
patience=() # what limits how long a command may take: timeout --foreground 300, say

# on WORKERS COMMAND [SLICE]: a command line on each worker ('all') of a slice, or of all slices where none is given, at
# once; or on one worker, of the first slice where none is given. It fails if it failed on any.
on() {
  if [[ $1 == all && -z ${3:-} ]]; then
    each_slice ssh_to all "$2"
  else
    ssh_to "$1" "$2" "${nodes[${3:-0}]}"
  fi
}

# ssh_to WORKERS COMMAND SLICE
ssh_to() {
  try "${patience[@]}" gcloud compute tpus tpu-vm ssh "$3" "${where[@]}" --worker="$1" \
    "${alive[@]/#/--ssh-flag=}" --command="$2"
}

# each_slice COMMAND...: does it with the name of each slice behind it. What slices there are beside the first work meanwhile.
each_slice() {
  local node others=() code=0
  for node in "${nodes[@]:1}"; do
    "$@" "$node" &
    others+=($!)
    [[ -z $dry_run ]] || wait $! # so that lines do not mix
  done
  "$@" "${nodes[0]}" || code=$?
  for node in "${others[@]}"; do
    wait "$node" || code=$?
  done
  return "$code"
}
