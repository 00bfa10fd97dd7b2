"""Counts what an engine of sequences does, for metrics. Times are in seconds.

One thread steps and counts; readers may see a count that is one step old. Any thread may refuse and end requests.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

# How a request that was taken on ended. The last five are early ends.
ENDS = ("stop", "length", "stopped", "disconnected", "deadline", "stopping", "failed")
# Why a request was refused, before it began.
REFUSALS = ("queue_full", "waited_too_long", "deadline", "stopping", "too_large", "invalid", "failed")
# Upper bounds of the histograms' buckets.
_WAITS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_STEPS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Histogram:
    """How often values fell into each bucket: `counts[i]` of those up to `bounds[i]`, and the last of all others."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass(kw_only=True)
class Stats:
    """Totals since the start."""

    steps: int = 0
    prompt_tokens: int = 0  # computed of prompts
    output_tokens: int = 0  # written
    drafted_tokens: int = 0  # computed before they were chosen
    accepted_tokens: int = 0  # of them, that were chosen then
    prefix_asked_tokens: int = 0  # of the prompts of requests that got a token
    prefix_reused_tokens: int = 0  # of them, that were in the cache and were not computed
    prefix_hits: int = 0  # requests with such tokens
    refusals: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REFUSALS, 0)))
    ends: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(ENDS, 0)))
    # Tokens of the sampled steps that chose each expert, [M, E] by layer with experts and by the checkpoint's order.
    expert_tokens: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    queue_s: Histogram = field(default_factory=lambda: Histogram(_WAITS_S))
    step_s: Histogram = field(default_factory=lambda: Histogram(_STEPS_S))
    first_token_s: Histogram = field(default_factory=lambda: Histogram(_WAITS_S))  # since the request arrived
    between_tokens_s: Histogram = field(default_factory=lambda: Histogram(_STEPS_S))
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)  # of the two counters

    def refused(self, reason: str) -> None:
        with self._lock:
            self.refusals[reason] += 1

    def begun(self, waited_s: float) -> None:
        self.queue_s.add(waited_s)

    def stepped(self, seconds: float, prompt_tokens: int, drafted_tokens: int) -> None:
        self.steps += 1
        self.drafted_tokens += drafted_tokens
        self.prompt_tokens += prompt_tokens
        self.step_s.add(seconds)

    def prompted(self, num_tokens: int, num_reused: int) -> None:
        """A request got its first token, whose prompt has so many tokens and began with so many of the cache's."""
        self.prefix_asked_tokens += num_tokens
        self.prefix_reused_tokens += num_reused
        self.prefix_hits += num_reused > 0

    def wrote(self, seconds: float, *, first: bool) -> None:
        self.output_tokens += 1
        (self.first_token_s if first else self.between_tokens_s).add(seconds)

    def ended(self, how: str) -> None:
        with self._lock:
            self.ends[how] += 1
