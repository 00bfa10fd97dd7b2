#!/usr/bin/env bash
# Have the tools' own validators read every file of deploy/. By hand; tests/deploy has what needs none of them.
#   ci/check_deploy.sh FOLDER          validators are installed into FOLDER (1.2 GB) and kept there
#   ci/check_deploy.sh --pod FOLDER    also starts the Deployment's own command as its pod would (ci/deploy/pod.py)
# Needs kubectl; PYTHON names a Python 3.11 or later; promtool comes from PATH or Debian's package. Compose 2 reads its
# files too, without a daemon: COMPOSE names its program, else it is docker's plugin or docker-compose, where there is one.
# Exit status 0: every validator is content.
set -euo pipefail

with_pod=
if [[ ${1-} == --pod ]]; then
  with_pod=yes
  shift
fi
if [[ $# -ne 1 ]]; then
  sed -n '3,7s/^# *//p' "${BASH_SOURCE[0]}" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
python=${PYTHON:-python3}
tools=$folder/tools/bin
cd "$root/deploy"

say() { printf '\n== %s\n' "$*"; }

# Installs packages into an environment, once. $1 is the environment, the rest are pip's words.
install_once() {
  local environment=$folder/$1
  shift
  [[ ! -f $environment/ready || $(< "$environment/ready") != "$*$(cksum "$root/ci/deploy/tools.txt")" ]] || return 0
  "$python" -m venv "$environment"
  "$environment/bin/python" -m pip install --quiet "$@"
  echo "$*$(cksum "$root/ci/deploy/tools.txt")" > "$environment/ready"
}

find_promtool() {
  if command -v promtool; then
    return
  fi
  if [[ ! -x $folder/prometheus/usr/bin/promtool ]]; then
    mkdir -p "$folder/prometheus"
    (cd "$folder/prometheus" && apt-get download --quiet --quiet prometheus && dpkg-deb -x prometheus_*.deb .) >&2
  fi
  echo "$folder/prometheus/usr/bin/promtool"
}

find_compose() {
  if [[ -n ${COMPOSE-} ]]; then
    echo "$COMPOSE"
  elif docker compose version > /dev/null 2>&1; then
    echo docker compose
  elif docker-compose version --short 2> /dev/null | grep --quiet '^v\?[2-9]'; then
    echo docker-compose
  fi
}

say "installing validators into $folder"
install_once tools --requirement "$root/ci/deploy/tools.txt"
install_once sky skypilot==0.14.1
promtool=$(find_promtool)

say "hadolint, shellcheck, yamllint"
"$tools/hadolint" docker/Dockerfile
"$tools/shellcheck" docker/build-model.sh "$root/ci/check_deploy.sh"
"$tools/yamllint" --strict --config-data '{extends: default, rules: {line-length: disable, document-start: disable,
  braces: disable, brackets: disable, comments: {min-spaces-from-content: 1}, octal-values: disable}}' .

say "uv: each requirement resolves to the same versions and digests"
for kind in cpu cuda tensorrt-llm; do
  extras=$(sed -n 's/.*uv pip compile pyproject.toml \(.*\) \\$/\1/p' "docker/requirements-$kind.txt")
  cp "docker/requirements-$kind.txt" "$folder/requirements-$kind.txt"
  # shellcheck disable=SC2086 # the extras are words
  "$tools/uv" pip compile "$root/pyproject.toml" $extras --constraints docker/constraints.txt --python-version 3.12 \
    --python-platform x86_64-manylinux_2_39 --only-binary :all: --generate-hashes --no-header --no-annotate --quiet \
    --cache-dir "$folder/uv-cache" --output-file "$folder/requirements-$kind.txt" > "$folder/uv.log"
  diff <(grep -v '^#' "docker/requirements-$kind.txt") <(grep -v '^#' "$folder/requirements-$kind.txt")
done

say "Compose: the specification's schema"
"$tools/check-jsonschema" --builtin-schema vendor.compose-spec compose/compose.yaml compose/compose.cuda.yaml
if read -ra compose < <(find_compose); then
  "${compose[@]}" version
  words=(env CHECKPOINT=x GRAFANA_PASSWORD=x MODEL=m PRECISION=int8)
  "${words[@]}" KIND=cpu "${compose[@]}" -f compose/compose.yaml config --format json > "$folder/compose-cpu.json"
  "${words[@]}" KIND=cuda "${compose[@]}" -f compose/compose.yaml -f compose/compose.cuda.yaml config --format json \
    > "$folder/compose-cuda.json"
  for kind in cpu cuda; do
    for place in '"/models/m-KIND-int8"' '"/models/m-KIND-int8/repository"' '"moeship:0.1.0-KIND"'; do
      grep --quiet --fixed-strings -- "${place//KIND/$kind}" "$folder/compose-$kind.json"
    done
  done
else
  echo "Compose 2 is not installed: 'docker compose config' has not run"
fi

say "promtool: configuration, rules, cases of alerts"
"$promtool" check config --syntax-only compose/prometheus.yml
"$promtool" check rules prometheus/moeship.rules.yml
(cd "$root/tests/deploy" && "$promtool" test rules alert_cases.yml)

say "Kubernetes: kustomize, and strict schemas"
for overlay in base overlays/cuda overlays/tensorrt-llm; do
  manifest=$folder/$(basename "$overlay").yaml
  kubectl kustomize "kubernetes/$overlay" > "$manifest"
  "$tools/kubernetes-validate" --strict --no-warn --quiet "$manifest"
done

say "KEDA, Prometheus operator, KServe, Grafana: types of their own packages"
"$tools/python" "$root/ci/deploy/typed.py" "$folder/cuda.yaml" "$folder/tensorrt-llm.yaml" kserve/moeship.yaml \
  grafana/moeship.json

say "SkyPilot loads task and service"
SKYPILOT_DISABLE_USAGE_COLLECTION=1 "$folder/sky/bin/python" - sky/model.yaml sky/service.yaml << 'END'
import sys

import sky

for path in sys.argv[1:]:
    print(path, sky.Task.from_yaml(path), sep="\n")
END

if [[ -n $with_pod ]]; then
  say "the Deployment's own command in a pod's namespaces"
  cd "$root"
  "${MOESHIP_PYTHON:-.venv/bin/python}" ci/deploy/pod.py "$folder/pod"
fi
say "every validator is content"
