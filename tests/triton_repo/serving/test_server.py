"""Starting and stopping: ports, limits, unasked ends; nothing is left of a server afterwards."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from serve_command import PATIENCE_S, start_command, wait_until

from cli.main import main
from export.errors import MissingPackageError
from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.contracts.model_state import ModelState
from triton_repo.errors import RepositoryError, ServerError
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.processes import program as program_module
from triton_repo.serving import server as server_module
from triton_repo.serving.installation import find_installation
from triton_repo.serving.ports import Address, Ports, choose_ports, resolve_host
from triton_repo.serving.server import ServerOptions, _tail, running_server


@pytest.fixture
def small_repository(tmp_path, tiny_engine) -> Path:
    package_engine(
        PackageOptions(
            engine=tiny_engine, name="tiny", output=tmp_path / "repository", onnxruntime=ModelParameters(threads=1)
        )
    )
    return tmp_path / "repository"


@pytest.fixture
def taken_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def processes_of(group: int) -> list[psutil.Process]:
    """Living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def regions(prefix: str) -> list[Path]:
    """Shared memory of one server."""
    return list(Path("/dev/shm").glob(f"{prefix}*"))


def test_ports_in_use_are_told_together_before_anything_starts(small_repository, taken_port, monkeypatch):
    monkeypatch.setattr(server_module, "find_installation", lambda workspace: pytest.fail("it went on"))
    options = ServerOptions(repository=small_repository, ports=Ports(grpc=taken_port))
    with pytest.raises(ServerError) as caught, running_server(options):
        pass
    assert f"the grpc port {taken_port} on 127.0.0.1 cannot be used (Address already in use)" in str(caught.value)
    assert "or none to have free ones chosen" in str(caught.value)


def test_a_request_log_that_cannot_be_opened_is_told_before_the_server_starts(small_repository, tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "running_program", lambda *_: pytest.fail("it went on"))
    options = ServerOptions(repository=small_repository, request_log=tmp_path)
    with (
        pytest.raises(ServerError, match=f"opening the request log {tmp_path}: it is a folder"),
        running_server(options),
    ):
        pass


def test_impossible_ports_are_refused():
    with pytest.raises(ServerError, match="the http port is 70000, expected 1 to 65535"):
        choose_ports(Address("127.0.0.1"), Ports(http=70000))
    with pytest.raises(ServerError, match="found the same port twice: grpc 9000, metrics 9000"):
        choose_ports(Address("127.0.0.1"), Ports(grpc=9000, metrics=9000))
    with pytest.raises(ServerError, match="on 192.0.2.1 cannot be used"):
        choose_ports(Address("192.0.2.1"), Ports())


def test_the_first_and_the_last_port_can_be_asked_for():
    for port in (0, 65536):
        with pytest.raises(ServerError, match=f"the grpc port is {port}, expected 1 to 65535"):
            choose_ports(Address("127.0.0.1"), Ports(grpc=port))
    # An address of no interface: what is refused is the address, so the ports are taken as ports.
    with pytest.raises(ServerError, match="the grpc port 1 on 192.0.2.1 .*\n.*the http port 65535 on 192.0.2.1"):
        choose_ports(Address("192.0.2.1"), Ports(grpc=1, http=65535))


def test_a_port_whose_last_server_has_just_ended_is_taken():
    """The kernel keeps a port in TIME_WAIT for a minute after its server closed a connection (RFC 9293, 3.6)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            accepted.close()
            assert client.recv(1) == b""
    assert choose_ports(Address("127.0.0.1"), Ports(grpc=port)).grpc == port


def test_chosen_ports_are_below_those_of_outgoing_connections_and_not_taken(monkeypatch):
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    free = choose_ports(Address("127.0.0.1"), Ports())
    assert all(10000 <= port < first for port in (free.grpc, free.http, free.metrics))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free.grpc))
        taken.listen()
        tries = iter([[free.grpc, free.http], [free.http, free.metrics], [free.grpc]])
        monkeypatch.setattr("triton_repo.serving.ports.random.sample", lambda *_: next(tries))
        again = choose_ports(Address("127.0.0.1"), Ports())
    assert (again.grpc, again.http) == (free.http, free.metrics)
    assert again.metrics >= first  # any that is free


def test_chosen_ports_differ():
    ports = choose_ports(Address("127.0.0.1"), Ports())
    assert len({ports.grpc, ports.http, ports.metrics}) == 3


def test_a_missing_tritonserver_names_the_extra_that_brings_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("triton_repo.serving.installation.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'moeship\[server\]'"):
        find_installation(tmp_path)


def test_a_tritonserver_on_path_is_taken_first(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "tritonserver"
    program.parent.mkdir()
    (tmp_path / "backends").mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    installation = find_installation(tmp_path / "workspace")
    assert (installation.program, installation.backends) == (program, tmp_path / "backends")
    assert installation.environment()["PATH"].startswith(str(Path(sys.executable).parent))


def fake_server(tmp_path, monkeypatch, script: str) -> None:
    program = tmp_path / "bin" / "tritonserver"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_a_server_that_ends_at_once_is_told_with_its_log(small_repository, tmp_path, monkeypatch):
    fake_server(tmp_path, monkeypatch, "echo no such library; exit 3")
    with pytest.raises(ServerError) as caught, running_server(ServerOptions(repository=small_repository)):
        pass
    assert "tritonserver ended with status 3 before it was ready" in str(caught.value)
    assert "the end of its log:\n    no such library" in str(caught.value)


def test_a_server_that_takes_too_long_is_stopped_with_all_its_processes(small_repository, tmp_path, monkeypatch):
    monkeypatch.setattr(program_module, "KILL_GRACE_S", 0.2)
    monkeypatch.setattr(server_module, "DRAIN_TIMEOUT_S", 0)
    pid = tmp_path / "pid"
    fake_server(tmp_path, monkeypatch, f"trap '' TERM; echo $$ > {pid}; sleep 1000 & echo loading; wait; wait")
    with (
        pytest.raises(
            ServerError, match="still loading models after 1 s; allow more time, or look at its log"
        ) as caught,
        running_server(ServerOptions(repository=small_repository, ready_timeout_s=1)),
    ):
        pass
    assert "    loading" in str(caught.value)
    assert processes_of(int(pid.read_text())) == []


def test_no_model_at_all_is_an_error_with_the_reasons_and_nothing_is_left(small_repository, monkeypatch):
    model = small_repository / "tiny" / "1" / "model.py"
    model.write_text(model.read_text() + "\nraise RuntimeError('the dog ate it')\n")
    started = []
    plain = subprocess.Popen
    monkeypatch.setattr(
        program_module.subprocess, "Popen", lambda *a, **k: started.append(plain(*a, **k)) or started[-1]
    )
    with pytest.raises(ServerError) as caught, running_server(ServerOptions(repository=small_repository)):
        pass
    assert "no model is ready" in str(caught.value)
    assert "tiny is UNAVAILABLE" in str(caught.value)
    assert "the dog ate it" in str(caught.value)
    assert caught.value.exit_status == 2
    assert processes_of(started[0].pid) == []


def test_an_error_of_ours_that_keeps_a_model_from_loading_is_told_without_a_stack(small_repository):
    data = small_repository / "tiny" / "1" / "engine" / "model.onnx.data"
    size, content = data.stat().st_size, data.read_bytes()
    data.unlink()  # it may be a link to another test's
    data.write_bytes(content[:1000])
    with pytest.raises(ServerError) as caught, running_server(ServerOptions(repository=small_repository)):
        pass
    told = str(caught.value)
    assert "  - tiny is UNAVAILABLE: opening the engine " in told
    assert told.endswith(f"  - model.onnx.data: found 1000 bytes, expected {size}")


@pytest.mark.parametrize(
    ("reason", "own", "words"),
    [
        (
            "Internal: EngineError: opening x: bad; build it\n\nAt:\n  engine.py(3): f\n",
            "opening x: bad; build it",
            None,
        ),
        ("Internal: RuntimeError: the dog ate it\n\nAt:\n  model.py(3): f\n", None, "RuntimeError: the dog ate it"),
        ("Internal: EngineError: cut", None, "EngineError: cut"),
        ("unloaded", None, "unloaded"),
        ("", None, ""),
    ],
)
def test_reasons_are_told_without_status_and_stack(reason, own, words):
    state = ModelState(name="tiny", version="1", state="UNAVAILABLE", reason=reason)
    assert state.own_words == own
    assert state.words == (own or words)
    assert str(state) == f"tiny version 1 UNAVAILABLE{f' ({state.words})' if reason else ''}"


def test_nothing_is_left_when_the_block_ends_even_with_an_error(small_repository):
    seen = {}

    def fail_while_serving() -> None:
        with running_server(ServerOptions(repository=small_repository)) as server:
            seen["group"] = server.process.pid
            assert len(processes_of(server.process.pid)) >= 2  # the server and the model's stub
            [setting] = [word for word in server.process.args if "shm-region-prefix-name=" in word]
            seen["prefix"] = setting.rpartition("=")[2]
            assert regions(seen["prefix"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_while_serving()
    assert processes_of(seen["group"]) == []
    assert not regions(seen["prefix"])


def test_the_memory_of_a_killed_server_is_given_back(small_repository):
    with running_server(ServerOptions(repository=small_repository)) as server:
        os.killpg(server.process.pid, signal.SIGKILL)
        assert wait_until(lambda: not processes_of(server.process.pid))
        [setting] = [word for word in server.process.args if "shm-region-prefix-name=" in word]
        assert regions(setting.rpartition("=")[2])
    assert not regions(setting.rpartition("=")[2])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_command_stops_on_a_signal_and_leaves_no_process(small_repository, number):
    command, ready = start_command(small_repository)
    with urllib.request.urlopen(f"{ready['http']}/v2/health/ready", timeout=PATIENCE_S) as response:
        assert response.status == 200
    assert [(model["name"], model["state"]) for model in ready["models"]] == [("tiny", "READY")]
    command.send_signal(number)
    _, errors = command.communicate(timeout=PATIENCE_S)
    assert command.returncode == 0, errors
    assert processes_of(ready["pid"]) == []


def test_a_module_in_the_callers_folder_does_not_stand_in_for_a_library(small_repository, tmp_path, monkeypatch):
    (tmp_path / "tokenizers.py").write_text("raise SystemExit('not the library')")
    monkeypatch.chdir(tmp_path)
    with running_server(ServerOptions(repository=Path("repository"))) as server:
        assert [(model.name, model.ready) for model in server.models] == [("tiny", True)]
        [stub] = [p for p in processes_of(server.process.pid) if "stub" in p.name()]
        assert Path(stub.cwd()) == Path(server_module.__file__).parents[2]


def test_hidden_folders_are_no_models(small_repository):
    (small_repository / ".git").mkdir()
    with running_server(ServerOptions(repository=small_repository)) as server:
        assert [model.name for model in server.models] == ["tiny"]


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_time_limit_that_never_comes_is_refused(small_repository, seconds):
    options = ServerOptions(repository=small_repository, ready_timeout_s=seconds)
    with pytest.raises(ServerError, match="the ready timeout is .* expected a finite number above 0"):
        running_server(options).__enter__()


def test_a_log_that_cannot_be_opened_is_named(small_repository, tmp_path):
    options = ServerOptions(repository=small_repository, log=tmp_path / "absent" / "server.log")
    with pytest.raises(ServerError, match=r"opening the server's log .*server.log: No such file or directory"):
        running_server(options).__enter__()


@pytest.mark.parametrize("host", ["", "no such host", "127.0.0.1.2", "x" * 70, "fe80::1%lo", "127.0.0.1:8000"])
def test_a_host_that_is_no_address_of_this_machine_is_told_once(host):
    with pytest.raises(ServerError, match="choosing ports: .*; give .*127.0.0.1|IPv6 address of one link") as caught:
        resolve_host(host)
    assert str(caught.value).count("127.0.0.1") <= 1 + host.count("127.0.0.1")


@pytest.mark.parametrize(
    ("host", "url", "asked"),
    [
        ("localhost", "127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "0.0.0.0", "127.0.0.1"),
        ("::1", "[::1]", "[::1]"),
        ("::", "[::]", "[::1]"),
    ],
)
def test_a_host_is_resolved_to_an_address(host, url, asked):
    address = resolve_host(host)
    assert (address.in_url, address.to_ask.in_url) == (url, asked)
    assert address.is_loopback == (host not in ("0.0.0.0", "::"))


def test_a_killed_command_takes_its_server_along(small_repository):
    command, ready = start_command(small_repository)
    command.kill()
    command.communicate(timeout=PATIENCE_S)
    assert wait_until(lambda: not processes_of(ready["pid"]))


def test_a_server_that_ends_unasked_ends_the_command_with_its_log(small_repository):
    command, ready = start_command(small_repository, "--no-restart")
    os.kill(ready["pid"], signal.SIGKILL)
    _, errors = command.communicate(timeout=PATIENCE_S)
    assert command.returncode == 2
    assert "tritonserver ended with status -9 (SIGKILL)" in errors
    assert "the end of its log" in errors
    assert processes_of(ready["pid"]) == []


def test_the_log_goes_to_the_file_that_was_named(small_repository, tmp_path):
    with running_server(ServerOptions(repository=small_repository, log=tmp_path / "server.log")):
        pass
    assert "tiny_0_0: " in (tmp_path / "server.log").read_text()


def test_the_command_refuses_what_is_no_repository(tmp_path, capsys):
    assert main(["serve", str(tmp_path)]) == 2
    assert f"RepositoryError: serving {tmp_path}: found no model" in capsys.readouterr().err
    with pytest.raises(RepositoryError), running_server(ServerOptions(repository=tmp_path / "none")):
        pass


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--world-size", "2"], "2 ranks were asked for, and no model here runs an engine of TensorRT-LLM"),
        (["--multi-model"], "an orchestrator was asked for, and no model here runs an engine of TensorRT-LLM"),
    ],
)
def test_ranks_are_refused_where_no_model_has_any(small_repository, capsys, words, problem):
    assert main(["serve", str(small_repository), *words]) == 2
    assert problem in capsys.readouterr().err


def test_the_steps_of_an_ensemble_alone_are_no_model_that_is_ready(small_repository):
    front = small_repository / "front"
    (front / "1").mkdir(parents=True)
    (front / "config.pbtxt").write_text(
        'name: "front" platform: "ensemble" max_batch_size: 1 '
        'input { name: "text_input" data_type: TYPE_STRING dims: 1 } '
        'output { name: "text_output" data_type: TYPE_STRING dims: 1 } '
        'ensemble_scheduling { step { model_name: "tiny" model_version: -1 '
        'input_map { key: "no_such_input" value: "text_input" } '
        'output_map { key: "text_output" value: "text_output" } } }'
    )
    with pytest.raises(ServerError) as caught, running_server(ServerOptions(repository=small_repository)):
        pass
    assert "no model is ready" in str(caught.value)
    # Triton gives no reason for an ensemble.
    assert "front is UNAVAILABLE\n" in str(caught.value)


def test_the_end_of_a_log_is_read_without_the_rest(tmp_path):
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.seek(1 << 30)  # of a sparse file
        file.write(b"\nthe cause\nthe end\n")
    assert _tail(log).endswith("\n    the cause\n    the end")
    log.unlink()
    assert _tail(log) == ""
    log.touch()
    assert _tail(log) == ""
