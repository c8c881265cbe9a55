#!/usr/bin/env bash
# Runs the GPU tests and the benchmarks at the size of Stable Diffusion v1.4, in at most 8 minutes and without downloads.
# Run it from the root of the checkout: training/benchmark/gpu.sh [RESULTS_FOLDER]
# Not included: `python -m training benchmark sae` in full, which installs other libraries to compare with.
set -uo pipefail
out=${1:-gpu-results}
mkdir -p "$out"
failed=0
run() { # SECONDS NAME COMMAND...; if a command fails or times out, the others still run
  timeout "$1" "${@:3}" 2>&1 | tee "$out/$2.txt" || { echo "$2: failed or timed out" >&2; failed=1; }
}
measure() { # SECONDS BENCHMARK [OPTIONS]
  run "$1" "$2" python -m training benchmark "${@:2}" --device cuda --out "$out/$2"
}
run 180 suite python -m pytest -m gpu tests/gpu -s -rs --durations=10
measure 75 latency
measure 70 conformance
measure 125 streaming
measure 30 sae --quick
exit "$failed"
