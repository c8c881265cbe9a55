#!/usr/bin/env bash
# Does it work on my GPU, and how fast? The GPU suite, then what is measured at the size of Stable Diffusion v1.4, in at
# most 8 minutes and without a download. From the checkout's root: training/benchmark/gpu.sh [FOLDER OF THE RESULTS]
# How training compares with other libraries' is left out, for it installs them: python -m training benchmark sae
set -uo pipefail
out=${1:-gpu-results}
mkdir -p "$out"
failed=0
run() { # SECONDS NAME COMMAND...: one that fails or takes too long leaves the others' results
  timeout "$1" "${@:3}" 2>&1 | tee "$out/$2.txt" || { echo "$2: failed or stopped" >&2; failed=1; }
}
measure() {
  run "$1" "$2" python -m training benchmark "${@:2}" --device cuda --out "$out/$2"
}
run 180 suite python -m pytest -m gpu tests/gpu -s -rs --durations=10
measure 75 latency
measure 70 conformance
measure 125 streaming
measure 30 sae --quick
exit "$failed"
