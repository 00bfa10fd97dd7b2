#!/usr/bin/env bash
# One CI job: a checkpoint becomes a verified, packaged engine, or the job fails and says why.
#   ci/build_engine.sh CHECKPOINT PRECISION NAME OUTPUT [TOKENS]
# OUTPUT receives engine/, verification.json and repository/. Exit status 0 done, 1 verification failed, 2 wrong input.
# BACKEND=tensorrt-llm builds for TensorRT-LLM: 3 says that it or a GPU is missing, and the checkpoint is written.
set -euo pipefail
if [[ $# -lt 4 || $# -gt 5 ]]; then
  sed -n '3,5s/^# *//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
checkpoint=$1 precision=$2 name=$3 output=$4 tokens=${5:-2048}
backend=${BACKEND:-onnxruntime}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
build=("$root/trt_build/build_engine.py" --checkpoint "$checkpoint" --precision "$precision" --output "$output/engine")

mkdir -p "$output"
if [[ $backend == tensorrt-llm ]]; then
  # The last stage of the build compares the engine with the reference and writes the result into engine.json.
  "$python" "${build[@]}" --backend "$backend" --verify-tokens "$tokens"
  "$python" -c 'import json, sys; json.dump(json.load(sys.stdin)["verification"], sys.stdout, indent=2)' \
    < "$output/engine/engine.json" > "$output/verification.json"
else
  "$python" "${build[@]}" --backend "$backend"
  "$python" -m cli.main verify "$output/engine" --reference "$checkpoint" --tokens "$tokens" --json \
    > "$output/verification.json"
fi
"$python" -m cli.main package "$output/engine" --name "$name" --output "$output/repository"
