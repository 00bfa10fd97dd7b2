"""What is recorded of each request. All times are in seconds from the start of the measured window."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from clients.bench.load import Work


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What one message of a server brought. Numbers of tokens in all are None where the message has none. `guessed`:
    the message does not say how many tokens it has, and counts as one."""

    tokens: int = 0
    guessed: bool = False
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
    guessed: bool = False  # messages did not say how many tokens they had

    def settle(self) -> None:
        """Share the server's number of tokens of the whole answer among its messages, where they said none: as evenly
        as whole numbers can be, at least one each. Does nothing where the server's number is smaller than theirs."""
        total, messages = self.num_output_tokens, len(self.arrivals)
        if not (self.guessed and self.is_answered and messages and total is not None and total > self.num_tokens):
            return
        ends = [total * turn // messages for turn in range(messages + 1)]
        self.arrivals = [
            (at, after - before) for (at, _), before, after in zip(self.arrivals, ends, ends[1:], strict=False)
        ]

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

    @property
    def between_tokens_s(self) -> float | None:
        """Mean seconds between two tokens of the answer: from the first message with tokens to the last, over the
        tokens that came after the first message."""
        later = self.num_tokens - self.arrivals[0][1] if self.arrivals else 0
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / later if later else None

    @property
    def answer_s(self) -> float | None:
        """Seconds from when the request was due to the end of its whole answer."""
        return self.end_s - self.due_s if self.is_answered and self.end_s is not None else None

    def gaps_s(self) -> list[tuple[float, int]]:
        """Seconds between a message with tokens and the one before, and the number of tokens of the later one."""
        times = self.arrivals
        return [(times[at][0] - times[at - 1][0], times[at][1]) for at in range(1, len(times))]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A load that was applied. `window_s` is the time for which rates are computed. `ended` says why the load ended
    before it was whole; None if it was."""

    records: list[Record]
    window_s: float
    cpu_s: float  # processor time of the generator's process in the window
    counting: str
    ended: str | None = None
