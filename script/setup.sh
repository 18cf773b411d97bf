# shellcheck shell=bash
# Sourced by demo.sh and test.sh: a virtual environment with everything, made once and kept up to date.
# With a GPU that includes nvcc, which compiles the GPU operator.
# usage: source script/setup.sh [EXTRAS]     PYTHON chooses the interpreter, VENV the folder
VENV=${VENV:-.venv}
[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
[ -x "$VENV/bin/uv" ] || "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check uv
extras=${1:-}
if [ -e /dev/nvidia0 ] || command -v nvidia-smi >/dev/null; then extras=${extras:+$extras,}nvcc; fi
"$VENV/bin/uv" pip install --quiet --python "$VENV/bin/python" --constraint script/constraints.txt \
    --editable ".${extras:+[$extras]}"
export PATH="$PWD/$VENV/bin:$PATH"
