# shellcheck shell=bash disable=SC2034,SC2154
# Read by the *_tpu.sh scripts, not run: flags, gcloud, quoting. The flags' variables are theirs.
# Nothing here needs more than the bash 3.2 of a Mac.

complain() { # One sentence for a user's mistake, which no repetition mends.
  printf 'error: %s\n' "$*" >&2
  exit 2
}

usage() { # The comment at the top of the script is its help.
  sed -n '2,${/^#/!q;s/^# \{0,1\}//;p;}' "$0"
}

# parse VALUES SWITCHES WORD...: sets $zone for --zone=VALUE and dry_run=yes for --dry_run, if the
# names are among those of VALUES and SWITCHES; what follows -- becomes the array `command`.
parse() {
  local values=" $1 " switches=" $2 " flag
  shift 2
  command=()
  while [ $# -gt 0 ]; do
    flag=${1%%=*} flag=${flag#--}
    case $1 in
      --help) usage && exit ;;
      --) shift && command=("$@") && break ;;
      --*) ;;
      *) complain "The argument '$1' is not a flag: write --flag=value." ;;
    esac
    if [[ $values == *" $flag "* ]]; then
      [[ $1 == *=?* ]] || complain "The flag --$flag needs a value: write --$flag=VALUE."
      printf -v "$flag" %s "${1#*=}"
    elif [[ $switches == *" $flag "* ]]; then
      [[ $1 != *=* ]] || complain "The flag --$flag takes no value."
      printf -v "$flag" yes
    else
      complain "There is no flag --$flag: see ${0##*/} --help."
    fi
    shift
  done
}

# require FLAG...: refuses missing flags, then sets what every call needs: `where` for gcloud and
# `same` for the other scripts.
require() {
  local flag
  for flag in "$@"; do
    [ -n "${!flag}" ] || complain "The flag --$flag is missing: see ${0##*/} --help."
  done
  where=(--zone="$zone" ${project:+--project="$project"})
  same=(--name="$name" "${where[@]}" ${dry_run:+--dry_run})
  if [ -z "$dry_run" ] && ! type -P gcloud >/dev/null; then
    complain "There is no gcloud on the PATH: see https://cloud.google.com/sdk/docs/install."
  fi
}

quote() { # Prints the words as one line that a shell reads as the same words.
  local word line="" apostrophe="'" escaped="'\\''"
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//$apostrophe/$escaped}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

tpus() { # gcloud compute tpus, or its print in a dry run.
  set -- gcloud compute tpus "$@" "${where[@]}" --quiet
  if [ -n "$dry_run" ]; then quote "$@"; else "$@"; fi
}

# look KIND FIELD ASSUMED: sets $state to that of the tpu-vm or queued-resources of our name, or to
# MISSING; a dry run assumes one. Lists, because `describe` answers a missing VM, a missing
# permission and a missing network all with status 1.
look() {
  local lines list=("$1" list "--format=value(name.basename(),$2)")
  if [ -n "$dry_run" ]; then
    tpus "${list[@]}"
    state=$3
  else
    lines=$(tpus "${list[@]}") || return
    state=$(awk -v name="$name" '$1 == name { print $2 }' <<<"$lines")
    state=${state:-MISSING}
  fi
}

# on_workers LINE: runs the line on every worker, in the home folder. The status is that of the first
# worker whose status is not 0, 255 if a connection was lost. ssh alone would notice a worker that
# vanishes only after hours, therefore the flags.
on_workers() {
  tpus tpu-vm ssh "$name" --worker=all --ssh-flag=-oServerAliveInterval=30 \
    --ssh-flag=-oConnectTimeout=30 --command="$1"
}
