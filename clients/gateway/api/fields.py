"""Reads the fields of a request's body: each endpoint has a table of the fields that it takes, and refuses others.

Fields that OpenAI's API has and that change nothing of an answer here are taken and left unread. Fields that would
change the answer and are not honoured are refused by name, unless they have the value that asks for nothing. A name
that neither OpenAI's API nor this gateway has is refused, as OpenAI does: it is more often a slip than a wish. A field
that is null counts as absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from clients.gateway.errors import ApiError, invalid, unsupported
from export.errors import kind_of, shown, suggestion

Read = Callable[[Any], Any]  # JSON value to the value; raises ValueError with "expected ..."
MOST_TOKENS = 2**31 - 1  # what the contract's tensor holds


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What one endpoint makes of the fields of its body."""

    taken: Mapping[str, Read]
    unread: frozenset[str] = frozenset()  # they change nothing here
    neutral: Mapping[str, tuple[Any, ...]]  # fields that are not honoured, and their values that ask for nothing

    def read(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the fields that are there. Raises ApiError for the first that is not as it must be."""
        values: dict[str, Any] = {}
        for name, value in body.items():
            if value is None or name in self.unread:
                continue
            if name in self.neutral:
                if not any(value == known and type(value) is type(known) for known in self.neutral[name]):
                    allowed = ", ".join(map(shown, self.neutral[name]))
                    raise unsupported(
                        name, f"found {shown(value)}, and this server does not honour it; leave it out"
                        + (f", or send {allowed}" if allowed else ""),
                    )  # fmt: skip
                continue
            if name not in self.taken:
                raise self._unknown(name)
            try:
                values[name] = self.taken[name](value)
            except ValueError as error:
                raise invalid(name, f"found {shown(value)}, {error}") from None
        return values

    def _unknown(self, name: str) -> ApiError:
        known = (*self.taken, *self.neutral, *self.unread)
        return ApiError(
            f"unrecognized request argument supplied: {shown(name)}{suggestion(name, known)}; leave it out",
            param=name[:100], code="unknown_parameter",
        )  # fmt: skip


def number(low: float, high: float) -> Read:
    """A finite number within bounds, which are included."""

    def read(value: Any) -> float:  # noqa: ANN401 - JSON value
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"expected a number from {low:g} to {high:g}")
        return float(value)

    return read


def integer(low: int, high: int) -> Read:
    """A whole number within bounds, which are included. 3.0 is one, as it is in JSON Schema."""

    def read(value: Any) -> int:  # noqa: ANN401 - JSON value
        is_whole = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value) and value == int(value))
        if isinstance(value, bool) or not is_whole or not low <= value <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return int(value)

    return read


def boolean(value: Any) -> bool:  # noqa: ANN401 - JSON value
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def text(most: int) -> Read:
    """A text of at most so many characters."""

    def read(value: Any) -> str:  # noqa: ANN401 - JSON value
        if not isinstance(value, str):
            raise ValueError("expected a text")
        if len(value) > most:
            raise ValueError(f"expected at most {most} characters")
        return value

    return read


def mapping(value: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON value
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, not {kind_of(value)}")
    return value


def one_of(*choices: str) -> Read:
    def read(value: Any) -> str:  # noqa: ANN401 - JSON value
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return value

    return read


def words(most: int, most_bytes: int) -> Read:
    """A text, or a list of at most so many. Empty ones are left out, since they would end every answer at once."""

    def read(value: Any) -> tuple[str, ...]:  # noqa: ANN401 - JSON value
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
            raise ValueError("expected a text or a list of texts")
        if len(found) > most:
            raise ValueError(f"expected at most {most} texts")
        if any(len(word.encode()) > most_bytes for word in found):
            raise ValueError(f"expected texts of at most {most_bytes} bytes")
        return tuple(word for word in found if word)

    return read


def biases(most: int, low: float, high: float) -> Read:
    """An object of token ids, written as texts, and a number each."""

    def read(value: Any) -> dict[int, float]:  # noqa: ANN401 - JSON value
        if not isinstance(value, dict) or len(value) > most:
            raise ValueError(f"expected an object of at most {most} token ids with a number each")
        found: dict[int, float] = {}
        for token, bias in value.items():
            # "01" beside "1" would be one token with two numbers.
            if not (token.isascii() and token.isdecimal() and len(token) < 10 and str(int(token)) == token):
                raise ValueError(
                    f"expected token ids as keys, written without zeros in front, and {shown(token)} is none"
                )
            try:
                found[int(token)] = number(low, high)(bias)
            except ValueError as error:
                raise ValueError(f"{error} for the token {token}") from None
        return found

    return read


def within(name: str, fields: Mapping[str, Read], *, unread: frozenset[str] = frozenset()) -> Read:
    """An object in the field `name` with fields of its own."""
    table = Fields(taken=fields, unread=unread, neutral={})

    def read(value: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON value
        try:
            return table.read(mapping(value))
        except ApiError as error:
            raise invalid(
                f"{name}.{error.param}", str(error).removeprefix(f"{error.param}: "), code=error.code
            ) from None

    return read
