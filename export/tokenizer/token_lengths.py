"""How many bytes of a text one token can stand for: what bounds a prompt's bytes before it is encoded.

The bound holds where a tokenizer gives every byte of a text to some token and no token a run of any length. Dropping
text, as pre-tokenizers that split at white space do, and fusing it, as one token for a run of unknown characters does,
leave no bound. The parts are those of the tokenizers package's tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

# How many times as many bytes a text may have as its normal form: computed over Unicode's decompositions by
# tests/export/tokenizer/test_token_lengths.py (NFC: Greek iota with dialytika and tonos), rounded up.
NORMAL_FORMS = {"NFC": 4, "NFD": 3, "NFKD": 4, "NFKC": 23}
_KEEPING = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts")  # pre-tokenizers that drop nothing
_BEHAVING = ("Split", "Punctuation")  # those that drop nothing unless their behaviour says so
_UTF8_MOST = 4  # bytes of a character


def most_bytes_per_token(backend: tokenizers.Tokenizer) -> int | None:
    """The most bytes of UTF-8 that one token stands for; None where no bound is known."""
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
    """A part, or the parts of a sequence of them, in their order."""
    if part is None:
        return []
    return [inner for found in part[key] for inner in _flat(found, key)] if part["type"] == "Sequence" else [part]


def _shrinking(normalizer: Mapping[str, Any]) -> int | None:
    """How many times fewer bytes a text may have after a normalizer; None where there is no saying."""
    kind = normalizer["type"]
    if kind == "Replace":
        pattern, content = normalizer["pattern"].get("String"), normalizer["content"]
        return 1 if pattern and len(content.encode()) >= len(pattern.encode()) else None
    return 1 if kind in ("Prepend", "ByteLevel") else NORMAL_FORMS.get(kind)


def _keeps(pre_tokenizer: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer drops nothing of a text."""
    kind = pre_tokenizer["type"]
    return kind in _KEEPING or (kind in _BEHAVING and pre_tokenizer["behavior"] != "Removed")


def _longest(model: Mapping[str, Any], *, byte_level: bool) -> int | None:
    """Bytes of a BPE's longest token; None where it drops or fuses characters that it does not know. Where bytes are
    written as characters, a character is a byte."""
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
