#!/usr/bin/env bash
# One CI job: a checkpoint becomes a verified, packaged engine, or the job fails and says why.
#   ci/build_engine.sh CHECKPOINT PRECISION NAME OUTPUT [TOKENS]
# OUTPUT receives engine/, verification.json and repository/. Exit status 0 done, 1 verification failed, 2 wrong input.
set -euo pipefail
if [[ $# -lt 4 || $# -gt 5 ]]; then
  sed -n '3,4s/^# *//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
checkpoint=$1 precision=$2 name=$3 output=$4 tokens=${5:-2048}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

mkdir -p "$output"
"$python" "$root/trt_build/build_engine.py" --checkpoint "$checkpoint" --precision "$precision" --output "$output/engine"
"$python" -m cli.main verify "$output/engine" --reference "$checkpoint" --tokens "$tokens" --json \
  > "$output/verification.json"
"$python" -m cli.main package "$output/engine" --name "$name" --output "$output/repository"
