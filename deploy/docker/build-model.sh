#!/usr/bin/env bash
# Make a model repository from a checkpoint, once. In the images of deploy/docker:
#   build-model CHECKPOINT NAME FOLDER [flags of build_engine.py] [-- flags of moeship package]
# CHECKPOINT is a folder or a hub id. FOLDER gets engine/ and, last and whole, repository/ with the model NAME. A run
# after any interruption goes on; where the repository is there already, nothing is done. Other words than those that
# FOLDER was begun with are refused (exit status 2). An engine for ONNX Runtime is compared with its checkpoint before it
# is packaged, over VERIFY_TOKENS tokens (2048; 0: not), and one that differs is not packaged (exit status 1). Engines of
# TensorRT-LLM are compared by their build. Other statuses: docs/operations.md.
set -euo pipefail

python=${MOESHIP_PYTHON:-/opt/moeship/bin/python}
tokens=${VERIFY_TOKENS:-2048}
if [[ $# -lt 3 ]]; then
  sed -n '3,8s/^# *//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
words=$*
checkpoint=$1 name=$2 folder=$3
shift 3
build=()
while [[ $# -gt 0 && $1 != -- ]]; do
  build+=("$1")
  shift
done
[[ $# -eq 0 ]] || shift # what is left is for package

# Words that made nothing, such as a mistyped checkpoint, bind nobody.
begun=$([[ ! -d $folder ]] || find "$folder" -mindepth 1 ! -name 'words*' -print -quit)
if [[ -n $begun && -f $folder/words && $(< "$folder/words") != "$words" ]]; then
  echo "making a model in $folder: asked for '$words', and the folder was begun with '$(< "$folder/words")';" \
    "name another folder, or remove this one" >&2
  exit 2
fi
if [[ -f $folder/repository/$name/config.pbtxt ]]; then
  echo "$folder/repository has the model $name already; name another folder for another engine"
  exit 0
fi
mkdir -p "$folder"
printf '%s\n' "$words" > "$folder/words.new"
mv "$folder/words.new" "$folder/words"
if [[ ! -f $folder/engine/engine.json ]]; then
  "$python" -m trt_build.build_engine --checkpoint "$checkpoint" --output "$folder/engine" "${build[@]}"
fi
if [[ $tokens != 0 && " ${build[*]} " != *" tensorrt-llm "* ]]; then
  "$python" -m cli.main verify "$folder/engine" --reference "$checkpoint" --tokens "$tokens"
fi
exec "$python" -m cli.main package "$folder/engine" --name "$name" --output "$folder/repository" "$@"
