"""Stop and bad words as token sequences, and the tensor [2, n] in which engines take them.

Row 0 holds the tokens of all words one after the other, row 1 where each word ends, then -1 to the end of the row
(TensorRT-LLM, triton_backend/inflight_batcher_llm/src/utils.cc, convertWordList).
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
# Words of a request have two spellings, of at most a token a byte: `options.MAX_WORD_BYTES_IN_ALL` twice, and spaces.
MAX_SEQUENCE_TOKENS = 1 << 17


def spell(tokenizer: Tokenizer, words: Iterable[str]) -> Words:
    """The token sequences that write each word, as it is and after a space, in which tokenizers often have it.

    A sequence whose text does not hold its word (a tokenizer may rewrite letters) is left out, unless it is made of
    special tokens, which show in no text.
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
    """The words that could not be complete across the prompt's end and the answer: those of which the prompt does not
    end with a beginning."""
    automaton = Automaton(words)
    longest = max(map(len, words), default=0)
    state = ROOT
    for token in prompt_ids[max(0, len(prompt_ids) - longest) :]:
        state = automaton.step(state, token)
    begun = set()  # the states whose beginnings the prompt ends with
    while state != ROOT:
        begun.add(state)
        state = automaton.fallback[state]
    return tuple(word for word in words if not _passes(automaton, word[:-1], begun))


def _passes(automaton: Automaton[int], word: Sequence[int], states: set[int]) -> bool:
    """Whether one of the states lies on the way to the word."""
    state = ROOT
    for token in word:
        state = automaton.edges[state][token]
        if state in states:
            return True
    return False


def pack_words(words: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    """int32 [2, n] of at least one word, n the tokens of all."""
    tokens = [token for word in words for token in word]
    ends = np.cumsum([len(word) for word in words])
    packed = np.full((2, len(tokens)), _PADDING, dtype=np.int32)
    packed[0] = tokens
    packed[1, : len(ends)] = ends
    return packed


def unpack_words(packed: npt.NDArray[Any]) -> Words:
    """The words of an integer tensor [2, n] or [1, 2, n]. Raises ValueError for another shape, for more than
    MAX_SEQUENCE_TOKENS, and for ends that are not rising places."""
    if packed.size % 2 or packed.size > 2 * MAX_SEQUENCE_TOKENS:
        raise ValueError(f"found {packed.size} values, expected two rows of at most {MAX_SEQUENCE_TOKENS} each")
    tokens, row = packed.reshape(2, -1).tolist()
    ends = row[: row.index(_PADDING)] if _PADDING in row else row
    rising = all(start < end <= len(tokens) for start, end in zip([0, *ends], ends, strict=False))
    if not rising or any(end != _PADDING for end in row[len(ends) :]):
        shown = f"{row[:8]}{' and more' if len(row) > 8 else ''}"
        raise ValueError(f"found the ends {shown}, expected rising ones up to {len(tokens)}, then {_PADDING}")
    return tuple(tuple(tokens[start:end]) for start, end in zip([0, *ends], ends, strict=False))
