"""Stop and bad words as token sequences, and the tensor [2, n] that engines take them in.

Row 0 holds the tokens of all words one after the other. Row 1 holds the end of each word in row 0, then -1 up to its
end (TensorRT-LLM, triton_backend/inflight_batcher_llm/src/utils.cc, convertWordList).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from export.tokenizer.loading import Tokenizer
from triton_repo.runtime.text.automaton import ROOT, Automaton
from triton_repo.runtime.text.detokenizer import has_text

Words = tuple[tuple[int, ...], ...]
_PADDING = -1
# Each word has two spellings with at most one token for each byte: twice `options.MAX_WORD_BYTES_IN_ALL`, and spaces.
MAX_SEQUENCE_TOKENS = 1 << 17


def spell(tokenizer: Tokenizer, words: Iterable[str]) -> Words:
    """The token sequences of each word, as it is and after a space, since tokenizers often have a word with its space.

    A sequence is left out if its text does not contain the word, since a tokenizer may rewrite letters. It is kept if
    it consists of special tokens, which have no text.
    """
    sequences = []
    for word in words:
        for text in (word, f" {word}"):
            ids = tokenizer.encode(text)
            silent = not any(has_text(tokenizer, token) for token in ids)
            if ids and (word in tokenizer.decode(ids) or (silent and text == word)):
                sequences.append(tuple(ids))
    return tuple(dict.fromkeys(sequences))


def not_starting_in(prompt_ids: Sequence[int], words: Words) -> Words:
    """The words that cannot begin in the prompt and end in the answer. A word can if the prompt ends with the beginning
    of the word."""
    automaton = Automaton(words)
    longest = max(map(len, words), default=0)
    state = ROOT
    for token in prompt_ids[max(0, len(prompt_ids) - longest) :]:
        state = automaton.step(state, token)
    begun = set()  # states of the beginnings that the prompt ends with
    while state != ROOT:
        begun.add(state)
        state = automaton.fallback[state]
    return tuple(word for word in words if not _passes(automaton, word[:-1], begun))


def _passes(automaton: Automaton[int], word: Sequence[int], states: set[int]) -> bool:
    """Whether the automaton passes one of the states while it reads the word."""
    state = ROOT
    for token in word:
        state = automaton.edges[state][token]
        if state in states:
            return True
    return False


def pack_words(words: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    """The tensor int32 [2, n] of at least one word; n is the number of tokens of all words."""
    tokens = [token for word in words for token in word]
    ends = np.cumsum([len(word) for word in words])
    packed = np.full((2, len(tokens)), _PADDING, dtype=np.int32)
    packed[0] = tokens
    packed[1, : len(ends)] = ends
    return packed


def unpack_words(packed: npt.NDArray[Any]) -> Words:
    """The words in an integer tensor [2, n] or [1, 2, n]. Raises ValueError for another shape, for more than
    MAX_SEQUENCE_TOKENS tokens, and for ends that do not rise."""
    if packed.size % 2 or packed.size > 2 * MAX_SEQUENCE_TOKENS:
        raise ValueError(f"found {packed.size} values, expected two rows of at most {MAX_SEQUENCE_TOKENS} each")
    tokens, row = packed.reshape(2, -1).tolist()
    ends = row[: row.index(_PADDING)] if _PADDING in row else row
    rising = all(start < end <= len(tokens) for start, end in zip([0, *ends], ends, strict=False))
    if not rising or any(end != _PADDING for end in row[len(ends) :]):
        shown = f"{row[:8]}{' and more' if len(row) > 8 else ''}"
        raise ValueError(f"found the ends {shown}, expected rising ones up to {len(tokens)}, then {_PADDING}")
    return tuple(tuple(tokens[start:end]) for start, end in zip([0, *ends], ends, strict=False))
