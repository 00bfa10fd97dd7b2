"""The gateway's own metrics, in Prometheus's text format."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from clients.gateway.pool import Triton

_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
# A path that no endpoint has counts under one name, so that a scan of paths makes no series of its own.
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/models", "/tokenize", "/detokenize",
         "/health", "/metrics", "/")  # fmt: skip


@dataclass
class Histogram:
    """Counts of seconds by their upper bounds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS_S) + 1))
    sum_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(_BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def lines(self, name: str) -> Iterator[str]:
        so_far = 0
        for bound, count in zip((*map(str, _BOUNDS_S), "+Inf"), self.counts, strict=True):
            so_far += count
            yield f'{name}_bucket{{le="{bound}"}} {so_far}'
        yield f"{name}_sum {self.sum_s:.6f}"
        yield f"{name}_count {so_far}"


@dataclass
class Metrics:
    """Numbers that the gateway only adds to."""

    in_flight: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: Histogram = field(default_factory=Histogram)
    first_token: Histogram = field(default_factory=Histogram)

    def ended(
        self,
        path: str,
        status: int,
        total_s: float,
        first_token_s: float | None,
        prompt_tokens: int | None,
        output_tokens: int | None,
    ) -> None:
        """Count a request that has ended."""
        self.requests[path if path in PATHS else "other", status] += 1
        self.seconds.add(total_s)
        if first_token_s is not None:
            self.first_token.add(first_token_s)
        self.prompt_tokens += prompt_tokens or 0
        self.output_tokens += output_tokens or 0

    def retried(self) -> None:
        """Count a request that went to another Triton."""
        self.retries += 1

    def text(self, tritons: list[Triton]) -> str:
        """All metrics, in Prometheus's text format."""
        return "\n".join([*self._lines(tritons), ""])

    def _lines(self, tritons: list[Triton]) -> Iterator[str]:
        yield from _head("requests_total", "counter", "Requests that have ended, by path and HTTP status.")
        for (path, status), count in sorted(self.requests.items()):
            yield f'moeship_gateway_requests_total{{path="{path}",status="{status}"}} {count}'
        for name, kind, what, value in (
            ("in_flight", "gauge", "Requests in flight, without probes and scrapes.", self.in_flight),
            ("retries_total", "counter", "Requests that were sent to another server.", self.retries),
            ("prompt_tokens_total", "counter", "Tokens of prompts that were answered.", self.prompt_tokens),
            ("output_tokens_total", "counter", "Tokens of answers.", self.output_tokens),
        ):
            yield from _head(name, kind, what)
            yield f"moeship_gateway_{name} {value}"
        yield from _head("server_up", "gauge", "Whether a server behind the gateway answers.")
        for place, triton in enumerate(tritons):
            yield f'moeship_gateway_server_up{{server="{place}"}} {int(triton.is_up)}'
        yield from _head("server_in_flight", "gauge", "Requests that a server behind the gateway has of it.")
        for place, triton in enumerate(tritons):
            yield f'moeship_gateway_server_in_flight{{server="{place}"}} {triton.in_flight}'
        yield from _head("request_seconds", "histogram", "Time from a request until its answer's end.")
        yield from self.seconds.lines("moeship_gateway_request_seconds")
        yield from _head("first_token_seconds", "histogram", "Time from a request until its first token is sent.")
        yield from self.first_token.lines("moeship_gateway_first_token_seconds")


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP moeship_gateway_{name} {what}"
    yield f"# TYPE moeship_gateway_{name} {kind}"
