#!/usr/bin/env bash
# Runs a training command on all workers of a Cloud TPU VM and follows its output. A VM that does not
# exist or was preempted is created and set up, and the command resumes. Ctrl-C stops following but
# not the training; the same command follows it again.
#
#   launch/run_tpu.sh --name=ada --zone=europe-west4-a --type=v3-8 --spot -- \
#     python -m ada_jax.train --config=experiments/cifar10.py --workdir=gs://BUCKET/cifar10
#
# --name, --zone, --type, --version, --project, --spot, --queued: as for create_tpu.sh
# --source=URL, --ref=REF: as for setup_tpu.sh
# --max_restarts=20   maximum number of restarts, after which the status is 143
# --retry_seconds=60  pause before a restart
# --stop              only make the running training save its state and stop
# --dry_run           print the gcloud commands without running them
#
# The status is that of the training: 0 if it finished, 2 for invalid arguments, others for crashes.
# The output of every worker goes to logs/ in the workdir.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
name="" zone="" type="" version="" project="" spot="" queued="" source="" ref="" dry_run=""
max_restarts=20 retry_seconds=60 stop=""
# shellcheck source=launch/common.sh
. "$here/common.sh"
parse "name zone type version project source ref max_restarts retry_seconds" \
  "spot queued stop dry_run" "$@"
require name zone
if [ -n "$stop" ]; then
  on_workers "bash ada_jax/launch/worker.sh stop"
  exit
fi
require type
for flag in max_restarts retry_seconds; do
  [[ ${!flag} =~ ^[0-9]+$ ]] || complain "--$flag=${!flag} must be an integer."
done
if [ -n "$ref" ] && [ -z "$source" ]; then
  complain "The flag --ref needs --source: without it this folder is installed."
fi

if [ ${#command[@]} = 0 ]; then
  complain "The command is missing: write -- python -m ada_jax.train --config=... --workdir=gs://..."
fi
workdir=""
for word in "${command[@]}"; do
  case $word in --workdir=*) workdir=${word#*=} ;; esac
done
if [[ $workdir != gs://?*/?* ]]; then # the disk is deleted with the VM
  complain "The command needs --workdir=gs://BUCKET/FOLDER, which outlives the VM."
fi
case " ${command[*]} " in
  *" --distributed"* | *" --nodistributed"*) ;;
  *" ada_jax.train "*) command+=(--distributed) ;; # the other commands do not have this flag
esac

create=("${same[@]}" --type="$type" ${version:+--version="$version"} ${spot:+--spot}
  ${queued:+--queued})
setup=("${same[@]}" ${source:+--source="$source"} ${ref:+--ref="$ref"})
new=""

prepare() { # Creates the VM and sets it up, unless it exists.
  look tpu-vm state READY || return
  if [ "$state" != READY ]; then
    new=yes
    "$here/create_tpu.sh" "${create[@]}" || return
  fi
  if [ -n "$new" ]; then
    "$here/setup_tpu.sh" "${setup[@]}" || return
    new=""
  fi
}

trap 'exit 130' INT TERM # exit without a restart
restarts=0
while true; do
  status=0
  prepare || status=$?
  if [ $status = 0 ]; then
    # The time names the logs, and distinguishes a new attempt from a connection gcloud repeats.
    attempt=$(if [ -n "$dry_run" ]; then echo TIME; else date -u +%Y%m%dT%H%M%SZ; fi)
    on_workers "$(quote bash ada_jax/launch/worker.sh run "$attempt" "$workdir" "${command[@]}")" ||
      status=$?
    case $status in
      0) break ;;
      2) ;;
      127) complain "$name is not set up: run launch/setup_tpu.sh." ;;
      # Stopped with its state saved; a process that lost its peers; a lost connection.
      143 | 134 | 255) ;;
      *) # A crash, unless the VM was preempted.
        if look tpu-vm state READY && [ "$state" = READY ]; then
          echo "The run ended with status $status; its logs are in $workdir/logs." >&2
          exit "$status"
        fi
        ;;
    esac
  fi
  if [ $status = 2 ]; then # The command has printed the error.
    exit 2
  fi
  if [ $restarts -ge "$max_restarts" ]; then
    echo "$name was interrupted or could not be created, also after $restarts restarts; the same command resumes." >&2
    exit 143
  fi
  restarts=$((restarts + 1))
  echo "Status $status: restart $restarts of at most $max_restarts in $retry_seconds s." >&2
  sleep "$retry_seconds"
done

if [ -n "$dry_run" ]; then
  echo "# After a preemption, at most $max_restarts times:"
  "$here/delete_tpu.sh" "${same[@]}"
  "$here/create_tpu.sh" "${create[@]}"
  "$here/setup_tpu.sh" "${setup[@]}"
  echo "# and the ssh above again."
fi
