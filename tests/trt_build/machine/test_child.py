"""Programs that end with the process that starts them: how they begin, whatever that process has loaded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trt_build.machine.child import child_program, ending_with_parent

ROOT = Path(__file__).parents[3]
# A process that is in the midst of calls, in several threads.
BUSY_WITH_GRPC = """
import os, subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor
import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from trt_build.machine.child import ending_with_parent

class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    def ServerLive(self, request, context):
        return service_pb2.ServerLiveResponse(live=True)

server = grpc.server(ThreadPoolExecutor(4))
service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(f"127.0.0.1:{port}"))

def call():
    while True:
        stub.ServerLive(service_pb2.ServerLiveRequest())

threading.Thread(target=call, daemon=True).start()
statuses = {subprocess.Popen(ending_with_parent(["true"])).wait(60) for _ in range(60)}
print(statuses, flush=True)
os._exit(0)
"""


def status_of_itself(*words: str) -> dict[str, str]:
    """What /proc says of a program that is started so."""
    with child_program([*words, "cat", "/proc/self/status"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        return dict(line.split(":\t", 1) for line in process.stdout)


def test_a_program_is_started_with_its_own_words_in_a_group_of_its_own():
    with child_program(["sh", "-c", 'echo "$0 $1" $$', "a b", "c"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read().split() == ["a", "b", "c", str(process.pid)]
        assert process.wait() == 0


def test_no_signal_is_ignored_that_a_shell_would_not_have_ignored():
    ignored = int(status_of_itself()["SigIgn"], 16)
    assert not ignored & (1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1))
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN  # as Python has it


def test_a_program_that_is_not_there_is_told_before_anything_starts():
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        ending_with_parent(["no-such-program"])


def test_programs_start_beside_calls_in_grpc():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", BUSY_WITH_GRPC], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "{0}\n"
