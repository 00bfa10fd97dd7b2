"""Loads the tokenizer of an engine from its tokenizer.json, without executing any of its code.

A checkpoint describes its tokenizer in several files. `export.tokenizer.settings` joins them, and writes engines and
packages a tokenizer.json that needs no other file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import hexdigits
from typing import TYPE_CHECKING

from export.checkpoint.file_table import TOKENIZER_FILE
from export.errors import CheckpointError, named
from export.files.reading import is_there, read_text
from export.tokenizer.patterns import check_patterns
from export.tokenizer.token_lengths import most_bytes_per_token

if TYPE_CHECKING:
    import tokenizers

MAX_TOKENIZER_BYTES = 128 << 20  # limit on tokenizer.json; a vocabulary of 260,000 tokens takes some 35 MB
_TRIAL = "A text, in two lines:\n 1 + 1 == 2  # café"


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Encodes text to token ids and decodes ids to text. Ids below `size` are tokens; from `size` on, ids are rows that
    pad the embedding."""

    backend: tokenizers.Tokenizer
    size: int

    @cached_property
    def most_bytes_per_token(self) -> int | None:
        """The most bytes of a text, in UTF-8, that one token can stand for; None if no bound is known."""
        return most_bytes_per_token(self.backend)

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """The tokens that stand for single bytes: <0x00> to <0xFF>, in either case, SentencePiece's byte fallback."""
        names = (f"<0x{high}{low}>" for high in hexdigits for low in hexdigits)
        return frozenset(token for token in map(self.backend.token_to_id, names) if token is not None)

    def encode(self, text: str) -> list[int]:
        """Encode `text` without adding tokens. A special token that is written in the text becomes that token."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a prompt with the tokens that the tokenizer adds, such as Llama's start token. If the text already
        begins with the start token, it is not added again."""
        encoding = self.backend.encode(text, add_special_tokens=True)
        ids = list(encoding.ids)
        doubled = len(ids) > 1 and encoding.special_tokens_mask[0] and ids[0] == ids[1]
        return ids[1:] if doubled else ids

    def decode(self, token_ids: list[int]) -> str:
        """Decode token ids to text without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return str(self.backend.decode(token_ids, skip_special_tokens=True))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer from a folder's tokenizer.json alone. Raises CheckpointError."""
    return make_tokenizer(tokenizer_text(folder), f"loading the tokenizer of {named(folder)}")


def tokenizer_text(folder: Path) -> str:
    """Read the text of a folder's tokenizer.json. Raises CheckpointError."""
    path = folder / TOKENIZER_FILE
    if not is_there(path):
        raise CheckpointError(
            f"loading the tokenizer of {named(folder)}: no {TOKENIZER_FILE}; save one beside the weights with "
            "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    return read_text(path, "the tokenizer", most=MAX_TOKENIZER_BYTES, error=CheckpointError)


def make_backend(text: str, where: str) -> tokenizers.Tokenizer:
    """Make the library's tokenizer from the text of a tokenizer.json, without padding and truncation, and try it on a
    short text. Raises CheckpointError, also for a regular expression that could take too long."""
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_str(text)
        backend.no_padding()
        backend.no_truncation()
        for component in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
            if component is not None:
                check_patterns(json.loads(component.__getstate__()))
        backend.decode(backend.encode(_TRIAL, add_special_tokens=True).ids)
    except BaseException as error:  # the library raises Exception itself; Rust's panics are BaseExceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{where}: {TOKENIZER_FILE} is damaged ({named(error, 400)})") from error
    return backend


def make_tokenizer(text: str, where: str) -> Tokenizer:
    """Make a Tokenizer from the text of a tokenizer.json. Raises CheckpointError whose message begins with `where`."""
    return tokenizer_of(make_backend(text, where), where)


def tokenizer_of(backend: tokenizers.Tokenizer, where: str) -> Tokenizer:
    """Make a Tokenizer from the library's. Raises CheckpointError if its vocabulary is empty."""
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not size:
        raise CheckpointError(f"{where}: {TOKENIZER_FILE} has an empty vocabulary")
    return Tokenizer(backend=backend, size=size)
