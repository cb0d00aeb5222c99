#!/bin/bash
# sbatch [--nodes N] [--gpus-per-node G] [--cpus-per-task C] [--time T] ... THIS_FILE [--config F] [--section.key V] ...
# Trains on all GPUs of the allocated nodes, or on their CPUs if they have no GPU. See docs/slurm.md.
#SBATCH --job-name=regraft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --array=0-2
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

set -euo pipefail
trap '' USR1 # until Python has started, this signal before the time limit would end the job

# Python: the virtual environment that was active at submission, else .venv here, else the first in PATH.
if [ -n "${VIRTUAL_ENV:-}" ]; then
    PATH="$VIRTUAL_ENV/bin:$PATH"
elif [ -d .venv/bin ]; then
    PATH="$PWD/.venv/bin:$PATH"
fi

# Seconds that torchrun gives the trainer to save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}"

# Modules in the working folder must not shadow others; a checkout of regraft is found there.
[ -f launch/slurm/job.py ] || export PYTHONSAFEPATH=1
exec python3 -m launch.slurm.job \
    --sweep=seeds \
    "$@"
