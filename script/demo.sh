#!/usr/bin/env bash
# Installs the packages, trains the demo ensemble and plots it; 2 minutes on 2 cores once the packages are installed.
# Run again, it resumes an interrupted run, or redraws the plots of a finished one. Arguments go to src/train.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/setup.sh
run=runs/demo
torchrun src/train.py config/train/demo.toml --resume --run-dir "$run" "$@"
python src/report.py "$run"
