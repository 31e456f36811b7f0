#!/usr/bin/env bash
# A scaling law on a laptop: widths x three budgets on the documentation of the installed libraries.
#
#     bash scripts/runs/cpu_scaling.sh
#
# A decade of FLOPs on toys demonstrates the method and is no result about language models. The table is
# JAXCHAT_BASE_DIR/$SERIES.csv; dev/scaling_analysis.ipynb fits the curves.

set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/ledger.sh"

SERIES="${SERIES:-cpu}"
BUDGETS="${BUDGETS:-5e11 1.6e12 5e12}"
WIDTHS="${WIDTHS:-32 48 64 96 128}"
DEPTH="${DEPTH:-4}"
VOCAB="${VOCAB:-2048}"

prepare embedded 0 "$VOCAB"
for flops in $BUDGETS; do
    for width in $WIDTHS; do
        # 2,048 tokens a step want four times the default rates (LOG.md)
        train "${SERIES}_${flops}_w$width" --depth "$DEPTH" --aspect-ratio $((width / DEPTH)) \
            --head-dim 16 --sequence-len 256 --corpus embedded --target-flops "$flops" \
            --device-batch-size 8 --total-batch-size 2048 --warmup-steps 10 \
            --matrix-lr 0.08 --embedding-lr 1.2 --unembedding-lr 0.032 \
            --eval-every 1000000 --eval-tokens 65536 --sample-every 1000000
    done
done
launch sweep_table --tags "${SERIES}_*" -o "$JAXCHAT_BASE_DIR/$SERIES.csv"
