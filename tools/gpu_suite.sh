#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: builds the kernels for the GPU here, tests them, watches them with
# compute-sanitizer, and measures them beside other projects' in one run.
#
#   tools/gpu_suite.sh [OUT_FOLDER]     default benchmarks/results/<date>-<gpu>; gets results.json and results.md
#
#   PYTHON=python3          interpreter with torch and pytest; python, or else python3
#   PEERS=FOLDER            other projects, see benchmarks/README.md
#   SRFT_CUDA_ARCHS=90      compute capabilities to build for; that of the GPU here
#   STAGES="build tests sanitizers benchmarks"      what to run, all of it if not given
#   SUITE_SECONDS=530       stages are cut short so that the whole ends after this time
#
# A stage that fails does not keep the later ones from running. Exit status: 0 if all passed, 1 if a stage did not,
# 2 if nothing could be done here. A peer that is missing or fails is a line in the results and no failure.
set -euo pipefail

out=${1:+$(realpath -m "$1")}
peers=${PEERS:+$(realpath -m "$PEERS")}
cd "$(dirname "$0")/.."
suite_seconds=${SUITE_SECONDS:-530}
wanted=${STAGES:-build tests sanitizers benchmarks}

refuse() {
  echo "gpu_suite: $1" >&2
  exit 2
}

PYTHON=${PYTHON:-$(command -v python || command -v python3 || true)}
[ -n "$PYTHON" ] || refuse "there is no python here; name one: PYTHON=/path/to/python3 tools/gpu_suite.sh"
gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') ||
  refuse "$PYTHON cannot import torch"
[ -n "$gpu" ] || refuse "there is no GPU here that $PYTHON's torch can use"
for toolkit in "${CUDA_HOME:-}" /usr/local/cuda "$(dirname "$(dirname "$(command -v nvcc || true)")")"; do
  [ -x "$toolkit/bin/nvcc" ] && break
done
[ -x "$toolkit/bin/nvcc" ] || refuse "there is no CUDA toolkit with nvcc here; set CUDA_HOME"

arch=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
export PATH=$PATH:$toolkit/bin:$toolkit/compute-sanitizer CUDA_HOME=$toolkit
export SRFT_CUDA_ARCHS=${SRFT_CUDA_ARCHS:-$arch} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export PYTHONPATH=$PWD${peers:+:$peers/site-packages}${PYTHONPATH:+:$PYTHONPATH}
out=${out:-$PWD/benchmarks/results/$(date +%Y-%m-%d)-$(tr -cs 'A-Za-z0-9\n' - <<<"$gpu")}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()

# stage NAME SECONDS COMMAND...: runs it for at most so long, keeps its output and what became of it.
stage() {
  local name=$1 limit=$2 began=$SECONDS left=$((suite_seconds - SECONDS - 5)) status=0 outcome
  shift 2
  printf '\n== %s: %s\n' "$name" "$*"
  if [ "$left" -lt 10 ]; then
    status=124
    echo "no time is left of $suite_seconds s" | tee "$work/$name.log"
  else
    timeout --kill-after=5 "$((left < limit ? left : limit))" "$@" 2>&1 | tee "$work/$name.log" ||
      status=${PIPESTATUS[0]}
  fi
  case $status in
    0) outcome=passed ;;
    124 | 137) outcome="FAILED: out of time" ;;
    *) outcome="FAILED: status $status" ;;
  esac
  if [[ $name == sanitizer-* && $status != 0 ]] && grep -qi "device not supported" "$work/$name.log"; then
    outcome="not run: compute-sanitizer does not take this device"
  fi
  note "$name" "$outcome" "$((SECONDS - began))" "$*"
}

# note NAME OUTCOME SECONDS COMMAND: the command without this machine's folders
note() {
  local command=$4
  command=${command//"$work/"/}
  [ -z "$peers" ] || command=${command//"$peers"/PEERS}
  command=${command//"$PYTHON"/python}
  printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$command" >>"$work/stages.tsv"
  printf -- '-- %s: %s after %s s\n' "$1" "$2" "$3"
  [[ $2 != FAILED* ]] || failed+=("$1: ${2#FAILED: }")
}

sanitizer() {
  command -v compute-sanitizer >/dev/null || {
    note "sanitizer-$1" "not run: compute-sanitizer is not installed" 0 ""
    return
  }
  stage "sanitizer-$1" 75 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$1" --error-exitcode 99 --print-limit 20 "$PYTHON" tools/launch_kernels.py
}

benchmark() {
  local name=$1 limit=$2 script=$3
  shift 3
  stage "$name" "$limit" "$PYTHON" "benchmarks/$script" --json "$work/$name.json" "$@"
}

echo "$gpu, sm_$arch; results go to $out"
if [[ $wanted == *build* ]]; then
  stage build 150 env SRFT_NATIVE=1 SRFT_CUDA=1 "$PYTHON" setup.py build_ext --inplace
fi
if [[ $wanted == *tests* ]]; then
  stage launch 60 "$PYTHON" tools/launch_kernels.py
  stage tests-ops 150 "$PYTHON" -m pytest -p no:cacheprovider -m gpu tests/ops
  mapfile -t others < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | grep -v '^tests/ops/' || true)
  if [ "${#others[@]}" -gt 0 ]; then
    stage tests-others 60 "$PYTHON" -m pytest -p no:cacheprovider -m gpu "${others[@]}"
  else
    note tests-others "nothing to run" 0 "no other test is marked gpu"
  fi
fi
if [[ $wanted == *sanitizers* ]]; then
  sanitizer memcheck
  sanitizer racecheck
fi
if [[ $wanted == *benchmarks* ]]; then
  size=(--rows 8192 --vocabulary 151936 --dtype bfloat16 --repeats 10 --limit 90 ${peers:+--peers "$peers"})
  benchmark linear 240 token_logprob.py "${size[@]}" --width 896 3584
  benchmark logits 90 token_logprob.py "${size[@]}"
  benchmark clipped-ratio 75 clipped_ratio.py --repeats 100 --limit 40
  benchmark gated-pooling 75 gated_pooling.py --repeats 10 --limit 60
fi

"$PYTHON" benchmarks/report.py "$work" "$out"
echo "done after $SECONDS s; see $out/results.md"
if [ "${#failed[@]}" -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
