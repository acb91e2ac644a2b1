#!/bin/bash
# One sweep as one program on the GPUs of several nodes: a process on each, connected by
# jax.distributed. Every node needs this environment, the sweep file and the agent; the first one
# writes the results to results/NAME. With --nodes=1 it is a job of one process.
#
#   sbatch experiments/cluster/slurm.sh [SPEC.toml]
#
#SBATCH --job-name=purejaxpg
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
spec=${1:-experiments/thousand.toml}

# SIGTERM comes 300 s before the time is up: the segment ends, a snapshot is written, and the status
# is 143. --kill-on-bad-exit ends the others if one is killed, sooner than jax would.
srun --kill-on-bad-exit=1 purejaxpg sweep "$spec"
status=$?

# --requeue covers lost nodes and preemption; a job whose time is up has to requeue itself. A
# cancelled job is no longer running and stays cancelled.
if [ "$status" -eq 143 ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
