"""Read objects of KEDA, the Prometheus operator and KServe, and a Grafana dashboard, by the types that packages of
these projects have. What is of another type, or is lost on the way, has a name or a place that they do not know.

    python ci/deploy/typed.py FILE...       # YAML of Kubernetes, or a dashboard's JSON; exit status 1: a fault
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudcoil.models.keda.v1alpha1 as keda
import cloudcoil.models.prometheus_operator.v1 as monitoring
import grafana_foundation_sdk.cog.plugins as grafana_plugins
import kserve
import kubernetes.client
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

# What these versions of the packages do not know, and their projects have. The end of the path, and where it is from.
KNOWN = {
    "spec.fallback.behavior": "KEDA since 2.17: keda.sh, Scaling Deployments, fallback",
    "titleFormat": "Grafana: annotations of a Prometheus query",
    "tagKeys": "Grafana: annotations of a Prometheus query",
    "definition": "Grafana: the text of a query variable, as it is shown in the list of variables",
}


def by_pydantic(model: type) -> Callable[[dict[str, Any]], Any]:
    def read(value: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
        return json.loads(model.model_validate(value).model_dump_json(by_alias=True, exclude_none=True))

    return read


def by_kserve(kind: str) -> Callable[[dict[str, Any]], Any]:
    """Keep what a model of KServe's Python SDK has, and what those of Kubernetes' client have within it."""

    def read(value: Any, kind: str) -> Any:  # noqa: ANN401 - JSON
        if inner := re.fullmatch(r"list\[(.*)\]", kind):
            return [read(item, inner[1]) for item in value]
        if inner := re.fullmatch(r"dict\(str, (.*)\)", kind):
            return {key: read(item, inner[1]) for key, item in value.items()}
        if model := getattr(kserve.models, kind, None):
            names = {name: model.openapi_types[field] for field, name in model.attribute_map.items()}
            return {key: read(item, names[key]) for key, item in value.items() if key in names}
        if model := getattr(kubernetes.client, kind, None):
            return model.from_dict(value).model_dump(by_alias=True, exclude_none=True, mode="json")
        if kind in ("str", "int", "bool") and not isinstance(value, {"str": str, "int": int, "bool": bool}[kind]):
            return f"no {kind}"
        return value

    return lambda value: read(value, kind)


def dashboard(value: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
    grafana_plugins.register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(value)))


READERS = {
    "ScaledObject": by_pydantic(keda.ScaledObject),
    "PodMonitor": by_pydantic(monitoring.PodMonitor),
    "ServingRuntime": by_kserve("V1alpha1ServingRuntime"),
    "InferenceService": by_kserve("V1beta1InferenceService"),
}


def lost(before: Any, after: Any, path: str = "") -> Iterator[str]:  # noqa: ANN401 - JSON
    """The places whose values are not the same after they were read."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            place = f"{path}.{key}" if path else key
            yield from lost(value, after[key], place) if key in after else [place]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from lost(*pair, f"{path}[{index}]")
    elif before != after:
        yield f"{path}: {before!r} was read as {after!r}"


def main() -> int:
    wrong = read = 0
    for path in map(Path, sys.argv[1:]):
        objects = [json.loads(path.read_text())] if path.suffix == ".json" else yaml.safe_load_all(path.read_text())
        for value in objects:
            reader = dashboard if path.suffix == ".json" else READERS.get(value["kind"])
            if reader is None:
                continue
            read += 1
            for place in lost(value, reader(value)):
                if not any(place.endswith(known) for known in KNOWN):
                    print(f"{path}: {value.get('kind', 'dashboard')}: {place}")
                    wrong += 1
    print(f"{read} objects read, {wrong} places wrong")
    return 1 if wrong or not read else 0


if __name__ == "__main__":
    sys.exit(main())
