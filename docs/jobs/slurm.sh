#!/bin/bash
# Trains on all GPUs of two nodes: sbatch docs/jobs/slurm.sh. Submitted again, it goes on.
#SBATCH --job-name=keras-vit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

DATA=${DATA:-folder:/shared/images}
RUN=${RUN:-/shared/runs/images}

if [ -e "$RUN/run.json" ]; then
  WHAT=(--resume "$RUN")
else
  WHAT=(--data "$DATA" --out "$RUN")
fi

# Slurm itself requeues after the failure of a node. Below, the job is after that of a task, three
# times at most, so that a mistake in the command line does not run for ever, and where it was told
# to stop (preempted, or by --signal), which is no error.
if srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  keras-vit train "${WHAT[@]}" --strategy multiworker; then
  grep -qs '"status": "finished"' "$RUN/run.json" || scontrol requeue "$SLURM_JOB_ID"
  exit
fi
[ "${SLURM_RESTART_COUNT:-0}" -lt 3 ] && scontrol requeue "$SLURM_JOB_ID"
exit 1
