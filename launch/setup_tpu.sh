#!/usr/bin/env bash
# Installs ada_jax on all workers of a Cloud TPU VM, from this folder or from a git repository.
#
#   launch/setup_tpu.sh --name=ada --zone=europe-west4-a
#
# --name=NAME        of the VM
# --zone=ZONE        its zone
# --project=PROJECT  by default gcloud's
# --source=URL       a git repository to clone; results then have its commit
# --ref=REF          branch, tag or commit of it
# --dry_run          print the gcloud commands without running them
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
name="" zone="" project="" source="" ref=HEAD dry_run=""
# shellcheck source=launch/common.sh
. "$here/common.sh"
parse "name zone project source ref" "dry_run" "$@"
require name zone

if [ -n "$source" ]; then
  fetch="git clone --quiet $(quote "$source") ada_jax"
  fetch+=" && git -C ada_jax checkout --quiet $(quote "$ref")"
else
  if [ "$ref" != HEAD ]; then
    complain "The flag --ref needs --source: without it this folder is installed."
  fi
  folder=/tmp/FOLDER
  if [ -z "$dry_run" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    # Without .git and other hidden files; not compressed, because most of it is weights.
    tar -C "$here/.." -cf "$folder/ada_jax.tar" --exclude='./.*' --exclude=./runs \
      --exclude=__pycache__ .
  fi
  tpus tpu-vm scp "$folder/ada_jax.tar" "$name:ada_jax.tar" --worker=all
  fetch="mkdir ada_jax && tar -xf ada_jax.tar -C ada_jax"
fi
on_workers "rm -rf ada_jax && $fetch && bash ada_jax/launch/worker.sh install"
