"""Calls that models write as JSON: objects with a name and arguments, or a name ahead of an object of arguments."""

from __future__ import annotations

import json
import re
from typing import Any

from clients.gateway.api.tools.reading import CallReader, Deltas

_BEGIN_SIZE = 256  # characters that are searched for a name and the begin of arguments, with each piece of an answer
_BEGIN = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_MOST = 1 << 16  # characters of an object that is kept until its end, to see whether it is a call
_NAME = re.compile(r"([^\s{\[]+)\s*(?:\[CALL_ID\]\s*[^\s{\[]*\s*)?(?:\[ARGS\]\s*)?(?=\{)")


class JsonCalls(CallReader):
    """Reads objects with a name and arguments; the arguments are given as the model writes them."""

    _object: _Object

    def _begin_call(self) -> None:
        self._object, self._read = _Object(), self._in_name

    def _in_name(self, is_last: bool) -> Deltas:
        """From a call's brace until its arguments begin."""
        found = _BEGIN.match(self._left[:_BEGIN_SIZE])
        if found is not None and (name := _text_of(found[1])) is not None:
            self._object = _Object(depth=1)
            self._left, self._read = self._left[found.end() :], self._in_arguments
            return [self._call(name)]
        end = self._object.end(self._left[:_MOST], is_kept=True)
        if end is not None:
            return self._unusual(end)
        if is_last or len(self._left) >= _MOST:
            text, self._left = self._left[:_MOST], self._left[_MOST:]
            return self._no_call(text)
        return []

    def _unusual(self, end: int) -> Deltas:
        """A whole object whose name and arguments are in another order, or which is no call."""
        text, self._left = self._left[:end], self._left[end:]
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            call = {}
        arguments = call.get("arguments", call.get("parameters"))
        if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
            return self._no_call(text)
        self._read = self._in_calls
        deltas = [self._call(call["name"]), self._arguments(json.dumps(arguments, ensure_ascii=False))]
        self._ended()
        return deltas

    def _in_arguments(self, is_last: bool) -> Deltas:  # noqa: ARG002 - as the others
        deltas, is_whole = self._some_arguments(1)
        if is_whole:
            self._read = self._behind_arguments
        return deltas

    def _some_arguments(self, depth: int) -> tuple[Deltas, bool]:
        """What came of the arguments, and whether that is all: so many objects are open then."""
        end = self._object.end(self._left, depth=depth)
        given, self._left = (self._left, "") if end is None else (self._left[:end], self._left[end:])
        deltas: list[dict[str, Any]] = [self._arguments(given)] if given else []
        if end is not None:
            self._ended()
        return deltas, end is not None

    def _behind_arguments(self, is_last: bool) -> Deltas:  # noqa: ARG002 - as the others
        """Up to a call's last brace: further keys are left out."""
        end = self._object.end(self._left)
        self._left = "" if end is None else self._left[end:]
        if end is not None:
            self._read = self._in_calls
        return []


class NamedCalls(JsonCalls):
    """Reads calls whose names stand ahead of the objects of their arguments, as Mistral's from version 11 on.

    vLLM takes what stands before the brace for the name (mistral_tool_parser.py); a name here has no white space.
    """

    start = ""  # any letter

    def _begin_call(self) -> None:
        self._read = self._in_name

    def _in_name(self, is_last: bool) -> Deltas:
        head = self._left[:_BEGIN_SIZE]
        found = _NAME.match(head)
        if found is not None:
            self._object = _Object()
            self._left, self._read = self._left[found.end() :], self._in_arguments
            return [self._call(found[1])]
        if is_last or len(head) == _BEGIN_SIZE or "{" in head:
            return self._no_call()
        return []

    def _in_arguments(self, is_last: bool) -> Deltas:  # noqa: ARG002 - as the others
        deltas, is_whole = self._some_arguments(0)
        if is_whole:
            self._read = self._in_text
        return deltas


class _Object:
    """Finds the end of a JSON object whose text comes in parts."""

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._in_string, self._is_escaped = depth, False, False
        self._seen = 0  # characters of the text that were read already

    def end(self, text: str, *, depth: int = 0, is_kept: bool = False) -> int | None:
        """How many characters of a text it takes until so many objects are open; None if more. `is_kept`: the text
        comes again with more behind it."""
        for place in range(self._seen, len(text)):
            letter = text[place]
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped, self._in_string = letter == "\\", letter != '"'
            elif letter == '"':
                self._in_string = True
            elif letter == "{":
                self._depth += 1
            elif letter == "}":
                self._depth -= 1
                if self._depth == depth:
                    self._seen = 0
                    return place + 1
        self._seen = len(text) if is_kept else 0
        return None


def _text_of(quoted: str) -> str | None:
    """The text that a string of JSON stands for; None for one that is no JSON."""
    try:
        return str(json.loads(quoted))
    except ValueError:
        return None
