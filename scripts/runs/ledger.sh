# Source this from a research script: the base directory, the environment, and the verbs of a sweep.
# What has finished is skipped, what was stopped continues from its last checkpoint.
#
#     DRY_RUN=1      print the commands, do nothing
#     SKIP_SETUP=1   take the environment as it is, as on a node without internet
#     WANDB_RUN=x    log every run to Weights & Biases, as x_TAG

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if (($#)); then
    echo "error: $0 takes no arguments: its first lines say what the environment sets" >&2
    exit 2
fi

. scripts/attend.sh
export JAXCHAT_BASE_DIR="${JAXCHAT_BASE_DIR:-${NANOCHAT_BASE_DIR:-$HOME/.cache/jaxchat}}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}"
ledger="$JAXCHAT_BASE_DIR/runs"

if [[ -z "${DRY_RUN:-}" ]]; then
    mkdir -p "$ledger"
    if [[ -z "${SKIP_SETUP:-}" ]]; then
        . scripts/hardware.sh
        [[ -z "${WANDB_RUN:-}" ]] || extras+=(--extra track)
        . scripts/setup.sh ${extras[@]+"${extras[@]}"}
    fi
fi

# launch NAME ARGUMENTS...: python -m scripts.NAME ARGUMENTS
launch() {
    if [[ -n "${DRY_RUN:-}" ]]; then
        printf '.venv/bin/python -m scripts.%s' "$1"
        printf ' %q' "${@:2}"
        echo
    else
        attend .venv/bin/python -m "scripts.$1" "${@:2}"
    fi
}

# once KEY NAME ARGUMENTS...: launch, unless the ledger says that this very command has finished under
# KEY. What stands on KEY has a key of the form KEY.SOMETHING and is due again.
once() {
    local mark="$ledger/$1" command="${*:2}" started=$SECONDS
    if [[ -n "${DRY_RUN:-}" ]]; then
        launch "${@:2}"
    elif [[ -f "$mark" && "$(<"$mark")" == "$command" ]]; then
        echo "--- $1: done before"
    else
        [[ "$command" != *--resume* ]] || rm -f "$mark" # to start anew sets the old model aside
        echo "--- $command"
        finish "$mark" "$command" launch "${@:2}"
        echo "--- $1: $((SECONDS - started)) s"
    fi
}

# prepare CORPUS SHARDS VOCABULARY: the data, and a tokenizer where there is none; a second one would
# orphan the models of the first, so one of another size is an error.
prepare() {
    local data=(--dataset "$1") made="$JAXCHAT_BASE_DIR/tokenizer/tokenizer.bpe"
    [[ "$1" == embedded ]] || data+=(--num-shards "$2" --all)
    once data data_download "${data[@]}"
    if [[ -n "${DRY_RUN:-}" || ! -f "$made" ]]; then
        [[ -n "${DRY_RUN:-}" ]] || rm -f "$ledger/tokenizer" # of one that is no more
        once tokenizer tok_train --corpus "$1" --vocab-size "$3"
    elif ! head -n 1 "$made" | grep -q "\"vocab_size\": $3[,}]"; then
        echo "error: this sweep wants a tokenizer of $3 tokens, and $made is another." >&2
        echo "       Give the sweep a base directory of its own with JAXCHAT_BASE_DIR." >&2
        exit 2
    fi
}

# train TAG ARGUMENTS...: pretrain a model of its own. EXTRA adds options to all of a sweep. One
# checkpoint is kept: at most 12 bytes a parameter.
train() {
    local extra
    read -ra extra <<<"${EXTRA:-}"
    WANDB_RUN="${WANDB_RUN:+${WANDB_RUN}_$1}" once "$1" base_train --model-tag "$1" \
        --keep-checkpoints 1 "${@:2}" ${extra[@]+"${extra[@]}"}
}

# core TAG: the CORE metric of a model; EVAL adds options, such as EVAL="--max-per-task 500", of
# which the mean is an estimate that the table leaves out.
core() {
    local extra
    read -ra extra <<<"${EVAL:-}"
    once "$1.core" base_eval -g "$1" ${extra[@]+"${extra[@]}"}
}
