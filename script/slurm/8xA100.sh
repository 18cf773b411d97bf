#!/usr/bin/env bash
# sbatch [-A account] script/slurm/8xA100.sh CONFIG [arguments of src/train.py …]        one node, eight A100
#SBATCH --job-name=bandsplit
#SBATCH --nodes=1
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
train 8 "$@"
