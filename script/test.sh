#!/usr/bin/env bash
# Everything that decides whether a change passes: set-up, style, types, import order, tests.  Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# The tests of script/slurm start a Slurm of their own; where these packages cannot be had they are skipped.
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! type slurmd munged shellcheck &>/dev/null; then
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        slurm-wlm munge shellcheck; } >/dev/null 2>&1 || true
fi
source script/setup.sh dev
unset PYTHONDONTWRITEBYTECODE # every rank would compile torch anew
ruff check .
ruff format --check .
mypy
lint-imports
python -m pytest "$@"
