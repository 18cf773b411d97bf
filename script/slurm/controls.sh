#!/usr/bin/env bash
# sbatch [-A account] --array=1-16 script/slurm/controls.sh --work FOLDER [arguments of bench/controls.py …]
# Each task trains every 16th run of the controls. Before, in jobs of the same kind, one after the other
# (--dependency=afterok:JOB): with --array=1 --only prepare and --only time, then with --array=1-16 --only rates.
#SBATCH --job-name=bandsplit-controls
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.out
# shellcheck source=script/slurm/launch.sh
source "$(scontrol show job "$SLURM_JOB_ID" | grep -oPm1 "Command=\K.*?/script/slurm/")launch.sh"
controls --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" --only train --jobs 1 "$@"
