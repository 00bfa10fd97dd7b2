"""Tools of a chat: which of them a request offers, the form in which its model writes calls, and calls read from it.

Each family of models writes a call in its own form, and its chat template shows which. Two forms are read, under the
names that vLLM's parsers have (docs/features/tool_calling of vLLM):

- hermes, as Qwen's templates have it: `<tool_call>\\n{"name": "add", "arguments": {"a": 7}}\\n</tool_call>` for each
- mistral, as Mistral's had it until their version 7: `[TOOL_CALLS] [{"name": "add", "arguments": {"a": 7}}, ...]`

What a model of another form writes stays the answer's text. A call that is required is written under a JSON schema,
whatever the form.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clients.gateway.api.guides import FORMAT, GUIDE_TYPE
from clients.gateway.errors import invalid, unsupported
from clients.gateway.state import Gateway
from clients.gateway.texts import Marks, ModelTexts
from export.errors import shown
from triton_repo.contracts.wire import MOST_GUIDE_BYTES

TOOLS, CHOICE = "tools", "tool_choice"
NONE, AUTO, REQUIRED, NAMED = "none", "auto", "required", "named"
_Choice = tuple[str, str]  # one of these, and the function that NAMED names


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a model writes calls. Without `begin` it writes them where they are required alone."""

    begin: str | None = None  # the text before a call, or before a list of calls
    end: str | None = None  # the text behind it
    between: str = ""  # characters beside white space that may stand before a call
    is_list: bool = False  # whether a required call is the list's only one
    prefill: str = ""  # what a prompt ends with whose answer must be a call

    def call_id(self) -> str:
        """A new id for a call. Mistral's templates refuse others than nine letters and digits."""
        if self.is_list:
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


HERMES = Form(begin="<tool_call>", end="</tool_call>", prefill="<tool_call>\n")
MISTRAL = Form(begin="[TOOL_CALLS]", end="]", between="[,", is_list=True, prefill="[TOOL_CALLS]")
UNKNOWN = Form()
# What templates have that share a begin with a form above and are of another: the calls of Qwen3-Coder and GLM are XML,
# and in later ones of Mistral a name stands before each call's arguments.
_OTHERS = {HERMES: ("<function=", "<arg_key>"), MISTRAL: ("[ARGS]",)}

# JSON schemas: the keywords that hold values, and those that hold schemas under names that the schema's author chose.
_VALUES = ("const", "enum", "default", "examples")
_TABLES = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")


def form_of(template: str) -> Form:
    """The form of a model's calls, by its chat template."""
    for form, others in _OTHERS.items():
        if form.begin is not None and form.begin in template and not any(other in template for other in others):
            return form
    return UNKNOWN


def read_tools(value: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - JSON value
    """The tools that a template may show to the model: functions, since clients run them."""
    if not isinstance(value, list):
        raise ValueError("expected a list of tools")
    for place, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(
                f"and tools[{place}] is {shown(tool)}, expected one of the type function, whose function has a name"
            )
        if not isinstance(function.get("parameters") or {}, dict):
            raise ValueError(f"and the parameters of tools[{place}] are no object, expected a JSON schema")
    return list(value)


def read_tool_choice(value: Any) -> _Choice:  # noqa: ANN401 - JSON value
    """Whether tools are shown to the model, and whether it must call one."""
    if isinstance(value, str) and value in (NONE, AUTO, REQUIRED):
        return value, ""
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return NAMED, function["name"]
    raise ValueError('expected one of none, auto, required, or {"type": "function", "function": {"name": NAME}}')


def shown_tools(values: Mapping[str, Any], template: str) -> list[dict[str, Any]] | None:
    """The tools that the template is given; None for none. Raises ApiError for a template that shows none."""
    tools, (kind, name) = values.get(TOOLS) or None, values.get(CHOICE, (AUTO, ""))
    if kind in (REQUIRED, NAMED) and not tools:
        raise invalid(CHOICE, f"found {kind if kind == REQUIRED else shown(name)} without tools; send tools beside it")
    if tools is None or kind == NONE:
        return None
    if "tools" not in template:
        raise invalid(TOOLS, "found tools, and this model's chat template shows none to the model; leave them out")
    if kind == NAMED and name not in _names(tools):
        raise invalid(CHOICE, f"found {shown(name)}, expected the name of one of the tools: {', '.join(_names(tools))}")
    return tools


def _names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    return [tool["function"]["name"] for tool in tools]


def is_required(values: Mapping[str, Any]) -> bool:
    """Whether an answer must be a call."""
    return choice_of(values) in (REQUIRED, NAMED)


def choice_of(values: Mapping[str, Any]) -> str:
    """Whether an answer may or must have calls: NONE, AUTO, REQUIRED or NAMED."""
    if not values.get(TOOLS):
        return NONE
    return str(values.get(CHOICE, (AUTO, ""))[0])


async def required_format(gateway: Gateway, model: str, values: Mapping[str, Any], form: Form) -> tuple[str, str]:
    """The guide that an answer which must be a call is kept to. Raises ApiError."""
    kind, name = values[CHOICE]
    if values.get(FORMAT, ("", ""))[0] or values.get("continue_final_message"):
        raise invalid(CHOICE, "found a call that is required, beside response_format or continue_final_message; leave "
                      "one of them out")  # fmt: skip
    if GUIDE_TYPE not in await gateway.pool.inputs(model):
        raise unsupported(CHOICE, "found a call that is required, and this model's server keeps no answer to a form; "
                          "send auto")  # fmt: skip
    if values.get("ignore_eos"):
        raise invalid("ignore_eos", f"found true beside {CHOICE}, whose answers must end; leave one of the two out")
    functions = [tool["function"] for tool in values[TOOLS] if kind == REQUIRED or tool["function"]["name"] == name]
    guide = json.dumps(call_schema(functions, is_list=form.is_list), ensure_ascii=False)
    if len(guide.encode("utf-8", "surrogatepass")) > MOST_GUIDE_BYTES:
        raise invalid(TOOLS, f"expected parameters whose schemas have at most {MOST_GUIDE_BYTES} bytes together")
    return "json_schema", guide


def call_schema(functions: Sequence[Mapping[str, Any]], *, is_list: bool) -> dict[str, Any]:
    """The JSON schema of a call of one of the functions, or of a list of one such call."""
    root = "#/items" if is_list else "#"
    if len(functions) == 1:
        schema = _schema_of(functions[0], root)
    else:
        schema = {"anyOf": [_schema_of(one, f"{root}/anyOf/{place}") for place, one in enumerate(functions)]}
    return {"type": "array", "items": schema, "minItems": 1, "maxItems": 1} if is_list else schema


def _schema_of(function: Mapping[str, Any], path: str) -> dict[str, Any]:
    parameters = function.get("parameters")
    if parameters is None:  # as OpenAI's API defines it, a function without parameters
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    elif not parameters:
        parameters = {"type": "object"}
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "arguments": _moved(parameters, f"{path}/properties/arguments"),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, path: str, *, has_names: bool = False) -> Any:  # noqa: ANN401 - JSON value
    """A schema that stands at a path of another one: its references lead to their places there. `has_names`: it is a
    table of schemas, whose keys are names."""
    if isinstance(schema, list):
        return [_moved(item, path) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if has_names:
            moved[key] = _moved(value, path)
        elif key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = path + value[1:]
        elif key in _VALUES:
            moved[key] = value
        elif key != "$schema":  # it may stand at the root alone
            moved[key] = _moved(value, path, has_names=key in _TABLES)
    return moved


_BEGIN_SIZE = 256  # characters that are searched for a name and the begin of arguments, with each piece of an answer
_BEGIN = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


class CallReader:
    """Reads the calls in one answer as it comes, and gives deltas of OpenAI's messages.

    A call's name is given once its arguments begin, and they as they come, as the model writes them. Text around calls
    is content. White space before a call is left out, and so is text behind one that is white space alone.
    """

    def __init__(self, form: Form, texts: ModelTexts, kind: str) -> None:
        self.num_calls = 0  # calls that are whole
        self._form, self._kind = form, kind
        mark = _special_id(form, texts)
        self._marks = None if mark is None else Marks(mark, texts)
        self._left = ""  # what is not given yet
        self._opening = ""  # what was read since the begin, to be given as content where no call follows
        self._num_begun = 0
        self._read = self._in_calls if kind in (REQUIRED, NAMED) else self._in_text
        self._object = _Object()

    def read(self, text: str, token_ids: Sequence[int], *, is_last: bool) -> list[dict[str, Any]]:
        """The deltas that a piece of an answer adds."""
        begin = self._form.begin or ""
        self._left += text if self._marks is None else self._marks.put_back(begin, text, token_ids)
        found: list[dict[str, Any]] = []
        while True:
            reading, size = self._read, len(self._left)
            found += reading(is_last)
            if self._read == reading and len(self._left) == size:
                return found

    def finish_reason(self, reason: str | None) -> str | None:
        """The finish reason of an answer that ends for the given one. As OpenAI's, it is "stop" where the request named
        the function."""
        return "tool_calls" if reason == "stop" and self.num_calls and self._kind != NAMED else reason

    def _in_text(self, is_last: bool) -> list[dict[str, Any]]:
        begin, text = self._form.begin, self._left
        place = -1 if begin is None else text.find(begin)
        if begin is not None and place >= 0:
            before = text[:place].rstrip()
            self._left, self._opening = text[place + len(begin) :], text[len(before) : place] + begin
            self._read = self._in_calls
            return _content(before)
        held = "" if is_last else _held(text, begin)
        self._left = held
        given = text.removesuffix(held) if held else text
        return [] if self._num_begun and not given.strip() else _content(given)

    def _in_calls(self, is_last: bool) -> list[dict[str, Any]]:
        """Before a call, or behind the last one."""
        form, text = self._form, self._left
        rest = text.lstrip(string.whitespace + form.between)
        self._opening += text[: len(text) - len(rest)]
        self._left = rest
        if rest.startswith("{"):
            self._object, self._read = _Object(), self._in_name
            return []
        if not is_last and (form.end or "").startswith(rest) and rest != form.end:
            return []  # nothing yet, or a part of the end
        opening, self._opening = self._opening, ""
        has_read = not opening or opening.isspace()
        if form.end is not None and rest.startswith(form.end) and has_read:
            self._left = rest.removeprefix(form.end)
            opening = ""
        self._read = self._in_text
        return _content("" if has_read else opening)

    def _in_name(self, is_last: bool) -> list[dict[str, Any]]:
        """From a call's brace until its arguments begin."""
        found = _BEGIN.match(self._left[:_BEGIN_SIZE])
        if found is not None and (name := _text_of(found[1])) is not None:
            self._object = _Object(depth=1)
            self._left, self._read = self._left[found.end() :], self._in_arguments
            return [self._begun(name)]
        end = self._object.end(self._left, is_kept=True)
        if end is not None:
            return self._unusual(end)
        if is_last:
            text, self._left, self._opening = self._opening + self._left, "", ""
            return _content(text)
        return []

    def _unusual(self, end: int) -> list[dict[str, Any]]:
        """A whole object whose name and arguments are in another order, or which is no call."""
        text, self._left, self._read = self._left[:end], self._left[end:], self._in_calls
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            call = {}
        arguments = call.get("arguments", call.get("parameters"))
        if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
            self._read = self._in_text
            opening, self._opening = self._opening, ""
            return _content(opening + text)
        deltas = [self._begun(call["name"]), self._arguments(json.dumps(arguments, ensure_ascii=False))]
        self._ended()
        return deltas

    def _in_arguments(self, is_last: bool) -> list[dict[str, Any]]:  # noqa: ARG002 - as the others
        end = self._object.end(self._left, depth=1)
        given, self._left = (self._left, "") if end is None else (self._left[:end], self._left[end:])
        if end is not None:
            self._read = self._behind_arguments
        return [self._arguments(given)] if given else []

    def _behind_arguments(self, is_last: bool) -> list[dict[str, Any]]:  # noqa: ARG002 - as the others
        """Up to a call's last brace: further keys are left out."""
        end = self._object.end(self._left)
        self._left = "" if end is None else self._left[end:]
        if end is not None:
            self._read = self._in_calls
            self._ended()
        return []

    def _begun(self, name: str) -> dict[str, Any]:
        self._num_begun += 1
        call = {"index": self._num_begun - 1, "id": self._form.call_id(), "type": "function",
                "function": {"name": name, "arguments": ""}}  # fmt: skip
        return {"tool_calls": [call]}

    def _arguments(self, text: str) -> dict[str, Any]:
        return {"tool_calls": [{"index": self._num_begun - 1, "function": {"arguments": text}}]}

    def _ended(self) -> None:
        self.num_calls += 1
        self._opening = ""


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


def message_of(deltas: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The message that deltas add up to. Its content is null where it has calls alone."""
    texts, reasoning = list[str](), list[str]()
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        texts.append(delta.get("content", ""))
        reasoning.append(delta.get("reasoning_content", ""))
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls.append({key: value for key, value in call.items() if key != "index"})
            else:
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
    content = "".join(texts)
    message = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    if thought := "".join(reasoning):
        message["reasoning_content"] = thought
    return {**message, "tool_calls": calls} if calls else message


def _content(text: str) -> list[dict[str, Any]]:
    return [{"content": text}] if text else []


def _held(text: str, begin: str | None) -> str:
    """The end of a text that may belong to a call: white space, and a part of what begins one."""
    if begin is None:
        return ""
    sizes = range(min(len(begin) - 1, len(text)), 0, -1)
    part = next((size for size in sizes if text.endswith(begin[:size])), 0)
    return text[len(text[: len(text) - part].rstrip()) :]


def _special_id(form: Form, texts: ModelTexts) -> int | None:
    """The token of a form's begin, where it is a special one."""
    token = None if form.begin is None else texts.tokenizer.backend.token_to_id(form.begin)
    return token if token in texts.special else None


def _text_of(quoted: str) -> str | None:
    """The text that a string of JSON stands for; None for one that is no JSON."""
    try:
        return str(json.loads(quoted))
    except ValueError:
        return None
