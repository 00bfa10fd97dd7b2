"""Guides: what an answer may go on with, token by token, so that it keeps to a grammar.

    guides = Guides(tokenizer)
    guide = guides.compile("regex", "[0-9]+").start(end_ids=(2,))      # one for each sequence
    guide.allowed()          # bool [V]: the tokens that may come next
    guide.take(token)        # the one that came; the next mask is computed in a thread
    guide.is_complete        # whether nothing may follow

The grammars are computed by the package llguidance (benchmarks/guided.py compares it with xgrammar). What it does is
bounded: a grammar, and each mask, by `LIMITS`; the number of compiled grammars by `Guides`.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from export.tokenizer.loading import Tokenizer
from triton_repo.errors import RequestError
from triton_repo.runtime.guided.grammars import grammar_of
from triton_repo.runtime.guided.vocabulary import Vocabulary
from triton_repo.runtime.options import refusal

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

Bits = npt.NDArray[np.bool_]
Made = TypeVar("Made")
MOST_GUIDES = 32  # compiled grammars that are kept; one takes 0.1 MB, and by `max_lexer_states` 40 MB at most
MOST_THREADS = 4  # that compute masks
LONGEST_MASK_S = 10.0  # before a request fails; `LIMITS` let a mask take a fraction of a second
# A lexer's work is counted in units of about 20 ns while it is built and 70 ns in a step, a parser's in items of 50 ns.
LIMITS = {
    "initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 500_000, "step_max_items": 100_000, "max_items_in_row": 2_000,
    "max_lexer_states": 20_000, "max_grammar_size": 200_000,
}  # fmt: skip
# What the library says, where its words are about its own options or parts, and what we say.
_SAID = {
    "oneOf constraints are not supported": "found a oneOf of schemas that one value may meet together, which is not "
    "served; send anyOf, or schemas of which no value meets two",
    "too many expressions constructed": "it takes too much: its patterns and limits of length multiply; send less",
    "NoExtensionBias": "no text begins as it demands; send one that can be met",
}
# The library compiles what lies within each other by recursion, and a stack that is too small ends the whole process:
# 8 MB are used up by some 2,000 rules that name each other. A guide of the most bytes has room for 20,000 levels.
_STACK_BYTES = 256 << 20
_STACK_SIZE = threading.Lock()  # held while new threads have that size
_STATE = re.compile("<state>|<non-verbose/>")  # the rest of an error is the library's state
_BROKEN = ("ParserTooComplex", "LexerTooComplex", "InternalError")  # reasons why the library stops


class Guides:
    """The compiled grammars of one model: the `most` that were asked for last. Any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, most: int = MOST_GUIDES) -> None:
        self._tokenizer, self._most = tokenizer, most
        self._lock = threading.Lock()
        self._library: LLTokenizer | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._kept: OrderedDict[tuple[str, str], CompiledGuide] = OrderedDict()

    def of(self, guide_type: str, guide: str) -> CompiledGuide | None:
        """The compiled grammar of a request; None for a request without a guide. Raises as `compile` does."""
        return self.compile(guide_type, guide) if guide_type else None

    def compile(self, guide_type: str, guide: str) -> CompiledGuide:
        """The compiled grammar of a request. Raises RequestError for a guide that is malformed, cannot be met, takes
        too much, or uses what is not served, and where the library is not installed."""
        with self._lock:
            kept = self._kept.get((guide_type, guide))
            if kept is not None and not kept.is_spent:
                self._kept.move_to_end((guide_type, guide))
                return kept
            library, pool = self._prepared()
        size = self._tokenizer.size
        made = _with_deep_stack(lambda: CompiledGuide(library, size, grammar_of(guide_type, guide), pool))
        with self._lock:
            self._kept[guide_type, guide] = made
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return made

    def __len__(self) -> int:
        return len(self._kept)

    def _prepared(self) -> tuple[LLTokenizer, ThreadPoolExecutor]:
        """The library's tokenizer and the threads, made when first asked for. The caller holds the lock."""
        if self._library is None or self._pool is None:
            require_library()
            self._library = Vocabulary(self._tokenizer).for_library()
            self._pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="guide")
        return self._library, self._pool


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
        self.is_complete = False  # whether the answer is whole and nothing may follow

    def allowed(self) -> Bits:
        """Whether each token may come next, bool [V], an end token only where the answer may end. Waits for the mask.
        Raises RequestError for a grammar that takes too much here or allows no token."""
        try:
            return self._next.result(LONGEST_MASK_S)
        except FutureTimeout:
            raise RequestError(
                f"choosing a token: the guide takes more than {LONGEST_MASK_S:g} s for a token here; send a simpler one"
            ) from None

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


def _with_deep_stack(action: Callable[[], Made]) -> Made:
    """What an action gives, computed in a thread with `_STACK_BYTES` for its stack. Memory is taken as it is used."""
    done: Future[Made] = Future()

    def run() -> None:
        try:
            done.set_result(action())
        except BaseException as error:  # whatever it is, the one who waits raises it
            done.set_exception(error)

    with _STACK_SIZE:
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=run, name="guide-compile", daemon=True).start()
        finally:
            threading.stack_size(before)
    return done.result()


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
    """Why the library cannot go on, in one line; None if it can."""
    if not matcher.is_error() and matcher.stop_reason() not in _BROKEN:
        return None
    found = " ".join(_STATE.split(matcher.get_error())[0].split())
    return (
        next((ours for theirs, ours in _SAID.items() if theirs in found), found[:400]) or "the grammar takes too much"
    )
