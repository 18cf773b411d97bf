#!/usr/bin/env bash
# Everything that decides whether a change passes: set-up, style, types, import order, tests.  Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/setup.sh dev
ruff check .
ruff format --check .
mypy
lint-imports
python -m pytest "$@"
