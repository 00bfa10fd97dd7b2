"""Stand-ins with which an engine of sequences computes in simulated time: a clock, a session whose logits are a hash
of the tokens that a slot holds, its cache, and clients that record what they are sent.

What a client must get is worked out by `alone`, which knows neither slots nor steps: the hash of the tokens so far, the
sampler, the next token.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from triton_repo.errors import RequestError
from triton_repo.runtime.batching.engine import SequenceEngine
from triton_repo.runtime.batching.outlet import Outlet
from triton_repo.runtime.batching.sequence import Request
from triton_repo.runtime.options import SamplingOptions, SamplingPlan
from triton_repo.runtime.sampling import Choice, Sampler
from trt_build.ort.session import PREFILL_CHUNK_TOKENS
from trt_build.ort.step_call import Row

Floats = npt.NDArray[np.float32]

VOCABULARY = 48  # ids of the engine, all of them the tokenizer's
END_ID = 0
_PAGE_POSITIONS = 16
_PAGE_BYTES = 1000
_TABLE = np.random.default_rng(5).normal(size=(256, VOCABULARY)).astype(np.float32)


class BrokenInvariantError(BaseException):
    """Not an Exception, since the engine goes on after those."""


def require(holds: bool, what: str, *shown: object) -> None:
    if not holds:
        raise BrokenInvariantError(what + "".join(f" {value!r}" for value in shown))


def logits_of(tokens: bytes, salt: int, broken_one_in: int = 0, surprise_one_in: int = 1) -> Floats:
    """Logits [V]; NaN after one in so many texts. All tokens before decide them after one in `surprise_one_in` texts,
    and only the last one after the others, whose greedy continuations repeat themselves therefore."""
    hashed = zlib.crc32(tokens, salt)
    chosen = zlib.crc32(tokens[-1:], salt) if (hashed >> 20) % surprise_one_in else hashed
    logits = _TABLE[chosen & 255].copy()
    logits[(chosen >> 8) % VOCABULARY] += 3
    if broken_one_in and (hashed >> 16) % broken_one_in == 0:
        logits[7] = np.nan
    return logits


class Clock:
    """Seconds of simulated time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class StandInCache:
    """What `trt_build.ort.cache.Cache` tells of itself, over slots that hold token ids."""

    def __init__(self, slots: int, positions: int, *, can_copy: bool = True) -> None:
        self.can_copy = can_copy
        self.num_slots, self.positions = slots, positions
        self.lengths = [0] * slots
        self.held = [bytearray() for _ in range(slots)]
        self.touched = [0] * slots  # positions that were written since the slot's memory was given back

    def bytes_of(self, positions: int) -> int:
        return (-(-positions // _PAGE_POSITIONS) + 1) * _PAGE_BYTES if positions else 0

    @property
    def touched_bytes(self) -> int:
        """What the slots have in memory indeed."""
        return sum(self.bytes_of(positions) for positions in self.touched)

    def append(self, slot: int, tokens: Sequence[int]) -> None:
        self.held[slot] += bytes(tokens)
        self.write(slot, len(self.held[slot]))
        self.lengths[slot] = len(self.held[slot])

    def write(self, slot: int, positions: int) -> None:
        self.touched[slot] = max(self.touched[slot], positions)

    def shorten(self, slot: int, length: int) -> None:
        require(0 <= length <= self.lengths[slot], "shortened to more than a slot holds", slot, length)
        self.lengths[slot] = length
        del self.held[slot][length:]

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        length = self.lengths[source] if length is None else length
        require(self.can_copy, "slots that cannot be copied were")
        require(self.lengths[target] <= length <= self.lengths[source], "copied more than a slot holds", source, length)
        require(self.held[source].startswith(self.held[target]), "other tokens are in the slot that is copied to")
        self.held[target] = self.held[source][:length]
        self.lengths[target] = length
        self.write(target, length)

    def release(self, slot: int, length: int = 0) -> None:
        self.shorten(slot, length)
        self.touched[slot] = length


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of a step: for itself, for each token of a prompt and for each row. Of every `period` steps the second
    half take `slowdown` times as long."""

    step_s: float = 0.07
    prompt_token_s: float = 0.0126
    row_s: float = 0.0
    slowdown: float = 1.0
    period: int = 10

    def seconds(self, prompt_tokens: int, rows: int, step: int) -> float:
        factor = self.slowdown if step % self.period >= self.period / 2 else 1.0
        return factor * (self.step_s + self.prompt_token_s * prompt_tokens + self.row_s * rows)


class StandInSession:
    """Computes steps in simulated time. `before` is called with the rows of each step, `advance` with its seconds, and
    `fails` says what a step does: None computes it, a number raises an error after so many of its rows."""

    def __init__(
        self, cost: Cost, *, salt: int = 0, broken_one_in: int = 0, surprise_one_in: int = 1,
        advance: Callable[[float], object] = lambda _: None,
    ) -> None:  # fmt: skip
        self.cost, self._advance = cost, advance
        self._text = salt, broken_one_in, surprise_one_in
        self.before: Callable[[Sequence[Row]], object] = lambda _: None
        self.fails: Callable[[Sequence[Row]], int | None] = lambda _: None
        self.num_steps = 0

    def step(self, cache: StandInCache, rows: Sequence[Row]) -> Floats:
        self.before(rows)
        _check_rows(cache, rows)
        # The last token of an answer costs what its row does, and those of its draft as much as a prompt's.
        tokens = sum(len(row.token_ids) - (row.num_logits == len(row.token_ids)) for row in rows)
        self._advance(self.cost.seconds(tokens, len(rows), self.num_steps))
        self.num_steps += 1
        done = self.fails(rows)
        logits = []
        for number, row in enumerate(rows):
            if number == done:
                for other in rows[number:]:  # written to, but not counted
                    cache.write(other.slot, cache.lengths[other.slot] + len(other.token_ids))
                raise OSError("the engine failed")
            start = cache.lengths[row.slot]
            cache.append(row.slot, row.token_ids)
            stop = cache.lengths[row.slot]
            for end in range(stop - row.num_logits + 1, stop + 1):
                require(end > start, "logits of a token that the row does not have", row)
                logits.append(logits_of(bytes(cache.held[row.slot][:end]), *self._text))
        return np.array(logits, dtype=np.float32).reshape(-1, VOCABULARY)


def _check_rows(cache: StandInCache, rows: Sequence[Row]) -> None:
    """What `trt_build.ort.session.Session.step` refuses, and the width that it is asked to keep to."""
    require(bool(rows), "a step without rows")
    slots = [row.slot for row in rows]
    require(slots == sorted(set(slots)), "rows of a step in another order than slots, or two of a slot", slots)
    for row in rows:
        size = len(row.token_ids)
        require(0 <= row.slot < cache.num_slots and size > 0 and 0 <= row.num_logits <= size, "a wrong row", row)
        require(cache.lengths[row.slot] + size <= cache.positions, "more tokens than a slot has room for", row)
        require(all(0 <= token < VOCABULARY for token in row.token_ids), "an id outside the vocabulary", row)
    width = sum(len(row.token_ids) for row in rows)
    require(width <= PREFILL_CHUNK_TOKENS, "a step is too wide", width)


@dataclass(kw_only=True)
class Wish:
    """What a client asks for and does. Times are seconds of the history; a fault is raised once."""

    number: int
    prompt: bytes
    most_tokens: int
    count: int = 1  # answers
    temperature: float = 0.0
    echo: bool = False
    every: int = 1  # tokens of a response
    ends: bool = True  # at END_ID
    names: tuple[str, ...] = ()
    arrives_s: float = 0.0
    patience_s: float | None = None
    leaves_s: float | None = None
    stop_s: float | None = None
    sampling_fails: int | None = None  # the number of the token whose choice raises
    writing_fails: int | None = None  # the number of the token that the last writer cannot write
    prompt_fails: bool = False  # taking the log-probabilities of the prompt
    cancel_fails: bool = False
    sending_fails: int | None = None  # the number of the response
    telling_fails: bool = False  # telling the client of an error
    looking_fails: bool = False


@dataclass(frozen=True, kw_only=True)
class Part:
    """A response: tokens of one answer, and how it ended."""

    index: int
    tokens: bytes
    end: str | None  # "stop", "length" or "cancelled"
    prompt_log_probs: tuple[float, ...] = ()


class StandInWriter:
    """A `Writer` that ends an answer at END_ID or at its length."""

    def __init__(self, wish: Wish, index: int) -> None:
        self._wish, self._index = wish, index
        self.wants_prompt, self.wants_routing, self.num_prompt_tops = wish.echo, False, 0
        self.sampler = new_sampler(wish, index, fails=wish.sampling_fails)
        self.tokens = bytearray()
        self.log_probs: list[float] = []
        self._num_sent = 0

    def write(self, choice: Choice) -> tuple[Part | None, str]:
        wish = self._wish
        self.tokens.append(choice.token_id)
        if self._index == wish.count - 1 and len(self.tokens) == wish.writing_fails:
            raise ValueError("no text for this token")
        end = end_of(wish, self.tokens)
        if end is None and len(self.tokens) - self._num_sent < wish.every:
            return None, ""
        return self._part(end), end or ""

    def cancel(self) -> Part:
        if self._wish.cancel_fails:
            raise ValueError("no last response")
        return self._part("cancelled")

    def take_prompt(self, log_probs: Sequence[float], tops: Sequence) -> None:
        if self._wish.prompt_fails:
            raise ValueError("no room for log-probabilities")
        self.log_probs += log_probs

    def _part(self, end: str | None) -> Part:
        tokens, self._num_sent = bytes(self.tokens[self._num_sent :]), len(self.tokens)
        return Part(index=self._index, tokens=tokens, end=end, prompt_log_probs=tuple(self.log_probs))


def new_sampler(wish: Wish, index: int, fails: int | None = None) -> Sampler:
    """The sampler of one answer. The choice of the token number `fails` raises an error that is none of ours."""
    options = SamplingOptions(temperature=wish.temperature, top_p=float(wish.temperature > 0), random_seed=wish.number)
    plan = SamplingPlan(options=options, prompt_ids=tuple(wish.prompt), end_ids=(END_ID,))
    num_chosen = 0

    def refuses(_token: int) -> bool:
        nonlocal num_chosen
        num_chosen += 1
        if num_chosen == fails:
            raise ValueError("no text for a candidate")
        return False

    return Sampler(plan, VOCABULARY, refuses=refuses if fails else None, sequence_index=index)


def end_of(wish: Wish, tokens: bytes | bytearray) -> str | None:
    if wish.ends and tokens[-1] == END_ID:
        return "stop"
    return "length" if len(tokens) == wish.most_tokens else None


@dataclass(kw_only=True)
class Expected:
    """What one answer of a wish is if nothing else runs."""

    tokens: bytes
    end: str  # "stop", "length" or "error"


def alone(wish: Wish, salt: int, broken_one_in: int = 0, surprise_one_in: int = 1) -> list[Expected]:
    """The answers to a wish, worked out token by token."""
    if wish.echo:
        sizes = range(1, len(wish.prompt))
        starts = [logits_of(wish.prompt[:size], salt, broken_one_in, surprise_one_in) for size in sizes]
        if wish.prompt_fails or any(np.isnan(logits).any() for logits in starts):
            return [Expected(tokens=b"", end="error")] * wish.count
    answers = []
    for index in range(wish.count):
        sampler, tokens, end = new_sampler(wish, index), bytearray(), None
        while end is None:
            logits = logits_of(wish.prompt + tokens, salt, broken_one_in, surprise_one_in)
            number = len(tokens) + 1
            if np.isnan(logits).any() or number == wish.sampling_fails:
                end = "error"
                break
            tokens.append(sampler.choose(logits).token_id)
            end = end_of(wish, tokens)
            if index == wish.count - 1 and number == wish.writing_fails:
                end = "error"
        answers.append(Expected(tokens=bytes(tokens), end=end))
    return answers


def prompt_log_probs(wish: Wish, salt: int, surprise_one_in: int = 1) -> list[float]:
    """ln softmax(logits)[token] of the prompt's tokens from the second on."""
    found = []
    for size in range(1, len(wish.prompt)):
        logits = logits_of(wish.prompt[:size], salt, 0, surprise_one_in).astype(np.float64)
        found.append(float(logits[wish.prompt[size]] - np.log(np.exp(logits).sum())))
    return found


@dataclass(eq=False)
class Client:
    """Records what the outlet of a wish is given. `reasons` says what else than its own answer may end it."""

    wish: Wish
    now: Callable[[], float] = lambda: 0.0
    log: list[tuple[float, int, object]] = field(default_factory=list)
    parts: list[tuple[float, Part]] = field(default_factory=list)
    error: Exception | None = None
    is_over: bool = False
    has_left: bool = False
    was_seen_leaving: bool = False
    place: int | None = None  # in the order of arrival, once the engine has taken the request
    reasons: set[str] = field(default_factory=set)
    num_sends: int = 0

    def __post_init__(self) -> None:
        wish = self.wish
        self.writers = [StandInWriter(wish, index) for index in range(wish.count)]
        self.request: Request[Part] = Request(
            names=frozenset({str(wish.number), *wish.names}),
            prompt_ids=tuple(wish.prompt),
            most_tokens=wish.most_tokens,
            writers=self.writers,
            outlet=Outlet(self._send, self._fail, self._is_cancelled),
            deadline_s=None if wish.patience_s is None else wish.arrives_s + wish.patience_s,
        )

    def _send(self, part: Part, is_last: bool) -> None:
        require(not self.is_over, "a response after the end", self.wish, part)
        self.num_sends += 1
        if self.num_sends == self.wish.sending_fails:
            self.reasons.add("sending")
            raise OSError("the stream is closed")
        ended = {other.index for _, other in self.parts if other.end}
        require(part.index not in ended, "tokens after an answer's end", self.wish, part)
        self.parts.append((self.now(), part))
        self.log.append((self.now(), self.wish.number, part))
        ended |= {part.index} if part.end else set()
        require(is_last == (len(ended) == self.wish.count), "is_last is wrong", self.wish, part, is_last)
        self.is_over = is_last

    def _fail(self, error: Exception) -> None:
        require(not self.is_over, "an error after the end", self.wish, error)
        self.is_over, self.error = True, error
        self.log.append((self.now(), self.wish.number, str(error)))
        if self.wish.telling_fails:
            raise OSError("the stream is closed")

    def _is_cancelled(self) -> bool:
        require(not self.is_over, "asked whether a client has gone that got its last response", self.wish)
        if self.wish.looking_fails:
            raise OSError("no such request")
        self.was_seen_leaving |= self.has_left
        return self.has_left

    def submit(self, engine: SequenceEngine) -> bool:
        """Send the request. Returns whether it was taken; a refusal is the client's error."""
        try:
            engine.submit(self.request)
        except RequestError as error:
            self.is_over, self.error = True, error
            self.log.append((self.now(), self.wish.number, str(error)))
            return False
        return True

    def tokens_of(self, index: int) -> bytes:
        return b"".join(part.tokens for _, part in self.parts if part.index == index)

    def end_of(self, index: int) -> str | None:
        return next((part.end for _, part in self.parts if part.index == index and part.end), None)
