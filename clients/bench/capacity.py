"""Plans how many servers a rate of requests needs, from load tests of one server.

Each open-loop load is a point: the rate at which requests arrived, and a percentile of each latency. Between points the
reciprocal of a latency is interpolated linearly. That is exact for the mean of a queue with exponential services
(M/M/1: 1/T = c - r), and a little too high a latency where services vary less. Latencies do not fall when the rate
rises, so points that say otherwise, by chance, are pooled (isotonic regression). Nothing is extrapolated: above the
highest measured rate nothing is known.

N servers get an Nth of the rate each. Requests that are shared out at random stay a Poisson process; shared in turn
they are more even, and the plan is then on the safe side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clients.bench.kept import Level, LoadTest
from clients.bench.objective import NAMES, Objective
from clients.bench.records import Record
from clients.bench.report import percentile
from export.errors import ConfigError, names

KEEPS_UP = 0.9  # ended requests over those that arrived, below which a server is taken to fall behind
LEAST_POINTS = 2
_REQUESTS = ("prompts", "prompt_tokens", "prompt_words", "max_tokens")  # what a report says of the requests
_VALUES: Mapping[str, Callable[[Record], float | None]] = {
    "first_token_s": lambda record: record.first_token_s,
    "between_tokens_s": lambda record: record.between_tokens_s,
    "answer_s": lambda record: record.answer_s,
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was measured of one server at a rate. `latencies`: seconds by the name of an objective's bound; infinite
    where so many requests failed; without a name that no request has, as the time between tokens of answers of one."""

    name: str
    rate: float
    num_requests: int
    tokens_per_request: float
    keeps_up: bool
    latencies: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A measured point, and what the others say of it."""

    point: Point
    predicted: Mapping[str, float]

    def error(self, name: str) -> float:
        """Predicted over measured, less one."""
        return self.predicted[name] / self.point.latencies[name] - 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many servers a rate needs. `most_rate` is the highest rate of one server at which the objective holds; it is
    None where it holds at no measured rate. `is_measured_end`: the objective still holds at the highest measured rate
    at which the server kept up."""

    target_rate: float
    share: float
    most_rate: float | None
    is_measured_end: bool
    servers: int | None
    predicted: Mapping[str, float]
    tokens_per_s: float
    points: Sequence[Point]
    checked: Sequence[Checked]


class Curve:
    """A latency over the rate of one server."""

    def __init__(self, points: Sequence[tuple[float, float, int]]) -> None:
        """`points`: rate, seconds and number of requests of each, by rate."""
        self._rates = [rate for rate, _, _ in points]
        self._reciprocals = _falling([1 / seconds for _, seconds, _ in points], [count for _, _, count in points])

    def at(self, rate: float) -> float:
        """Seconds at a rate up to the highest measured one; below the lowest, those of the lowest."""
        rates, values = self._rates, self._reciprocals
        if rate <= rates[0]:
            return 1 / values[0]
        for low, high, one, other in zip(rates, rates[1:], values, values[1:], strict=False):
            if rate <= high:
                return 1 / (one + (other - one) * (rate - low) / (high - low))
        raise ValueError(f"{rate} is above the highest measured rate {rates[-1]}")

    def highest_within(self, bound_s: float) -> float | None:
        """The highest measured or interpolated rate at which the latency is within the bound; None if there is none."""
        rates, values = self._rates, self._reciprocals
        least = 1 / bound_s
        if values[0] < least:
            return None
        for low, high, one, other in zip(rates, rates[1:], values, values[1:], strict=False):
            if other < least:
                return low + (high - low) * (one - least) / (one - other)
        return rates[-1]


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
    return sorted((_point(found, share) for found in levels.values()), key=lambda point: point.rate)


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
            for name, value_of in _VALUES.items()
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


def plan_capacity(points: Sequence[Point], target_rate: float, objective: Objective, share: float) -> Plan:
    """Plan servers for a rate so that a share of the requests meets each bound. Raises ConfigError where the server
    kept up at fewer than LEAST_POINTS rates, and for a bound of what no answer has."""
    usable = _usable(points)
    if len(usable) < LEAST_POINTS:
        raise ConfigError(
            f"planning capacity: the server kept up at {len(usable)} of the {len(points)} measured rates, expected "
            f"{LEAST_POINTS} or more; measure lower rates, too"
        )
    curves = _curves(usable)
    asked = [name for name in NAMES.values() if getattr(objective, name) is not None]
    if absent := [name for name in asked if name not in curves]:
        raise ConfigError(
            f"planning capacity: the objective {objective} bounds {absent[0]}, which no answer has; measure longer "
            "answers"
        )
    limits = {name: curves[name].highest_within(getattr(objective, name)) for name in asked}
    rates = [rate for rate in limits.values() if rate is not None]
    most = min(rates) if len(rates) == len(limits) else None
    tokens = sum(point.tokens_per_request * point.num_requests for point in usable)
    servers = max(1, math.ceil(target_rate / most - 1e-9)) if most else None
    each = target_rate / servers if servers else usable[0].rate
    return Plan(
        target_rate=target_rate,
        share=share,
        most_rate=most,
        is_measured_end=most == usable[-1].rate,
        servers=servers,
        predicted={name: curve.at(min(each, usable[-1].rate)) for name, curve in curves.items()},
        tokens_per_s=each * tokens / sum(point.num_requests for point in usable),
        points=points,
        checked=check(usable),
    )


def check(usable: Sequence[Point]) -> list[Checked]:
    """Each point but the first and the last, and what a curve without it says of its rate."""
    found = []
    for at, point in enumerate(usable):
        if 0 < at < len(usable) - 1:
            curves = _curves([*usable[:at], *usable[at + 1 :]])
            found.append(Checked(point=point, predicted={name: curve.at(point.rate) for name, curve in curves.items()}))
    return found


def _usable(points: Sequence[Point]) -> list[Point]:
    """The points up to the first at which the server fell behind or too many requests failed."""
    found: list[Point] = []
    for point in points:
        if not point.keeps_up or math.inf in point.latencies.values():
            break
        found.append(point)
    return found


def _curves(points: Sequence[Point]) -> dict[str, Curve]:
    named = [name for name in _VALUES if all(name in point.latencies for point in points)]
    return {
        name: Curve([(point.rate, point.latencies[name], point.num_requests) for point in points]) for name in named
    }


def _falling(values: Sequence[float], weights: Sequence[int]) -> list[float]:
    """The closest values that do not rise: neighbours that do are replaced by their weighted mean (pool adjacent
    violators; Barlow et al., Statistical Inference under Order Restrictions, 1972)."""
    pools: list[tuple[float, int, int]] = []  # mean, weight, number of values
    for value, weight in zip(values, weights, strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (one, a, count), (other, b, more) = pools[-2:]
            pools[-2:] = [((one * a + other * b) / (a + b), a + b, count + more)]
    return [mean for mean, _, count in pools for _ in range(count)]


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan as JSON values."""
    return {
        **{key: value for key, value in vars(plan).items() if key not in ("points", "checked")},
        "rate_of_each": plan.target_rate / plan.servers if plan.servers else None,
        "points": [
            {**vars(point), "latencies": {k: v if math.isfinite(v) else None for k, v in point.latencies.items()}}
            for point in plan.points
        ],
        "checked": [
            {
                "load": one.point.name,
                "predicted": one.predicted,
                "error": {name: one.error(name) for name in one.predicted},
            }
            for one in plan.checked
        ],
    }
