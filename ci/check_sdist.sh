#!/usr/bin/env bash
# Make the source distribution in the folder given, build a wheel from it, install the wheel in an environment of its own,
# and run its kernels. PYTHON names the interpreter. Takes two minutes, most of it pip's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
output=$(realpath "${1:?usage: ci/check_sdist.sh FOLDER}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet build
"$work/venv/bin/python" -m build --sdist --outdir "$work/sdist" .
"$work/venv/bin/pip" wheel --verbose --no-deps --wheel-dir "$work/wheel" "$work"/sdist/moeship-*.tar.gz
wheel=$(ls "$work"/wheel/moeship-*-py3-none-*.whl)
"$work/venv/bin/pip" install --quiet "$wheel[cpu]" pytest
checks=$PWD/ci/check_wheel.py
cd "$work"
venv/bin/moeship --version
venv/bin/python "$checks"
mkdir -p "$output"
cp sdist/moeship-*.tar.gz "$output"
