#!/usr/bin/env bash
# sbatch [-A account] --array=0-15 script/slurm/array_branches.sh CONFIG [arguments of src/train.py …]
# One job and one GPU per branch, no communication; python src/evaluate.py RUN RUN … evaluates them as one ensemble.
#SBATCH --job-name=bandsplit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.out
# shellcheck source=script/slurm/launch.sh
source "$(scontrol show job "$SLURM_JOB_ID" | grep -oPm1 "Command=\K.*?/script/slurm/")launch.sh"
train 1 --branches "$SLURM_ARRAY_TASK_ID" "$@"
