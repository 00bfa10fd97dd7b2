"""Metrics of an engine as Triton's families get them."""

from __future__ import annotations

import numpy as np
import pytest
from reported import STEP_S, FakeFamilies, Timed

from triton_repo.contracts.server_variables import RESTARTS_VARIABLE
from triton_repo.runtime.reporting.metrics import DEFINITIONS, Metrics
from trt_build.ort.routing import Routing


@pytest.fixture
def engine(scripted, byte_level):
    return Timed(scripted("return hello"), byte_level, slots=2, max_waiting=9)


@pytest.fixture
def families():
    return FakeFamilies()


def test_every_metric_is_there_at_the_start_with_the_models_name(engine, families):
    Metrics(engine.engine, "tiny", families)
    names = {name for definition in DEFINITIONS for name in definition.names}
    experts = {"moeship_expert_tokens_total"}  # the model has none
    assert {name for name, _ in families.values} == names - experts
    assert set(families.kinds) == names
    assert all(("model", "tiny") in labels for _, labels in families.values)
    assert all(name.startswith("moeship_") for name in names)
    settings = {name: value for (name, _), value in families.values.items() if value}
    assert settings == {"moeship_requests_waiting_limit": 9, "moeship_slots": 2, "moeship_kv_budget_bytes": 1024}


def test_names_follow_prometheus_rules():
    """https://prometheus.io/docs/practices/naming: base units, `_total` of counters and of nothing else."""
    for definition in DEFINITIONS:
        assert definition.name.endswith("_total") == (definition.kind == "counter"), definition.name
        assert definition.kind != "histogram" or definition.name.endswith("_seconds")
        assert not any(unit in definition.name for unit in ("milli", "_ms", "kilo", "mega", "minutes"))


def test_counts_and_sizes_of_a_run(engine, families, byte_level):
    metrics = Metrics(engine.engine, "tiny", families)
    prompt = len(byte_level.encode("def main"))
    for name in ("a", "b", "c"):
        engine.submit(name, max_tokens=3, num_return_sequences=1)
    engine.engine.step()
    metrics.publish()
    found = {name: families.of(f"moeship_{name}") for name in (
        "requests_running", "sequences_running", "requests_waiting", "steps_total", "prompt_tokens_total",
        "output_tokens_total", "kv_reserved_bytes", "kv_held_bytes")}  # fmt: skip
    assert found == {
        "requests_running": 2, "sequences_running": 2, "requests_waiting": 1, "steps_total": 1,
        "prompt_tokens_total": 2 * prompt, "output_tokens_total": 2, "kv_reserved_bytes": 2 * (prompt + 2),
        "kv_held_bytes": 2 * (prompt + 2),
    }  # fmt: skip
    engine.run()
    metrics.publish()
    assert families.of("moeship_requests_ended_total", end="length") == 3
    assert families.of("moeship_requests_ended_total", end="stop") == 0
    assert [families.of(f"moeship_{name}") for name in ("requests_running", "requests_waiting")] == [0, 0]


def test_a_histogram_counts_all_up_to_each_bound(engine, families):
    """Two requests begin at once and one after 3 steps of 0.5 s, which are 6 in all."""
    metrics = Metrics(engine.engine, "tiny", families)
    for name in ("a", "b", "c"):
        engine.submit(name, max_tokens=3)
    engine.run()
    metrics.publish()
    buckets = {
        dict(labels)["le"]: value
        for (name, labels), value in families.values.items()
        if name.endswith("queue_seconds_bucket")
    }
    assert buckets == {
        "0.01": 2, "0.025": 2, "0.05": 2, "0.1": 2, "0.25": 2, "0.5": 2, "1.0": 2, "2.5": 3, "5.0": 3, "10.0": 3,
        "30.0": 3, "60.0": 3, "120.0": 3, "+Inf": 3,
    }  # fmt: skip
    assert (families.of("moeship_queue_seconds_sum"), families.of("moeship_queue_seconds_count")) == (3 * STEP_S, 3)
    steps = [dict(labels)["le"] for name, labels in families.values if name.endswith("moeship_step_seconds_bucket")]
    assert [float(bound) for bound in steps] == sorted({float(bound) for bound in steps})
    assert families.of("moeship_step_seconds_bucket", le="0.25") == 0
    assert families.of("moeship_step_seconds_bucket", le="0.5") == families.of("moeship_step_seconds_count") == 6


def test_what_has_not_changed_costs_no_message(engine, families):
    metrics = Metrics(engine.engine, "tiny", families)
    engine.submit("a")
    engine.run()
    metrics.publish()
    before = families.messages
    metrics.publish()
    assert families.messages == before
    with pytest.raises(Exception, match="found 0"):
        engine.submit("b", max_tokens=0)
    metrics.publish()
    assert families.messages == before


def test_instances_of_a_model_add_up(scripted, byte_level, families):
    engines = [Timed(scripted("return hello"), byte_level) for _ in range(2)]
    metrics = [Metrics(engine.engine, "tiny", families) for engine in engines]
    for engine in engines:
        engine.submit("a", max_tokens=400)
        engine.engine.step()
    for one in metrics:
        one.publish()
    assert families.of("moeship_requests_running") == families.of("moeship_slots") == 2
    engines[0].engine.end_all()
    metrics[0].publish()
    assert families.of("moeship_requests_running") == 1


def test_experts_have_the_numbers_of_their_layers(scripted, byte_level, families):
    routing = Routing(layers=(1, 3), expert_order=(1, 0), experts_per_token=1)
    engine = Timed(scripted("return hello"), byte_level, routing=routing)
    metrics = Metrics(engine.engine, "tiny", families)
    engine.engine.stats.expert_tokens += [[1, 2], [3, 4]]
    for _ in range(4):
        metrics.publish()
    assert families.of("moeship_expert_tokens_total", layer="1", expert="0") == 0
    metrics.publish()
    found = [
        families.of("moeship_expert_tokens_total", layer=layer, expert=expert) for layer in "13" for expert in "01"
    ]
    assert found == [1, 2, 3, 4]


@pytest.mark.parametrize(("said", "value"), [("3", 3), ("", 0), ("three", 0), ("-1", 0)])
def test_restarts_are_what_serve_says(engine, families, monkeypatch, said, value):
    monkeypatch.setenv(RESTARTS_VARIABLE, said)
    Metrics(engine.engine, "tiny", families)
    assert families.of("moeship_server_restarts_total") == value


def test_a_model_serves_without_metrics_where_triton_takes_none(engine, caplog):
    class NoFamilies(FakeFamilies):
        def __call__(self, **given):
            raise RuntimeError("metrics are off")

    assert Metrics.start(engine.engine, "tiny", NoFamilies()) is None
    assert "tiny has no metrics" in caplog.text


def test_the_last_changes_are_published_at_the_end(engine, families):
    metrics = Metrics.start(engine.engine, "tiny", families)
    engine.submit("a")
    engine.run()
    engine.engine.accounts.routing = Routing(layers=(0,), expert_order=(0,), experts_per_token=1)
    engine.engine.stats.expert_tokens = np.full((1, 1), 7)
    metrics.stop()
    assert families.of("moeship_requests_ended_total", end="length") == 1
    assert families.of("moeship_expert_tokens_total", layer="0", expert="0") == 7
