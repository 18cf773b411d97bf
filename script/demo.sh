#!/usr/bin/env bash
# From nothing to a trained spectral ensemble and its plots; 2 minutes on 2 cores once the packages are there.
# Interrupted, it resumes; finished, it draws the plots again.  Arguments go to src/train.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/setup.sh
run=runs/demo
torchrun src/train.py config/train/demo.toml --resume --run-dir "$run" "$@"
python src/report.py "$run"
