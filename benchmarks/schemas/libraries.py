"""The two libraries of grammars behind one interface, over the same vocabulary: llguidance and xgrammar.

Each is as a server would use it: one thread, the vocabulary's padding rows among the ids, its own limits.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from export.tokenizer.loading import Tokenizer
from triton_repo.runtime.guided.guides import LIMITS
from triton_repo.runtime.guided.vocabulary import Vocabulary

LIBRARIES = ("llguidance", "xgrammar")


class Matcher(Protocol):
    """One text in progress."""

    def mask(self) -> npt.NDArray[np.uint8]:
        """Whether each token may come next, a bit each, the lowest of a byte first."""

    def take(self, token: int) -> bool:
        """Move on by a token. Returns whether the grammar takes it."""

    def may_end(self) -> bool:
        """Whether the text may end here. Call it after `mask`."""


class Library(Protocol):
    """A library with the vocabulary of one model."""

    def schema(self, text: str) -> Matcher:
        """Compile a JSON schema. Raises ValueError, or the library's own error."""


class LlGuidance:
    """llguidance, with the limits that moeship sets."""

    def __init__(self, tokenizer: Tokenizer, num_ids: int) -> None:
        self._library: Any = importlib.import_module("llguidance")
        vocabulary = Vocabulary(tokenizer)
        vocabulary.tokens += [b""] * (num_ids - vocabulary.size)
        self._tokenizer = vocabulary.for_library()

    def schema(self, text: str) -> Matcher:
        library = self._library
        grammar = library.LLMatcher.grammar_from_json_schema(text)
        limits = library.LLParserLimits(verbose_errors=False, **LIMITS)
        found = _OfLlGuidance(library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits))
        found.mask()
        if found.matcher.is_error():
            raise ValueError(found.matcher.get_error())
        return found


class _OfLlGuidance:
    def __init__(self, matcher: Any) -> None:  # noqa: ANN401 - the library's own
        self.matcher = matcher

    def mask(self) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)

    def take(self, token: int) -> bool:
        return bool(self.matcher.consume_token(token))

    def may_end(self) -> bool:
        return bool(self.matcher.is_accepting())


class XGrammar:
    """xgrammar, whose schemas allow what JSON Schema allows (strict_mode off)."""

    def __init__(self, tokenizer: Tokenizer, num_ids: int) -> None:
        self._library: Any = importlib.import_module("xgrammar")
        tokens = Vocabulary(tokenizer).tokens
        self._num_ids, self._end = num_ids, tokens.index(b"")
        info = self._library.TokenizerInfo(
            tokens, vocab_type=self._library.VocabType.RAW, vocab_size=num_ids, stop_token_ids=[self._end]
        )
        self._compiler = self._library.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def schema(self, text: str) -> Matcher:
        compiled = self._compiler.compile_json_schema(text, any_whitespace=True, strict_mode=False)
        bits = self._library.allocate_token_bitmask(1, self._num_ids)
        return _OfXGrammar(self._library.GrammarMatcher(compiled), bits, self._end)


class _OfXGrammar:
    def __init__(self, matcher: Any, bits: Any, end: int) -> None:  # noqa: ANN401 - the library's own
        self._matcher, self._bits, self._end = matcher, bits, end
        self._bytes = bits.numpy().view(np.uint8)[0]

    def mask(self) -> npt.NDArray[np.uint8]:
        self._matcher.fill_next_token_bitmask(self._bits)
        return self._bytes

    def take(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))

    def may_end(self) -> bool:
        return bool(self._bytes[self._end // 8] >> self._end % 8 & 1)


def load(name: str, tokenizer: Tokenizer, num_ids: int) -> Library:
    """The library of that name. Raises ImportError where it is not installed."""
    return LlGuidance(tokenizer, num_ids) if name == "llguidance" else XGrammar(tokenizer, num_ids)


def accepts(matcher: Matcher, tokens: Sequence[int]) -> bool:
    """Whether a grammar takes the tokens, and lets the text end behind them."""
    if not all(matcher.take(token) for token in tokens):
        return False
    matcher.mask()
    return matcher.may_end()
