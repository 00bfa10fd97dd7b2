"""What is dead, what hangs, and what is only busy: a server that is nothing but processes, heartbeats and a port."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from serve_command import wait_until

from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.contracts.model_state import ModelState
from triton_repo.errors import RepositoryError, ServerError
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.processes.heartbeat import FOLDER_VARIABLE, read_beats
from triton_repo.processes.program import MARK_VARIABLE, read_process
from triton_repo.serving import readiness
from triton_repo.serving.health import HealthEndpoint
from triton_repo.serving.ports import Address, ChosenPorts
from triton_repo.serving.readiness import NotReady, Waiting, wait_until_ready
from triton_repo.serving.server import Server, ServerOptions
from triton_repo.supervision import supervisor
from triton_repo.supervision.supervisor import RestartPolicy, supervise
from triton_repo.supervision.watch import Limits, Watch
from trt_build.ort.mapped_file import MappedFile

LIMITS = Limits(interval=0.05, stopped=0.5, beat=3.0, step=3.0, liveness=3.0)
# Stands for Triton's: starts the model's process under the name of Triton's stub, and one that a library might start.
PROGRAM = """
import subprocess, sys, time
subprocess.Popen(["/x/triton_python_backend_stub", sys.argv[1]], executable=sys.executable)
subprocess.Popen(["sleep", "0.5"]).wait()
time.sleep(1000)
"""
# Each is one step of an engine. The last holds the interpreter's lock, which no computation of an engine does.
STEPS = {
    "computes": "import hashlib\nwhile True: hashlib.sha256(bytes(200_000_000))",
    "sleeps": "import time\ntime.sleep(1000)",
    "steps": "import time\nwhile True: heartbeat.step(); time.sleep(0.5)",
    "stuck": "import time\nheartbeat.step()\ntime.sleep(1000)",
    "hangs": "import ctypes, time\ntime.sleep(1)\nctypes.PyDLL(None).sleep(1000)",
}
MODEL = """
import sys
sys.path.insert(0, {root!r})
from triton_repo.processes.heartbeat import Heartbeat
heartbeat = Heartbeat.start("tiny", "tiny_0_0")
heartbeat.report(running=1, waiting=100)
{step}
"""


LOADED = ModelState(name="tiny", version="1", state="READY", reason="")


class Live(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Live) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield HealthEndpoint(http=f"http://127.0.0.1:{listener.server_port}", grpc="")
        listener.shutdown()


@pytest.fixture
def serving(tmp_path, endpoint):
    """Starts a server whose model does a step; gives the server and the pid of the model's process."""
    mark = f"moeship_{secrets.token_hex(8)}_"

    def start(step: str, endpoint: HealthEndpoint = endpoint) -> tuple[Server, int]:
        path = tmp_path / "repository" / "tiny" / "1" / "model.py"
        path.parent.mkdir(parents=True)
        path.write_text(MODEL.format(root=str(Path(__file__).parents[3]), step=STEPS[step]))
        (tmp_path / "beats").mkdir()
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(path)],
            env={**os.environ, MARK_VARIABLE: mark, FOLDER_VARIABLE: str(tmp_path / "beats")},
            start_new_session=True,
        )
        assert wait_until(lambda: read_beats(tmp_path / "beats"))
        server = Server(
            grpc_url="", http_url=None, metrics_url="", models=(LOADED,), process=process, program="tritonserver",
            world_size=1, log=None, mark=mark, heartbeats=tmp_path / "beats", endpoint=endpoint,
        )  # fmt: skip
        started.append(server)
        return server, read_beats(tmp_path / "beats")[0].pid

    started: list[Server] = []
    yield start
    for server in started:
        server.kill()


@pytest.mark.parametrize("step", ["computes", "steps"])
def test_a_busy_model_is_not_taken_for_one_that_hangs(serving, step):
    server, _ = serving(step)
    watch = Watch(server, LIMITS)
    looking = time.monotonic() + 2 * LIMITS.beat
    while time.monotonic() < looking:
        assert watch.look() is None
        time.sleep(LIMITS.interval)


def test_an_engine_that_ends_no_step_is_named(serving):
    server, pid = serving("stuck")
    assert re.fullmatch(
        rf"the engine of the model tiny \(pid {pid}\) hangs: it has requests, and has ended no step for [34] s",
        Watch(server, LIMITS).wait(),
    )


def test_weights_that_somebody_wrote_into_are_named(serving, tmp_path):
    server, _ = serving("steps")
    path = tmp_path / "model.onnx.data"
    path.write_bytes(bytes(100))
    os.utime(path, ns=(0, 0))  # not written within the same tick of the kernel's clock
    watch = Watch(server, LIMITS, [MappedFile(path)])
    assert watch.look() is None
    with path.open("r+b") as file:
        file.write(b"x")
    assert "model.onnx.data was written to while it was in use" in watch.wait()


def test_a_killed_model_is_named_with_its_process(serving):
    server, pid = serving("sleeps")
    watch = Watch(server, LIMITS)
    assert watch.look() is None
    os.kill(pid, signal.SIGKILL)
    assert watch.wait() == f"the Python process of the model tiny (pid {pid}) has ended"


def test_a_model_that_died_before_the_first_look_is_seen(serving):
    server, pid = serving("sleeps")
    os.kill(pid, signal.SIGKILL)
    assert Watch(server, LIMITS).wait() == f"the Python process of the model tiny (pid {pid}) has ended"


def test_a_killed_server_is_told_with_its_signal(serving):
    server, _ = serving("sleeps")
    watch = Watch(server, LIMITS)
    server.process.kill()
    assert watch.wait() == "tritonserver ended with status -9 (SIGKILL)"


def test_a_server_that_is_killed_between_two_questions_is_told_with_its_signal(serving, monkeypatch):
    server, _ = serving("sleeps")
    watch = Watch(server, LIMITS)
    wait, asked = server.process.wait, []

    def wait_and_kill(timeout):
        asked.append(timeout)
        try:
            return wait(timeout)
        finally:
            if len(asked) == 1:
                os.kill(server.process.pid, signal.SIGKILL)
                os.waitid(os.P_PID, server.process.pid, os.WEXITED | os.WNOWAIT)

    monkeypatch.setattr(server.process, "wait", wait_and_kill)
    assert watch.look() == "tritonserver ended with status -9 (SIGKILL)"
    assert len(asked) == 2


def test_a_server_whose_models_are_gone_just_before_it_is_told_as_what_ended(serving):
    server, pid = serving("sleeps")
    watch = Watch(server, LIMITS)
    os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: (found := read_process(pid)) is None or found.has_ended)
    threading.Timer(0.1, server.process.kill).start()
    assert watch.look() == "tritonserver ended with status -9 (SIGKILL)"


@pytest.mark.parametrize("which", ["model", "server"])
def test_a_stopped_process_is_a_fault_after_a_while_and_none_when_it_goes_on(serving, which):
    server, pid = serving("sleeps")
    pid = pid if which == "model" else server.process.pid
    watch = Watch(server, LIMITS)
    os.kill(pid, signal.SIGSTOP)
    assert watch.look() is None
    os.kill(pid, signal.SIGCONT)
    time.sleep(LIMITS.stopped)
    assert watch.look() is None
    os.kill(pid, signal.SIGSTOP)
    assert f"(pid {pid}) is stopped" in watch.wait()


def test_a_model_that_holds_the_interpreters_lock_hangs(serving):
    server, pid = serving("hangs")
    fault = Watch(server, LIMITS).wait()
    assert fault.startswith(f"the model tiny (pid {pid}) hangs: no heartbeat for ")


def test_a_server_that_accepts_connections_and_says_nothing_hangs(serving):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        server, _ = serving("sleeps", HealthEndpoint(http=f"http://127.0.0.1:{deaf.getsockname()[1]}", grpc=""))
        assert Watch(server, LIMITS).wait().startswith("tritonserver hangs: it has not answered its liveness for ")


class Told:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.events = []

    def ready(self, server, restarts):
        self.events.append(("ready", restarts))

    def failed(self, fault, restart, pause_s):
        self.events.append((fault, restart, pause_s))

    def draining(self, timeout_s):
        self.events.append(("draining", timeout_s))


class Failing:
    """Stands for a Preparation and its servers, each of which lives so long and fails for the reason; None drains."""

    models: tuple[ModelState, ...] = (LOADED,)

    def __init__(self, lives, repository):
        self.lives, self.repository, self.killed, self.drained = iter(lives), repository, 0, []
        self.told_restarts = []

    @contextlib.contextmanager
    def started(self, restarts):
        self.told_restarts.append(restarts)
        self.seconds, self.fault = next(self.lives)
        if self.seconds is None:
            raise ServerError(f"serving {self.repository}: {self.fault}\n  its log")
        yield self

    def log_tail(self):
        return "\n  its log"

    def kill(self):
        self.killed += 1

    def drain(self, timeout_s):
        self.drained.append(timeout_s)
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time that only sleeping and serving take."""
    now = [0.0]
    monkeypatch.setattr(supervisor.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def life(monkeypatch, clock, tmp_path):
    """Supervises servers with these lives; gives what was told, what was raised, and the preparation."""
    (tmp_path / "another" / "1").mkdir(parents=True)
    (tmp_path / "another" / "config.pbtxt").write_text('backend: "onnxruntime"')

    def live(*lives, policy=None, repository=tmp_path):
        preparation, told = Failing(lives, repository), Told()
        monkeypatch.setattr(supervisor, "prepared", lambda options: contextlib.nullcontext(preparation))

        class FakeWatch:
            def __init__(self, server, limits, weights):
                self.server = server

            def wait(self):
                clock[0] += self.server.seconds
                if self.server.fault is None:
                    raise KeyboardInterrupt
                return self.server.fault

        monkeypatch.setattr(supervisor, "Watch", FakeWatch)
        with pytest.raises((ServerError, RepositoryError, KeyboardInterrupt)) as caught:
            supervise(ServerOptions(repository=repository, drain_timeout_s=7), policy or RestartPolicy(), told)
        return told.events, caught.value, preparation

    return live


def test_pauses_grow_and_after_the_last_restart_it_ends_with_the_reason_and_the_log(life, tmp_path):
    events, error, preparation = life(*[(1, "a fault")] * 4, policy=RestartPolicy(max_restarts=3))
    assert events == [
        ("ready", 0), ("a fault", 1, 1.0),
        ("ready", 1), ("a fault", 2, 2.0),
        ("ready", 2), ("a fault", 3, 4.0),
        ("ready", 3),
    ]  # fmt: skip
    assert str(error) == (
        f"serving {tmp_path}: a fault; it was started again 3 times and will not be started again\n  its log"
    )
    assert error.exit_status == 2
    assert preparation.killed == 4


def test_pauses_have_a_longest():
    assert [RestartPolicy().pause_s(restart) for restart in (1, 5, 6, 2000)] == [1.0, 16.0, 30.0, 30.0]


def test_the_count_begins_anew_after_a_time_of_health(life):
    events, _, preparation = life((1, "a"), (299, "b"), (300, "c"), (1, "d"), (1, None))
    assert [event for event in events if event[0] != "ready"] == [
        ("a", 1, 1.0), ("b", 2, 2.0), ("c", 1, 1.0), ("d", 2, 2.0), ("draining", 7),
    ]  # fmt: skip
    # The models are told of all restarts, for a metric that never falls.
    assert preparation.told_restarts == [0, 1, 2, 3, 4]


def test_a_restart_that_does_not_come_up_counts_and_the_first_start_is_its_own_error(life, tmp_path):
    events, error, _ = life((1, "a"), (None, "a port is taken"), (1, None))
    assert events == [("ready", 0), ("a", 1, 1.0), ("a port is taken", 2, 2.0), ("ready", 2), ("draining", 7)]
    assert isinstance(error, KeyboardInterrupt)
    events, error, _ = life((None, "a port is taken"))
    assert events == []
    assert str(error) == f"serving {tmp_path}: a port is taken\n  its log"


def test_an_interrupt_drains_and_kills_nothing(life):
    _, error, preparation = life((1, None))
    assert isinstance(error, KeyboardInterrupt)
    assert (preparation.drained, preparation.killed) == ([7], 0)


@pytest.mark.parametrize("max_restarts", [0, 5])
def test_damaged_files_are_named_and_nothing_is_started_again(life, tmp_path, tiny_engine, max_restarts):
    repository = tmp_path / "repository"
    package_engine(
        PackageOptions(
            engine=tiny_engine, name="tiny", output=repository, onnxruntime=ModelParameters(threads=1), copy=True
        )
    )
    data = repository / "tiny" / "1" / "engine" / "model.onnx.data"
    os.utime(data)  # its digest is then computed, and is right
    events, _, _ = life((1, "a"), (1, None), policy=RestartPolicy(max_restarts=1), repository=repository)
    assert ("ready", 1) in events
    os.truncate(data, data.stat().st_size - 4096)
    policy = RestartPolicy(max_restarts=max_restarts)
    events, error, _ = life((1, "the process died"), policy=policy, repository=repository)
    assert events == [("ready", 0)]
    assert isinstance(error, RepositoryError)
    assert "the process died; it is not started again, because an engine's files are damaged" in str(error)
    assert f"model.onnx.data: found {data.stat().st_size} bytes, expected {data.stat().st_size + 4096}" in str(error)
    assert error.exit_status == 2


def test_a_model_that_never_loaded_does_not_keep_the_others_from_being_served_again(
    life, tmp_path, tiny_engine, monkeypatch
):
    repository = tmp_path / "repository"
    for name in ("tiny", "damaged"):
        package_engine(PackageOptions(engine=tiny_engine, name=name, output=repository, copy=True))
    os.truncate(repository / "damaged" / "1" / "engine" / "model.onnx.data", 4096)
    unloaded = ModelState(name="damaged", version="1", state="UNAVAILABLE", reason="it is damaged")
    monkeypatch.setattr(Failing, "models", (LOADED, unloaded))
    events, error, _ = life((1, "a"), (1, None), repository=repository)
    assert ("ready", 1) in events
    assert isinstance(error, KeyboardInterrupt)


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("m/1/engine/engine.json", r"no engine at .*/m/1/engine \(engine.json is missing\)"),
        ("m/config.pbtxt", r"found no model, expected folders with a config.pbtxt"),
        ("preprocessing/1/tokenizer/tokenizer.json", r"preprocessing: no tokenizer at .*/preprocessing/1/tokenizer"),
        ("m/1", "m: no version folder"),
        ("", "no such folder"),
    ],
)
def test_what_is_gone_is_named_and_nothing_is_started_again(life, tmp_path, tiny_engine, lost, named):
    repository = tmp_path / "repository"
    layout = "ensemble" if lost.startswith("preprocessing") else None
    package_engine(PackageOptions(engine=tiny_engine, name="m", output=repository, layout=layout))
    path = repository / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    events, error, _ = life((1, "the process died"), repository=repository)
    assert events == [("ready", 0)]
    assert isinstance(error, RepositoryError)
    assert re.search(f"the process died; it is not started again, because .*missing(.|\n)*{named}", str(error))


def test_a_steps_tokenizer_that_cannot_be_read_is_named(life, tmp_path, tiny_engine):
    repository = tmp_path / "repository"
    package_engine(PackageOptions(engine=tiny_engine, name="m", output=repository, layout="ensemble", copy=True))
    tokenizer = repository / "postprocessing" / "1" / "tokenizer" / "tokenizer.json"
    os.truncate(tokenizer, 100)
    events, error, _ = life((1, "the process died"), repository=repository)
    assert events == [("ready", 0)]
    assert isinstance(error, RepositoryError)
    assert str(tokenizer.parent) in str(error)


def test_a_process_that_is_stopped_while_models_load_ends_the_wait(monkeypatch):
    monkeypatch.setattr(readiness, "STOPPED_LOAD_S", 1.0)
    process = subprocess.Popen(["sleep", "1000"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and nobody listens
        port = free.getsockname()[1]
        waiting = Waiting(
            process=process, program="tritonserver", address=Address("127.0.0.1"),
            ports=ChosenPorts(grpc=port, http=None, metrics=port), endpoint=HealthEndpoint(http=None, grpc=""),
            steps=frozenset(), timeout_s=60, mark=f"moeship_{secrets.token_hex(8)}_",
        )  # fmt: skip
        try:
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(NotReady, match=rf"process {process.pid} is stopped \(state T\) while models load"):
                wait_until_ready(waiting)
        finally:
            process.kill()
            process.wait()
