"""When a server is started again, and when it is given up: servers that live as long as a test says."""

from __future__ import annotations

import contextlib
import os
import re
import shutil

import pytest

from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.contracts.model_state import ModelState
from triton_repo.errors import RepositoryError, ServerError
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.serving.server import ServerOptions
from triton_repo.supervision import supervisor
from triton_repo.supervision.supervisor import RestartPolicy, supervise

LOADED = ModelState(name="tiny", version="1", state="READY", reason="")


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
