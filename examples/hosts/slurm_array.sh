#!/bin/bash
# A sweep as a Slurm array: each task has a GPU, and the database shares out the trials. docs/sweep.md.
#
#   sbatch --export=ALL,RUN=lora_sst2 slurm_array.sh
#
# A task that is preempted, or has two minutes left, gets SIGTERM: its trial saves a checkpoint. Slurm queues a preempted
# task again by itself; after the end of the time the same sbatch goes on with everything that is not done.
#SBATCH --job-name=fastpeft-sweep
#SBATCH --array=0-3
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=fastpeft-sweep-%A_%a.log

set -eu

# Each task has a folder of its own, since one process has a sweep's folder at a time. exec: the signal goes to fastpeft.
exec fastpeft sweep \
  --run "${RUN:-iwlora_mnli}" \
  --name "${NAME:-shared}" \
  --storage "${STORAGE:-postgresql+psycopg://sweeps@db.example.org/sweeps}" \
  --trials "${TRIALS:-60}" \
  --results-dir "${RESULTS:-results}/task-${SLURM_ARRAY_TASK_ID:-0}" \
  --trials-only
