"""Computes the most bytes of a text that one token can stand for. It bounds a prompt's bytes before it is encoded.

There is a bound if every byte of a text belongs to a token and every token has a longest text. There is none if text is
dropped, as by pre-tokenizers that split at white space, or if a single token stands for a run of unknown characters of
any length. The names of components are those of the tokenizers package's tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

# Normal form -> largest ratio of a text's bytes to the bytes of its normal form, rounded up. Computed over Unicode's
# decompositions by tests/export/tokenizer/test_token_lengths.py (NFC: Greek iota with dialytika and tonos).
NORMAL_FORMS = {"NFC": 4, "NFD": 3, "NFKD": 4, "NFKC": 23}
_KEEPING = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts")  # pre-tokenizers that keep all of a text
_BEHAVING = ("Split", "Punctuation")  # pre-tokenizers that drop text only if their `behavior` is "Removed"
_UTF8_MOST = 4  # most bytes of a character in UTF-8


def most_bytes_per_token(backend: tokenizers.Tokenizer) -> int | None:
    """The most bytes of a text, in UTF-8, that one token can stand for; None if no bound is known."""
    parts = json.loads(backend.to_str())
    normalizers = _flat(parts["normalizer"], "normalizers")
    pre_tokenizers = _flat(parts["pre_tokenizer"], "pretokenizers")
    added = parts["added_tokens"]
    factors = [_shrinking(part) for part in normalizers]
    if (
        parts["model"].get("type") != "BPE"
        or any(token["lstrip"] or token["rstrip"] for token in added)
        or not all(map(_keeps, pre_tokenizers))
    ):
        return None
    byte_level = any(part["type"] == "ByteLevel" for part in (*normalizers, *pre_tokenizers))
    longest = _longest(parts["model"], byte_level=byte_level)
    if longest is None:
        return None
    most = max([longest, *(len(token["content"].encode()) for token in added)])
    for factor in factors:
        if factor is None:
            return None
        most *= factor
    return most


def _flat(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """A component as a list: of itself, or of all components of a (nested) sequence in order."""
    if part is None:
        return []
    return [inner for found in part[key] for inner in _flat(found, key)] if part["type"] == "Sequence" else [part]


def _shrinking(normalizer: Mapping[str, Any]) -> int | None:
    """The largest factor by which a normalizer can shrink a text's bytes; None if no bound is known."""
    kind = normalizer["type"]
    if kind == "Replace":
        pattern, content = normalizer["pattern"].get("String"), normalizer["content"]
        return 1 if pattern and len(content.encode()) >= len(pattern.encode()) else None
    return 1 if kind in ("Prepend", "ByteLevel") else NORMAL_FORMS.get(kind)


def _keeps(pre_tokenizer: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer keeps all of a text."""
    kind = pre_tokenizer["type"]
    return kind in _KEEPING or (kind in _BEHAVING and pre_tokenizer["behavior"] != "Removed")


def _longest(model: Mapping[str, Any], *, byte_level: bool) -> int | None:
    """Bytes of the longest token of a BPE model; None if the model drops or fuses unknown characters. With `byte_level`
    each character of a token stands for one byte."""
    from tokenizers import pre_tokenizers

    vocabulary = model["vocab"]
    if byte_level:
        complete = all(letter in vocabulary for letter in pre_tokenizers.ByteLevel.alphabet())
        return max(map(len, vocabulary)) if complete else None
    longest = max((len(token.encode()) for token in vocabulary), default=0)
    if model["byte_fallback"] and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return longest
    unknown_alone = model["unk_token"] is not None and not model["fuse_unk"]
    return max(longest, _UTF8_MOST) if unknown_alone else None
