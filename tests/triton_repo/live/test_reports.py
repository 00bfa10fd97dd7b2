"""What a live Triton tells its operator of requests to both layouts: metrics, and lines of the request log."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from live_requests import PATIENCE_S, Asked, metrics_of, slow_down
from live_triton import LiveTriton
from serve_command import start_command, wait_until

from cli.main import main
from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.processes.heartbeat import read_beats
from triton_repo.runtime.reporting.metrics import DEFINITIONS
from triton_repo.serving.server import ServerOptions, running_server
from triton_repo.supervision.watch import Limits, Watch

SINGLE, STEPS = "alone", "steps"
ENGINES = {SINGLE: SINGLE, STEPS: "tensorrt_llm"}  # the model that has the engine, by the model that is asked
SLOTS, WAITING = 2, 2
LONG = {"text_input": "def ", "max_tokens": 630, "end_id": -1}


# Put into the served models: a byte for each round in which metrics were published.
COUNTED = """
from pathlib import Path
from triton_repo.runtime.reporting import metrics

publish = metrics.Metrics.publish


def counted(self, **options):
    publish(self, **options)
    with Path({rounds!r}).open("ab") as file:
        file.write(b".")


metrics.Metrics.publish = counted
"""


def rounds_of(repository, engine) -> Path:
    return repository.parent / f"{engine}.rounds"


def put_into(model, text) -> None:
    """Have the Python program of a packaged model run a text when it starts."""
    path = model / "1" / "model.py"
    path.write_text(path.read_text().replace("\nLAST = ", f"{text}\nLAST = "))


def package(repository, engine, *layouts) -> None:
    parameters = ModelParameters(threads=1, slots=SLOTS, max_waiting=WAITING)
    for name in layouts:
        layout = "ensemble" if name == STEPS else "single"
        package_engine(
            PackageOptions(engine=engine, name=name, output=repository, onnxruntime=parameters, layout=layout)
        )
        slow_down(repository / ENGINES[name])
        rounds = rounds_of(repository, ENGINES[name])
        rounds.touch()
        put_into(repository / ENGINES[name], COUNTED.format(rounds=str(rounds)))


class Serving:
    """`moeship serve` with a request log, and what it has told so far."""

    def __init__(self, repository, log, *words) -> None:
        self.command, self.said = start_command(repository, "--request-log", str(log), *words)
        self.repository, self.log, self.printed = repository, log, []
        self._reading = threading.Thread(target=lambda: self.printed.extend(self.command.stdout), daemon=True)
        self._reading.start()
        self.live = LiveTriton(SimpleNamespace(grpc_url=self.said["grpc"]))

    def metrics(self, model: str) -> dict:
        """Name and labels beside the model -> value, of the model that has the engine."""
        return metrics_of(self.said["metrics"], ENGINES[model])

    def published(self, model: str, rounds: int) -> None:
        """Return when metrics have been published so many times from here on."""
        path = rounds_of(self.repository, ENGINES[model])
        before = path.stat().st_size
        assert wait_until(lambda: path.stat().st_size > before + rounds)  # one may be under way

    def grown(self, model: str, before: dict, **expected: float) -> dict:
        """The metrics that have grown since `before`, once those of `expected` have grown so much in all."""

        def changes() -> dict:
            return {key: value - before[key] for key, value in self.metrics(model).items() if value != before[key]}

        def has_grown() -> bool:
            found = changes().items()
            return all(
                sum(value for (other, _), value in found if other == f"moeship_{name}_total") == growth
                for name, growth in expected.items()
            )

        assert wait_until(has_grown)
        return changes()

    def lines(self, model: str, *ids: str) -> list[dict]:
        """The lines of these requests, once all are there."""

        def found() -> list[dict]:
            text = "".join(self.printed) if self.log == "-" else self.log.read_text()
            lines = [json.loads(line) for line in text.splitlines()]
            return [line for line in lines if line.get("model") == ENGINES[model] and line["id"] in ids]

        wait_until(lambda: len(found()) == len(ids))
        return found()

    def events(self) -> list[dict]:
        """What `serve` has printed of faults and restarts."""
        return [line for line in map(json.loads, self.printed) if "event" in line]

    def close(self) -> None:
        self.live.channel.close()
        if self.command.poll() is None:
            self.command.send_signal(signal.SIGTERM)
            self.command.send_signal(signal.SIGTERM)
        self.command.wait(60)
        self._reading.join(PATIENCE_S)
        self.command.communicate()


@pytest.fixture(scope="module")
def serving(tmp_path_factory, tiny_engine):
    folder = tmp_path_factory.mktemp("reports")
    package(folder / "repository", tiny_engine, SINGLE, STEPS)
    served = Serving(folder / "repository", folder / "requests.jsonl")
    yield served
    served.close()


@pytest.fixture(params=[SINGLE, STEPS])
def model(request):
    return request.param


def settled(serving, model) -> dict:
    """The metrics once nothing runs and all of them have been published again, those of experts too."""
    running = ("moeship_requests_running", ())
    serving.published(model, 1)
    assert wait_until(lambda: serving.metrics(model)[running] == 0)
    serving.published(model, max(definition.interval for definition in DEFINITIONS))
    return serving.metrics(model)


def test_every_metric_is_there_before_the_first_request(serving, model):
    found = {name for name, _ in serving.metrics(model) if name.startswith("moeship_")}
    assert found == {name for definition in DEFINITIONS for name in definition.names}
    settings = {name: serving.metrics(model)[f"moeship_{name}", ()] for name in ("slots", "requests_waiting_limit")}
    assert settings == {"slots": SLOTS, "requests_waiting_limit": WAITING}


def test_requests_are_counted_and_logged_one_by_one(serving, model):
    before = settled(serving, model)
    asked = [Asked(serving.live, model, f"count-{n}", text_input="def ", max_tokens=5, end_id=-1, stream=n % 2 == 0)
             for n in range(3)]  # fmt: skip
    assert [one.end()["num_output"] for one in asked] == [5, 5, 5]
    experts = "moeship_expert_tokens_total"

    def grown_experts() -> dict:
        found = serving.grown(model, before, output_tokens=15, requests_ended=3)
        return found if any(name == experts for name, _ in found) else {}

    grown = wait_until(grown_experts)
    assert grown["moeship_prompt_tokens_total", ()] == 12
    assert grown["moeship_requests_ended_total", (("end", "length"),)] == 3
    counts = {name: grown[f"moeship_{name}_seconds_count", ()] for name in ("queue", "first_token", "between_tokens")}
    assert counts == {"queue": 3, "first_token": 3, "between_tokens": 12}
    assert grown["moeship_steps_total", ()] == grown["moeship_step_seconds_bucket", (("le", "+Inf"),)]
    # A step takes 10 ms at least, so each request's five tokens take 40 ms behind its first.
    assert 12 * 0.01 < grown["moeship_between_tokens_seconds_sum", ()] < 12
    # Each token of a sampled step chooses two of five experts, in each of three layers.
    chosen = {labels: value for (name, labels), value in grown.items() if name == experts}
    layers = [sum(value for labels, value in chosen.items() if ("layer", layer) in labels) for layer in "012"]
    assert layers[0] == layers[1] == layers[2] > 0
    lines = serving.lines(model, "count-0", "count-1", "count-2")
    assert {(line["end"], line["status"], line["prompt_tokens"], line["output_tokens"]) for line in lines} == {
        ("length", "OK", 4, 5)
    }
    assert all(0 <= line["queued_s"] <= line["first_token_s"] < line["total_s"] for line in lines)
    assert "def " not in serving.log.read_text()


def test_the_live_view_shows_the_engine_of_either_layout(serving, model, capsys):
    serving.live.text(model, text_input="def f(", max_tokens=4, end_id=-1)
    settled(serving, model)
    assert main(["top", serving.said["metrics"], "--once", "--json", "--interval", "0.2"]) == 0
    engines = {each["model"]: each for each in json.loads(capsys.readouterr().out)["engines"]}
    shown = engines[ENGINES[model]]
    assert (shown["kind"], shown["slots"], shown["waiting_limit"]) == ("ONNX Runtime", SLOTS, WAITING)
    assert shown["first_token_s"]["p50"] > 0
    assert set(shown["expert_load"]) == {"0", "1", "2"}


def test_a_prompt_that_begins_like_the_last_one_goes_on_from_the_cache(serving, model):
    """A token of the engine is a byte. What the prompts share is not computed again."""
    system = "# Every request begins with these words.\n" * 4
    serving.live.text(model, text_input=f"{system}def f(", max_tokens=4, end_id=-1)
    before = settled(serving, model)
    serving.live.text(model, "second", text_input=f"{system}class Other", max_tokens=4, end_id=-1)
    asked = {"prefix_asked_tokens": len(system) + 11, "prefix_reused_tokens": len(system)}
    grown = serving.grown(model, before, prefix_hits=1, prompt_tokens=11, requests_ended=1, **asked)
    [line] = serving.lines(model, "second")
    assert (line["prompt_tokens"], line["reused_tokens"]) == (len(system) + 11, len(system))
    assert grown["moeship_requests_ended_total", (("end", "length"),)] == 1
    assert serving.metrics(model)["moeship_prefix_kept_tokens", ()] >= len(system)


def test_early_ends_and_refusals_are_counted_by_their_reason(serving, model):
    before = settled(serving, model)
    running = [Asked(serving.live, model, name, **LONG, stream=True) for name in ("stopped", "gone")]
    assert all(one.begun.wait(PATIENCE_S) for one in running)
    waiting = [
        Asked(serving.live, model, f"wait-{n}", text_input="def ", max_tokens=2, end_id=-1) for n in range(WAITING)
    ]
    assert wait_until(lambda: serving.metrics(model)["moeship_requests_waiting", ()] == WAITING)
    found = serving.metrics(model)
    assert (found["moeship_requests_running", ()], found["moeship_sequences_running", ()]) == (2, 2)
    assert 0 < found["moeship_kv_reserved_bytes", ()] <= found["moeship_kv_budget_bytes", ()]
    assert "requests wait already" in Asked(serving.live, model, "refused", **LONG).end()["refusal"]
    serving.live.ask(model, "stopped", text_input="", max_tokens=0, stop=True)
    running[1].call.cancel()
    assert [one.end()["num_output"] for one in waiting] == [2, 2]
    grown = serving.grown(model, before, requests_ended=4)
    ends = {labels[0][1]: value for (name, labels), value in grown.items() if name == "moeship_requests_ended_total"}
    # The first step of an ensemble is told that the client has gone, and stops the engine's.
    assert ends in ({"stopped": 1, "disconnected": 1, "length": 2}, {"stopped": 2, "length": 2})
    assert grown["moeship_requests_refused_total", (("reason", "queue_full"),)] == 1
    lines = {line["id"]: line for line in serving.lines(model, "stopped", "gone", "refused", "wait-0", "wait-1")}
    assert (lines["refused"]["end"], lines["refused"]["status"]) == ("queue_full", "UNAVAILABLE")
    assert lines["refused"]["queued_s"] is None
    assert lines["stopped"]["end"] == "stopped"
    assert lines["gone"]["end"] == ("disconnected" if ends.get("disconnected") else "stopped")
    assert all(lines[f"wait-{n}"]["queued_s"] > 0 for n in range(WAITING))


@pytest.mark.parametrize(("model", "log"), [(SINGLE, "requests.jsonl"), (STEPS, "-")])
def test_a_restart_is_counted_and_a_drain_ends_in_its_time(tmp_path, tiny_engine, model, log):
    package(tmp_path / "repository", tiny_engine, model)
    serving = Serving(tmp_path / "repository", log if log == "-" else tmp_path / log, "--drain-timeout", "1")
    try:
        stub = next(
            beat.pid
            for folder in tmp_path.glob("moeship-serve-*/heartbeats-*")
            for beat in read_beats(folder)
            if beat.model == ENGINES[model]
        )
        os.kill(stub, signal.SIGKILL)
        assert wait_until(lambda: [event["event"] for event in serving.events()] == ["failed", "ready"])
        assert serving.events()[1]["restarts"] == 1
        assert serving.metrics(model)["moeship_server_restarts_total", ()] == 1
        long = [Asked(serving.live, model, f"long-{n}", **LONG, stream=True) for n in range(SLOTS)]
        assert all(one.begun.wait(PATIENCE_S) for one in long)
        waits = Asked(serving.live, model, "waits", **LONG)
        assert wait_until(lambda: serving.metrics(model)["moeship_requests_waiting", ()] == 1)
        serving.command.send_signal(signal.SIGTERM)
        assert "the server is stopping" in waits.end()["refusal"]
        # What outlasts the drain ends with what it has.
        found = [one.end() for one in long]
        assert [answer["reason"] for answer in found] == ["cancelled"] * SLOTS
        assert all(0 < answer["num_output"] < LONG["max_tokens"] for answer in found)
        assert serving.command.wait(PATIENCE_S) == 0
        ends = {line["id"]: line["end"] for line in serving.lines(model, "long-0", "long-1", "waits")}
        assert ends == {"long-0": "stopping", "long-1": "stopping", "waits": "stopping"}
    finally:
        serving.close()


STUCK = """
from trt_build.ort import session
session.Session.step = lambda *given: time.sleep(1000)
"""


def test_an_engine_that_hangs_while_its_process_beats_is_named(tmp_path, tiny_engine):
    package(tmp_path / "repository", tiny_engine, SINGLE)
    put_into(tmp_path / "repository" / SINGLE, STUCK)
    with running_server(ServerOptions(repository=tmp_path / "repository")) as server, LiveTriton(server) as live:
        watch = Watch(server, Limits(step=1.0))
        assert watch.look() is None
        asked = Asked(live, SINGLE, **LONG)
        assert re.search(r"the engine of the model alone .* has ended no step for [1-9]\d* s", watch.wait())
        server.kill()
        asked.end()
