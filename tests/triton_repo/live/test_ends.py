"""How requests end with their server, in both layouts: it is asked to stop, or the process that computes them dies."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import psutil
import pytest
from live_requests import Asked, metrics_of, slow_down
from live_triton import LiveTriton
from serve_command import PATIENCE_S, start_command, wait_until

from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.packaging.package import PackageOptions, package_engine

ENGINES = {"single": "tiny", "ensemble": "tensorrt_llm"}  # the model that holds the engine, by layout
STREAMS, WHOLE, QUEUED = 10, 2, 3
NUM_TOKENS = 400


@pytest.fixture(params=ENGINES)
def served(request, tmp_path, tiny_engine):
    """`moeship serve` on a model that answers as many at a time as are in flight here, and hardly gets on while the
    folder `held` is there."""
    repository, layout = tmp_path / "repository", request.param
    package_engine(
        PackageOptions(
            engine=tiny_engine,
            name="tiny",
            output=repository,
            layout=layout,
            onnxruntime=ModelParameters(threads=1, slots=STREAMS + WHOLE),
        )
    )
    held = tmp_path / "held"
    held.mkdir()
    slow_down(repository / ENGINES[layout], held)
    command, said = start_command(repository, "--no-restart")
    server = SimpleNamespace(grpc_url=said["grpc"])
    with LiveTriton(server) as live:
        yield SimpleNamespace(
            live=live, command=command, pid=said["pid"], metrics=said["metrics"], folder=tmp_path, held=held,
            engine=ENGINES[layout],
        )  # fmt: skip
    if command.poll() is None:
        command.kill()
    command.communicate(timeout=PATIENCE_S)


def ask(served, **tensors) -> Asked:
    return Asked(served.live, "tiny", **{"text_input": "def ", "max_tokens": NUM_TOKENS, "end_id": -1, **tensors})


def is_at(served, *, running: int, waiting: int) -> bool:
    """Whether so many requests are computed and so many wait."""
    found = metrics_of(served.metrics, served.engine)
    return (found["moeship_requests_running", ()], found["moeship_requests_waiting", ()]) == (running, waiting)


def test_a_server_that_is_asked_to_stop_finishes_what_is_in_flight_and_refuses_the_rest(served):
    streams = [ask(served, stream=True) for _ in range(STREAMS)]
    whole = [ask(served) for _ in range(WHOLE)]
    assert all(stream.begun.wait(PATIENCE_S) for stream in streams)
    assert wait_until(lambda: is_at(served, running=STREAMS + WHOLE, waiting=0))
    queued = [ask(served, stream=stream) for stream in (True, False, True)]
    assert len(queued) == QUEUED
    assert wait_until(lambda: is_at(served, running=STREAMS + WHOLE, waiting=QUEUED))
    processes = [psutil.Process(served.pid), *psutil.Process(served.pid).children(recursive=True)]
    served.command.send_signal(signal.SIGTERM)
    refused = "answering the request: the server is stopping; send the request to another server or again later"
    assert [asked.end() for asked in queued] == [{"refusal": f"UNAVAILABLE: {refused}"}] * QUEUED
    served.held.rmdir()
    found = [asked.end() for asked in (*streams, *whole)]
    assert [(answer.get("reason"), answer.get("num_output")) for answer in found] == [("length", NUM_TOKENS)] * len(
        found
    )
    assert served.command.wait(PATIENCE_S) == 0
    # Orphans that have ended stay as zombies until process 1 takes notice of them.
    assert not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not list(served.folder.glob("moeship-serve-*"))


def test_the_requests_of_a_process_that_dies_end_with_an_error(served):
    stub = next(
        child
        for child in psutil.Process(served.pid).children(recursive=True)
        if f"/{served.engine}/" in " ".join(child.cmdline())
    )
    asked = [ask(served, stream=True), ask(served)]
    assert asked[0].begun.wait(PATIENCE_S)
    assert wait_until(lambda: is_at(served, running=2, waiting=0))
    os.kill(stub.pid, signal.SIGKILL)
    assert [one.end() for one in asked] == [{"refusal": "UNAVAILABLE"}] * 2
    # Without restarts the command says so and ends.
    assert served.command.wait(PATIENCE_S) != 0
