"""The wait for a server to be ready."""

from __future__ import annotations

import secrets
import signal
import socket
import subprocess

import pytest

from triton_repo.serving import readiness
from triton_repo.serving.health import HealthEndpoint
from triton_repo.serving.readiness import NotReady, Waiting, wait_until_ready


def test_a_process_that_is_stopped_while_models_load_ends_the_wait(monkeypatch):
    monkeypatch.setattr(readiness, "STOPPED_LOAD_S", 1.0)
    process = subprocess.Popen(["sleep", "1000"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and nobody listens
        port = free.getsockname()[1]
        waiting = Waiting(
            process=process, program="tritonserver", listening=[("127.0.0.1", port)],
            endpoint=HealthEndpoint(http=None, grpc=""),
            steps=frozenset(), timeout_s=60, mark=f"moeship_{secrets.token_hex(8)}_",
        )  # fmt: skip
        try:
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(NotReady, match=rf"process {process.pid} is stopped \(state T\) while models load"):
                wait_until_ready(waiting)
        finally:
            process.kill()
            process.wait()
