"""Pods and services have no rights that they do not need, models are made where they are served, and objects name each
other rightly."""

from __future__ import annotations

from pathlib import Path

import pytest
from deployed import USER, base, compose, documents, job_of, jobs, kustomized, model_words, of_kubernetes, parsed, pods

from cli import package
from trt_build import build_engine


@pytest.mark.parametrize("name", ["moeship", "moeship-model", "kserve"])
def test_pods_run_without_rights_and_with_a_root_that_is_read_only(name):
    pod = pods()[name]
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        context = {**pod.get("securityContext", {}), **container["securityContext"]}
        assert context["runAsUser"] == USER
        assert context["runAsNonRoot"] is True
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "memory" in container["resources"]["limits"]
    [main] = pod["containers"]
    writable = {mount["mountPath"] for mount in main["volumeMounts"] if not mount.get("readOnly")}
    assert writable == ({"/tmp", "/models"} if name == "moeship-model" else {"/tmp", "/dev/shm"})


@pytest.mark.parametrize("name", ["moeship", "moeship-model", "kserve"])
def test_what_is_mounted_is_a_volume_and_every_volume_is_mounted(name):
    pod = pods()[name]
    containers = [*pod["containers"], *pod.get("initContainers", [])]
    mounted = {mount["name"] for container in containers for mount in container.get("volumeMounts", [])}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", ["moeship", "kserve"])
def test_a_server_is_promised_the_memory_that_it_may_take(name):
    """Else the kernel ends it for what its neighbours take. Files in /dev/shm and /tmp of memory count in it."""
    [container] = pods()[name]["containers"]
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


def test_services_of_compose_run_without_rights_and_reach_this_machine_alone():
    [whole] = documents("compose/compose.yaml")
    for service in compose().values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert "healthcheck" in service
        assert "user" in service or service["image"].startswith("moeship:")
    assert whole["secrets"].keys() == {"api-keys"}


@pytest.mark.parametrize("name", ["base", "compose", "compose.cuda", "sky", "cuda", "tensorrt-llm"])
def test_models_are_made_with_flags_that_exist(name):
    words = jobs()[name] if name in jobs() else job_of(kustomized(f"overlays/{name}"))["args"]
    build, packaging = model_words(words)
    assert parsed(build_engine, build).output
    assert parsed(package, packaging).name


@pytest.mark.parametrize("overlay", ["base", "overlays/cuda", "overlays/tensorrt-llm"])
def test_servers_wait_for_and_serve_what_the_job_makes(overlay):
    objects = kustomized(overlay)
    _, name, folder, *_ = job_of(objects)["args"]
    [pod] = [entry["spec"]["template"]["spec"] for entry in objects if entry["kind"] == "Deployment"]
    assert of_kubernetes(objects).options.repository == Path(folder, "repository")
    assert pod["initContainers"][0]["args"] == [f"{folder}/repository/{name}/config.pbtxt"]
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if volume["name"] == "models"]
    assert claims == [entry["metadata"]["name"] for entry in objects if entry["kind"] == "PersistentVolumeClaim"]


def test_compose_serves_what_it_makes_from_a_folder_of_its_own_for_each_kind_of_engine():
    [overlay] = documents("compose/compose.cuda.yaml")
    served = compose()["server"]["command"][1]
    for command in (compose()["model"]["command"], overlay["services"]["model"]["command"]):
        folder = command[2].replace("${KIND:?give KIND=cuda}", "${KIND:-cpu}")
        assert served == f"{folder}/repository"
        assert all(f"${{{variable}:-" in folder for variable in ("MODEL", "KIND", "PRECISION"))


def test_engines_of_the_cpu_take_as_many_threads_as_the_pod_asks_cores_for():
    _, packaging = model_words(jobs()["base"])
    [pod] = [entry["spec"]["template"]["spec"] for entry in base() if entry["kind"] == "Deployment"]
    assert str(parsed(package, packaging).threads) == pod["containers"][0]["resources"]["requests"]["cpu"]


def test_services_rules_and_monitors_name_ports_and_labels_of_the_pods():
    objects = kustomized("overlays/cuda")
    [deployment] = [entry for entry in objects if entry["kind"] == "Deployment"]
    pod = deployment["spec"]["template"]
    ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
    labels = pod["metadata"]["labels"].items()
    for entry in objects:
        spec = entry.get("spec", {})
        if entry["kind"] == "Service":
            assert spec["selector"].items() <= labels
            assert all(ports[port["targetPort"]] == port["port"] for port in spec["ports"])
        elif entry["kind"] in ("PodDisruptionBudget", "Deployment", "PodMonitor"):
            assert spec["selector"]["matchLabels"].items() <= labels
        elif entry["kind"] == "NetworkPolicy":
            assert spec["podSelector"]["matchLabels"].items() <= labels
            assert {port["port"] for rule in spec["ingress"] for port in rule["ports"]} <= ports.keys()
        if entry["kind"] == "PodMonitor":
            assert {endpoint["port"] for endpoint in spec["podMetricsEndpoints"]} == {"metrics", "openai"}
        if entry["kind"] == "ScaledObject":
            assert spec["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
            assert "replicas" not in deployment["spec"]
            slots = parsed(package, ["engine", "--name", "m", "--output", "o"]).slots
            assert 0 < float(spec["triggers"][0]["metadata"]["threshold"]) < slots


def test_what_kserve_scales_by_is_read_from_its_pods_and_counted_of_its_pods_alone():
    """KServe labels the pods of a service with its name, and calls its Deployment NAME-predictor
    (kserve.github.io, constants InferenceServicePodLabelKey and PredictorServiceName)."""
    runtime, service, monitor = documents("kserve/moeship.yaml")
    name = service["metadata"]["name"]
    assert monitor["spec"]["selector"]["matchLabels"] == {"serving.kserve.io/inferenceservice": name}
    ports = {port["name"] for port in runtime["spec"]["containers"][0]["ports"]}
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports
    [metric] = service["spec"]["predictor"]["autoScaling"]["metrics"]
    assert metric["external"]["metric"]["query"].count(f'pod=~"{name}-predictor-.*"') == 2
