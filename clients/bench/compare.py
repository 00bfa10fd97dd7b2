"""Compares two load tests: each figure of B over that of A, with an interval that covers the chance within the tests.

Intervals are of a block bootstrap. Requests that are near in time are alike, as a queue that is long for one is long
for the next; so not requests are drawn anew but slices of the test, with all requests that were due in them (Künsch,
The Jackknife and the Bootstrap for General Stationary Observations, 1989). The percentiles of the interval are a little
wider than 2.5 % and 97.5 %, because few slices vary too little (Hesterberg, What Teachers Should Know about the
Bootstrap, 2015, section 5.2: with n slices, the normal quantile of t(n-1) times the root of n/(n-1)).

A queue near its limit is long for longer than a slice, so neighbouring slices are alike, too. As far as the numbers of
slow requests in them follow one another, intervals of percentiles are wider: the variance of a mean is that of
independent slices times (1 + phi) / (1 - phi), where phi is the correlation of neighbours (of an autoregressive process
of order one), whose estimate is too low by (1 + 3 phi) / n (Marriott and Pope, Bias in the Estimation of
Autocorrelations, 1954).

What differs from one run to the next, such as other load on the machine, is in no interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clients.bench.kept import Level, LoadTest
from clients.bench.records import Record
from export.errors import ConfigError, names

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

SLICES = 20
DRAWS = 1000
_SHARE_LEFT_OUT = 0.01  # difference of the shares of requests without an answer that is told
_MOST_AT_ONCE = 1 << 22  # values that are drawn at a time
# Of 20 slices: t(19) has 97.5 % below 2.093; 2.093 * sqrt(20/19) = 2.147, above which a normal value lies with 1.59 %.
_TAIL = 0.0159
_MOST_ALIKE = 0.9  # of neighbouring slices; what is above cannot be told from 20 of them
LEAST_BEYOND = 5  # requests above a percentile, or there is no interval
_LATENCIES: tuple[tuple[str, Callable[[Record], float | None]], ...] = (
    ("first token, s", lambda record: record.first_token_s),
    ("between tokens, mean of an answer, s", lambda record: record.between_tokens_s),
    ("whole answer, s", lambda record: record.answer_s),
)
_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One figure of a load in both tests. `ratio` is B over A; `low` and `high` are its interval of 95 %, None where
    there are too few requests for one. `better` says whether a larger figure is better (1) or a smaller one (-1)."""

    figure: str
    a: float | None
    b: float | None
    better: int
    low: float | None = None
    high: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.b / self.a if self.a and self.b is not None else None

    @property
    def verdict(self) -> str:
        """What the interval says of B."""
        if self.low is None or self.high is None:
            return "too few requests to tell"
        if self.low <= 1 <= self.high:
            return "no difference shown"
        return "better" if (self.low > 1) == (self.better > 0) else "worse"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A load that both tests have: its differences, and what else was not the same."""

    name: str
    differences: Sequence[Difference]
    unlike: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        differences = [
            {**vars(one), "ratio": one.ratio, "verdict": one.verdict, "interval": 0.95} for one in self.differences
        ]
        return {"load": self.name, "unlike": list(self.unlike), "differences": differences}


def compare(a: LoadTest, b: LoadTest, seed: int = 0) -> list[Compared]:
    """Compare the loads that have one name. Raises ConfigError where there is none."""
    of_b = _by_name(b)
    pairs = [(level, of_b[name]) for name, level in _by_name(a).items() if name in of_b]
    if not pairs:
        has_a, has_b = (names(level.name for level in test.levels) for test in (a, b))
        raise ConfigError(
            f"comparing load tests: A has the loads {has_a}, B has {has_b}; measure both with the same --streams or "
            "--rate"
        )
    abouts = _unlike_tests(a, b)
    return [_compare(one, other, seed, abouts) for one, other in pairs]


def _by_name(test: LoadTest) -> dict[tuple[str, int], Level]:
    """The loads by their names, and of those of one name by their turns: `--rate 2,4,2,4` has two of each."""
    turns = Counter[str]()
    found = {}
    for level in test.levels:
        found[level.name, turns[level.name]] = level
        turns[level.name] += 1
    return found


def unpaired(a: LoadTest, b: LoadTest) -> tuple[list[str], list[str]]:
    """The names of the loads that only A has, and of those that only B has."""
    of_a, of_b = (_by_name(test) for test in (a, b))
    return [key[0] for key in of_a if key not in of_b], [key[0] for key in of_b if key not in of_a]


def _compare(a: Level, b: Level, seed: int, unlike: Sequence[str]) -> Compared:
    import numpy as np

    draws = np.random.default_rng(seed)
    sides = [Side(level, draws.multinomial(SLICES, [1 / SLICES] * SLICES, size=DRAWS)) for level in (a, b)]
    found = []
    for figure, value_of in (
        ("output tokens a second", Side.tokens), ("answers a second", Side.answers),
    ):  # fmt: skip
        at, drawn = zip(*(value_of(side) for side in sides), strict=True)
        found.append(_difference(figure, at, drawn, better=1))
    for what, value_of_record in _LATENCIES:
        samples = [side.samples(value_of_record) for side in sides]
        for name, share in _SHARES.items():
            at, drawn = zip(*(quantile(sample, side, share) for sample, side in zip(samples, sides, strict=True)),
                            strict=True)  # fmt: skip
            found.append(_difference(f"{what}: {name}", at, drawn, better=-1))
    return Compared(name=a.name, differences=found, unlike=[*unlike, *_unlike(a, b)])


def _difference(figure: str, at: Sequence[float | None], drawn: Sequence[Floats | None], *, better: int) -> Difference:
    import numpy as np

    one, other = drawn
    low = high = None
    if one is not None and other is not None:
        known = (one > 0) & np.isfinite(one) & np.isfinite(other)
        if known.mean() > 0.99:
            low, high = (float(value) for value in np.quantile(other[known] / one[known], [_TAIL, 1 - _TAIL]))
    return Difference(figure=figure, a=at[0], b=at[1], better=better, low=low, high=high)


class Side:
    """One of the two loads, cut into slices of time. `weights` says how often each draw takes each slice."""

    def __init__(self, level: Level, weights: npt.NDArray[np.int64]) -> None:
        self.records, self.weights = level.records, weights
        self._window = float(level.report["window_s"]) or 1e-9

    def slices(self, times: Sequence[float]) -> npt.NDArray[np.int64]:
        """The slice of each time; what lies behind the window counts to the last."""
        import numpy as np

        return np.minimum((np.asarray(times) / self._window * SLICES).astype(np.int64), SLICES - 1)

    def tokens(self) -> tuple[float | None, Floats | None]:
        """Tokens a second in the window, and those of each draw."""
        return self._rate([arrival for record in self.records for arrival in record.arrivals])

    def answers(self) -> tuple[float | None, Floats | None]:
        """Whole answers a second in the window, and those of each draw."""
        return self._rate([(record.end_s or 0.0, 1) for record in self.records if record.is_answered])

    def _rate(self, counted: Sequence[tuple[float, int]]) -> tuple[float | None, Floats | None]:
        import numpy as np

        counted = [(at, count) for at, count in counted if at <= self._window]
        if not counted:
            return 0.0, None
        times, counts = zip(*counted, strict=True)
        by_slice = np.bincount(self.slices(times), weights=counts, minlength=SLICES)
        drawn = self.weights @ by_slice / self._window
        return float(by_slice.sum() / self._window), drawn if len(counted) >= SLICES else None

    def samples(self, value_of: Callable[[Record], float | None]) -> tuple[Floats, npt.NDArray[np.int64]]:
        """The values of the requests that have one, in order, and the slice in which each was due."""
        import numpy as np

        found = sorted((value, record.due_s) for record in self.records if (value := value_of(record)) is not None)
        values = np.array([value for value, _ in found])
        return values, self.slices([due for _, due in found]) if found else np.zeros(0, np.int64)


def quantile(
    samples: tuple[Floats, npt.NDArray[np.int64]], side: Side, share: float
) -> tuple[float | None, Floats | None]:
    """A percentile of the samples, and that of each draw: the smallest value that at least the share does not
    exceed, as many times as far from the percentile as neighbouring slices make it."""
    import numpy as np

    values, slices = samples
    if not len(values):
        return None, None
    at = float(np.quantile(values, share))
    if len(values) * (1 - share) < LEAST_BEYOND:
        return at, None
    drawn = []
    rows = max(1, _MOST_AT_ONCE // len(values))
    for begin in range(0, len(side.weights), rows):
        below = np.cumsum(side.weights[begin : begin + rows, slices], axis=1, dtype=np.int32)
        places = (below < share * below[:, -1:]).sum(axis=1)
        drawn.append(np.where(below[:, -1] > 0, values[np.minimum(places, len(values) - 1)], np.nan))
    whole = np.concatenate(drawn)
    return at, at * (whole / at) ** _widening(values > at, slices, 1 - share) if at > 0 else whole


def _widening(is_slow: npt.NDArray[np.bool_], slices: npt.NDArray[np.int64], share: float) -> float:
    """How many times as far a percentile varies as it would if slices were independent. `is_slow` says which requests
    exceed it, on average a `share` of them."""
    import numpy as np

    slow = np.bincount(slices, weights=is_slow - share, minlength=SLICES)
    slow -= slow.mean()
    total = float(slow @ slow)
    if not total:
        return 1.0
    alike = (SLICES * float(slow[1:] @ slow[:-1]) / total + 1) / (SLICES - 3)
    if alike < 1 / SLICES**0.5:  # one standard error of it
        return 1.0
    alike = min(alike, _MOST_ALIKE)
    return float(np.sqrt((1 + alike) / (1 - alike)))


def _unlike(a: Level, b: Level) -> list[str]:
    """What the two loads were told differently, apart from the seed."""
    one, other = a.report["load"], b.report["load"]
    keys = [key for key in {**one, **other} if key != "seed"]
    found = [f"{key}: A {one.get(key)}, B {other.get(key)}" for key in keys if one.get(key) != other.get(key)]
    early = [(side, level.report["ended_early"]) for side, level in (("A", a), ("B", b))]
    found += [f"{side} ended early: {why}" for side, why in early if why]
    # A server that fails requests, or leaves them waiting at the end, looks quick by those that it answers.
    counts = [(level.report["requests"], len(level.records)) for level in (a, b)]
    for key, what in (("failed", "failed"), ("cut_at_the_end", "unanswered at the end")):
        (few, of_a), (many, of_b) = ((requests[key], sent) for requests, sent in counts)
        if abs(few / (of_a or 1) - many / (of_b or 1)) > _SHARE_LEFT_OUT:
            found.append(f"{what}: A {few} of {of_a} requests, B {many} of {of_b}; no time of answers has them")
    return found


def _unlike_tests(a: LoadTest, b: LoadTest) -> list[str]:
    """What was measured in the two tests, where that is not the same."""
    found = [(key, a.about.get(key), b.about.get(key)) for key in ("model", "endpoint")]
    return [f"{key}: A {one}, B {other}" for key, one, other in found if one != other]
