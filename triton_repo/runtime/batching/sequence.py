"""What the engine of sequences knows of a request and of each sequence that answers it."""

from __future__ import annotations

import threading
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from triton_repo.runtime.batching.drafts.ngrams import Ngrams
from triton_repo.runtime.batching.outlet import Outlet
from triton_repo.runtime.sampling import Choice, Sampler

Response = TypeVar("Response")
Written = TypeVar("Written", covariant=True)


class Writer(Protocol[Written]):
    """Chooses and writes the tokens of one sequence."""

    sampler: Sampler
    wants_prompt: bool  # whether it wants the log-probabilities of the prompt's tokens
    num_prompt_tops: int  # of how many of the likeliest tokens at their places it wants them too
    wants_routing: bool  # whether it wants the experts of each token

    def write(self, choice: Choice) -> tuple[Written | None, str]:
        """Take the next token. Returns a response if there is one to send, and the finish reason: "stop", "length", or
        "" while the sequence goes on."""

    def cancel(self) -> Written:
        """The last response of a sequence that nobody waits for."""

    def take_prompt(self, log_probs: Items[float], tops: Items[tuple[tuple[int, float], ...]]) -> None:
        """Take the log-probabilities of some of the prompt's tokens, in their order, from the second token on, and the
        likeliest tokens at their places, where they are wanted."""


@dataclass(kw_only=True, eq=False)
class Request(Generic[Response]):
    """One request: a prompt, and one writer for each sequence that continues it. Two requests are never equal.

    `deadline_s` is when its client stops waiting, on the engine's clock.
    """

    names: frozenset[str]  # names by which a request to stop may name this one: its id, the key of its answer
    prompt_ids: tuple[int, ...]
    most_tokens: int  # new tokens of each sequence
    writers: Items[Writer[Response]]
    outlet: Outlet[Response]
    deadline_s: float | None = None
    request_id: str = ""  # as its client gave it
    awaited: Future[Any] | None = None  # what must be there before it begins, such as its compiled guide
    stopped: threading.Event = field(default_factory=threading.Event)
    arrived_s: float = 0.0  # the rest is the engine's
    begun_s: float | None = None
    first_token_s: float | None = None  # when it was chosen
    num_reused: int | None = None  # tokens of the prompt that the cache had when it was chosen
    num_output: int = 0  # tokens chosen, of all sequences
    num_running: int = 0
    is_gone: bool = False  # whether its client was found to have gone

    @property
    def is_ready(self) -> bool:
        """Whether it may begin. What it awaits may also have failed."""
        return self.awaited is None or (self.awaited.done() and self.awaited.exception() is None)

    @property
    def failure(self) -> BaseException | None:
        """Why what it awaits will not be there."""
        return self.awaited.exception() if self.awaited is not None and self.awaited.done() else None

    @property
    def num_positions(self) -> int:
        """Positions of the cache that each sequence takes at most. The last token is not computed."""
        return len(self.prompt_ids) + self.most_tokens - 1

    @property
    def wants_prompt(self) -> bool:
        """Whether the logits of the whole prompt are wanted, so that each of its tokens must be computed."""
        return any(writer.wants_prompt for writer in self.writers)

    @property
    def wants_routing(self) -> bool:
        """Whether the experts of its tokens are wanted."""
        return any(writer.wants_routing for writer in self.writers)


@dataclass(kw_only=True, eq=False)
class Sequence:
    """A sequence that runs: its tokens, its slot, its sampler and its writer."""

    request: Request[Any]
    writer: Writer[Any]
    slot: int
    source: Sequence | None = None  # the sequence of the same request that computes the prompt for this one
    prefix_slot: int | None = None  # a slot that holds or will hold the beginning of the prompt, which is to be copied
    num_computed: int = 0  # tokens whose keys and values are in the slot
    num_reused: int = 0  # those of them that were not computed for this sequence
    tokens: list[int] = field(default_factory=list)  # the prompt's, and then those that were chosen
    token_s: float = 0.0  # when the last one was chosen
    is_held: bool = False  # whether its last logits wait for a guide's mask, so that it computes nothing
    ngrams: Ngrams | None = None  # its text's, once drafts of it are looked for

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)

    @property
    def num_left(self) -> int:
        """Tokens of the prompt that are not computed yet and that nobody else computes. At 0 the sequence gets
        at least one token in a step."""
        return 0 if self.is_waiting else max(0, len(self.request.prompt_ids) - self.num_computed)

    @property
    def has_chosen(self) -> bool:
        """Whether it has a token that is not its prompt's."""
        return len(self.tokens) > len(self.request.prompt_ids)

    @property
    def is_waiting(self) -> bool:
        """Whether it computes nothing, since it takes its prompt, or the beginning of it, over from another slot."""
        return self.source is not None or self.prefix_slot is not None
