#!/usr/bin/env bash
# The whole life of a small ChatGPT, in one command:
#
#     bash speedrun_jax.sh
#
# It looks at the hardware and picks a tier; JAXCHAT_TIER and DEPTH override, and RL=1 adds
# reinforcement learning. Run it again after any interruption: finished stages are skipped, a killed
# stage continues from its last checkpoint.
#
#     JAXCHAT_TIER=node   8 GPUs: depth 24, ClimbMix, about three hours
#     JAXCHAT_TIER=gpu    some GPUs, or TPUs: depth 12, ClimbMix, about two hours on one H100
#     JAXCHAT_TIER=cpu    a laptop: a small model on the documentation of its own libraries, minutes
#                         (on a Mac with PyTorch on its GPU, elsewhere with JAX)
#     JAXCHAT_TIER=smoke  tests: the same stages on a toy, under three minutes
#
# Everything is written below JAXCHAT_BASE_DIR (~/.cache/jaxchat); the report also lands here.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
[[ -d scripts/runs ]] || cd "${SLURM_SUBMIT_DIR:-.}/scripts/.." # sbatch runs a copy; submit from here

if (($#)); then
    echo "error: $0 takes no arguments: its first lines say what the environment sets" >&2
    exit 2
fi

. scripts/attend.sh
export JAXCHAT_BASE_DIR="${JAXCHAT_BASE_DIR:-${NANOCHAT_BASE_DIR:-$HOME/.cache/jaxchat}}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}"

# --- The tier -------------------------------------------------------------------------------------

. scripts/hardware.sh
[[ -z "${WANDB_RUN:-}" ]] || extras+=(--extra track)
if [[ -n "${JAXCHAT_TIER:-}" ]]; then
    why="JAXCHAT_TIER asks for it"
elif ((gpus >= 8)); then
    JAXCHAT_TIER=node why="$gpus GPUs found"
elif ((gpus >= 1)); then
    JAXCHAT_TIER=gpu why="$gpus GPU(s) found"
elif ((tpus >= 1)); then
    JAXCHAT_TIER=gpu why="$tpus TPU chip(s) found"
elif [[ "$(uname -s)" == Darwin ]]; then
    # There --backend defaults to torch, which uses the Mac's GPU (MPS): jaxchat/backend.py.
    JAXCHAT_TIER=cpu why="a Mac, so on PyTorch"
else
    JAXCHAT_TIER=cpu why="neither an NVIDIA GPU nor a TPU found"
fi

# Training takes as many rows at a time as a card holds; small cards have a preset that saves memory.
fit=()
if ((gpu_memory_mib && gpu_memory_mib < 12000)); then fit=(--card 8)
elif ((gpu_memory_mib && gpu_memory_mib < 20000)); then fit=(--card 16); fi

case "$JAXCHAT_TIER" in
node)
    DEPTH="${DEPTH:-24}" takes="about three hours on 8 H100s"
    # Ratio 8 undertrains the compute-optimal 10.5 a little, for speed; depth 24 then reaches GPT-2.
    # Its 5.9 B tokens at 4.7 characters are 28 G characters; a shard holds 250 M: 110, and slack.
    data=(--dataset climbmix --num-shards 150 --all)
    tok=(--corpus climbmix)
    base=(--corpus climbmix --target-param-data-ratio 8 ${fit[@]+"${fit[@]}"} --save-every 1000)
    loss=(--corpus climbmix)
    eval=()
    mid=(--data hub) sft=(--data hub) rl=(--data hub)
    chat=(--data hub)
    ;;
gpu)
    DEPTH="${DEPTH:-12}" takes="about two hours on one H100"
    # 0.9 B tokens at depth 12 are 4.2 G characters: 17 shards, and the tokenizer wants 2 G of them.
    data=(--dataset climbmix --num-shards 24 --all)
    tok=(--corpus climbmix)
    base=(--corpus climbmix --target-param-data-ratio 8 ${fit[@]+"${fit[@]}"} --save-every 500)
    loss=(--corpus climbmix)
    eval=()
    mid=(--data hub) sft=(--data hub) rl=(--data hub)
    chat=(--data hub)
    ;;
cpu)
    DEPTH="${DEPTH:-4}" takes="about twenty minutes on 2 cores"
    # On Linux, memory in huge pages: a tenth less time per training step (LOG.md).
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
    offline=(--data offline --eval-every 100)
    data=(--dataset embedded)
    tok=(--corpus embedded --vocab-size 4096)
    # Width 192 and 2,048 tokens a step: 1.8 M tokens. So small a batch wants
    # four times the rates that the square-root rule leaves it (LOG.md).
    base=(--corpus embedded --aspect-ratio 48 --head-dim 64 --sequence-len 512
        --device-batch-size 4 --total-batch-size 2048 --num-iterations 900
        --matrix-lr 0.08 --embedding-lr 1.2 --unembedding-lr 0.032
        --eval-every 300 --eval-tokens 32768 --sample-every 450 --save-every 150)
    loss=(--corpus embedded --split-tokens 65536)
    eval=(--max-per-task 100)
    # 0.6 M and 0.25 M tokens, a seventh of the offline mixture and a fifth of its successor: at the
    # base run's full rates that is enough for calculator, spelling and turns (LOG.md).
    mid=("${offline[@]}" --num-iterations 300 --eval-tokens 32768 --save-every 100)
    sft=("${offline[@]}" --num-iterations 120 --eval-tokens 32768 --save-every 100)
    rl=("${offline[@]}" --num-iterations 60 --questions 8 --samples 8 --max-tokens 96 --slots 16
        --eval-every 30 --eval-questions 64 --save-every 20)
    chat=(-a "Documentation|Arithmetic|SpellingBee|SimpleSpelling" -x 300)
    ;;
smoke)
    DEPTH="${DEPTH:-2}" takes="under three minutes on 2 cores"
    offline=(--data offline --num-iterations 8)
    data=(--dataset embedded)
    tok=(--corpus embedded --vocab-size 1024 --max-chars 2000000)
    base=(--corpus embedded --aspect-ratio 32 --head-dim 32 --sequence-len 128
        --device-batch-size 8 --total-batch-size 1024 --num-iterations 40
        --eval-every 20 --eval-tokens 8192 --save-every 20)
    loss=(--corpus embedded --split-tokens 8192)
    eval=(--max-per-task 10)
    mid=("${offline[@]}" --eval-tokens 2048)
    sft=("${offline[@]}" --eval-tokens 2048)
    rl=("${offline[@]}" --num-iterations 2 --questions 2 --samples 4 --max-tokens 16
        --eval-questions 2 --eval-samples 2)
    chat=(-a "Documentation|SimpleSpelling" -x 8)
    ;;
*)
    echo "error: JAXCHAT_TIER=$JAXCHAT_TIER: choose node, gpu, cpu or smoke" >&2
    exit 2
    ;;
esac

echo "jaxchat speedrun: tier $JAXCHAT_TIER ($why), depth $DEPTH; takes $takes"
echo "everything is kept in $JAXCHAT_BASE_DIR"

# --- The environment ------------------------------------------------------------------------------

started=$SECONDS
. scripts/setup.sh ${extras[@]+"${extras[@]}"}
echo "environment ready in $((SECONDS - started)) s"

# Better now than after hours of downloads.
if ((gpus)) && [[ -z "${JAX_PLATFORMS:-}" ]]; then
    .venv/bin/python -c "import jax; jax.devices('cuda')" || {
        echo "error: nvidia-smi finds a GPU and JAX does not. Its CUDA 13 needs NVIDIA's driver 580 or" >&2
        echo "       later and a card since Turing (RTX 20, T4). To train without: JAX_PLATFORMS=cpu" >&2
        echo "       JAXCHAT_TIER=cpu bash speedrun_jax.sh" >&2
        exit 2
    }
fi

# --- The stages -----------------------------------------------------------------------------------

# stage NAME ARGUMENTS...: run `python -m scripts.NAME ARGUMENTS`, unless the ledger says that this
# very command has finished and nothing before it has run anew. A script that runs on several
# models (-i first) has an entry for each.
ledger="$JAXCHAT_BASE_DIR/stages"
mkdir -p "$ledger"
anew=0
stage() {
    local name="$1" command="$*"
    [[ "${2:-}" == -i ]] && name="$1 ($3)"
    local mark="$ledger/$name"
    if ((!anew)) && [[ -f "$mark" && "$(<"$mark")" == "$command" ]]; then
        echo "--- $name: done before"
        return
    fi
    ((!anew)) || rm -f "$mark" # of a model that is no more
    anew=1
    echo "--- $command"
    finish "$mark" "$command" attend .venv/bin/python -m "scripts.$1" "${@:2}"
}

stage data_download "${data[@]}"
stage tok_train "${tok[@]}"
stage tok_eval "${tok[@]:0:2}"
stage base_train --depth "$DEPTH" "${base[@]}"
stage base_loss -g "d$DEPTH" "${loss[@]}"
stage base_eval -g "d$DEPTH" ${eval[@]+"${eval[@]}"}
stage chat_eval -i base -g "d$DEPTH" "${chat[@]}"
stage mid_train -g "d$DEPTH" "${mid[@]}"
stage chat_eval -i mid -g "d$DEPTH" "${chat[@]}"
stage chat_sft -g "d$DEPTH" "${sft[@]}"
stage chat_eval -i sft -g "d$DEPTH" "${chat[@]}"
if [[ -n "${RL:-}" ]]; then
    stage chat_rl -g "d$DEPTH" "${rl[@]}"
    stage chat_eval -i rl -g "d$DEPTH" "${chat[@]}"
fi
stage report

echo
echo "Done. The report is report.md; now talk to the model, in the terminal or in the browser:"
echo "    .venv/bin/python -m scripts.chat_cli -g d$DEPTH"
echo "    .venv/bin/python -m scripts.chat_web -g d$DEPTH"
