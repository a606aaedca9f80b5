#!/usr/bin/env bash
# Tests, benchmarks and trains on one GPU in a given time: the tests of the numerics, the benchmark
# (with PyTorch if it is installed), then rows of the paper's table 1 by
# experiments/cifar10.py:ROW,gpu.
#
#   launch/gpu_study.sh --minutes=10 --out=DIR
#   launch/gpu_study.sh --minutes=10 --out=DIR -- --config.dataset=npz --config.data_dir=/DIR/FILE.npz
#   launch/gpu_study.sh --minutes=30 --out=DIR --recipe=best  # this row and ada+augmix, three seeds
#   launch/gpu_study.sh --minutes=10 --out=DIR --rehearsal    # tiny sizes, on a CPU
#
# The words after -- are flags of every training. When the time is up the script exits with status
# 143, after Ctrl-C with 130, and the same command resumes. DIR has tests.log, benchmark.md,
# results/ROW.json after each row, report.md and the runs' folders.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

minutes='' out='' recipe='' rehearsal=''
parse "minutes out recipe" "rehearsal" "$@"
[ -n "$out" ] || complain "The flag --out is missing: see ${0##*/} --help."
[[ $minutes =~ ^[1-9][0-9]*$ ]] || complain "--minutes=$minutes must be a positive integer."
end=$((SECONDS + 60 * minutes - 15)) # 15 seconds for the report
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."

rows=(nominal ada augmix ada+augmix deepaugment+augmix ada+deepaugment+augmix)
scale=accelerator
flags=(${command[@]+"${command[@]}"})
if [ -n "$recipe" ]; then
  rows=("$recipe,ada+augmix,seeds=3")
  flags=("--config.eval_sets=('clean','c','cbar')" ${flags[@]+"${flags[@]}"})
fi
if [ -n "$rehearsal" ]; then
  export JAX_PLATFORMS=cpu
  [ -n "$recipe" ] || rows=(nominal ada)
  scale=tiny
  flags=(--config.dataset=mnist5k '--config.train_split=train[:64]' '--config.eval_split=test[:40]'
    --config.batch_size=16 --config.eval_batch_size=40 --config.epochs=0 --config.train_steps=4
    --config.classifier=resnet9 "--config.ada.corruption_net=('edsr_small',)" ${flags[@]+"${flags[@]}"})
fi

running=''
limited() { # Runs a command, and stops it by SIGTERM when the time is up.
  local left=$((end - SECONDS))
  [ $left -gt 0 ] || return 143
  timeout --kill-after=60 --signal=TERM $left "$@" &
  running=$!
  wait $running
}
# shellcheck disable=SC2329 # Traps call it.
stop() { # STATUS: stops the running command, waits for it, and exits.
  [ -z "$running" ] || { kill -TERM "$running" && wait "$running"; } 2>/dev/null || true
  exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM

status=0
outcome() { # PART STATUS LOG: prints how a part of the study ended, and sets the exit status.
  case $2 in
    0) echo "$1: done after $SECONDS s" ;;
    124 | 137 | 143) echo "$1: the time is up; the same command resumes" && status=143 ;;
    *) echo "$1: failed, see $3" && status=1 ;;
  esac
}

if [ -z "$recipe" ] && [ ! -e "$out/tests_passed" ]; then
  echo "tests: $out/tests.log"
  ended=0
  limited python3 -m pytest -q -m accelerator -p no:cacheprovider tests >"$out/tests.log" 2>&1 || ended=$?
  if [ $ended = 0 ]; then touch "$out/tests_passed"; fi
  outcome tests $ended "$out/tests.log"
  tail -n 1 "$out/tests.log"
fi

if [ -z "$recipe" ] && [ ! -e "$out/benchmark_done" ]; then
  echo "benchmark: $out/benchmark.md"
  peer=()
  if python3 -c 'import torch' 2>/dev/null; then peer=(--peer=torch); fi
  ended=0
  limited python3 -m ada_jax.benchmark --rows=peak,conv,inner,step,augment,memory --scale=$scale \
    ${peer[@]+"${peer[@]}"} >"$out/benchmark.md" 2>"$out/benchmark.log" || ended=$?
  if [ $ended = 0 ]; then touch "$out/benchmark_done"; fi
  outcome benchmark $ended "$out/benchmark.log"
fi

for row in "${rows[@]}"; do
  own=() ended=0
  : >"$out/$row.log"
  if [[ $row == *deepaugment* ]]; then
    own=(--config.deepaugment.dir="$out/deepaugment")
    data=()
    for flag in ${flags[@]+"${flags[@]}"}; do
      case $flag in --config.dataset=* | --config.data_dir=* | --config.train_split=*) data+=("$flag") ;; esac
    done
    limited python3 -m ada_jax.deepaugment --config=experiments/deepaugment.py:gpu \
      --out="$out/deepaugment" ${data[@]+"${data[@]}"} >>"$out/$row.log" 2>&1 || ended=$?
  fi
  if [ $ended = 0 ]; then
    limited python3 -m ada_jax.sweep --sweep="experiments/sweeps/gpu.py:$row" --out="$out/runs" \
      --collect="$out/results" ${flags[@]+"${flags[@]}"} ${own[@]+"${own[@]}"} \
      >>"$out/$row.log" 2>&1 || ended=$?
  fi
  outcome "$row" $ended "$out/$row.log"
  [ $status != 143 ] || break
done

if compgen -G "$out/results/*.json" >/dev/null; then
  python3 -m ada_jax.report "$out"/results/*.json >"$out/report.md"
  cat "$out/report.md"
fi
exit $status
