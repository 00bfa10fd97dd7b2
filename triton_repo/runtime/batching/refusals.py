"""The errors of requests that an engine of sequences does not compute."""

from __future__ import annotations

from typing import Any

from triton_repo.errors import RequestError
from triton_repo.runtime.batching.memory.slots import Slots
from triton_repo.runtime.batching.sequence import Request


def too_large(request: Request[Any], slots: Slots) -> RequestError | None:
    """The error of a request that could not begin on an idle server either; None if it could."""
    if len(request.writers) > slots.num_slots:
        return RequestError(
            f"reading the request: num_return_sequences: found {len(request.writers)}, expected at most "
            f"{slots.num_slots}, the sequences that this server computes at a time; ask for fewer"
        )
    most = slots.most_positions(len(request.writers))
    if request.num_positions > most:
        return RequestError(
            f"reading the request: prompt and max_tokens of {request.num_positions + 1} tokens for "
            f"{len(request.writers)} answers exceed the memory of this server, which has room for {most + 1} each; "
            "ask for fewer tokens or answers"
        )
    return None


def overloaded(problem: str, num_waiting: int, num_slots: int, answer_s: float) -> RequestError:
    """The error of a request for which there is no room or no time. `answer_s` is how long a sequence runs, on
    average: by that and the queue the client is told when to send the request again."""
    seconds = max(1, round((1 + num_waiting / num_slots) * answer_s))
    return RequestError(
        f"answering the request: {problem} on this server; send it again in about {seconds} s, or to another server",
        kind="UNAVAILABLE",
    )


def too_late() -> RequestError:
    """The error of a request whose own deadline passed while it waited."""
    return RequestError(
        "answering the request: the time that it allows passed while it waited for its turn; allow more, or send it to "
        "another server",
        kind="UNAVAILABLE",
    )


def unready(seconds: float) -> RequestError:
    """The error of a request whose guide was not compiled in time."""
    return RequestError(
        f"compiling the guide: it was not done within {seconds:g} s; send a simpler one, or send it again where this "
        "server compiles others"
    )


def as_exception(error: BaseException | None) -> Exception:
    """An error that a client can be sent."""
    return error if isinstance(error, Exception) else RequestError(f"compiling the guide: it failed ({error!r})")
