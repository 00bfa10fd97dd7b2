"""The tokenizer of an engine, loaded without executing anything: its tokenizer.json says everything.

A checkpoint's tokenizer is spread over several files; `export.tokenizer.settings` joins them, and what is made of the
checkpoint gets a tokenizer.json that needs no other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from export.checkpoint.file_table import TOKENIZER_FILE
from export.errors import CheckpointError, named
from export.files.reading import is_there, read_text
from export.tokenizer.patterns import check_patterns
from export.tokenizer.token_lengths import most_bytes_per_token

if TYPE_CHECKING:
    import tokenizers

MAX_TOKENIZER_BYTES = 128 << 20  # vocabularies of 260,000 tokens take some 35 MB
_TRIAL = "A text, in two lines:\n 1 + 1 == 2  # café"


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to token ids and back. `size` counts the ids that stand for text: ids from there on are padding rows."""

    backend: tokenizers.Tokenizer
    size: int

    @cached_property
    def most_bytes_per_token(self) -> int | None:
        """The most bytes of a text, in UTF-8, that one token stands for; None where no bound is known."""
        return most_bytes_per_token(self.backend)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in the text count as such, none is added."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, with what the tokenizer puts before a text of its own accord, as Llama's start token;
        a start token that the text itself begins with is not doubled."""
        encoding = self.backend.encode(text, add_special_tokens=True)
        ids = list(encoding.ids)
        doubled = len(ids) > 1 and encoding.special_tokens_mask[0] and ids[0] == ids[1]
        return ids[1:] if doubled else ids

    def decode(self, token_ids: list[int]) -> str:
        """The text of `token_ids`, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return str(self.backend.decode(token_ids, skip_special_tokens=True))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json as it stands. Raises CheckpointError."""
    return make_tokenizer(tokenizer_text(folder), f"loading the tokenizer of {named(folder)}")


def tokenizer_text(folder: Path) -> str:
    """The text of tokenizer.json. Raises CheckpointError."""
    path = folder / TOKENIZER_FILE
    if not is_there(path):
        raise CheckpointError(
            f"loading the tokenizer of {named(folder)}: no {TOKENIZER_FILE}; save one beside the weights with "
            "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    return read_text(path, "the tokenizer", most=MAX_TOKENIZER_BYTES, error=CheckpointError)


def make_backend(text: str, where: str) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json's text, without padding and truncation, after it was tried on a text.
    Raises CheckpointError, also for patterns that take for ever on some text."""
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_str(text)
        backend.no_padding()
        backend.no_truncation()
        for component in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
            if component is not None:
                check_patterns(json.loads(component.__getstate__()))
        backend.decode(backend.encode(_TRIAL, add_special_tokens=True).ids)
    except BaseException as error:  # the library raises bare Exception, and Rust's panics are not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{where}: {TOKENIZER_FILE} is damaged ({named(error, 400)})") from error
    return backend


def make_tokenizer(text: str, where: str) -> Tokenizer:
    """A tokenizer of a tokenizer.json's text. Raises CheckpointError beginning with `where`."""
    return tokenizer_of(make_backend(text, where), where)


def tokenizer_of(backend: tokenizers.Tokenizer, where: str) -> Tokenizer:
    """Raises CheckpointError for a tokenizer without a token."""
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not size:
        raise CheckpointError(f"{where}: {TOKENIZER_FILE} has an empty vocabulary")
    return Tokenizer(backend=backend, size=size)
