"""Points of a server's capacity: of each measured rate a percentile of each latency, and how far chance moves it.

Rounds of one rate are averaged by their logarithms, so that a round on a busy machine counts as one of them and does
not fill the tail of all. Two kinds of chance make the standard error of that mean. Within a round, requests that are
near in time are alike, so slices of the load are drawn anew, as in clients/bench/compare.py. Between rounds the machine
is not the same. How far rounds lie apart beyond the first kind is estimated once over all rates, as each has few rounds
(the moment estimator of DerSimonian and Laird, Meta-analysis in Clinical Trials, 1986, with equal weights). With a
single round of each rate this second kind is unknown, and in no figure.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from clients.bench.compare import SLICES, Side, quantile
from clients.bench.kept import Level, LoadTest
from clients.bench.records import Record
from clients.bench.report import percentile
from export.errors import ConfigError, names

KEEPS_UP = 0.9  # ended requests over those that arrived, below which a server is taken to fall behind
LEAST_POINTS = 2
LARGEST_ERROR = 1.0  # of a percentile that too few requests exceed: it may be off by a factor of e
_DRAWS = 200  # which give a standard error to 5 %
_LEAST_OF_A_ROUND = 50  # requests, or the rounds of a rate are taken as one
_REQUESTS = ("prompts", "prompt_tokens", "prompt_words", "max_tokens", "sampling")  # what a report says of the requests
VALUES: Mapping[str, Callable[[Record], float | None]] = {
    "first_token_s": lambda record: record.first_token_s,
    "between_tokens_s": lambda record: record.between_tokens_s,
    "answer_s": lambda record: record.answer_s,
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was measured of one server at a rate. `latencies`: seconds by the name of an objective's bound; infinite
    where so many requests failed; without a name that no request has, as the time between tokens of answers of one.
    `errors`: standard errors of the latencies' logarithms. `rounds`: loads of that rate."""

    name: str
    rate: float
    num_requests: int
    tokens_per_request: float
    keeps_up: bool
    latencies: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    rounds: int = 1


def points_of(tests: Sequence[LoadTest], share: float) -> list[Point]:
    """The points of all tests by their rate; loads of one rate are one point. Raises ConfigError where the tests
    measured several servers, models or kinds of requests, or have too few open loops."""
    for test in tests:
        if len(urls := test.about.get("urls") or ()) > 1:
            raise ConfigError(
                f"planning capacity: a load test has {len(urls)} servers ({names(urls)}), expected one; measure one"
            )
    if len(models := {str(test.about["model"]) for test in tests if test.about.get("model")}) > 1:
        raise ConfigError(
            f"planning capacity: the load tests are of different models ({names(sorted(models))}); give tests of one"
        )
    levels: dict[float, list[Level]] = {}
    kinds = set()
    for test in tests:
        for level in test.levels:
            load = level.report["load"]
            if load["kind"].startswith("open loop, Poisson") and level.records and not level.report["ended_early"]:
                levels.setdefault(float(load["rate"]), []).append(level)
                kinds.add(", ".join(f"{key} {load[key]}" for key in _REQUESTS if key in load))
    if len(kinds) > 1:
        raise ConfigError(
            f"planning capacity: the load tests sent different requests ({'; '.join(sorted(kinds))}); give tests of "
            "one kind of requests"
        )
    if len(levels) < LEAST_POINTS:
        raise ConfigError(
            f"planning capacity: found {len(levels)} whole open loops in the load tests, expected {LEAST_POINTS} rates "
            "or more; measure with `moeship bench --rate R,R,R --output FILE`, as a closed loop does not show how long "
            "requests wait that arrive by themselves"
        )
    return _with_errors([_point(found, share) for found in levels.values()], list(levels.values()), share)


def _with_errors(points: Sequence[Point], levels: Sequence[Sequence[Level]], share: float) -> list[Point]:
    """The points by their rate, with the errors of their latencies and the mean of their rounds."""
    latencies, errors = ([dict[str, float]() for _ in points] for _ in range(2))
    for name, value_of in VALUES.items():
        rounds = [_rounds(found, name, value_of, share) for found in levels]
        tau = between([(logs, errors_within) for logs, errors_within, _ in rounds])
        for at, (logs, errors_within, weights) in enumerate(rounds):
            if logs:
                latencies[at][name] = math.exp(sum(map(operator.mul, logs, weights)) / sum(weights))
                errors[at][name] = error_of_mean(errors_within, weights, tau)
            elif points[at].latencies.get(name, math.inf) < math.inf:
                # So many requests failed in one of the rounds that it has no such percentile; all of them together do.
                errors[at][name] = LARGEST_ERROR
    told = [
        replace(point, latencies={**point.latencies, **better}, errors=error, rounds=len(found))
        for point, better, error, found in zip(points, latencies, errors, levels, strict=True)
    ]
    return sorted(told, key=lambda point: point.rate)


def _rounds(
    levels: Sequence[Level], name: str, value_of: Callable[[Record], float | None], share: float
) -> tuple[list[float], list[float], list[int]]:
    """Of each round the logarithm of its percentile, its error and its number of requests. Rounds of few requests are
    taken as one. Nothing where a round has no such percentile."""
    if any(len(level.records) < _LEAST_OF_A_ROUND for level in levels):
        levels = [_joined(levels)]
    found = [_latency(level.records, name, value_of, share) for level in levels]
    if any(value is None or value == math.inf for value in found):
        return [], [], []
    return (
        [math.log(value) for value in found if value],
        [error_within(level, value_of, share) for level in levels],
        [len(level.records) for level in levels],
    )


def _joined(levels: Sequence[Level]) -> Level:
    """Rounds one after another, as one load."""
    if len(levels) == 1:
        return levels[0]
    records, begun = list[Record](), 0.0
    for level in levels:
        records += [_later(record, begun) for record in level.records]
        begun += float(level.report["window_s"])
    return Level(name=levels[0].name, report={**levels[0].report, "window_s": begun}, records=records)


def _later(record: Record, by_s: float) -> Record:
    return replace(
        record,
        due_s=record.due_s + by_s,
        sent_s=record.sent_s + by_s,
        end_s=(record.end_s or 0.0) + by_s,
        arrivals=[(at + by_s, tokens) for at, tokens in record.arrivals],
    )


def _point(levels: Sequence[Level], share: float) -> Point:
    records = [record for level in levels for record in level.records]
    # A load of a number of requests has arrivals until the last of them, one of a duration until its end.
    seconds = sum(
        float(level.report["load"].get("duration_s") or max(record.due_s for record in level.records)) or 1e-9
        for level in levels
    )
    ended = [record for record in records if not record.cut]
    # Nothing ends before the quickest request would, so as many seconds of each load show nothing.
    quickest = min(((record.end_s or 0.0) - record.due_s for record in ended if not record.error), default=0.0)
    windows = sum(max(0.0, float(level.report["window_s"]) - quickest) for level in levels)
    tokens = sum(record.num_tokens for record in records if record.is_answered)
    rate = len(records) / seconds
    return Point(
        name=levels[0].name,
        rate=rate,
        num_requests=len(records),
        tokens_per_request=tokens / (sum(record.is_answered for record in records) or 1),
        keeps_up=len(ended) >= KEEPS_UP * rate * windows,
        latencies={
            name: value
            for name, value_of in VALUES.items()
            if (value := _latency(records, name, value_of, share)) is not None
        },
    )


def _latency(
    records: Sequence[Record], name: str, value_of: Callable[[Record], float | None], share: float
) -> float | None:
    """A percentile; None where no request has the value. Failed requests count as slower than all others. A request
    that was ended before it had the value counts with the time that it had waited."""
    values, failed = [], 0
    for record in records:
        value = value_of(record)
        if record.error is not None:
            failed += 1
        elif value is not None:
            values.append(value)
        elif name != "between_tokens_s" and record.cut and record.end_s is not None:
            values.append(record.end_s - record.due_s)
    values.sort()
    if not values and not failed:
        return None
    if share * (len(values) + failed - 1) > len(values) - 1:
        return math.inf
    return max(1e-9, percentile([*values, *[values[-1]] * failed], share))


def error_within(level: Level, value_of: Callable[[Record], float | None], share: float) -> float:
    """The standard error within a load of a percentile's logarithm; LARGEST_ERROR where too few requests exceed it."""
    import numpy as np

    weights = np.random.default_rng(0).multinomial(SLICES, [1 / SLICES] * SLICES, size=_DRAWS)
    side = Side(level, weights)
    _, drawn = quantile(side.samples(value_of), side, share)
    known = drawn[np.isfinite(drawn) & (drawn > 0)] if drawn is not None else ()
    if len(known) < _DRAWS / 2:
        return LARGEST_ERROR
    # The variance of n slices that are drawn anew is smaller than the true one by (n-1)/n.
    return min(LARGEST_ERROR, float(np.log(known).std()) * math.sqrt(SLICES / (SLICES - 1)))


def between(rounds: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """The standard deviation from round to round beyond the errors within. `rounds` has for each rate the logarithms of
    its rounds' percentiles and their errors within. 0 where no rate has two rounds."""
    found, freedom = 0.0, 0
    for logs, errors in rounds:
        if len(logs) > 1:
            mean = sum(logs) / len(logs)
            within = sum(error**2 for error in errors) / len(errors)
            found += sum((value - mean) ** 2 for value in logs) - (len(logs) - 1) * within
            freedom += len(logs) - 1
    return math.sqrt(max(0.0, found / freedom)) if freedom else 0.0


def error_of_mean(errors: Sequence[float], weights: Sequence[float], between_rounds: float) -> float:
    """The standard error of the weighted mean of rounds, of their errors within and the deviation between them."""
    total = sum(weights)
    parts = [
        (weight / total) ** 2 * (error**2 + between_rounds**2) for error, weight in zip(errors, weights, strict=True)
    ]
    return min(LARGEST_ERROR, math.sqrt(sum(parts)))
