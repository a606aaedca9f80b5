#!/usr/bin/env bash
# Deletes a Cloud TPU VM and its queued request. It is not an error if there is nothing to delete.
#
#   launch/delete_tpu.sh --name=ada --zone=europe-west4-a
#
# --name=NAME        of the VM
# --zone=ZONE        its zone
# --project=PROJECT  by default gcloud's
# --dry_run          print the gcloud commands without running them
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
name="" zone="" project="" dry_run=""
# shellcheck source=launch/common.sh
. "$here/common.sh"
parse "name zone project" "dry_run" "$@"
require name zone

look queued-resources state.state MISSING
if [ "$state" != MISSING ]; then
  tpus queued-resources delete "$name" --force # with its VM
  exit
fi
look tpu-vm state READY
if [ "$state" = MISSING ]; then
  echo "There is no $name in $zone."
else
  tpus tpu-vm delete "$name"
fi
