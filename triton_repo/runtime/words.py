"""Stop and bad words as token sequences, and the tensor [2, n] in which engines take them.

Row 0 holds the tokens of all words one after the other, row 1 where each word ends, then -1 to the end of the row
(TensorRT-LLM, triton_backend/inflight_batcher_llm/src/utils.cc, convertWordList).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from export.tokenizer import Tokenizer
from triton_repo.runtime.detokenizer import has_text

Words = tuple[tuple[int, ...], ...]
_PADDING = -1


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


def starts_in(prompt_ids: Sequence[int], word: Sequence[int]) -> bool:
    """Whether the prompt ends with a beginning of the word, so that the word could be complete across the two."""
    return any(tuple(prompt_ids[-size:]) == tuple(word[:size]) for size in range(1, len(word)))


def pack_words(words: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    """int32 [2, n] of at least one word, n the tokens of all."""
    tokens = [token for word in words for token in word]
    ends = np.cumsum([len(word) for word in words])
    packed = np.full((2, len(tokens)), _PADDING, dtype=np.int32)
    packed[0] = tokens
    packed[1, : len(ends)] = ends
    return packed


def unpack_words(packed: npt.NDArray[Any]) -> Words:
    """The words of an integer tensor [2, n] or [1, 2, n]. Raises ValueError for ends that are not rising places."""
    tokens, row = packed.reshape(2, -1).tolist()
    ends = row[: row.index(_PADDING)] if _PADDING in row else row
    rising = all(start < end <= len(tokens) for start, end in zip([0, *ends], ends, strict=False))
    if not rising or any(end != _PADDING for end in row[len(ends) :]):
        raise ValueError(f"found the ends {row}, expected rising ones up to {len(tokens)}, then {_PADDING}")
    return tuple(tuple(tokens[start:end]) for start, end in zip([0, *ends], ends, strict=False))
