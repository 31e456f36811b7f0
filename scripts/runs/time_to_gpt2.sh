#!/usr/bin/env bash
# Time to GPT-2: train depth 24 on 8 GPUs, and say how long it took and whether its CORE passes GPT-2's.
#
#     bash scripts/runs/time_to_gpt2.sh
#
# Counted are the seconds in training steps, over all interruptions; evaluations, checkpoints and the
# preparation of data are not. Exits with 1 when CORE stays below.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[[ -f ledger.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}/scripts/runs" # sbatch runs a copy; submit from the root
. ./ledger.sh

DEPTH="${DEPTH:-24}"
RATIO="${RATIO:-8}"     # undertrained for its size: 1.5 times faster than the series' 12
GOAL="${GOAL:-0.256525}" # GPT-2 (1.6 B parameters, 2019), DCLM's CORE (arXiv 2406.11794)
CORPUS="${CORPUS:-climbmix}"
SHARDS="${SHARDS:-150}" # 5.8 G tokens of 4.7 characters
VOCAB="${VOCAB:-32768}"
tag="${TAG:-gpt2_d$DEPTH}"

prepare "$CORPUS" "$SHARDS" "$VOCAB"
train "$tag" --depth "$DEPTH" --corpus "$CORPUS" --target-param-data-ratio "$RATIO" \
    --save-every 1000
core "$tag"
launch sweep_table --tags "$tag" --goal "$GOAL"
