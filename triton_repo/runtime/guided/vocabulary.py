"""What each token adds to an answer's text, as bytes, and the grammar library's view of the vocabulary.

The bytes are those that the detokenizer writes, whatever kind of tokenizer it is: each token is decoded behind another
one, so that a leading space counts as text. A token that is no whole character has its bytes by its name: one character
a byte in byte-level vocabularies, <0x0A> in SentencePiece's. Tokens without a text, such as special tokens, have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from export.tokenizer.loading import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_UNDECIDED = "\ufffd"
_ANCHORS = ("a", "\n", "0")  # texts that other tokens are decoded and encoded behind
_FORCED_BYTES = 4096  # of a text that the grammar forces, how much is spelled in tokens at once


class Vocabulary:
    """The tokens of one model, for grammars. `tokens` has the bytes of each id, b"" for none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.tokens = token_bytes(tokenizer)
        self._ids = {text: token for token, text in reversed(list(enumerate(self.tokens))) if text}
        self._longest = max(map(len, self._ids), default=1)

    @property
    def size(self) -> int:
        return len(self.tokens)

    def for_library(self) -> LLTokenizer:
        """The library's tokenizer. It has one id more than the model, `size`, which stands for the end of a text, so
        that requests may end at different tokens."""
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_Spelling(self)))

    def spell(self, text: bytes) -> list[int]:
        """Token ids of a text inside an answer, as the tokenizer spells it. Where the tokenizer would write another
        text, such as a space in front, it is spelled by the longest tokens that fit."""
        try:
            letters = text.decode()
        except UnicodeDecodeError:
            return self._longest_first(text)
        for anchor in ("", *_ANCHORS):
            ids = self._tokenizer.encode(anchor + letters)
            for start in range(min(len(ids), 4)):
                if b"".join(self.tokens[token] for token in ids[start:]) == text:
                    return ids[start:]
        return self._longest_first(text)

    def _longest_first(self, text: bytes) -> list[int]:
        ids, place = [], 0
        while place < len(text):
            size = min(self._longest, len(text) - place)
            while size and text[place : place + size] not in self._ids:
                size -= 1
            if not size:
                break  # the vocabulary cannot write the byte
            ids.append(self._ids[text[place : place + size]])
            place += size
        return ids


class _Spelling:
    """The attributes that the library reads of a tokenizer."""

    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.eos_token_id = vocabulary.size
        self.tokens = [*vocabulary.tokens, b""]

    def __call__(self, text: bytes | str) -> list[int]:
        return self._vocabulary.spell((text.encode() if isinstance(text, str) else text)[:_FORCED_BYTES])


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each id below `tokenizer.size` adds to a text; b"" for ids that add none."""
    backend = tokenizer.backend
    anchor, before = _anchor(tokenizer)
    texts = backend.decode_batch([[*anchor, token] for token in range(tokenizer.size)], skip_special_tokens=True)
    found = []
    for token, text in enumerate(texts):
        added = text[len(before) :] if text.startswith(before) else ""
        found.append(_named_bytes(backend.id_to_token(token) or "") if _UNDECIDED in text else added.encode())
    return found


def _anchor(tokenizer: Tokenizer) -> tuple[list[int], str]:
    """Tokens with a text to decode others behind, and their text. Not bytes, which would join the bytes of others."""
    for text in _ANCHORS:
        ids = [token for token in tokenizer.encode(text) if token not in tokenizer.byte_ids]
        if ids and (before := tokenizer.decode(ids)):
            return ids, before
    return [], ""


def _named_bytes(name: str) -> bytes:
    """The bytes of a token that is no whole character, by its name."""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    letters = _byte_letters()
    return bytes(letters[letter] for letter in name) if all(letter in letters for letter in name) else b""


@cache
def _byte_letters() -> dict[str, int]:
    """Byte-level vocabularies' letter for each byte, by the letter: itself where the byte is a printable character of
    Latin-1, else the next letter from U+0100 on (GPT-2, bytes_to_unicode of src/encoder.py)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
