"""What a load is: how many requests are sent and when, and how long prompts and answers are."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from export.errors import ConfigError

MOST_TOKENS = 1 << 24  # largest number of tokens of one prompt or answer that can be asked for
_FIXED = re.compile(r"(\d+)")
_UNIFORM = re.compile(r"(\d+)-(\d+)")
_LOGNORMAL = re.compile(r"lognormal:(\d+),(\d+(?:\.\d+)?),(\d+)")


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """A distribution of numbers of tokens.

    With `sigma` 0, every whole number from `low` to `high` is equally likely. Otherwise the numbers are lognormal with
    the median `low` and the standard deviation `sigma` of the logarithm, and those above `high` count as `high`.
    """

    low: int
    high: int
    sigma: float = 0.0

    def draw(self, source: random.Random) -> int:
        """One number of tokens, at least 1."""
        if not self.sigma:
            return source.randint(self.low, self.high)
        try:
            return max(1, min(self.high, round(source.lognormvariate(math.log(self.low), self.sigma))))
        except OverflowError:  # of a number that a float cannot hold
            return self.high

    def __str__(self) -> str:
        if self.sigma:
            return f"lognormal:{self.low},{self.sigma:g},{self.high}"
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


def read_lengths(text: str, what: str) -> Lengths:
    """Read "64", "32-128" or "lognormal:MEDIAN,SIGMA,MOST". Raises ConfigError; `what` names the value in it."""
    found: Lengths | None = None
    if match := _FIXED.fullmatch(text):
        found = Lengths(low=int(match[1]), high=int(match[1]))
    elif match := _UNIFORM.fullmatch(text):
        found = Lengths(low=int(match[1]), high=int(match[2]))
    elif match := _LOGNORMAL.fullmatch(text):
        median, sigma, most = int(match[1]), float(match[2]), int(match[3])
        found = Lengths(low=median, high=most if sigma else min(median, most), sigma=sigma)
    if found is None or not 1 <= found.low <= found.high <= MOST_TOKENS:
        raise ConfigError(
            f"reading {what}: found {text!r}, expected tokens such as 64, a range such as 32-128, or "
            f"lognormal:MEDIAN,SIGMA,MOST such as lognormal:100,0.8,1000, each from 1 to {MOST_TOKENS}"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Load:
    """When requests are sent.

    Closed loop: `streams` streams, each of which sends its next request when its last answer has ended. Open loop:
    requests arrive at random (a Poisson process) with `rate` requests a second on average, or at the seconds of
    `schedule`, whether or not earlier ones are answered. One of the three is set. The load ends after `requests`
    requests or `duration_s` seconds; one of these is set, too. Raises ConfigError for anything else. With
    `stops_at_error` no request is sent after one has failed.
    """

    streams: int | None = None
    rate: float | None = None
    schedule: tuple[float, ...] | None = None
    requests: int | None = None
    duration_s: float | None = None
    seed: int = 0
    stops_at_error: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}, expected {expected}"
            for name, value, holds, expected in (
                ("the number of streams", self.streams, self.streams is None or self.streams >= 1, "1 or more"),
                ("the rate", self.rate, self.rate is None or 0 < self.rate < math.inf, "requests a second above 0"),
                ("the number of requests", self.requests, self.requests is None or self.requests >= 1, "1 or more"),
                (
                    "the duration", self.duration_s, self.duration_s is None or 0 < self.duration_s < math.inf,
                    "seconds above 0",
                ),
            )
            if not holds
        ]  # fmt: skip
        if [self.streams, self.rate, self.schedule].count(None) != 2:
            problems.append("expected either streams or a rate, or the times of a trace")
        if (self.requests is None) == (self.duration_s is None):
            problems.append("expected either a number of requests or a duration")
        if problems:
            raise ConfigError(f"planning a load: {'; '.join(problems)}")

    @property
    def is_open(self) -> bool:
        """Whether requests are sent when they are due, answered or not."""
        return self.streams is None

    @property
    def kind(self) -> str:
        if not self.is_open:
            return "closed loop"
        return "open loop, Poisson arrivals" if self.schedule is None else "open loop, arrivals of a trace"

    def arrivals_s(self) -> Iterator[float]:
        """The seconds from the start at which requests of an open loop arrive. Those at random have no end."""
        if self.schedule is not None:
            yield from self.schedule
            return
        source, due = random.Random(f"arrivals/{self.seed}"), 0.0
        while True:
            due += source.expovariate(self.rate or math.inf)
            yield due


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling options of every request. None leaves an option to the server."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    ignore_end: bool = False  # whether answers go on after an end token, up to max_tokens


@dataclass(frozen=True, kw_only=True)
class Work:
    """One request to send."""

    prompt: str
    max_tokens: int
    early_after: int | None = None  # tokens after which the client ends it; None if it reads the whole answer
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
