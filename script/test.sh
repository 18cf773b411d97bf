#!/usr/bin/env bash
# Everything that decides whether a change passes: style, types, import order, tests.
# usage: bash script/test.sh [--quick] [arguments of pytest …]
#   --quick   without the tests marked `slow` (kills, disks that fill, several ranks, Slurm, whole builds, README)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
selection=()
if [[ ${1:-} == --quick ]]; then
    shift
    selection=(-m "not slow and not long")
fi

# The tests of script/slurm start a Slurm of their own; where these packages cannot be had they are skipped.
if [[ ! ${selection[*]} && $(id -u) == 0 ]] && ! type slurmd munged shellcheck &>/dev/null && type apt-get &>/dev/null; then
    echo "installing with apt-get: slurm-wlm munge shellcheck (for the tests of script/slurm)"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        slurm-wlm munge shellcheck; } >/dev/null 2>&1 || echo "not available: the tests with Slurm are skipped"
fi
echo "installing into ${VENV:-.venv}, where missing: the package with its extra dev, at the versions of script/constraints.txt"
source script/setup.sh dev

unset PYTHONDONTWRITEBYTECODE # every rank would compile torch anew
ruff check .
ruff format --check .
lint-imports
mypy
# One process more than there are cores: tests of Slurm, kills and restarts mostly wait.
processes=$(($(nproc) + 1))
python -m pytest -n "$((processes < 8 ? processes : 8))" --dist loadgroup --no-loadscope-reorder "${selection[@]}" "$@"
