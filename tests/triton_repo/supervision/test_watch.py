"""What is dead, what hangs, and what is only busy: a server that is nothing but processes, heartbeats and a port."""

from __future__ import annotations

import http.server
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from serve_command import PATIENCE_S, wait_until

from triton_repo.contracts.model_state import ModelState
from triton_repo.processes.heartbeat import FOLDER_VARIABLE, read_beats
from triton_repo.processes.program import MARK_VARIABLE, read_process
from triton_repo.serving.health import HealthEndpoint
from triton_repo.serving.server import Server
from triton_repo.supervision import watch
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
    told = re.fullmatch(
        rf"the engine of the model tiny \(pid {pid}\) hangs: it has requests, and has ended no step for (\d+) s",
        Watch(server, LIMITS).wait(),
    )
    assert told is not None
    assert int(told[1]) >= LIMITS.step  # more where this process had to wait for its turn


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


def test_a_server_whose_models_are_gone_just_before_it_is_told_as_what_ended(serving, monkeypatch):
    monkeypatch.setattr("triton_repo.supervision.watch._ENDING_S", PATIENCE_S)  # however late the kill comes
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


def test_a_running_server_is_warned_of_its_certificates_end_once_at_each_step(caplog):
    ends = datetime.now(UTC) + timedelta(days=40)
    certificate = watch._CertificateEnd(ends)
    told = []
    for left in (40, 29, 28, 6.5, 6, 0.5, -0.1, -3):
        caplog.clear()
        certificate.warn(ends - timedelta(days=left))
        told.append(len(caplog.messages))
    assert told == [0, 1, 0, 1, 0, 1, 1, 0]
    assert "new connections fail" not in caplog.text
    soon = watch._CertificateEnd(datetime.now(UTC) + timedelta(days=5))  # the check before the start has told this
    soon.warn(datetime.now(UTC))
    assert caplog.messages == []
