"""How the tokenizers of transformers' classes split and join text, as tokenizer.json has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Contractions; words with one sign before them; single digits; signs with the line ends after them; white space.
_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def byte_level_pipeline(settings: Mapping[str, Any], *, composed: bool = False) -> dict[str, Any]:
    """The pipeline of GPT2Tokenizer and CodeGenTokenizer, and with `composed` that of GPTNeoXTokenizer, which brings
    text to Unicode's form NFC first."""
    parts = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    prefix_space = bool(settings.get("add_prefix_space", False))
    return {
        "normalizer": {"type": "NFC"} if composed else None,
        "pre_tokenizer": {**parts, "add_prefix_space": prefix_space},
        "decoder": {**parts, "add_prefix_space": True},
    }


def qwen_pipeline(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline of Qwen2Tokenizer: text is brought to Unicode's form NFC, split by a pattern of its own
    (PRETOKENIZE_REGEX of models/qwen2/tokenization_qwen2.py), and turned into bytes. Published files have trim_offsets
    false, which changes no token."""
    prefix_space = bool(settings.get("add_prefix_space", False))
    parts = {"type": "ByteLevel", "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _QWEN_PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {**parts, "add_prefix_space": prefix_space}]},
        "decoder": {**parts, "add_prefix_space": True},
    }


def llama_pipeline(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline of LlamaTokenizer. `_get_prepend_scheme` (tokenization_utils_base.py) decides whether a space is put
    before the first piece of text or before every one."""
    prefix_space = settings.get("add_prefix_space")
    prefix_space = prefix_space is None or bool(prefix_space)
    first = "always" if settings.get("legacy", False) else "first"
    decoders = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix_space else []
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": first if prefix_space else "never",
            "split": False,
        },
        "decoder": {"type": "Sequence", "decoders": [*decoders, {"type": "Fuse"}, *strip]},
    }
