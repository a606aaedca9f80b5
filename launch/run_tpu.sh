#!/usr/bin/env bash
# Runs a training command on all workers of a Cloud TPU VM and follows it to its end. A VM that is
# not there, or was preempted, is created and set up (again), and the command goes on where it was.
# Broken off here, the training goes on there; the same command follows it again.
#
#   launch/run_tpu.sh --name=ada --zone=europe-west4-a --type=v3-8 --spot -- \
#     python -m ada_jax.train --config=experiments/cifar10.py --workdir=gs://BUCKET/cifar10
#
# --name, --zone, --type, --version, --project, --spot, --queued: as for create_tpu.sh
# --source=URL, --ref=REF: as for setup_tpu.sh
# --max_restarts=20   restarts in all, after which the run is left as it is with status 143
# --retry_seconds=60  before a restart
# --stop              only tell the training that runs there to save its state and stop
# --dry_run           print the gcloud commands, run none
#
# The status is the training's: 0 for a finished run, 2 for a user's mistake, others for crashes. The
# output of every worker goes to logs/ in the workdir.
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
[[ $max_restarts =~ ^[0-9]+$ ]] || complain "--max_restarts=$max_restarts is not a whole number."

if [ ${#command[@]} = 0 ]; then
  complain "The command is missing: write -- python -m ada_jax.train --config=... --workdir=gs://..."
fi
workdir=""
for word in "${command[@]}"; do
  case $word in --workdir=*) workdir=${word#*=} ;; esac
done
if [[ $workdir != gs://?*/?* ]]; then # the disk dies with the VM
  complain "The command needs --workdir=gs://BUCKET/FOLDER, which outlives the VM."
fi
case " ${command[*]} " in
  *" --distributed"* | *" --nodistributed"*) ;;
  *" ada_jax.train "*) command+=(--distributed) ;; # the other binaries do not know it
esac

create=("${same[@]}" --type="$type" ${version:+--version="$version"} ${spot:+--spot}
  ${queued:+--queued})
setup=("${same[@]}" ${source:+--source="$source"} ${ref:+--ref="$ref"})
new=""

prepare() { # Creates the VM unless it is there, and sets up one that was created.
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

trap 'exit 130' INT TERM # not a reason to restart
restarts=0
while true; do
  status=0
  prepare || status=$?
  if [ $status = 0 ]; then
    # The time names the logs, and tells a connection that gcloud repeats from a new attempt.
    attempt=$(if [ -n "$dry_run" ]; then echo TIME; else date -u +%Y%m%dT%H%M%SZ; fi)
    on_workers "$(quote bash ada_jax/launch/worker.sh run "$attempt" "$workdir" "${command[@]}")" ||
      status=$?
    case $status in
      0) break ;;
      2) ;;
      127) complain "$name is not set up: run launch/setup_tpu.sh." ;;
      # Stopped with its state saved; a process of JAX's that lost its peers; a lost connection.
      143 | 134 | 255) ;;
      *) # A crash, unless the VM died under it.
        if look tpu-vm state READY && [ "$state" = READY ]; then
          echo "The run ended with status $status; its logs are in $workdir/logs." >&2
          exit "$status"
        fi
        ;;
    esac
  fi
  if [ $status = 2 ]; then # It said what the mistake is.
    exit 2
  fi
  if [ $restarts -ge "$max_restarts" ]; then
    echo "$name was interrupted once more after $restarts restarts; the same command goes on." >&2
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
