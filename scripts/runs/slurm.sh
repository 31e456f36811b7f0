#!/usr/bin/env bash
# Pretraining on a Slurm cluster, one process per node with all its GPUs:
#
#     sbatch scripts/runs/slurm.sh --depth 24 --save-every 500
#
# Prepare the environment and the data once where there is internet, on a file system that all nodes
# see (JAXCHAT_BASE_DIR):  . scripts/setup.sh --extra gpu && python -m scripts.data_download -n 150
#
# Five minutes before the time limit, or when the job is pre-empted, every process saves and exits
# with 143; a lost node makes the others exit with 75. Both put the job back into the queue, where it
# continues from its last checkpoint, on the nodes it then gets.

#SBATCH --job-name=jaxchat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=jaxchat-%j.log
#SBATCH --signal=B:TERM@300

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}"

# The shell gets the signal (B:) and hands it to srun, which hands it to every process.
srun .venv/bin/python -m scripts.base_train "$@" &
training=$!
trap 'kill -TERM "$training"' TERM
status=0
wait "$training" || status=$?
while kill -0 "$training" 2>/dev/null; do # a trapped signal ends wait before the training has ended
    status=0
    wait "$training" || status=$?
done

# 143 saved after a signal, 75 and 137 lost a process; anything else would fail the same way again.
case "$status" in
143 | 137 | 75)
    if ((${SLURM_RESTART_COUNT:-0} < 20)); then
        echo "exit status $status: back into the queue"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    fi
    ;;
esac
exit "$status"
