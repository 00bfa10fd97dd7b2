"""Every server of deploy/ is started with words that `serve` takes, and its ports, probes and times are those of the
server that they start. ci/check_deploy.sh has the tools' own validators."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from deployed import (
    DEPLOY,
    ROOT,
    SERVERS,
    Deployed,
    RefusedError,
    base_images,
    commands_of,
    compose,
    documents,
    of_compose,
    parsed,
    tasks,
)

from cli import gateway, serve
from clients.gateway.app import create_app
from clients.gateway.settings import Settings
from triton_repo.processes.program import DRAIN_TIMEOUT_S, KILL_GRACE_S
from triton_repo.serving.server import END_TIMEOUT_S, SETTLE_S
from triton_repo.supervision import companion
from triton_repo.supervision.watch import Limits

# From SIGTERM on, beside the drain: what was not drained ends; the server ends, or is killed, and what is left of it is
# killed; the gateway ends, or is killed.
AFTER_DRAIN_S = END_TIMEOUT_S + SETTLE_S + DRAIN_TIMEOUT_S + 2 * KILL_GRACE_S + 2 * companion.END_TIMEOUT_S


@pytest.fixture(params=SERVERS)
def server(request) -> Deployed:
    return SERVERS[request.param]()


def test_a_server_is_asked_to_listen_beyond_its_container_on_the_ports_that_are_named(server):
    options = server.options
    assert options.host == "0.0.0.0"
    assert not options.no_http
    listening = [options.grpc_port, options.http_port, options.metrics_port, options.openai_port]
    assert {port for port in listening if port is not None} == server.ports
    assert len(server.ports) == sum(port is not None for port in listening)


def test_probes_ask_for_paths_that_exist_on_the_ports_that_have_them(server):
    """Triton's are those that `serve` itself asks for (triton_repo/serving/health.py), and KServe's protocol names."""
    options = server.options
    of_gateway = create_app(Settings(tritons=("127.0.0.1:8001",))).url_path_for("health")
    paths = {options.http_port: {"/v2/health/live", "/v2/health/ready"}, options.openai_port: {of_gateway}}
    for name, probe in server.probes.items():
        asked = probe["httpGet"]
        named = {"http": options.http_port, "openai": options.openai_port}
        assert asked["path"] in paths[named.get(asked["port"], asked["port"])], name
    # Readiness needs a model; liveness does not, as a server that loads one must not be ended for that.
    assert server.probes["readiness"]["httpGet"]["path"] in ("/health", "/v2/health/ready")
    if "liveness" in server.probes:
        assert server.probes["liveness"]["httpGet"]["path"] == "/v2/health/live"


def test_a_probe_begins_at_once_and_ends_before_the_next_one(server):
    """The startup probe waits for the models, so the others wait for nothing; an answer that comes later than the next
    question says nothing of the time between."""
    for name, probe in server.probes.items():
        assert "initialDelaySeconds" not in probe, name
        if "timeoutSeconds" in probe:
            assert probe["timeoutSeconds"] <= probe["periodSeconds"], name


def test_a_server_has_the_time_to_load_its_models(server):
    options, probe = server.options, server.probes["startup"]
    needed = options.ready_timeout + (companion.READY_TIMEOUT_S if options.openai_port else 0)
    assert probe["periodSeconds"] * probe["failureThreshold"] >= needed


def test_a_server_that_hangs_is_named_by_serve_before_a_probe_has_it_ended(server):
    if "liveness" not in server.probes:
        return  # Compose ends nothing for its health
    probe = server.probes["liveness"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > max(Limits().beat, Limits().liveness)
    assert server.options.no_restart  # one supervisor: Kubernetes


def test_a_server_has_the_time_to_drain(server):
    assert server.grace_s >= server.pause_s + server.options.drain_timeout + AFTER_DRAIN_S


def test_kserve_and_kubernetes_pause_before_the_drain():
    """A server that drains says that it is ready, and refuses: proxies must have learnt of its end before."""
    assert all(SERVERS[name]().pause_s >= 5 for name in ("base", "kserve"))


@pytest.mark.parametrize("page", ["deploying", "operations"])
def test_pages_have_the_time_after_the_drain(page):
    text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    assert f"{AFTER_DRAIN_S:g} s at worst" in text


def test_the_server_of_compose_gives_up_its_keys_file_by_the_path_of_the_secret():
    assert of_compose().options.api_keys == Path("/run/secrets", *compose()["server"]["secrets"])


def test_prometheus_reads_the_ports_that_the_server_has_under_the_name_that_the_alerts_have():
    [config] = documents("compose/prometheus.yml")
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    options = of_compose().options
    assert targets == {
        "moeship": [f"server:{options.metrics_port}"],
        "moeship-gateway": [f"server:{options.openai_port}"],
    }
    assert 'up{job="moeship"}' in (DEPLOY / "prometheus" / "moeship.rules.yml").read_text("utf-8")


def test_skyserve_probes_the_gateway_that_its_task_starts():
    task, service = tasks()
    lines = [shlex.split(line.removesuffix("&")) for line in commands_of(service["run"]) if "bin/moeship " in line]
    found = {words[1]: words[2:] for words in lines}
    served, asked = parsed(serve, found["serve"]), parsed(gateway, found["gateway"])
    assert served.host == "127.0.0.1"
    assert asked.triton == [f"127.0.0.1:{served.grpc_port}"]
    assert (asked.host, asked.port) == ("0.0.0.0", service["resources"]["ports"])
    assert asked.api_keys is not None
    probe = service["service"]["readiness_probe"]
    assert probe["path"] == "/health"
    assert probe["initial_delay_seconds"] > served.ready_timeout
    assert service["resources"]["image_id"] == f"docker:{base_images()['triton-cpu']}"
    assert task["resources"]["image_id"] == f"docker:{base_images()['wheel']}"
    assert task["file_mounts"]["/models"]["name"] == service["file_mounts"]["/models"]["name"]


@pytest.mark.parametrize("words", [["repository", "--drain-timout=3"], ["--host=0.0.0.0"]])
def test_a_command_that_serve_would_refuse_is_refused_here(words):
    with pytest.raises(RefusedError):
        parsed(serve, words)
