#!/usr/bin/env bash
# Pretraining on a Slurm cluster, one process per node with all its GPUs:
#
#     sbatch scripts/runs/slurm.sh --depth 24 --save-every 500
#
# Prepare the environment and the data once where there is internet, with JAXCHAT_BASE_DIR on a file
# system that all nodes see:
#
#     . scripts/setup.sh --extra gpu
#     .venv/bin/python -m scripts.data_download -n 180 && .venv/bin/python -m scripts.tok_train
#
# Five minutes before the time limit, or when the job is pre-empted, every process saves and exits
# with 143; a lost one makes the others exit with 75. Both put the job back into the queue, where it
# continues from its last checkpoint, on the nodes it then gets. After a loss it does so only when
# it has saved since it began: what fails before the first checkpoint would fail there again.

#SBATCH --job-name=jaxchat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=jaxchat-%j.log
#SBATCH --signal=TERM@300

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}" || exit
export JAXCHAT_BASE_DIR="${JAXCHAT_BASE_DIR:-${NANOCHAT_BASE_DIR:-$HOME/.cache/jaxchat}}"

checkpoints() {
    ls -d "$JAXCHAT_BASE_DIR"/base_checkpoints/*/step_*[0-9] 2>/dev/null
}

before=$(checkpoints)

# back from the queue it continues what it began, also where --resume never began it
goes_on=()
((${SLURM_RESTART_COUNT:-0})) && goes_on=(--resume auto)

# The signal goes to every process and, without B:, not to this shell: srun would answer a TERM by
# killing them all. KillOnBadExit would kill those that still save, or make 137 of an error's 2.
srun --kill-on-bad-exit=0 .venv/bin/python -m scripts.base_train "$@" ${goes_on[@]+"${goes_on[@]}"}
status=$?

# srun returns the highest status: behind one of a lost process (75; 134 where JAX gave up on it; 137
# where it was killed) may be the 1 or 2 of an error, which no retry gets past.
worth_a_retry() {
    case "$status" in
    143) true ;;
    75 | 134 | 137) [[ "$(checkpoints)" != "$before" ]] ;;
    *) false ;;
    esac
}

if worth_a_retry && ((${SLURM_RESTART_COUNT:-0} < 20)); then
    echo "exit status $status: back into the queue"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit "$status"
