#!/usr/bin/env bash
# Runs on every worker of a TPU; setup_tpu.sh and run_tpu.sh call it over ssh.
#
#   worker.sh install                          install the package in ~/ada_jax_env, and CIFAR-10
#   worker.sh run ATTEMPT WORKDIR COMMAND...   start the command, or follow it if it is running
#   worker.sh stop                             send SIGTERM; the training saves its state and ends
#
# The command does not depend on the ssh connection that started it: gcloud repeats a lost
# connection, and there must not be two trainings on a TPU.
set -euo pipefail
tree=$(cd "$(dirname "$0")/.." && pwd)
environment=$HOME/ada_jax_env
state=$HOME/.ada_jax # lock, pid, command, attempt, log, status, stop
mkdir -p "$state"

install() {
  # The images have Python 3.10, and Ubuntu's 3.11 is a release candidate; uv installs a release.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --seed --clear --python 3.11 "$environment"
  cd "$tree"
  "$environment/bin/pip" install --quiet -r requirements.txt -e '.[tpu]'
  "$environment/bin/python" -c "import tensorflow_datasets as tfds; tfds.data_source('cifar10')" ||
    echo "CIFAR-10 could not be prepared here; other data sets do not need it." >&2
  touch "$environment/complete"
}

upload() { # Copies the log to the bucket, where it outlives the VM.
  gcloud storage cp --quiet "$state/log" "$1/logs/$(hostname)-$(cat "$state/attempt").log" \
    >"$state/upload.log" 2>&1 || true
}

supervise() { # WORKDIR COMMAND...: runs the command, uploads its output, records its status.
  local workdir=$1 status=0 uploads
  shift
  trap : TERM # On preemption this shell gets SIGTERM too, and must outlive the training.
  (while sleep 60; do upload "$workdir"; done) 9>&- &
  uploads=$!
  "$@" || status=$?
  if [ -e "$state/stop" ]; then
    status=130 # so that run_tpu.sh does not restart it
  fi
  echo "$status" >"$state/status"
  kill "$uploads" 2>/dev/null || true # unless a signal to the group has ended it
  upload "$workdir"
}

run() {
  local attempt=$1 workdir=$2 words lines=10
  shift 2
  if [ ! -e "$environment/complete" ]; then
    echo "error: this worker is not set up." >&2
    exit 127
  fi
  words=$(printf '%q ' "$@")
  exec 9>"$state/lock" # held by the training, even after a lost connection
  if ! flock --nonblock 9; then
    if [ "$words" != "$(cat "$state/command")" ]; then
      echo "error: Another command is running; wait for it or end it with run_tpu.sh --stop:" \
        "$(cat "$state/command")" >&2
      exit 2
    fi
  # The same attempt with a status ended while the connection was lost.
  elif [ "$attempt" != "$(cat "$state/attempt" 2>/dev/null)" ] || [ ! -e "$state/status" ]; then
    rm -f "$state/status" "$state/stop"
    echo "$attempt" >"$state/attempt"
    echo "$words" >"$state/command"
    : >"$state/log" # before tail, which may start before the supervisor
    cd "$tree"
    PATH=$environment/bin:$PATH setsid bash "$tree/launch/worker.sh" supervise "$workdir" "$@" \
      </dev/null >>"$state/log" 2>&1 &
    echo $! >"$state/pid"
    lines=+1
  fi
  exec 9>&-
  tail --pid="$(cat "$state/pid")" --sleep-interval=0.2 --lines="$lines" --follow "$state/log"
  exit "$(cat "$state/status" || echo 255)" # without a status the supervisor was killed
}

stop() {
  if flock --nonblock "$state/lock" true; then
    echo "Nothing is running."
  else
    touch "$state/stop"
    kill -TERM -- "-$(cat "$state/pid")" # the group: shell, training, uploads
  fi
}

"$@"
