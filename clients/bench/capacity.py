"""Plans how many servers a rate of requests needs, from load tests of one server.

Each open-loop load is a point: the rate at which requests arrived, and a percentile of each latency. Between points the
reciprocal of a latency is interpolated linearly. That is exact for the mean of a queue with exponential services
(M/M/1: 1/T = c - r), and a little too high a latency where services vary less. Latencies do not fall when the rate
rises, so points that say otherwise, by chance, are pooled (isotonic regression). Nothing is extrapolated: above the
highest measured rate nothing is known.

A percentile of some hundreds of requests is itself uncertain, and so is what is predicted of it. Curves through points
that are drawn anew, each with its standard error (clients/bench/points.py), give the intervals of predictions.

N servers get an Nth of the rate each. Requests that are shared out at random stay a Poisson process; shared in turn
they are more even, and the plan is then on the safe side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clients.bench.objective import NAMES, Objective
from clients.bench.points import LEAST_POINTS, VALUES, Point
from clients.bench.report import percentile
from export.errors import ConfigError

CERTAIN = 0.15  # a prediction whose interval reaches further than this part of it is called uncertain
_DRAWS = 400
_Z = 1.96  # within so many standard deviations lie 95 % of a normal distribution


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A measured point, and what the others say of it. `chance`: how far apart the two may be by chance alone, as a
    part of the measured one (95 %)."""

    point: Point
    predicted: Mapping[str, float]
    chance: Mapping[str, float]

    def error(self, name: str) -> float:
        """Predicted over measured, less one."""
        return self.predicted[name] / self.point.latencies[name] - 1

    def is_certain(self, name: str) -> bool:
        """Whether chance is small enough for the difference to say something of the prediction."""
        return self.chance[name] <= CERTAIN


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many servers a rate needs. `most_rate` is the highest rate of one server at which the objective holds; it is
    None where it holds at no measured rate. `is_measured_end`: the objective still holds at the highest measured rate
    at which the server kept up. `predicted_within` has intervals of 95 %; `servers_within` is that of `servers`, whose
    upper end is None where it may be that no number is enough."""

    target_rate: float
    share: float
    most_rate: float | None
    is_measured_end: bool
    servers: int | None
    servers_within: tuple[int, int | None] | None
    predicted: Mapping[str, float]
    predicted_within: Mapping[str, tuple[float, float]]
    tokens_per_s: float
    points: Sequence[Point]
    checked: Sequence[Checked]

    def is_certain(self, name: str) -> bool:
        """Whether the interval of a prediction is narrow enough to plan with."""
        low, high = self.predicted_within[name]
        return max(self.predicted[name] / low, high / self.predicted[name]) <= 1 + CERTAIN

    def times_longer(self, name: str) -> int:
        """How many times as many requests would make a prediction certain: its error falls with their root."""
        low, high = self.predicted_within[name]
        return math.ceil((math.log(high / low) / 2 / math.log1p(CERTAIN)) ** 2)


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


def plan_capacity(points: Sequence[Point], target_rate: float, objective: Objective, share: float) -> Plan:
    """Plan servers for a rate so that a share of the requests meets each bound. Raises ConfigError where the server
    kept up at fewer than LEAST_POINTS rates, and for a bound of what no answer has."""
    usable = usable_points(points)
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
    rate_of_each = min(each, usable[-1].rate)
    return Plan(
        target_rate=target_rate,
        share=share,
        most_rate=most,
        is_measured_end=most == usable[-1].rate,
        servers=servers,
        servers_within=_servers_within(usable, asked, objective, target_rate) if servers else None,
        predicted={name: curve.at(rate_of_each) for name, curve in curves.items()},
        predicted_within={name: _middle(_at(usable, name, rate_of_each)) for name in curves},
        tokens_per_s=each * tokens / sum(point.num_requests for point in usable),
        points=points,
        checked=check(usable),
    )


def check(usable: Sequence[Point]) -> list[Checked]:
    """Each point but the first and the last, and what a curve without it says of its rate."""
    found = []
    for at, point in enumerate(usable):
        if 0 < at < len(usable) - 1:
            others = [*usable[:at], *usable[at + 1 :]]
            curves = _curves(others)
            found.append(
                Checked(
                    point=point,
                    predicted={name: curve.at(point.rate) for name, curve in curves.items()},
                    chance={name: _chance(others, point, name) for name in curves},
                )
            )
    return found


def _chance(others: Sequence[Point], point: Point, name: str) -> float:
    """How far a prediction and the measured value may be apart by chance alone, as a part (95 %)."""
    logs = [math.log(value) for value in _at(others, name, point.rate)]
    mean = sum(logs) / len(logs)
    variance = sum((value - mean) ** 2 for value in logs) / len(logs) + point.errors.get(name, 0.0) ** 2
    return math.expm1(_Z * math.sqrt(variance))


def _drawn_curves(points: Sequence[Point], name: str) -> list[Curve]:
    """Curves that other measurements of the points would have given: each latency lognormal around the measured one.
    The same at each call."""
    import numpy as np

    noise = np.random.default_rng(0).standard_normal((_DRAWS, len(points)))
    errors = np.array([point.errors.get(name, 0.0) for point in points])
    drawn = np.array([point.latencies[name] for point in points]) * np.exp(noise * errors)
    return [
        Curve([(point.rate, value, point.num_requests) for point, value in zip(points, row, strict=True)])
        for row in drawn.tolist()
    ]


def _at(points: Sequence[Point], name: str, rate: float) -> list[float]:
    return [curve.at(rate) for curve in _drawn_curves(points, name)]


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """The interval that has 95 % of the values in its middle."""
    ordered = sorted(values)
    return percentile(ordered, 0.025), percentile(ordered, 0.975)


def _servers_within(
    points: Sequence[Point], asked: Sequence[str], objective: Objective, target_rate: float
) -> tuple[int, int | None]:
    """The interval of the number of servers."""
    limits = [
        [curve.highest_within(getattr(objective, name)) or 0.0 for curve in _drawn_curves(points, name)]
        for name in asked
    ]
    low, high = _middle([min(each) for each in zip(*limits, strict=True)])
    most = max(1, math.ceil(target_rate / low - 1e-9)) if low > 0 else None
    return (max(1, math.ceil(target_rate / high - 1e-9)) if high > 0 else 1), most


def usable_points(points: Sequence[Point]) -> list[Point]:
    """The points up to the first at which the server fell behind or too many requests failed."""
    found: list[Point] = []
    for point in points:
        if not point.keeps_up or math.inf in point.latencies.values():
            break
        found.append(point)
    return found


def _curves(points: Sequence[Point]) -> dict[str, Curve]:
    named = [name for name in VALUES if all(name in point.latencies for point in points)]
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
                "chance": one.chance,
            }
            for one in plan.checked
        ],
    }
