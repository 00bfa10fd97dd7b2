"""The library's errors in our own form: what was found, what is expected, and what to do.

The library (llguidance 1.9) tells its errors as texts alone: those of its parser of schemas, of the crate regex-syntax,
and of the rules that it makes of both.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from export.errors import shown

_MOST_SHOWN = 200  # characters of a text of the library
_NO_VALUE = "no value meets the schema, since "
_AGAIN = "; send one that can be met"
_TOO_MUCH = "it takes too much: its patterns, rules and limits of length multiply; send less"
_LOOK = {"Start": "^", "End": "$", "StartLF": "^", "EndLF": "$", "WordUnicode": r"\b", "WordUnicodeNegate": r"\B"}


def _look(found: re.Match[str]) -> str:
    sign = _LOOK.get(found[1], "a look-around")
    return (
        f"found {sign} within a regular expression, expected ^ and $ at its ends alone and no look-around; write what "
        "stands beside it instead"
    )


def _syntax(found: re.Match[str]) -> str:
    return (
        f"found the regular expression {shown(found[1].strip())}, expected one of Rust's regex: {found[2].strip()}; "
        "mend it"
    )


def _unmet(found: re.Match[str]) -> str:
    reason = found[1]
    for theirs, ours in (
        ("Regex is empty", "no text meets its patterns, formats and limits of length together"),
        ("incompatible types", "its parts ask for different types"),
        ("anyOf is empty", "anyOf has no schema"),
        ("minProperties > maxProperties", "minProperties is greater than maxProperties"),
    ):
        if reason.startswith(theirs):
            return f"{_NO_VALUE}{ours}{_AGAIN}"
    reason = reason.replace(" is unsatisfiable", " can have no value")
    return f"{_NO_VALUE}{reason[:_MOST_SHOWN].rstrip('. ')}{_AGAIN}"


# The first that is found decides.
_SAID: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(theirs), ours)
    for theirs, ours in (
        (
            "oneOf constraints are not supported",
            "found a oneOf of schemas that one value may meet together, which is not served; send anyOf, or schemas of "
            "which no value meets two",
        ),
        ("too many expressions constructed|initial_lexer_fuel|step_lexer_fuel|Too many items|[Ff]uel", _TOO_MUCH),
        ("NoExtensionBias", "no text begins as it demands; send one that can be met"),
        (
            "Unable to determine if regex is empty",
            "found patterns, formats and limits of length that are too much to join; send fewer, or write ^ in front",
        ),
        (r"lookarounds not supported yet; (\w+)", _look),
        (r"regex parse error: (.*?)(?: \^+)+ error: (.*?)(?: \d+ \| .*|$)", _syntax),
        (r"Unsatisfiable schema: (.*)", _unmet),
        (
            r"Unknown format: (.*)",
            lambda found: (
                f"found the format {shown(found[1])}, expected date, date-time, time, duration, email, hostname, ipv4, "
                "ipv6, uuid or uri; leave it out"
            ),
        ),
        (
            r"Pointer '(.*?)' does not exist",
            lambda found: f"found the reference {shown('#' + found[1])}, which leads to nothing; mend or leave it out",
        ),
        (
            r"Resource '(.*?)' is not present",
            lambda found: (
                f"found the reference {shown(found[1])}, expected one within the schema (#/$defs/...); put what it "
                "leads to there"
            ),
        ),
        (
            "Failed to generate regex for (?:float|integer) range",
            "found limits of a number that are too far apart or too long to be served; send rounder ones",
        ),
    )
)


def said(problem: str) -> str:
    """An error of the library, of one line, in our own form."""
    for theirs, ours in _SAID:
        if found := theirs.search(problem):
            return ours if isinstance(ours, str) else ours(found)
    return f"it cannot be compiled or followed: {problem[:_MOST_SHOWN]}; send another one" if problem else _TOO_MUCH
