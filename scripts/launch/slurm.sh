#!/bin/bash
# A run on several nodes under SLURM, which goes on by itself after a preemption or when its time is up.
#
#   sbatch --nodes 2 --gpus-per-node 8 scripts/launch/slurm.sh runs/photos --recipe full data=/shared/photos
#
# The run folder, the data and HF_HOME lie where every node sees them. CONFIG=scripts/launch/fsdp.yaml shares the model
# out. SLURM sends SIGTERM two minutes before it ends a job: the state is saved, and the job is put back in the queue.
#SBATCH --job-name=hf-finetune
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

output=${1:?usage: sbatch slurm.sh OUTPUT --recipe RECIPE [KEY=VALUE ...]}
shift
nodes=${SLURM_JOB_NUM_NODES:?this script is started by sbatch}
gpus=${SLURM_GPUS_ON_NODE:-1}

export CONFIG=${CONFIG:-scripts/launch/ddp.yaml}
export NODES=$nodes PROCESSES=$((nodes * gpus))
MAIN_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_NODE MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-1} / gpus > 0 ? ${SLURM_CPUS_PER_TASK:-1} / gpus : 1))

# shellcheck disable=SC2016  # each node's own number is filled in there
srun --kill-on-bad-exit=0 bash -c 'exec accelerate launch --config_file "$CONFIG" \
    --num_machines "$NODES" --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_NODE" --main_process_port "$MAIN_PORT" \
    scripts/train.py "$@"' hf-finetune "$@" --output "$output" --resume
code=$?

# The launcher's own exit code does not tell an interruption from a failure; the run's status does.
status=$(sed -n 's/^ *"status": "\([a-z]*\)".*/\1/p' "$output/run.json" 2>/dev/null | head -n 1)
echo "slurm.sh: exit code $code, run $status"
if [ "$status" = interrupted ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 130
fi
exit "$code"
