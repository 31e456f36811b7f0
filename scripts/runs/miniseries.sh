#!/usr/bin/env bash
# The miniseries: one compute-optimal model at each depth, judged by bits per byte and CORE.
#
#     bash scripts/runs/miniseries.sh
#     SERIES=ratio8 RATIO=8 DEPTHS="8 12 16" bash scripts/runs/miniseries.sh
#
# A change of the recipe is good when it lowers the whole curve and not one depth. The runs follow each
# other on all GPUs of this machine; run it again after an interruption. The table is
# JAXCHAT_BASE_DIR/$SERIES.csv, and dev/scaling_analysis.ipynb draws it.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[[ -f ledger.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}/scripts/runs" # sbatch runs a copy; submit from the root
. ./ledger.sh

SERIES="${SERIES:-mini}"                # tags are mini_d8 and so on
DEPTHS="${DEPTHS:-8 10 12 14 16 18 20}" # 3.2e19 FLOPs and 38 GB in all
RATIO="${RATIO:-12}"                    # tokens per scaling parameter
CORPUS="${CORPUS:-climbmix}"
SHARDS="${SHARDS:-150}"                 # d20 reads 5.2 G tokens of 4.7 characters, a shard holds 250 M
VOCAB="${VOCAB:-32768}"

prepare "$CORPUS" "$SHARDS" "$VOCAB"
for depth in $DEPTHS; do
    tag="${SERIES}_d$depth"
    train "$tag" --depth "$depth" --corpus "$CORPUS" --target-param-data-ratio "$RATIO" \
        --save-every 1000
    core "$tag"
    # after every depth, so that the table is there while the series runs
    launch sweep_table --tags "${SERIES}_d*" -o "$JAXCHAT_BASE_DIR/$SERIES.csv"
done
