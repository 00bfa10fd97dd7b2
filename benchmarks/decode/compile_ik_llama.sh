#!/bin/bash
# Compile ik_llama.cpp for this machine's processor: bash benchmarks/decode/compile_ik_llama.sh FOLDER [VERSION]
#
# The wheel of ik-llama-cpp-python is compiled for AVX2 only. Its sdist of 0.1.5 cannot be installed, since it lacks a
# file that llama-quantize needs, common/cmake/build-info-gen-cpp.cmake; the library itself is complete. This script
# compiles the library, and the installed package loads it from the path in IK_LLAMA_CPP_LIB_PATH. Needs cmake 3.21, a
# C++20 compiler, a quarter of an hour on two cores, and 1 GB. $CMAKE_BUILD_PARALLEL_LEVEL processes, or one for a core.
set -euo pipefail
folder=$(realpath -m "$1") version=${2:-0.1.5}
mkdir -p "$folder" && cd "$folder"
pip download --quiet --no-deps --no-binary ik-llama-cpp-python "ik-llama-cpp-python==$version"
tar xf "ik_llama_cpp_python-$version.tar.gz"
cmake -S "ik_llama_cpp_python-$version/vendor/ik_llama.cpp" -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
    -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
cmake --build build --target llama --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"
echo "export IK_LLAMA_CPP_LIB_PATH=$(find "$folder/build" -name libllama.so)"
