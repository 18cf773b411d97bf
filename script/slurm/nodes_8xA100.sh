#!/usr/bin/env bash
# sbatch [-A account] --nodes=4 script/slurm/nodes_8xA100.sh CONFIG [arguments of src/train.py …]   nodes of eight A100
#SBATCH --job-name=bandsplit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:a100:8
#SBATCH --cpus-per-task=128
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# shellcheck source=script/slurm/launch.sh
source "$(scontrol show job "$SLURM_JOB_ID" | grep -oPm1 "Command=\K.*?/script/slurm/")launch.sh"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
rendezvous=(
    --nnodes "$SLURM_NNODES" --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID"
    --rdzv-endpoint "$head:$((20000 + SLURM_JOB_ID % 10000))"
)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a new store per attempt, without stale addresses
train 8 "$@"
