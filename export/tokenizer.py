"""The tokenizer that travels with a checkpoint or an engine, loaded without executing anything from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.checkpoint import read_json
from export.errors import CheckpointError
from export.token_lengths import most_bytes_per_token

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. `size` counts the ids that stand for text: ids from there on are padding rows."""

    backend: tokenizers.Tokenizer
    size: int
    eos_token_id: int | None

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
    """Read tokenizer.json, and the end token's name from tokenizer_config.json. Raises CheckpointError."""
    import tokenizers

    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(
            f"loading the tokenizer of {folder}: no {TOKENIZER_FILE}; save one beside the weights with "
            "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise CheckpointError(f"loading the tokenizer of {folder}: {TOKENIZER_FILE} is not UTF-8 ({error})") from error
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for every damaged file
        raise CheckpointError(f"loading the tokenizer of {folder}: {TOKENIZER_FILE} is damaged ({error})") from error
    backend.no_padding()
    backend.no_truncation()
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if not size:
        raise CheckpointError(f"loading the tokenizer of {folder}: {TOKENIZER_FILE} has an empty vocabulary")
    return Tokenizer(backend=backend, size=size, eos_token_id=_end_token(folder, backend))


def _end_token(folder: Path, backend: tokenizers.Tokenizer) -> int | None:
    """The id of the settings' eos_token, which may be a string or an object with its content."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return None
    token: Any = read_json(path, "the tokenizer's settings").get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    return backend.token_to_id(token) if isinstance(token, str) else None
