#!/usr/bin/env bash
# Run some of the CPU kernels' tests under valgrind's memcheck: reads past a tensor's end and of memory that nobody wrote.
# Compiles a copy of the sources as an install does. Needs g++, valgrind and what the tests need; PYTHON names the
# interpreter. valgrind has no AVX-512: the levels are plain and avx2. Takes two minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(command -v "${PYTHON:-python3}")
[[ $python = /* ]] || python=$PWD/$python
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z export trt_build tests/kernel_nodes.py tests/trt_build/kernels ci pyproject.toml setup.py README.md LICENSE |
  xargs -0 cp --parents -t "$copy"
cd "$copy"
"$python" setup.py -q build_ext --inplace
# Python's own pools would hide what lies in them.
PYTHONMALLOC=malloc OPENBLAS_NUM_THREADS=1 valgrind --tool=memcheck --leak-check=no --error-limit=no --num-callers=25 \
  --child-silent-after-fork=yes --xml=yes --xml-file=errors.xml "$python" ci/valgrind_kernels.py || failed=$?
"$python" ci/valgrind_kernels.py errors.xml
exit "${failed:-0}"
