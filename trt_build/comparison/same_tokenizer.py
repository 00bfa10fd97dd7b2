"""Compares an engine's tokenizer with the checkpoint's: whoever has another tokenizer has another model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from export.errors import shown
from export.tokenizer.loading import Tokenizer, load_tokenizer
from export.tokenizer.settings import Settings, TokenizerFacts
from trt_build.errors import EngineError

# The facts that decide which ids a prompt begins and an answer ends with. Chat templates and the longest input change
# no logit.
_TOKEN_FACTS = ("bos_token_id", "pad_token_id", "special_tokens", "added_tokens", "begins_with", "ends_with")


def require_same_tokenizer(
    folder: Path, facts: TokenizerFacts | None, end_ids: tuple[int, ...], settings: Settings
) -> Tokenizer:
    """The tokenizer of the checkpoint whose `settings` are given, if the engine in `folder` has the same.

    Compares the content of the engine's tokenizer.json with the tokenizer that a build makes of the checkpoint's files,
    then the special ids of engine.json: `facts` (None in an engine of format 2, which has a copy of the checkpoint's
    own tokenizer.json) and `end_ids`. Raises EngineError that names the first difference.
    """
    expected = load_tokenizer(settings.folder) if facts is None else settings.tokenizer
    difference = next(_differences(load_tokenizer(folder), expected, facts, end_ids, settings), None)
    if difference is not None:
        raise EngineError(
            f"verifying {folder} against {settings.folder}: the engine's tokenizer is not the checkpoint's "
            f"({difference}); name the checkpoint that the engine was built from, or build the engine again"
        )
    return expected


def _differences(
    engine: Tokenizer,
    checkpoint: Tokenizer,
    facts: TokenizerFacts | None,
    end_ids: tuple[int, ...],
    settings: Settings,
) -> Iterator[str]:
    found, expected = (json.loads(tokenizer.backend.to_str()) for tokenizer in (engine, checkpoint))
    if found != expected:
        yield from _vocabulary_difference(_texts(engine), _texts(checkpoint))
        found_model, expected_model = found.pop("model"), expected.pop("model")
        yield from _content_difference("", found, expected)
        yield from _content_difference("model.", found_model, expected_model)
    if tuple(end_ids) != settings.ids.eos:
        yield f"the end tokens are {list(end_ids)} in engine.json, {list(settings.ids.eos)} in the checkpoint"
    for name in _TOKEN_FACTS if facts is not None else ():
        ours, theirs = getattr(facts, name), getattr(settings.facts, name)
        if ours != theirs:
            yield f"{name} is {shown(ours, 80)} in engine.json, {shown(theirs, 80)} by the checkpoint's files"


def _texts(tokenizer: Tokenizer) -> Mapping[int, str]:
    return {token: text for text, token in tokenizer.backend.get_vocab(with_added_tokens=True).items()}


def _vocabulary_difference(found: Mapping[int, str], expected: Mapping[int, str]) -> Iterator[str]:
    ids = sorted(found.keys() | expected.keys())
    other = [token for token in ids if found.get(token) != expected.get(token)]
    if other:
        yield (
            f"{len(other)} of {len(ids)} ids stand for another text, first id {other[0]}: "
            f"{shown(found.get(other[0]), 40)} in the engine, {shown(expected.get(other[0]), 40)} in the checkpoint"
        )


def _content_difference(prefix: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            yield (
                f"{prefix}{name} of tokenizer.json is {shown(found.get(name), 60)} in the engine, "
                f"{shown(expected.get(name), 60)} in the checkpoint"
            )
