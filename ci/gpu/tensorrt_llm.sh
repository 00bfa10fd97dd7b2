#!/usr/bin/env bash
# Builds, proves, serves and measures TensorRT-LLM engines on this machine's NVIDIA GPU; README.md says what it takes.
#   ci/gpu/tensorrt_llm.sh [--output DIR] [--full] [--precisions P,P] [--tp-size N] [--check] [--help]
#   ci/gpu/tensorrt_llm.sh --inside ...    the same, in the container already
# Variables: CONTAINER, DIGEST, GPUS below; PYTHON with --inside, one that has moeship's packages already.
# Exit status 0 all is well, 1 a step failed or an engine differs from the reference, 2 it cannot run here.
set -Eeuo pipefail

CONTAINER=${CONTAINER:-nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3} # TensorRT-LLM 1.2.1
DIGEST=${DIGEST:-} # sha256:... for that very image; empty takes what the tag names, and the results say what it was
GPUS=${GPUS:-all}  # value of docker's flag --gpus
CPU_TORCH=https://download.pytorch.org/whl/cpu # the reference runs on the CPU: a build of torch without CUDA will do

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$root/ci/gpu/run_tensorrt_llm.py

refuse() {
  echo "cannot run here: $1" >&2
  exit 2
}

usage() {
  sed -n '2,6s/^# *//p' "${BASH_SOURCE[0]}"
  PYTHONPATH=$root python3 "$work" --help 2> /dev/null || true # every flag, where this Python is new enough
}

# Sets inside, output, checkpoint, and words: the other arguments.
read_words() {
  inside=no output=gpu-results checkpoint="" words=()
  while [[ $# -gt 0 ]]; do
    case $1 in
      --inside) inside=yes; shift; continue ;;
      --output | --checkpoint) [[ $# -gt 1 ]] || refuse "$1 needs a folder" ;;&
      --output) output=$2; shift 2; continue ;;
      --checkpoint) checkpoint=$2; shift 2; continue ;;
      --output=*) output=${1#*=}; shift; continue ;;
      --checkpoint=*) checkpoint=${1#*=}; shift; continue ;;
      -h | --help) usage; exit 0 ;;
    esac
    words+=("$1"); shift
  done
}

# On the host: runs this script in the container with docker. Paths are the same there; the clone is mounted read-only.
run_container() {
  local image=$CONTAINER${DIGEST:+@$DIGEST} status=0 digest mounts=()
  command -v docker > /dev/null || refuse "no docker on PATH; install Docker Engine and nvidia-container-toolkit"
  nvidia-smi > /dev/null 2>&1 || refuse "nvidia-smi finds no GPU; install NVIDIA's driver"
  docker image inspect "$image" > /dev/null 2>&1 || docker pull "$image" \
    || refuse "docker cannot pull $image; is its daemon running, and nvcr.io within reach?"
  digest=$(docker image inspect --format '{{join .RepoDigests " "}}' "$image")
  mounts=(--volume "$root:$root:ro" --volume "$output:$output")
  [[ -z $checkpoint ]] || mounts+=(--volume "$checkpoint:$checkpoint:ro")
  docker run --rm --init --gpus "$GPUS" --ipc host --ulimit memlock=-1 --ulimit stack=67108864 "${mounts[@]}" \
    --workdir "$root" --env "MOESHIP_CONTAINER=$image" --env "MOESHIP_CONTAINER_DIGEST=$digest" "$image" \
    bash "$root/ci/gpu/tensorrt_llm.sh" --inside "${words[@]}" || status=$?
  # Status 125 comes from docker: the container was not started.
  [[ $status -ne 125 ]] || refuse "docker cannot start a container with GPUs; install nvidia-container-toolkit, run \
'nvidia-ctk runtime configure --runtime=docker' and restart docker"
  exit "$status"
}

# In the container: makes a Python environment below the output for moeship's packages, since TensorRT-LLM's
# Python has other versions of torch and transformers. moeship itself runs from the clone. Sets python.
make_environment() {
  local venv=$output/venv packages=() package wanted
  wanted="$(python3 --version) $(cksum < "$root/pyproject.toml") $root"
  python=$venv/bin/python
  [[ ! -f $venv/ready || $(< "$venv/ready") != "$wanted" ]] || return 0
  rm -rf "$venv"
  mapfile -t packages < <(python3 - "$root/pyproject.toml" << 'END'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *extras["transformers"], *extras["client"], sep="\n")
END
  )
  unset PIP_CONSTRAINT # NVIDIA's images pin packages for their own Python with it
  python3 -m pip install --quiet --target "$venv.virtualenv" virtualenv
  PYTHONPATH=$venv.virtualenv python3 -m virtualenv --quiet "$venv"
  rm -rf "$venv.virtualenv"
  for package in "${packages[@]}"; do
    [[ $package != torch==* ]] || "$python" -m pip install --quiet --retries 1 --index-url "$CPU_TORCH" "$package" \
      || echo "$CPU_TORCH cannot be reached; taking the larger build" >&2
  done
  "$python" -m pip install --quiet "${packages[@]}"
  "$python" - "$root" << 'END'
import pathlib, sys, sysconfig
pathlib.Path(sysconfig.get_path("purelib"), "moeship.pth").write_text(sys.argv[1] + "\n")
END
  echo "$wanted" > "$venv/ready"
}

run_inside() {
  export PATH=$PATH:/opt/tritonserver/bin PYTHONUNBUFFERED=1
  python=${PYTHON:-}
  if [[ -z $python ]]; then
    # The container's own Python checks the machine before anything is installed.
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} python3 "$work" --check "${words[@]}" || exit $?
    [[ " ${words[*]} " != *" --check "* ]] || exit 0
    trap 'chown -R --reference "$output" "$output"/venv* || true
          refuse "the packages of moeship cannot be installed into $output/venv; pip says above why"' ERR
    make_environment
    trap - ERR
  fi
  cd "$root"
  exec "$python" "$work" "${words[@]}"
}

read_words "$@"
mkdir -p "$output" || refuse "the folder $output cannot be made"
output=$(cd "$output" && pwd)
words+=(--output "$output")
if [[ -n $checkpoint ]]; then
  checkpoint=$(cd "$checkpoint" && pwd) || refuse "no folder $checkpoint"
  words+=(--checkpoint "$checkpoint")
fi
if [[ $inside == yes ]]; then run_inside; else run_container; fi
