"""Which tools a request offers, whether its answer must be a call of one, and what reads the answer's calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from clients.gateway.api.guides import FORMAT, GUIDE_TYPE
from clients.gateway.api.tools.forms import MISTRAL_NAMED, QWEN_CODER, Form
from clients.gateway.api.tools.json_calls import JsonCalls, NamedCalls
from clients.gateway.api.tools.reading import AUTO, NAMED, NONE, REQUIRED, CallReader
from clients.gateway.api.tools.xml_calls import XmlCalls
from clients.gateway.errors import invalid, unsupported
from clients.gateway.state import Gateway
from clients.gateway.texts import ModelTexts
from export.errors import shown
from triton_repo.contracts.wire import MOST_GUIDE_BYTES

TOOLS, CHOICE, PARALLEL = "tools", "tool_choice", "parallel_tool_calls"
_Choice = tuple[str, str]  # one of the kinds, and the function that NAMED names

# JSON schemas: the keywords that hold values, and those that hold schemas under names that the schema's author chose.
_VALUES = ("const", "enum", "default", "examples")
_TABLES = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")


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
        raise invalid(
            TOOLS,
            "found tools, and this model's chat template shows none to the model; leave them out, or start the gateway "
            "with a template that shows them: --chat-template FILE",
        )
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
    guide = json.dumps(call_schema(functions, is_list=form.is_list, arguments=form.arguments), ensure_ascii=False)
    if len(guide.encode("utf-8", "surrogatepass")) > MOST_GUIDE_BYTES:
        raise invalid(TOOLS, f"expected parameters whose schemas have at most {MOST_GUIDE_BYTES} bytes together")
    return "json_schema", guide


def call_schema(
    functions: Sequence[Mapping[str, Any]], *, is_list: bool, arguments: str = "arguments"
) -> dict[str, Any]:
    """The JSON schema of a call of one of the functions, or of a list of one such call. `arguments`: the key of the
    call's arguments."""
    root = "#/items" if is_list else "#"
    if len(functions) == 1:
        schema = _schema_of(functions[0], root, arguments)
    else:
        schema = {"anyOf": [_schema_of(one, f"{root}/anyOf/{place}", arguments) for place, one in enumerate(functions)]}
    return {"type": "array", "items": schema, "minItems": 1, "maxItems": 1} if is_list else schema


def _schema_of(function: Mapping[str, Any], path: str, arguments: str) -> dict[str, Any]:
    parameters = function.get("parameters")
    if parameters is None:  # as OpenAI's API defines it, a function without parameters
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    elif not parameters:
        parameters = {"type": "object"}
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            arguments: _moved(parameters, f"{path}/properties/{arguments}"),
        },
        "required": ["name", arguments],
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


def reader_of(form: Form, texts: ModelTexts, values: Mapping[str, Any]) -> CallReader | None:
    """What reads the calls in one answer; None where it can have none."""
    kind = choice_of(values)
    if kind in (REQUIRED, NAMED):
        return JsonCalls(form, texts, kind)
    if kind == NONE or not form.begins:
        return None
    if form is QWEN_CODER:
        functions = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in values[TOOLS]}
        return XmlCalls(form, texts, kind, functions)
    return (NamedCalls if form is MISTRAL_NAMED else JsonCalls)(form, texts, kind)
