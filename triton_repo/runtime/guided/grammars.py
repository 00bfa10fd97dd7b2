"""The library's grammar of a guide, by its type. The types are those of TensorRT-LLM's Triton models."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from triton_repo.runtime.guided.ebnf import lark_of
from triton_repo.runtime.guided.problems import said
from triton_repo.runtime.guided.schema import LONGEST_PATTERN, check_schema
from triton_repo.runtime.options import refusal

# One space at most between the parts of JSON, as in Outlines: small models write white space for ever where they may.
_OPTIONS: dict[str, Any] = {"whitespace_pattern": " ", "lenient": False, "coerce_one_of": False}


def grammar_of(guide_type: str, guide: str) -> str:
    """The library's text of a grammar. `guide_type` is one of contracts/wire.py: GUIDE_TYPES. Raises RequestError for a
    guide that is malformed, cannot be met, or uses what is not served."""
    from llguidance import LLMatcher

    try:
        if guide_type == "regex":
            if len(guide) > LONGEST_PATTERN:
                raise ValueError(
                    f"found {len(guide)} characters, expected at most {LONGEST_PATTERN}; send a shorter one"
                )
            return _made(LLMatcher.grammar_from_regex, without_anchors(guide))
        if guide_type == "ebnf_grammar":
            return _made(LLMatcher.grammar_from_lark, lark_of(guide))
        schema = {"type": "object"} if guide_type == "json" else check_schema(guide)
        return _made(LLMatcher.grammar_from_json_schema, json.dumps(schema), overrides=_OPTIONS)
    except ValueError as error:
        raise refusal([f"guided_decoding_guide: {error}"]) from error


def _made(make: Callable[..., str], text: str, **options: Any) -> str:  # noqa: ANN401 - the library's
    """What a function of the library makes of a text. Raises ValueError in our own words."""
    try:
        return make(text, **options)
    except ValueError as error:
        raise ValueError(said(" ".join(str(error).split()))) from error


def check_guide(guide_type: str, guide: str) -> None:
    """Raise RequestError for a guide that is malformed or cannot be met, as far as that is known without a library. Of
    regular expressions nothing is."""
    try:
        if guide_type == "json_schema":
            check_schema(guide)
        elif guide_type == "ebnf_grammar":
            lark_of(guide)
    except ValueError as error:
        raise refusal([f"guided_decoding_guide: {error}"]) from error


def without_anchors(regex: str) -> str:
    """A regular expression without ^ at its start and $ at its end. The whole answer must match in any case, and the
    library has no anchors."""
    start = 1 if regex.startswith("^") else 0
    slashes = len(regex) - 1 - len(regex[:-1].rstrip("\\"))
    end = len(regex) - 1 if regex.endswith("$") and slashes % 2 == 0 else len(regex)
    return regex[start:end]
