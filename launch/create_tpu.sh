#!/usr/bin/env bash
# Creates a Cloud TPU VM and waits until it is ready. It does nothing if the VM is ready, starts a
# stopped VM, and replaces a preempted one.
#
#   launch/create_tpu.sh --name=ada --zone=europe-west4-a --type=v3-8 --spot
#
# --name=NAME        of the VM
# --zone=ZONE        a zone that has the type
# --type=TYPE        accelerator type, such as v3-8, v4-8, v5e-8, v5p-8 or v6e-8
# --version=VERSION  software version; by default the one for JAX on the type
# --project=PROJECT  by default gcloud's
# --spot             spot capacity, much cheaper and preemptible at any time
# --queued           wait in Google's queue (queued resources)
# --poll_seconds=30  interval of checking the queue
# --dry_run          print the gcloud commands without running them
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
name="" zone="" type="" version="" project="" spot="" queued="" poll_seconds=30 dry_run=""
# shellcheck source=launch/common.sh
. "$here/common.sh"
parse "name zone type version project poll_seconds" "spot queued dry_run" "$@"
require name zone type
[[ $poll_seconds =~ ^[0-9]+$ ]] || complain "--poll_seconds=$poll_seconds must be an integer."

type=${type/#v5e-/v5litepod-} # gcloud's name of v5e
case ${version:-$type} in
  "$version") ;;
  v[234]-*) version=tpu-ubuntu2204-base ;;
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
  *) complain "No software version is known for --type=$type: name one with --version." ;;
esac

look tpu-vm state MISSING
case $state in
  READY)
    echo "$name is ready."
    exit
    ;;
  STOPPED)
    tpus tpu-vm start "$name"
    exit
    ;;
  PREEMPTED | TERMINATED) "$here/delete_tpu.sh" "${same[@]}" ;; # to free the name
  MISSING) ;;
  *)
    if [ -z "$queued" ]; then
      echo "$name is in state $state: try again later." >&2
      exit 1
    fi
    ;;
esac

options=(--accelerator-type="$type" ${spot:+--spot})
if [ -z "$queued" ]; then
  tpus tpu-vm create "$name" --version="$version" "${options[@]}"
  exit
fi

look queued-resources state.state MISSING
if [ "$state" = FAILED ] || [ "$state" = SUSPENDED ]; then
  "$here/delete_tpu.sh" "${same[@]}"
  state=MISSING
fi
if [ "$state" = MISSING ]; then
  tpus queued-resources create "$name" --node-id="$name" --runtime-version="$version" \
    "${options[@]}"
fi
absent=0
while true; do
  look queued-resources state.state ACTIVE # not as a condition, where its failure would be ignored
  [ "$state" != ACTIVE ] || break
  echo "The request for $name is in state $state."
  case $state in
    FAILED | SUSPENDING | SUSPENDED | DELETING) exit 1 ;;
    MISSING) [ $((++absent)) -lt 3 ] || exit 1 ;; # A new request may take a moment to be listed.
    *) absent=0 ;;
  esac
  sleep "$poll_seconds"
done
