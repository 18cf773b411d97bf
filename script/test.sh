#!/usr/bin/env bash
# All checks of a change: style, import contracts, types, tests.
# usage: bash script/test.sh [--quick] [arguments of pytest …]
#   --quick   without the tests marked `slow`: faults and restarts, Slurm, builds of the operator, the commands of the
#             README, training with every recipe; doc/development.md
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
selection=()
if [[ ${1:-} == --quick ]]; then
    shift
    selection=(-m "not slow and not long")
fi

# The tests of script/slurm start their own Slurm, those of the page a browser, those of bench/network.py links; without
# these packages they are skipped.
packages=(slurm-wlm munge shellcheck chromium iproute2)
if [[ ! ${selection[*]} && $(id -u) == 0 ]] && type apt-get &>/dev/null &&
    ! type slurmd munged shellcheck chromium ip tc &>/dev/null; then
    echo "installing with apt-get: ${packages[*]} (for the tests of script/slurm, of the page and of bench/network.py)"
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        "${packages[@]}"; } >/dev/null 2>&1 || echo "not available: tests that need them are skipped"
fi
echo "installing into ${VENV:-.venv} what is missing there: the packages of pyproject.toml with its extra dev (8 GB in all)"
source script/setup.sh dev

unset PYTHONDONTWRITEBYTECODE # every rank would compile torch's Python files again
export OMP_NUM_THREADS=1      # the processes of the tests share the cores
ruff check .
ruff format --check .
lint-imports
mypy
processes=$(env -u OMP_NUM_THREADS nproc) # which takes that for a limit
python -m pytest -n "$((processes < 8 ? processes : 8))" --dist loadgroup --no-loadscope-reorder --durations=15 "${selection[@]}" "$@"
if [[ ${has_gpu:-} && ! ${selection[*]} && $# == 0 ]]; then
    python -m pytest -m gpu # from all others, GPUs are hidden
fi
