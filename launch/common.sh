# shellcheck shell=bash disable=SC2034,SC2154
# Functions of the launch scripts for flags, gcloud and quoting. The scripts that source this file
# set the variables of their flags. Everything works with macOS's bash 3.2.

complain() { # Prints an error and exits with status 2, after which nothing is retried.
  printf 'error: %s\n' "$*" >&2
  exit 2
}

usage() { # The comment at the top of the script is its help.
  sed -n '2,${/^#/!q;s/^# \{0,1\}//;p;}' "$0"
}

# parse VALUES SWITCHES WORD...: sets $zone for --zone=VALUE if VALUES has zone, and dry_run=yes for
# --dry_run if SWITCHES has dry_run. The words after -- become the array `command`.
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

# require FLAG...: exits if a flag is missing; else sets the common arguments, `where` for gcloud
# and `same` for the other scripts.
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

quote() { # Prints the words quoted for a shell.
  local word line="" apostrophe="'" escaped="'\\''"
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//$apostrophe/$escaped}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

tpus() { # Runs gcloud compute tpus, or prints it in a dry run.
  set -- gcloud compute tpus "$@" "${where[@]}" --quiet
  if [ -n "$dry_run" ]; then quote "$@"; else "$@"; fi
}

# look KIND FIELD ASSUMED: sets $state to the state of the tpu-vm or queued-resources called $name,
# or to MISSING; to ASSUMED in a dry run. It uses `list`, because `describe` has the same status 1
# for a missing VM, a missing permission and a missing network.
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

# on_workers LINE: runs the line on every worker, in the home folder. The status is the first
# non-zero one of a worker, 255 if a connection was lost. Without the flags, ssh would notice only
# after hours that a worker has vanished.
on_workers() {
  tpus tpu-vm ssh "$name" --worker=all --ssh-flag=-oServerAliveInterval=30 \
    --ssh-flag=-oConnectTimeout=30 --command="$1"
}
