#!/bin/bash
# The units of one sweep as tasks of a Ray cluster on the nodes of a job (extra: ray). A lost node
# costs the units it was computing; the sweep continues on the others.
#
#   sbatch experiments/cluster/slurm_ray.sh [SPEC.toml]
#
#SBATCH --job-name=purejaxpg-ray
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --open-mode=append
set -u
spec=${1:-experiments/thousand.toml}
head=$SLURMD_NODENAME
address=$head:6379

# SIGTERM comes to this script only (B:), so that the cluster outlives the sweep.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --port=6379 --num-gpus=4 --block &
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --overlap --nodes="$((SLURM_JOB_NUM_NODES - 1))" --ntasks="$((SLURM_JOB_NUM_NODES - 1))" \
        --exclude="$head" bash -c "sleep 15; ray start --address=$address --num-gpus=4 --block" &
fi

# The sweep decides at its start how many tasks run at a time, so wait for all nodes.
python - "$address" "$SLURM_JOB_NUM_NODES" <<'END'
import sys, time, ray
for _ in range(60):
    time.sleep(5)
    try:
        ray.init(address=sys.argv[1], log_to_driver=False, ignore_reinit_error=True)
        if sum(node["Alive"] for node in ray.nodes()) >= int(sys.argv[2]):
            break
    except ConnectionError:
        pass
END

purejaxpg sweep "$spec" --executor ray --ray-address "$address" --ray-task GPU=1 &
sweep=$!
trap 'kill -TERM $sweep' TERM
wait "$sweep"
status=$?
if [ "$status" -gt 128 ]; then # the trap ended the first wait
    wait "$sweep"
    status=$?
fi
if [ "$status" -eq 143 ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
