"""Guides: what an answer may go on with, token by token, so that it keeps to a grammar.

    guides = Guides(tokenizer)
    guide = guides.compile("regex", "[0-9]+").start(end_ids=(2,))      # one for each sequence
    guide.allowed()          # bool [V]: the tokens that may come next
    guide.take(token)        # the one that came; the next mask is computed in a thread
    guide.is_complete        # whether nothing may follow

The grammars are computed by the package llguidance (benchmarks/guided.py compares it with xgrammar). What it does is
bounded: a grammar, and each mask, by `LIMITS`; the time and memory of compiling one by `Trials`, where `LIMITS` do not;
the number of compiled grammars by `Guides`.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from export.tokenizer.loading import Tokenizer
from triton_repo.errors import RequestError
from triton_repo.runtime.guided.compiling import Compilers
from triton_repo.runtime.guided.grammars import grammar_of
from triton_repo.runtime.guided.problems import said
from triton_repo.runtime.guided.trials import Trials
from triton_repo.runtime.guided.vocabulary import Vocabulary
from triton_repo.runtime.options import refusal

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

Bits = npt.NDArray[np.bool_]
MOST_GUIDES = 32  # compiled grammars that are kept; one takes 0.1 MB, and by `max_lexer_states` 40 MB at most
MOST_THREADS = 4  # that compute masks
MOST_COMPILERS = 2  # threads that compile
MOST_ASKED = 64  # guides that wait to be compiled, or are
ASK_AGAIN_S = 2
LONGEST_MASK_S = 10.0  # before a request fails; `LIMITS` let a mask take a fraction of a second
# A lexer's work is counted in units of about 20 ns while it is built and 70 ns in a step, a parser's in items of 50 ns.
LIMITS = {
    "initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 500_000, "step_max_items": 100_000, "max_items_in_row": 2_000,
    "max_lexer_states": 20_000, "max_grammar_size": 200_000,
}  # fmt: skip
_TRIALS = Trials(LIMITS)  # of all models of a process: a trial does not depend on the vocabulary
_STATE = re.compile("<state>|<non-verbose/>")  # the rest of an error is the library's state
_BROKEN = ("ParserTooComplex", "LexerTooComplex", "InternalError")  # reasons why the library stops


class Guides:
    """The compiled grammars of one model: the `most` that were asked for last. Any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, most: int = MOST_GUIDES, trials: Trials = _TRIALS) -> None:
        self._tokenizer, self._most, self._trials = tokenizer, most, trials
        self._lock = threading.Lock()  # guards the two tables
        self._preparing = threading.Lock()
        self._prepared: tuple[LLTokenizer, ThreadPoolExecutor] | None = None
        self._compilers: Compilers[CompiledGuide] = Compilers(MOST_COMPILERS)
        self._kept: OrderedDict[tuple[str, str], Future[CompiledGuide]] = OrderedDict()
        self._asked: dict[tuple[str, str], Future[CompiledGuide]] = {}  # those that are not compiled yet

    def of(self, guide_type: str, guide: str) -> Future[CompiledGuide] | None:
        """What `ask` gives for a request; None for one without a guide."""
        return self.ask(guide_type, guide) if guide_type else None

    def compile(self, guide_type: str, guide: str) -> CompiledGuide:
        """The compiled grammar of a request, which is waited for. Raises RequestError for a guide that is malformed,
        cannot be met, takes too much, or uses what is not served, and where the library is not installed."""
        return self.ask(guide_type, guide).result()

    def ask(self, guide_type: str, guide: str) -> Future[CompiledGuide]:
        """The same without waiting: the future raises what `compile` raises. Raises RequestError where too many guides
        wait to be compiled, and where the library is not installed."""
        key = (guide_type, guide)
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None and not kept.result().is_spent:
                self._kept.move_to_end(key)
                return kept
            if key in self._asked:
                return self._asked[key]
            if len(self._asked) >= MOST_ASKED:
                raise RequestError(
                    f"compiling the guide: {len(self._asked)} others wait for that on this server; send it again in "
                    f"about {ASK_AGAIN_S} s, or to another server", kind="UNAVAILABLE",
                )  # fmt: skip
            require_library()
            asked = self._asked[key] = self._compilers.submit(lambda: self._compiled(guide_type, guide))
        asked.add_done_callback(lambda done: self._keep(key, done))
        return asked

    def _compiled(self, guide_type: str, guide: str) -> CompiledGuide:
        with self._preparing:
            if self._prepared is None:
                library = Vocabulary(self._tokenizer).for_library()
                pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="guide")
                self._prepared = library, pool
            library, pool = self._prepared
        grammar = grammar_of(guide_type, guide)
        self._trials.check(grammar)
        return CompiledGuide(library, self._tokenizer.size, grammar, pool)

    def _keep(self, key: tuple[str, str], done: Future[CompiledGuide]) -> None:
        with self._lock:
            self._asked.pop(key, None)
            if done.cancelled() or done.exception() is not None:
                return
            self._kept[key] = done
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)

    def __len__(self) -> int:
        return len(self._kept)


def require_library() -> None:
    """Raise RequestError where llguidance is not installed."""
    try:
        import llguidance  # noqa: F401
    except ImportError as error:
        raise refusal(
            [
                "guided_decoding_guide_type: guided decoding needs the package llguidance, which this server does not "
                "have; install moeship[cpu] or moeship[cuda] for the server's Python, or leave the guide out"
            ]
        ) from error


class CompiledGuide:
    """A grammar that was compiled and tried: its first mask is known. What the library learns of it is shared by all
    sequences and bounded; where it can learn no more, the grammar is spent, and must be compiled again."""

    def __init__(self, library: LLTokenizer, num_tokens: int, grammar: str, pool: ThreadPoolExecutor) -> None:
        from llguidance import LLMatcher

        self._num_tokens, self._pool, self.is_spent = num_tokens, pool, False
        with _panics_caught():
            self._matcher = LLMatcher(library, grammar, log_level=0, limits=_limits())
            self._first, self._may_end = _mask(self._matcher, num_tokens)
            problem = _problem(self._matcher)
        if problem is None and not self._may_end and not self._first.any():
            problem = "no token may begin the answer, so that it cannot be met"
        if problem is not None:
            raise refusal([f"guided_decoding_guide: {problem}"])

    def start(self, end_ids: Sequence[int]) -> Guide:
        """The guide of one sequence, which ends with one of `end_ids`."""
        first = _with_ends(self._first.copy(), end_ids, self._may_end)
        return Guide(self._matcher.deep_copy(), first, end_ids, self._pool.submit, self._spend)

    def _spend(self) -> None:
        self.is_spent = True


class Guide:
    """Where one sequence is in its grammar. One thread at a time calls it; masks are computed in another one."""

    def __init__(
        self,
        matcher: LLMatcher,
        first: Bits,
        end_ids: Sequence[int],
        submit: Callable[[Callable[[], Bits]], Future[Bits]],
        spend: Callable[[], None],
    ) -> None:
        self._matcher, self._submit, self._spend = matcher, submit, spend
        self._end_ids, self._num_tokens = tuple(end_ids), len(first)
        self._next: Future[Bits] = Future()
        self._next.set_result(first)
        self._asked_s = time.monotonic()  # when the mask was asked for
        self.is_complete = False  # whether the answer is whole and nothing may follow

    def allowed(self) -> Bits:
        """Whether each token may come next, bool [V], an end token only where the answer may end. Waits for the mask.
        Raises RequestError for a grammar that takes too much here or allows no token."""
        try:
            return self._next.result(max(0.0, self._left_s()))
        except FutureTimeout:
            raise RequestError(
                f"choosing a token: the guide takes more than {LONGEST_MASK_S:g} s for a token here; send a simpler one"
            ) from None

    def is_ready(self, wait_s: float = 0.0) -> bool:
        """Whether `allowed` gives its answer at once, be it an error. Waits for that as long as `wait_s`."""
        wait([self._next], max(0.0, min(wait_s, self._left_s())))
        return self._next.done() or self._left_s() <= 0

    def _left_s(self) -> float:
        """Seconds that the next mask may still take."""
        return self._asked_s + LONGEST_MASK_S - time.monotonic()

    def take(self, token: int) -> None:
        """Move on by a token that `allowed` has, and have the mask behind it computed. Raises RequestError."""
        self.allowed()
        if token in self._end_ids:
            self.is_complete = True
            return
        with _panics_caught():
            if not self._matcher.consume_token(token):
                raise self._failed(_problem(self._matcher) or f"it does not take the token {token}")
            self.is_complete = self._matcher.is_stopped() and self._matcher.is_accepting()
        if not self.is_complete:
            self._asked_s = time.monotonic()
            self._next = self._submit(self._mask)

    def num_taken(self, tokens: Sequence[int]) -> int:
        """How many of the tokens the grammar would take, one after the other. Moves nothing."""
        self.allowed()
        with _panics_caught():
            return self._matcher.validate_tokens(list(tokens))

    def _mask(self) -> Bits:
        with _panics_caught():
            allowed, may_end = _mask(self._matcher, self._num_tokens)
            problem = _problem(self._matcher)
        _with_ends(allowed, self._end_ids, may_end)
        if problem is None and not allowed.any():
            problem = "no token may follow"
        if problem is not None:
            raise self._failed(problem)
        return allowed

    def _failed(self, problem: str) -> RequestError:
        self._spend()
        return RequestError(f"choosing a token: the guide cannot be followed further: {problem}")


class AwaitedGuide:
    """The guide of a sequence whose grammar may still be compiled. The sequence begins once that is done."""

    def __init__(self, compiled: Future[CompiledGuide], end_ids: Sequence[int]) -> None:
        self._compiled, self._end_ids = compiled, tuple(end_ids)

    @cached_property
    def _guide(self) -> Guide:
        return self._compiled.result(timeout=0).start(self._end_ids)

    @property
    def is_complete(self) -> bool:
        """As of `Guide`."""
        return self._guide.is_complete

    def is_ready(self, wait_s: float = 0.0) -> bool:
        """As of `Guide`."""
        return self._guide.is_ready(wait_s)

    def allowed(self) -> Bits:
        """As of `Guide`."""
        return self._guide.allowed()

    def take(self, token: int) -> None:
        """As of `Guide`."""
        self._guide.take(token)

    def num_taken(self, tokens: Sequence[int]) -> int:
        """As of `Guide`."""
        return self._guide.num_taken(tokens)


@contextmanager
def _panics_caught() -> Iterator[None]:
    """Makes a RequestError of a panic in the library, which is no Exception and would end the thread."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ != "PanicException":
            raise
        raise RequestError(f"following the guide: the library failed ({error}); send another guide") from error


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False, **LIMITS)


def _mask(matcher: LLMatcher, num_tokens: int) -> tuple[Bits, bool]:
    """Whether each token may come next, bool [V], and whether the text may end."""
    words = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    return np.unpackbits(words, count=num_tokens, bitorder="little").view(np.bool_), matcher.is_accepting()


def _with_ends(allowed: Bits, end_ids: Sequence[int], may_end: bool) -> Bits:
    for token in end_ids:
        if token < len(allowed):
            allowed[token] = may_end
    return allowed


def _problem(matcher: LLMatcher) -> str | None:
    """Why the library cannot go on, in one line of ours; None if it can."""
    if not matcher.is_error() and matcher.stop_reason() not in _BROKEN:
        return None
    return said(" ".join(_STATE.split(matcher.get_error())[0].split()))
