"""Calls that models write as XML, as Qwen3-Coder does, whose arguments become JSON by the schemas of the request.

    <tool_call>
    <function=add>
    <parameter=a>
    7
    </parameter>
    </function>
    </tool_call>

The form is that of Qwen3-Coder's chat template, and values are read as vLLM's parser reads them
(vllm/entrypoints/openai/tool_parsers/qwen3coder_tool_parser.py): a value ends at the first sign of an end, `null` is
null, and what does not fit its type stays a text. Unlike there, a boolean that is none stays one too.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from clients.gateway.api.tools.forms import FUNCTION, Form
from clients.gateway.api.tools.reading import CallReader, Deltas
from clients.gateway.texts import ModelTexts

_PARAMETER, _END_PARAMETER, _END_FUNCTION, _END = "<parameter=", "</parameter>", "</function>", "</tool_call>"
_NAME_SIZE = 256  # characters of a name and its sign
_FUNCTION_NAME = re.compile(FUNCTION + r"[ \t]*([^<>\n]*[^<>\s])[ \t]*>")
_PARAMETER_NAME = re.compile(r"[ \t]*([^<>\n]*[^<>\s])[ \t]*>")
_BEHIND_VALUE = (_PARAMETER, _END_FUNCTION, _END)  # before a parameter, and what ends a value that lacks its end
_IN_FUNCTION = re.compile("|".join(_BEHIND_VALUE))
_IN_VALUE = re.compile("|".join((_END_PARAMETER, *_BEHIND_VALUE)))
_MOST_PYTHON = 4096  # characters of a value that is read as Python where it is no JSON
_MOST_SCHEMAS = 64  # and as many values of an enum, that are read for the types of one value


class XmlCalls(CallReader):
    """Reads calls as XML. `functions`: the schema of each one's parameters. A text is given as it comes, any other
    value once it is whole."""

    start = FUNCTION

    def __init__(self, form: Form, texts: ModelTexts, kind: str, functions: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(form, texts, kind)
        self._functions = functions
        self._parameters: Mapping[str, Any] = {}  # the schema of the parameters of the function that is called
        self._num_given = 0  # parameters of it that were begun
        self._value = _Value({}, {})

    def _begun_by(self, begin: str) -> None:
        self._read = self._in_calls
        if begin == FUNCTION:
            self._left = FUNCTION + self._left
            self._opening.pop()

    def _begin_call(self) -> None:
        self._read = self._in_name

    def _in_name(self, is_last: bool) -> Deltas:
        head = self._left[:_NAME_SIZE]
        found = _FUNCTION_NAME.match(head)
        if found is not None:
            self._parameters, self._num_given = self._functions.get(found[1], {}), 0
            self._left, self._read = self._left[found.end() :], self._in_function
            return [self._call(found[1])]
        if not is_last and _may_grow(head, FUNCTION):
            return []
        self._left = self._left.removeprefix(FUNCTION)
        return self._no_call(FUNCTION)

    def _in_function(self, is_last: bool) -> Deltas:
        """Between parameters, where other text is left out."""
        found = _IN_FUNCTION.search(self._left)
        if found is None:
            self._left = self._left[len(self._left) - _partial(self._left, _BEHIND_VALUE) :]
            if is_last and not self._is_cut:
                self._left = ""
                return self._close()
            return []
        self._left = self._left[found.end() :]
        if found[0] == _PARAMETER:
            self._read = self._in_parameter_name
            return []
        if found[0] == _END:
            self._left = _END + self._left
        return self._close()

    def _close(self) -> Deltas:
        self._read = self._in_calls
        self._ended()
        return [self._arguments("}" if self._num_given else "{}")]

    def _in_parameter_name(self, is_last: bool) -> Deltas:
        head = self._left[:_NAME_SIZE]
        found = _PARAMETER_NAME.match(head)
        if found is not None:
            name = found[1]
            properties = self._parameters.get("properties")
            schema = properties.get(name) if isinstance(properties, dict) else None
            self._value = _Value(schema, self._parameters)
            self._left, self._read = self._left[found.end() :], self._before_value
            begin = ", " if self._num_given else "{"
            self._num_given += 1
            return [self._arguments(f"{begin}{json.dumps(name, ensure_ascii=False)}: ")]
        if is_last or not _may_grow(head):
            self._read = self._in_function
        return []

    def _before_value(self, is_last: bool) -> Deltas:
        """A line break there is none of the value's."""
        if self._left or is_last:
            self._left, self._read = self._left.removeprefix("\n"), self._in_value
        return []

    def _in_value(self, is_last: bool) -> Deltas:  # noqa: ARG002 - as the others
        text = self._left
        found = _IN_VALUE.search(text)
        if found is not None:
            self._left = text[found.end() if found[0] == _END_PARAMETER else found.start() :]
            self._read = self._in_function
            return self._some(self._value.last(text[: found.start()].removesuffix("\n")))
        part = _partial(text, (_END_PARAMETER, *_BEHIND_VALUE))
        size = len(text) - part
        size -= text[:size].endswith("\n")
        self._left = text[size:]
        return self._some(self._value.add(text[:size]))

    def _some(self, text: str) -> Deltas:
        return [self._arguments(text)] if text else []


class _Value:
    """One value, as JSON. `schema` is its own, `root` the one that its references are of."""

    def __init__(self, schema: Any, root: Mapping[str, Any]) -> None:  # noqa: ANN401 - JSON value
        self._types = _types(schema, root)
        self._is_text = not self._types or self._types <= {"string", "null"}
        self._parts: list[str] = []  # what was not given yet
        self._has_begun = False

    def add(self, text: str) -> str:
        """What more text adds."""
        if text:
            self._parts.append(text)
        if not self._is_text or not text:
            return ""
        if not self._has_begun:
            so_far = "".join(self._parts)
            if "null".startswith(so_far.lower()):
                return ""
            self._has_begun = True
            self._parts = []
            return '"' + _inner(so_far)
        self._parts = []
        return _inner(text)

    def last(self, text: str) -> str:
        """What the rest of the text adds."""
        given = self.add(text)
        if self._has_begun:
            return given + '"'
        return json.dumps(_converted("".join(self._parts), self._types), ensure_ascii=False)


def _inner(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _types(schema: Any, root: Mapping[str, Any]) -> set[str]:  # noqa: ANN401 - JSON value
    """The types of JSON that a schema takes; none where it does not say."""
    found, waiting, seen = set[str](), [schema], set[int]()
    while waiting and len(seen) < _MOST_SCHEMAS:
        one = waiting.pop()
        if not isinstance(one, dict) or id(one) in seen:
            continue
        seen.add(id(one))
        stated, reference, values = one.get("type"), one.get("$ref"), one.get("enum")
        if isinstance(stated, str | list):
            found |= {kind for kind in ([stated] if isinstance(stated, str) else stated) if isinstance(kind, str)}
        elif isinstance(values, list):
            found |= set(map(_type_of, values[:_MOST_SCHEMAS]))
        elif "const" in one:
            found.add(_type_of(one["const"]))
        elif isinstance(reference, str):
            waiting.append(_referred(reference, root))
        else:
            inner = (one.get(key) for key in ("anyOf", "oneOf", "allOf"))
            waiting += [each for schemas in inner if isinstance(schemas, list) for each in schemas[:_MOST_SCHEMAS]]
    return found


def _referred(reference: str, root: Mapping[str, Any]) -> Any:  # noqa: ANN401 - JSON value
    found: Any = root
    for key in reference.removeprefix("#").split("/")[1:]:
        found = found.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    return found


def _type_of(value: Any) -> str:  # noqa: ANN401 - JSON value
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _integer(text: str) -> int:
    value = float(text)
    if not value.is_integer():
        raise ValueError(text)
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else int(value)


def _number(text: str) -> float | int:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return _integer(text) if value.is_integer() and abs(value) < 2**53 else value


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _object(text: str) -> Any:  # noqa: ANN401 - JSON value
    try:
        value = json.loads(text)
    except ValueError:
        if len(text) > _MOST_PYTHON:
            raise
        value = ast.literal_eval(text)
    json.dumps(value, allow_nan=False).encode()  # a surrogate's half stays escaped
    return value


_READ: Mapping[str, Callable[[str], Any]] = {
    "boolean": _boolean, "integer": _integer, "number": _number, "array": _object, "object": _object,
}  # fmt: skip


def _converted(text: str, types: set[str]) -> Any:  # noqa: ANN401 - JSON value
    """A value of one of some types; the text itself where it is of none of them."""
    if text.lower() == "null":
        return None
    for kind, read in _READ.items():
        if kind in types:
            try:
                return read(text.strip())
            except (ValueError, KeyError, TypeError, OverflowError, SyntaxError, RecursionError, MemoryError):
                continue
    return text


def _may_grow(head: str, sign: str = "") -> bool:
    """Whether more text may make a name and its sign of the begin of one."""
    return len(head) < _NAME_SIZE and not re.search("[<\n]", head.removeprefix(sign))


def _partial(text: str, signs: tuple[str, ...]) -> int:
    """How many characters at the end of a text may belong to a sign."""
    place = text.rfind("<", max(0, len(text) - max(map(len, signs)) + 1))
    return len(text) - place if place >= 0 and any(sign.startswith(text[place:]) for sign in signs) else 0
