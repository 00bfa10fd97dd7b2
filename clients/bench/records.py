"""What is recorded of each request. All times are in seconds from the start of the measured window."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from clients.bench.load import Work


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What one message of a server brought. Numbers of tokens in all are None where the message has none."""

    tokens: int = 0
    finish_reason: str | None = None
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None


class Target(Protocol):
    """A server as the generator uses it."""

    counting: str  # how tokens are counted, for the report

    def answer(self, work: Work) -> AsyncGenerator[Arrival, None]:
        """Send one request and yield what arrives. Closing the generator ends the request. Raises ClientError."""


@dataclass(kw_only=True)
class Record:
    """One request. `arrivals` are the messages that brought tokens: the time and the number of tokens of each."""

    index: int
    stream: int  # number of the closed loop's stream; in an open loop the number of the request
    due_s: float  # when it should have been sent: in an open loop when it arrived, else when it was sent
    sent_s: float
    max_tokens: int
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    end_s: float | None = None
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None  # by the server's own count
    finish_reason: str | None = None
    ended_early: bool = False  # by the client, because the load asks for that
    cut: bool = False  # by the end of the load's duration
    error: str | None = None  # class of the error
    status: str | None = None  # gRPC status or HTTP status of the error
    message: str | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that arrived."""
        return sum(tokens for _, tokens in self.arrivals)

    @property
    def is_answered(self) -> bool:
        """Whether the whole answer came."""
        return self.end_s is not None and not (self.ended_early or self.cut or self.error)

    @property
    def first_token_s(self) -> float | None:
        """Seconds from when the request was due to its first token."""
        return self.arrivals[0][0] - self.due_s if self.arrivals else None

    def gaps_s(self) -> list[tuple[float, int]]:
        """Seconds between a message with tokens and the one before, and the number of tokens of the later one."""
        times = self.arrivals
        return [(times[at][0] - times[at - 1][0], times[at][1]) for at in range(1, len(times))]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A load that was applied. `window_s` is the time for which rates are computed."""

    records: list[Record]
    window_s: float
    cpu_s: float  # processor time of the generator's process in the window
    counting: str
