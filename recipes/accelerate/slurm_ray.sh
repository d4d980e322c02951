#!/bin/bash
# Late rollouts on several nodes of SLURM, one learner and Ray workers. Not tried on a cluster.
#   sbatch --nodes=1 recipes/accelerate/slurm_ray.sh RECIPE.py --late.workers 2 --late.max_staleness 1 $CLIP $PLAIN
# A node of eight GPUs has seven for workers. N workers need a lag of at least N - 1, and of N to be busy while the learner
# learns. A lag costs something from 2 on (recipes/studies/late/README.md); lags above 8 were not studied. Against it:
#   CLIP='--old_logprobs rollout --loss PPOClip --loss.delta 1.2'
# For the 8B recipes of diffusion models, whose compiled FP8 does not go with workers, uncompiled bf16:
#   PLAIN='--torch_compile false --rollout_quantization none'
# Their likelihood is none with which a lag was studied: keep it at 1 there. Nodes with other than eight GPUs: give
# sbatch --gpus-per-node, --cpus-per-task and --mem.
# The first node's first GPU is the learner's; Ray gives all other GPUs, of all nodes, to the workers, one each.
# As slurm.sh does, it goes on by itself after its time limit.
#SBATCH --job-name=dllm-rl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
source .venv/bin/activate  # the environment, on every node; put your own line here
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take --cpus-per-task from sbatch (SLURM 22.05 on)
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))  # of the learner, and so of each worker
export RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0 RAY_AUTH_MODE=token  # the token: ~/.ray/auth_token, a shared home
ray get-auth-token > /dev/null || exit 1  # without a token its line says how to make one
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RAY_ADDRESS=$first:6379
one=(--overlap --nodes=1 --ntasks=1 --nodelist="$first")
# USR1 and INT are for the learner, which saves; Ray must live until it has saved.
srun "${one[@]}" bash -c 'trap "" USR1 INT; CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES#*,} exec ray start --head \
    --port=6379 --num-gpus=$((SLURM_GPUS_ON_NODE - 1)) --include-dashboard=false --disable-usage-stats --block' &
head=$! tries=0
until srun "${one[@]}" ray health-check --address "$RAY_ADDRESS"; do
    if ! kill -0 "$head" 2> /dev/null || [ $((tries += 1)) -eq 30 ]; then
        echo "slurm_ray.sh: Ray's head on $first has ended or does not answer; its error is above" >&2
        exit 1
    fi
    sleep 2
done
if [ "$SLURM_NNODES" -gt 1 ]; then
    srun --overlap --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$first" \
        bash -c 'trap "" USR1 INT; exec ray start --address="$RAY_ADDRESS" --disable-usage-stats --block' &
    sleep 30  # until the others have joined: the run is refused where the workers find no room
fi
srun "${one[@]}" python "$@" --resume_from_checkpoint latest
status=$?
if [ "$status" -eq 138 ] || [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
