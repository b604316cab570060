#!/bin/bash
# A run as a Job of Hugging Face: this checkout on rented GPUs, pushed to REPO_ID at each best evaluation and at the end.
#
#   hf auth login
#   scripts/launch/hf_jobs.sh a10g-large user/my-model full backbone=timm/vit_base_patch16_224.augreg_in21k data=user/photos
#
# HOURS (2) is what the job may take, CONFIG the accelerate config (scripts/launch/ddp.yaml), IMAGE the container. With
# DRY_RUN=1 the job is printed and not submitted. `hf jobs hardware` lists flavours and prices. The token reaches the job
# as a secret. A job has no disk that outlives it: what is kept is what was pushed.
set -euo pipefail

flavor=${1:?usage: hf_jobs.sh FLAVOR REPO_ID RECIPE [KEY=VALUE ...]}
repo=${2:?usage: hf_jobs.sh FLAVOR REPO_ID RECIPE [KEY=VALUE ...]}
recipe=${3:?usage: hf_jobs.sh FLAVOR REPO_ID RECIPE [KEY=VALUE ...]}
shift 3
hours=${HOURS:-2}
options=(--flavor "$flavor" --timeout "${hours}h" --secrets HF_TOKEN --env "CONFIG=${CONFIG:-scripts/launch/ddp.yaml}")
[ -n "${DRY_RUN:-}" ] && options+=(--dry-run)

# The code goes along, read-only, by way of a bucket.
root=$(cd "$(dirname "$0")/../.." && pwd)
code=$(mktemp -d)
trap 'rm -rf "$code"' EXIT
tar -C "$root" --exclude=__pycache__ -c pyproject.toml README.md LICENSE hf_finetune scripts recipes | tar -C "$code" -x

# shellcheck disable=SC2016  # the container fills these in
inside='set -e
cp -r /code /tmp/code && cd /tmp/code && pip install --quiet .
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
if [ "$gpus" -gt 1 ]; then
    exec accelerate launch --config_file "$CONFIG" --num_processes "$gpus" scripts/train.py --recipe "$@"
fi
exec hf-finetune train "$@"'

# A tenth of the time is left to compare, and to push.
max_hours=$(awk "BEGIN { print 0.9 * $hours }")
hf jobs run "${options[@]}" --volume "$code:/code:ro" "${IMAGE:-pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime}" -- \
    bash -c "$inside" hf-finetune "$recipe" "$@" \
    "hub={repo_id: $repo, when: best}" "training.max_hours=$max_hours" --output /tmp/run
