#!/usr/bin/env bash
# Run the CPU kernels' tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the
# sources. Needs g++ and what the tests need; PYTHON names the interpreter. Takes some minutes.
# Compiled with -O1: with setup.py's -O3 g++ takes eight times as long for checks that are the same, and removes some
# undefined behaviour before it could be noticed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(command -v "${PYTHON:-python3}")
[[ $python = /* ]] || python=$PWD/$python
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z export trt_build tests/kernel_nodes.py tests/trt_build/kernels pyproject.toml setup.py README.md LICENSE |
  xargs -0 cp --parents -t "$copy"
cd "$copy"
printf '#!/bin/sh\nexec g++ "$@" -O1\n' > g++-quick
chmod +x g++-quick
export CXX=$PWD/g++-quick CC=$PWD/g++-quick
export CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined"
export CXXFLAGS=$CFLAGS LDFLAGS=$CFLAGS  # also for the library that emulates AMX, which the tests compile
"$python" setup.py -q build_ext --inplace
nm -D trt_build/ort/kernels/moeship_kernels.so | grep __asan_init >/dev/null
# Leak detection is off, because Python and ONNX Runtime do not free all memory at exit.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
  "$python" -m pytest -q --noconftest -p no:cacheprovider tests/trt_build/kernels -k "not torch and not missing_library"
find build/emulating -name moeship_kernels.so -exec nm -D {} + | grep __asan_init >/dev/null
