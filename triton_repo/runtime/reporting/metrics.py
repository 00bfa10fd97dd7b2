"""Publishes the accounts of an engine of sequences as Prometheus metrics, through Triton's custom metrics.

    metrics = Metrics.start(engine, "phixtral", pb_utils.MetricFamily)      # in a model's initialize
    metrics.stop()                                                          # in its finalize

A thread compares the engine's counts with those that it published last, once a second, and passes the differences on.
A difference takes Triton about 20 us (measured with Triton 2.51: a message to the server and its answer), so the cost
is bounded by the number of metrics and not by the number of tokens, and the threads that compute and send pay nothing.

A histogram is published as the three counters that Prometheus reads it from: `_bucket`, `_sum` and `_count`. Triton's
own histograms (since 2.51) take one message for each value, which at thousands of tokens a second would be a tenth of a
core. Gauges are changed by differences too, so that several instances of a model add up.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from export.files.reading import whole_number
from triton_repo.contracts.server_variables import RESTARTS_VARIABLE
from triton_repo.runtime.batching.engine import SequenceEngine
from triton_repo.runtime.batching.stats import Histogram

logger = logging.getLogger(__name__)

PUBLISH_INTERVAL_S = 1.0
MODEL_LABEL = "model"  # of every metric

Labels = tuple[tuple[str, str], ...]
Reading = tuple[str, Labels, float]


class Metric(Protocol):
    """The part of `pb_utils.Metric` that is used here."""

    def increment(self, value: float, /) -> None:
        """Add to the value. That of a counter may not be negative."""


class Family(Protocol):
    """The part of an object of `pb_utils.MetricFamily` that is used here."""

    def Metric(self, *, labels: Mapping[str, str]) -> Metric:  # noqa: N802 - Triton's name
        """The metric with these labels; a new one begins at 0."""


class Families(Protocol):
    """The class `pb_utils.MetricFamily`."""

    COUNTER: Any
    GAUGE: Any

    def __call__(self, *, name: str, description: str, kind: Any) -> Family:  # noqa: ANN401 - Triton's enumeration
        """A new family, or the one of this name that the server has."""


@dataclass(frozen=True, kw_only=True)
class Definition:
    """What is exported under one name. `read` gives its value, its values by labels, or its histogram. It is published
    at every `interval`-th time."""

    name: str
    kind: str  # "counter", "gauge" or "histogram"
    help: str
    read: Callable[[SequenceEngine], float | Mapping[Labels, float] | Histogram]
    interval: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """The names that Prometheus sees."""
        return tuple(f"{self.name}{end}" for end in _HISTOGRAM_ENDS) if self.kind == "histogram" else (self.name,)

    def readings(self, engine: SequenceEngine) -> Iterator[Reading]:
        """Each of the values: its name, its labels beside the model, the value."""
        value = self.read(engine)
        if isinstance(value, Histogram):
            yield from _readings_of(self.name, value)
        elif isinstance(value, Mapping):
            for labels, count in value.items():
                yield self.name, labels, count
        else:
            yield self.name, (), value


_HISTOGRAM_ENDS = ("_bucket", "_sum", "_count")


def _readings_of(name: str, histogram: Histogram) -> Iterator[Reading]:
    """A bucket counts the values up to its bound, those of the buckets before it included."""
    totals = list(accumulate(histogram.counts))
    for bound, total in zip((*map(str, histogram.bounds), "+Inf"), totals, strict=True):
        yield f"{name}_bucket", (("le", bound),), total
    yield f"{name}_sum", (), histogram.sum
    yield f"{name}_count", (), totals[-1]


def _by(label: str, counts: Mapping[str, int]) -> dict[Labels, float]:
    return {((label, value),): count for value, count in counts.items()}


def _expert_tokens(engine: SequenceEngine) -> dict[Labels, float]:
    layers = engine.accounts.routing.layers if engine.accounts.routing else ()
    return {
        (("layer", str(layer)), ("expert", str(expert))): count
        for layer, counts in zip(layers, engine.stats.expert_tokens.tolist(), strict=True)
        for expert, count in enumerate(counts)
    }


def _restarts(_engine: SequenceEngine) -> int:
    return whole_number(os.environ.get(RESTARTS_VARIABLE, ""), 0, 1 << 31) or 0


DEFINITIONS = tuple(
    Definition(
        name=f"moeship_{name}", kind=kind, help=text, read=read,
        # A model of 32 layers with 40 experts has 1,280 of these, which takes 26 ms.
        interval=5 if read is _expert_tokens else 1,
    )
    for name, kind, text, read in (
        ("requests_waiting", "gauge", "Requests in the queue.", lambda e: e.counts()[1]),
        ("requests_waiting_limit", "gauge", "Requests that the queue holds; more are refused.",
         lambda e: e.limits.max_waiting),
        ("requests_running", "gauge", "Requests that are computed.", lambda e: e.counts()[0]),
        ("sequences_running", "gauge", "Sequences that are computed; each takes a slot.", lambda e: e.num_sequences),
        ("slots", "gauge", "Sequences that can be computed together.", lambda e: e.limits.slots),
        ("kv_reserved_bytes", "gauge", "Keys and values that running sequences may come to take.",
         lambda e: e.memory[0]),
        ("kv_held_bytes", "gauge", "Keys and values that may be in memory, those of ended sequences included.",
         lambda e: e.memory[1]),
        ("kv_budget_bytes", "gauge", "Keys and values that may be in memory at most.", lambda e: e.memory[2]),
        ("steps_total", "counter", "Steps of the engine.", lambda e: e.stats.steps),
        ("prompt_tokens_total", "counter", "Tokens of prompts that were computed.", lambda e: e.stats.prompt_tokens),
        ("output_tokens_total", "counter", "Tokens that were chosen.", lambda e: e.stats.output_tokens),
        ("draft_tokens_total", "counter", "Tokens of drafts: computed before they were chosen.",
         lambda e: e.stats.drafted_tokens),
        ("draft_accepted_tokens_total", "counter", "Those of them that were chosen then.",
         lambda e: e.stats.accepted_tokens),
        ("prefix_kept_tokens", "gauge", "Tokens of ended sequences that the cache keeps.", lambda e: e.kept[0]),
        ("prefix_kept_bytes", "gauge", "Their keys and values.", lambda e: e.kept[1]),
        ("prefix_hits_total", "counter", "Requests whose prompt's beginning was in the cache.",
         lambda e: e.stats.prefix_hits),
        ("prefix_asked_tokens_total", "counter", "Tokens of the prompts of requests that got a token.",
         lambda e: e.stats.prefix_asked_tokens),
        ("prefix_reused_tokens_total", "counter", "Those of them that were in the cache and were not computed.",
         lambda e: e.stats.prefix_reused_tokens),
        ("requests_ended_total", "counter", "Requests that were taken on and have ended, by how they ended.",
         lambda e: _by("end", e.stats.ends)),
        ("requests_refused_total", "counter", "Requests that were refused before they began, by the reason.",
         lambda e: _by("reason", e.stats.refusals)),
        ("step_seconds", "histogram", "Time of a step.", lambda e: e.stats.step_s),
        ("queue_seconds", "histogram", "Time from a request's arrival until it begins.", lambda e: e.stats.queue_s),
        ("first_token_seconds", "histogram", "Time from a request's arrival until its first token is chosen.",
         lambda e: e.stats.first_token_s),
        ("between_tokens_seconds", "histogram", "Time between two tokens of a sequence.",
         lambda e: e.stats.between_tokens_s),
        ("expert_tokens_total", "counter",
         "Tokens that chose an expert, counted in a sample of the steps: at most four steps a second.", _expert_tokens),
        ("server_restarts_total", "counter", "Times that moeship serve started this server again after a fault.",
         _restarts),
    )
)  # fmt: skip


class Metrics:
    """The metrics of one instance of a model."""

    def __init__(self, engine: SequenceEngine, model: str, families: Families) -> None:
        """Make every metric, so that each is there at 0. Raises what Triton raises where its metrics are off."""
        self._engine = engine
        self._families = {
            name: families(
                name=name,
                description=definition.help,
                kind=families.GAUGE if definition.kind == "gauge" else families.COUNTER,
            )
            for definition in DEFINITIONS
            for name in definition.names
        }
        self._model = model
        self._metrics: dict[tuple[str, Labels], Metric] = {}
        self._published: dict[tuple[str, Labels], float] = {}
        self._number = 0  # of the publication
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self.publish()

    @classmethod
    def start(cls, engine: SequenceEngine, model: str, families: Families) -> Metrics | None:
        """Publish once a second in a daemon thread. Returns None, and logs why, where Triton takes no metrics."""
        try:
            metrics = cls(engine, model, families)
        except Exception:  # the model serves without metrics
            logger.exception("%s has no metrics: Triton does not take them", model)
            return None
        metrics._thread = threading.Thread(target=metrics._run, name="metrics", daemon=True)
        metrics._thread.start()
        return metrics

    def publish(self, *, everything: bool = False) -> None:
        """Pass on what has changed, of the metrics whose turn it is or of all."""
        for definition in DEFINITIONS:
            if everything or self._number % definition.interval == 0:
                for reading in definition.readings(self._engine):
                    self._pass_on(*reading)
        self._number += 1

    def _pass_on(self, name: str, labels: Labels, value: float) -> None:
        key = name, labels
        if key not in self._metrics:
            self._metrics[key] = self._families[name].Metric(labels={MODEL_LABEL: self._model, **dict(labels)})
        difference = value - self._published.get(key, 0)
        if difference:
            self._metrics[key].increment(difference)
            self._published[key] = value

    def stop(self) -> None:
        """End the thread, publish for the last time, and take the metrics from the server."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        self._publish_or_log(everything=True)
        self._metrics.clear()  # before their families (triton_python_backend_stub, metric.cc)
        self._families.clear()

    def _run(self) -> None:
        while not self._stopped.wait(PUBLISH_INTERVAL_S):
            self._publish_or_log()

    def _publish_or_log(self, *, everything: bool = False) -> None:
        try:
            self.publish(everything=everything)
        except Exception:  # the next second may be better
            logger.exception("publishing the metrics of %s failed", self._model)
