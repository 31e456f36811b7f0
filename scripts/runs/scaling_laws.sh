#!/usr/bin/env bash
# Scaling laws: every depth at every budget of FLOPs. The best depth of a budget shows how parameters
# and tokens should grow with compute, and so what --target-param-data-ratio should be.
#
#     bash scripts/runs/scaling_laws.sh
#     BUDGETS="1e17 3e17 1e18" DEPTHS="6 8 10 12" bash scripts/runs/scaling_laws.sh
#
# The runs follow each other on all GPUs of this machine; run it again after an interruption. The table
# is JAXCHAT_BASE_DIR/$SERIES.csv; dev/scaling_analysis.ipynb fits the curves.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[[ -f ledger.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}/scripts/runs" # sbatch runs a copy; submit from the root
. ./ledger.sh

SERIES="${SERIES:-flops}"                    # tags are flops_1e18_d10 and so on
BUDGETS="${BUDGETS:-1e18 2.15e18 4.64e18 1e19}" # thirds of a decade; 1.1e20 FLOPs in all
DEPTHS="${DEPTHS:-10 12 14 16 18 20}"           # 145 GB of checkpoints
CORPUS="${CORPUS:-climbmix}"
SHARDS="${SHARDS:-400}"                      # d10 reads 20 G tokens at 1e19 FLOPs
VOCAB="${VOCAB:-32768}"
# One batch for all: the rule derives it from the ratio's tokens, and a budget gives others.
BATCH="${BATCH:-524288}"

prepare "$CORPUS" "$SHARDS" "$VOCAB"
for flops in $BUDGETS; do
    for depth in $DEPTHS; do
        train "${SERIES}_${flops}_d$depth" --depth "$depth" --corpus "$CORPUS" --target-flops "$flops" \
            --total-batch-size "$BATCH" --save-every 2000 \
            --eval-every 1000000 --sample-every 1000000
    done
    launch sweep_table --tags "${SERIES}_*" -o "$JAXCHAT_BASE_DIR/$SERIES.csv"
done
