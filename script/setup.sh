# shellcheck shell=bash
# Sourced by demo.sh and test.sh: a virtual environment with everything, made once and kept up to date.
# usage: source script/setup.sh [EXTRA]      PYTHON chooses the interpreter, VENV the folder
VENV=${VENV:-.venv}
[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
[ -x "$VENV/bin/uv" ] || "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$VENV/bin/uv" pip install --quiet --python "$VENV/bin/python" --constraint script/constraints.txt --editable ".${1:+[$1]}"
export PATH="$PWD/$VENV/bin:$PATH"
