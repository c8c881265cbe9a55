#!/usr/bin/env bash
# Train a recipe's autoencoders as a Hugging Face Job: one GPU, the run kept in a bucket, resumed if it is cut off.
# REPOSITORY: git address of this repository. BUCKET: owner/name of a storage bucket. RECIPE: file name in this folder.
set -euo pipefail
: "${REPOSITORY:?}" "${BUCKET:?}" "${RECIPE:=sd_v1_4_saes.json}"
name=${RECIPE%.json}
exec hf jobs run --detach --name "${name//_/-}" --flavor h200 --timeout 24h --attempts 3 \
  --secrets HF_TOKEN --volume "hf://buckets/$BUCKET:/kept" \
  python:3.12 bash -euc "
    git clone --depth 1 $REPOSITORY /work && cd /work && pip install -q -e '.[train]'
    python -m training sae --recipe training/recipes/$RECIPE --run-dir /kept/$name/run --out /kept/$name/saes"
