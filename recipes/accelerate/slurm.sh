#!/bin/bash
# A run on SLURM, which goes on by itself after its time limit:   sbatch recipes/accelerate/slurm.sh RECIPE.py --FIELD VALUE ...
# One node or more: sbatch --nodes=2 recipes/accelerate/slurm.sh ...
# SLURM itself starts one process a GPU. USR1 warns them before the limit; they save, end with 138, and the job is queued
# again. So it is if they end with 143, after a SIGTERM of their own: of a node that is taken away, or of whatever preempts.
# scancel, and a preemption by SLURM, end this script too: then only SLURM's own setting (PreemptMode=REQUEUE) queues again.
# To save and end the run:   scancel --signal=INT JOBID   (status 130)
#SBATCH --job-name=dllm-rl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
# Of the host, for all weights in fp32: each process reads 32 GB of LLaDA-8B before it shards them, and the main one gathers
# as much to save (estimates). With adapters in bf16 less is enough: nobody has measured how much.
#SBATCH --mem-per-gpu=40G
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
source .venv/bin/activate  # the environment, on every node; put your own line here
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take --cpus-per-task from sbatch (SLURM 22.05 on)
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A port of this job's own, so that two jobs can share a node.
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) WORLD_SIZE=$SLURM_NTASKS
# A process that ended by the warning must not have the others killed while they end, too.
srun --kill-on-bad-exit=0 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python "$0" "$@"' \
    "$@" --resume_from_checkpoint latest
status=$?
if [ "$status" -eq 138 ] || [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
