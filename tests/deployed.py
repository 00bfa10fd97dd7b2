"""The files of deploy/ as tests read them: servers with their probes and times, jobs that make models, images."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

from cli import serve

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KINDS = ("cpu", "cuda", "tensorrt-llm")  # of images
USER = 10001


class RefusedError(Exception):
    """What a command line would be refused for."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise RefusedError(message)


def parsed(module, words: list[str]) -> argparse.Namespace:
    """The words as the command itself reads them. Raises RefusedError."""
    parser = Parser()
    module.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def documents(path: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / path).read_text("utf-8")))


@cache
def kustomized(overlay: str) -> list[dict]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed, which lays overlays over the base")
    made = subprocess.run(
        [kubectl, "kustomize", DEPLOY / "kubernetes" / overlay], capture_output=True, text=True, check=True, timeout=60
    )
    return list(yaml.safe_load_all(made.stdout))


def seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+)s", text)
    assert found, text
    return float(found[1])


def default(text: str) -> str:
    """A value of Compose with the defaults of its variables; one that must be given is `given`."""
    return re.sub(r"\$\{\w+(?::-([^}]*)|:\?[^}]*)\}", lambda match: "given" if match[1] is None else match[1], text)


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """A server of deploy/."""

    words: list[str]  # what follows `moeship serve`
    ports: set[int]  # those that others may reach
    probes: dict[str, dict]
    pause_s: float  # before it gets SIGTERM
    grace_s: float  # from the beginning of the pause until it is killed

    @property
    def options(self) -> argparse.Namespace:
        return parsed(serve, self.words)


def of_pod(container: dict, grace_s: float) -> Deployed:
    assert container["command"] == ["/opt/moeship/bin/moeship"]
    first, *words = container["args"]
    assert first == "serve"
    pause = container["lifecycle"]["preStop"]
    return Deployed(
        words=words,
        ports={port["containerPort"] for port in container["ports"]},
        probes={name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")},
        pause_s=float(pause["sleep"]["seconds"] if "sleep" in pause else pause["exec"]["command"][1]),
        grace_s=grace_s,
    )


def of_kubernetes(objects: list[dict]) -> Deployed:
    [pod] = [entry["spec"]["template"]["spec"] for entry in objects if entry["kind"] == "Deployment"]
    return of_pod(pod["containers"][0], pod["terminationGracePeriodSeconds"])


def of_kserve() -> Deployed:
    runtime, service, _ = documents("kserve/moeship.yaml")
    return of_pod(runtime["spec"]["containers"][0], service["spec"]["predictor"]["terminationGracePeriodSeconds"])


def compose() -> dict:
    [whole] = documents("compose/compose.yaml")
    return whole["services"]


def of_compose() -> Deployed:
    server = compose()["server"]
    first, *words = [default(word) for word in server["command"]]
    assert first == "serve"
    check = server["healthcheck"]
    url = re.search(r"http://127\.0\.0\.1:(\d+)(/[\w/]*)", check["test"][-1])
    probe = {"httpGet": {"path": url[2], "port": int(url[1])}}
    return Deployed(
        words=words,
        ports={int(port.split(":")[-1]) for port in server["ports"]} | {8002},  # Prometheus is in the same network
        probes={"readiness": probe, "startup": {**probe, "periodSeconds": 1, "failureThreshold":
                seconds(check["start_period"])}},
        pause_s=0.0,
        grace_s=seconds(server["stop_grace_period"]),
    )  # fmt: skip


def base() -> list[dict]:
    return [*documents("kubernetes/base/server.yaml"), *documents("kubernetes/base/model.yaml")]


SERVERS = {
    "base": lambda: of_kubernetes(base()),
    "cuda": lambda: of_kubernetes(kustomized("overlays/cuda")),
    "tensorrt-llm": lambda: of_kubernetes(kustomized("overlays/tensorrt-llm")),
    "kserve": of_kserve,
    "compose": of_compose,
}


def pods() -> dict[str, dict]:
    found = {entry["metadata"]["name"]: entry["spec"]["template"]["spec"] for entry in base()}
    runtime, *_ = documents("kserve/moeship.yaml")
    return {**found, "kserve": runtime["spec"]}


def base_images() -> dict[str, str]:
    """The stages of the Dockerfile that begin with an image, with the values of its arguments."""
    text = (DEPLOY / "docker" / "Dockerfile").read_text("utf-8")
    values = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.M))
    found = {stage: image for image, stage in re.findall(r"^FROM (\S+) AS (\S+)", text, re.M)}
    return {stage: re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], image) for stage, image in found.items()}


def model_words(words: list[str]) -> tuple[list[str], list[str]]:
    """What `build-model` gives to build_engine.py and to `moeship package`."""
    checkpoint, name, folder, *rest = words
    at = rest.index("--") if "--" in rest else len(rest)
    build = ["--checkpoint", checkpoint, "--output", f"{folder}/engine", *rest[:at]]
    return build, [f"{folder}/engine", "--name", name, "--output", f"{folder}/repository", *rest[at + 1 :]]


def jobs() -> dict[str, list[str]]:
    """Every use of build-model, by where it is."""
    [cuda] = documents("compose/compose.cuda.yaml")
    found = {
        "base": job_of(base())["args"],
        "compose": [default(word) for word in compose()["model"]["command"]],
        "compose.cuda": [default(word) for word in cuda["services"]["model"]["command"]],
    }
    task, _ = tasks()
    [line] = [line for line in commands_of(task["run"]) if "build-model.sh" in line]
    words = re.sub(r"\$(\w+)", lambda match: task["envs"][match[1]], line.partition("build-model.sh ")[2])
    found["sky"] = shlex.split(words)
    return found


def job_of(objects: list[dict]) -> dict:
    [pod] = [entry["spec"]["template"]["spec"] for entry in objects if entry["kind"] == "Job"]
    [container] = pod["containers"]
    assert container["command"] == ["build-model"]
    return container


def tasks() -> tuple[dict, dict]:
    [task], [service] = documents("sky/model.yaml"), documents("sky/service.yaml")
    return task, service


def commands_of(script: str) -> list[str]:
    return script.replace("\\\n", " ").splitlines()
