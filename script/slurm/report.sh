#!/usr/bin/env bash
# sbatch [-A account] script/slurm/report.sh RUN [RUN …]        figures and a table, on a CPU
#SBATCH --job-name=bandsplit-report
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=00:30:00
#SBATCH --output=slurm-%j.out
# shellcheck source=script/slurm/launch.sh
source "$(scontrol show job "$SLURM_JOB_ID" | grep -oPm1 "Command=\K.*?/script/slurm/")launch.sh"
report "$@"
