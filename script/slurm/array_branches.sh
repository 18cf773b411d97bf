#!/usr/bin/env bash
# sbatch [-A account] --array=0-15 script/slurm/array_branches.sh CONFIG [arguments of src/train.py …]
# One job a branch, one GPU each, no communication; python src/evaluate.py RUN RUN … joins them into one ensemble.
#SBATCH --job-name=bandsplit
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%A_%a.out
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export PATH="$PWD/.venv/bin:$PATH"
srun torchrun --standalone --nproc-per-node "${NPROC_PER_NODE:-1}" src/train.py --branches "$SLURM_ARRAY_TASK_ID" "$@"
