#!/usr/bin/env bash
# A scaling law on a laptop: widths x three budgets on the documentation of the installed libraries.
#
#     bash scripts/runs/cpu_scaling.sh
#
# A decade of FLOPs on toys demonstrates the method and is no result about language models. The table is
# JAXCHAT_BASE_DIR/$SERIES.csv; dev/scaling_analysis.ipynb fits the curves.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[[ -f ledger.sh ]] || cd "${SLURM_SUBMIT_DIR:-.}/scripts/runs" # sbatch runs a copy; submit from the root
. ./ledger.sh

SERIES="${SERIES:-cpu}"                  # tags are cpu_1.5e11_w24 and so on
BUDGETS="${BUDGETS:-1.5e11 5e11 1.5e12}" # at 5e10 the best width is below 24
WIDTHS="${WIDTHS:-24 32 48 64 96}"       # in two heads; the smear gate reads 24 channels
DEPTH="${DEPTH:-2}"
VOCAB="${VOCAB:-512}" # so that lm_head is not most of N

prepare embedded 0 "$VOCAB"
for flops in $BUDGETS; do
    for width in $WIDTHS; do
        # So small a batch wants larger rates than the square-root rule leaves it (LOG.md): these come to
        # those of the cpu tier.
        train "${SERIES}_${flops}_w$width" --depth "$DEPTH" --aspect-ratio $((width / DEPTH)) \
            --head-dim $((width / 2)) --sequence-len 256 --corpus embedded --target-flops "$flops" \
            --device-batch-size 4 --total-batch-size 1024 --warmup-steps 10 \
            --matrix-lr 0.12 --embedding-lr 1.8 --unembedding-lr 0.048 \
            --eval-every 1000000 --eval-tokens 65536 --sample-every 1000000
    done
done
launch sweep_table --tags "${SERIES}_*" -o "$JAXCHAT_BASE_DIR/$SERIES.csv"
