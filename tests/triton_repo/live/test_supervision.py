"""A real Triton whose processes are killed, stopped and robbed of their files under `moeship serve`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from serve_command import PATIENCE_S, start_command, wait_until

from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.errors import ServerError
from triton_repo.packaging.package import ENSEMBLE, SINGLE, PackageOptions, package_engine
from triton_repo.serving import server as server_module
from triton_repo.serving.installation import find_installation
from triton_repo.serving.readiness import model_of
from triton_repo.serving.server import ServerOptions, running_server

SEEN_S, SERVED_S = 10, 40  # the bars
NAME = "tiny"


@pytest.fixture
def package(tmp_path, tiny_engine):
    """Packages the engine in a layout; the folder of a command's temporary files is the repository's parent."""

    def make(layout: str, folder: Path = tmp_path, *, copy: bool = False) -> Path:
        options = PackageOptions(
            engine=tiny_engine,
            name=NAME,
            output=folder / "repository",
            onnxruntime=ModelParameters(threads=1),
            layout=layout,
            copy=copy,
        )
        package_engine(options)
        return folder / "repository"

    return make


@pytest.fixture
def start():
    """Starts commands as `start_command` does; ends those that a failing test left."""
    commands = []

    def start_one(repository: Path, *words: str) -> tuple[subprocess.Popen, dict]:
        command, ready = start_command(repository, *words)
        commands.append(command)
        return command, ready

    yield start_one
    for command in commands:
        with command:
            if command.poll() is None:
                command.terminate()


def stubs(server: int) -> dict[str, psutil.Process]:
    """The models' processes of a server by model."""
    return {name: child for child in psutil.Process(server).children() if (name := model_of(child.cmdline()))}


def is_ready(http: str) -> bool:
    try:
        with urllib.request.urlopen(f"{http}/v2/health/ready", timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


def ask(http: str, max_tokens: int = 4) -> dict:
    body = json.dumps({"text_input": "def main(", "max_tokens": max_tokens}).encode()
    request = urllib.request.Request(f"{http}/v2/models/{NAME}/generate", data=body)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        return json.load(response)


def lines_of(command: subprocess.Popen) -> list[str]:
    """What the command says on stderr, as it comes."""
    lines: list[str] = []
    threading.Thread(target=lambda: lines.extend(command.stderr), daemon=True).start()
    return lines


@pytest.mark.parametrize("layout", [SINGLE, ENSEMBLE])
def test_a_killed_model_and_a_stopped_server_are_served_again_on_the_same_ports(start, package, tmp_path, layout):
    command, ready = start(package(layout))
    model, process = next(iter(stubs(ready["pid"]).items()))
    process.kill()
    began = time.monotonic()
    assert wait_until(lambda: not is_ready(ready["http"]))
    assert time.monotonic() - began < SEEN_S
    failed, again = (json.loads(command.stdout.readline()) for _ in range(2))
    assert time.monotonic() - began < SERVED_S
    assert (failed["event"], failed["restart"]) == ("failed", 1)
    assert failed["reason"] == f"the Python process of the model {model} (pid {process.pid}) has ended"
    assert again == {**ready, "event": "ready", "restarts": 1, "pid": again["pid"]}
    assert ask(ready["http"])["text_output"]

    os.kill(again["pid"], signal.SIGSTOP)
    began = time.monotonic()
    failed, again = (json.loads(command.stdout.readline()) for _ in range(2))
    assert time.monotonic() - began < SERVED_S
    assert f"tritonserver (pid {failed['reason'].split()[2][:-1]}) is stopped" in failed["reason"]
    assert ask(ready["http"])["text_output"]

    command.terminate()
    _, errors = command.communicate(timeout=PATIENCE_S)
    assert command.returncode == 0
    assert len([line for line in errors.splitlines() if "is ended, and started again in" in line]) == 2
    assert not list(tmp_path.glob("moeship-serve-*"))


def test_a_second_request_to_stop_ends_at_once(start, package, tmp_path):
    command, ready = start(package(SINGLE))
    os.kill(next(iter(stubs(ready["pid"]).values())).pid, signal.SIGSTOP)  # it would never say that it drains
    command.terminate()
    time.sleep(0.5)
    began = time.monotonic()
    command.terminate()
    command.communicate(timeout=PATIENCE_S)
    assert time.monotonic() - began < SEEN_S
    assert command.returncode == 0
    assert not psutil.pid_exists(ready["pid"])
    assert not list(tmp_path.glob("moeship-serve-*"))


def test_a_data_file_that_is_cut_under_a_running_server_ends_it_and_is_named(start, package):
    repository = package(SINGLE, copy=True)
    command, ready = start(repository)
    assert ask(ready["http"])["text_output"]
    os.truncate(repository / NAME / "1" / "engine" / "model.onnx.data", 4096)
    began = time.monotonic()
    with pytest.raises(OSError):
        ask(ready["http"])
    _, errors = command.communicate(timeout=PATIENCE_S)
    assert time.monotonic() - began < SEEN_S
    assert command.returncode == 2
    assert "an engine's files are damaged" in errors
    assert "model.onnx.data: found 4096 bytes" in errors


def test_weights_that_are_replaced_do_not_show_and_weights_that_are_written_over_end_the_server(start, package):
    repository = package(SINGLE, copy=True)
    command, ready = start(repository)
    data, kept = repository / NAME / "1" / "engine" / "model.onnx.data", repository.parent / "kept"
    right = ask(ready["http"], 40)["text_output"]
    kept.hardlink_to(data)
    other = repository.parent / "other"
    other.write_bytes(data.read_bytes()[::-1])
    other.replace(data)
    time.sleep(1)  # two looks
    assert ask(ready["http"], 40)["text_output"] == right

    with kept.open("r+b") as file:  # what the server has in memory
        file.write(data.read_bytes())
    try:
        refusal = json.dumps(ask(ready["http"], 40))
    except urllib.error.HTTPError as error:
        with error:
            refusal = error.read().decode()
    except OSError as error:  # it has been ended
        refusal = str(error)
    assert right not in refusal
    assert "text_output" not in refusal
    _, errors = command.communicate(timeout=PATIENCE_S)
    assert command.returncode == 2
    assert "model.onnx.data was written to while it was in use" in errors
    assert "an engine's files are damaged" in errors


def test_a_killed_command_leaves_nothing_after_the_next_start_even_of_a_stopped_server(start, package, tmp_path):
    repository = package(SINGLE)
    command, ready = start(repository)
    [stub] = stubs(ready["pid"]).values()
    os.kill(ready["pid"], signal.SIGSTOP)  # it cannot follow the request to end
    command.kill()
    command.communicate(timeout=PATIENCE_S)
    [left] = tmp_path.glob("moeship-serve-*")
    next_command, _ = start(repository)
    assert not left.exists()
    assert wait_until(lambda: not psutil.pid_exists(ready["pid"]) and not psutil.pid_exists(stub.pid))
    next_command.terminate()
    next_command.communicate(timeout=PATIENCE_S)
    assert not list(tmp_path.glob("moeship-serve-*"))


@pytest.mark.parametrize("layout", [SINGLE, ENSEMBLE])
def test_a_repository_is_served_whatever_its_path(package, tmp_path, layout):
    odd = tmp_path / "a b'c\"d;e$HOME&ä(日)"
    odd.mkdir()
    with running_server(ServerOptions(repository=package(layout, odd))) as server:
        assert all(model.ready for model in server.models)
        assert ask(server.http_url)["text_output"]


def test_a_temporary_folder_of_an_odd_path_is_passed_over(package, tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a b"))
    with running_server(ServerOptions(repository=package(SINGLE))) as server:
        assert server.models[0].ready
        assert not list((tmp_path / "a b").iterdir())


def test_a_model_whose_process_does_not_start_ends_the_wait_at_once(package, monkeypatch):
    def without_stub(workspace: Path):
        installation = find_installation(workspace)
        stub = installation.backends / "python" / "triton_python_backend_stub"
        stub.unlink()
        stub.symlink_to("/bin/false")
        return installation

    monkeypatch.setattr(server_module, "find_installation", without_stub)
    began = time.monotonic()
    with pytest.raises(ServerError) as caught, running_server(ServerOptions(repository=package(SINGLE))):
        pass
    assert "ended while it was loading, and tritonserver waits for it without end" in str(caught.value)
    assert "the end of its log" in str(caught.value)
    assert time.monotonic() - began < SERVED_S


def test_http_can_be_off(start, package):
    repository = package(SINGLE)
    command, ready = start(repository, "--no-http", "--host", "localhost")
    assert ready["http"] is None
    assert ready["grpc"].startswith("127.0.0.1:")
    ports = {c.laddr.port for c in psutil.Process(ready["pid"]).net_connections("tcp") if c.status == "LISTEN"}
    assert ports == {int(url.split(":")[-1].split("/")[0]) for url in (ready["grpc"], ready["metrics"])}
    next(iter(stubs(ready["pid"]).values())).kill()
    failed, again = (json.loads(command.stdout.readline()) for _ in range(2))
    assert (failed["event"], again["event"], again["http"]) == ("failed", "ready", None)
    command.terminate()
    command.communicate(timeout=PATIENCE_S)
    assert command.returncode == 0


def test_an_ipv6_address_is_served(package):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with running_server(ServerOptions(repository=package(SINGLE), host="::1")) as server:
        assert server.grpc_url.startswith("[::1]:")
        assert ask(server.http_url)["text_output"]


@pytest.mark.parametrize(
    "path", ["v2/systemsharedmemory/status", "v2/cudasharedmemory/status", "v2/trace/setting", "v2/logging"]
)
def test_what_only_an_administrator_needs_asks_for_a_header(served_phixtral, path):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{served_phixtral.http_url}/{path}", timeout=PATIENCE_S)
    with caught.value:
        assert caught.value.code == 403


def test_what_only_an_administrator_needs_is_restricted_over_grpc_too(served_phixtral):
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    with InferenceServerClient(served_phixtral.grpc_url) as client:
        for call in (
            client.get_system_shared_memory_status, client.get_cuda_shared_memory_status, client.get_trace_settings,
            client.get_log_settings, lambda: client.register_system_shared_memory("a", "/moeship", 8),
        ):  # fmt: skip
            with pytest.raises(InferenceServerException, match="restricted"):
                call()
        assert client.get_inference_statistics()
        assert client.get_model_repository_index()


def test_no_other_user_can_read_what_a_server_makes(package):
    with running_server(ServerOptions(repository=package(SINGLE))) as server:
        regions = list(Path("/dev/shm").glob(f"{server.mark}*"))
        assert regions
        for path in (*regions, server.heartbeats.parent, server.heartbeats, *server.heartbeats.iterdir()):
            assert path.stat().st_mode & 0o077 == 0, path


def test_a_server_with_known_holes_is_not_exposed_unless_that_is_accepted(start, package):
    repository = package(SINGLE)
    refused = subprocess.run(
        [sys.executable, "-m", "cli.main", "serve", str(repository), "--host", "0.0.0.0"],
        capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "listening on 0.0.0.0 with tritonserver 2.51.0, which has known holes" in refused.stderr
    for words in ("CVE-2025-23310", "CVE-2025-23319", "tritonserver:25.07-py3", "--accept-known-vulnerabilities"):
        assert words in refused.stderr
    command, ready = start(repository, "--host", "0.0.0.0", "--accept-known-vulnerabilities")
    errors = lines_of(command)
    assert ready["grpc"].startswith("0.0.0.0:")
    assert is_ready(ready["http"])
    command.terminate()
    assert command.wait(PATIENCE_S) == 0
    assert wait_until(lambda: any("CVE-2025-23310" in line for line in errors))
