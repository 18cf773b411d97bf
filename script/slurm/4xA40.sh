#!/usr/bin/env bash
# sbatch [-A account] script/slurm/4xA40.sh CONFIG [arguments of src/train.py …]        one node, four A40
#SBATCH --job-name=bandsplit
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:a40:4
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export PATH="$PWD/.venv/bin:$PATH"
srun torchrun --standalone --nproc-per-node "${NPROC_PER_NODE:-4}" src/train.py "$@"
