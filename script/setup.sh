# shellcheck shell=bash
# Sourced by demo.sh and test.sh: creates or updates the virtual environment and puts it on PATH.
# On machines with a GPU, also installs nvcc, which compiles the GPU operator.
# usage: source script/setup.sh [EXTRAS]     PYTHON chooses the interpreter, VENV the folder
VENV=${VENV:-.venv}
[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
[ -x "$VENV/bin/uv" ] || "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check uv
extras=${1:-}
has_gpu=""
if [ -e /dev/nvidia0 ] || command -v nvidia-smi >/dev/null; then
    # shellcheck disable=SC2034 # test.sh asks for it
    has_gpu=yes extras=${extras:+$extras,}nvcc
fi
"$VENV/bin/uv" pip install --quiet --python "$VENV/bin/python" --constraint script/constraints.txt \
    --editable ".${extras:+[$extras]}"
export PATH="$PWD/$VENV/bin:$PATH"
