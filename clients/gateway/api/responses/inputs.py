"""Reads the items and tools of a request for a response into the messages and tools of a chat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from clients.gateway.api import fields
from clients.gateway.api.messages import MOST_MESSAGES, read_messages
from clients.gateway.api.tools import offers
from export.errors import shown

_FUNCTION_KEYS = ("name", "description", "parameters", "strict")


def read_input(value: Any) -> list[Any]:  # noqa: ANN401 - JSON value
    """The messages; a text is one of the user. Raises ValueError that says which item is wrong."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_MESSAGES:
        raise ValueError(f"expected a text or a list of items, from one to {MOST_MESSAGES}")
    read = read_messages([_message(f"input[{place}]", item) for place, item in enumerate(value)], "input")
    return _turns(value, read)


def _message(where: str, item: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON value
    """The message that one item stands for, a part of one where it is of the model's."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if not isinstance(kind, str) or kind not in _READ:
        raise ValueError(
            f"{where} is {shown(item)}, expected an item of the type {', '.join(_READ)}: nothing is stored, and no "
            "tools are run here"
        )
    return _READ[kind](where, item)


def _plain(where: str, item: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001 - as the others
    """A message without what says that it is one, and what an earlier answer added to it."""
    return {key: value for key, value in item.items() if key not in ("type", "id", "status", "phase")}


def _call(where: str, item: dict[str, Any]) -> dict[str, Any]:
    function = {key: _text(where, item, key) for key in ("name", "arguments")}
    call = {"id": _text(where, item, "call_id"), "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _result(where: str, item: dict[str, Any]) -> dict[str, Any]:
    key, output = _text(where, item, "call_id"), item.get("output")
    if not isinstance(output, str | list) or output == []:
        raise ValueError(
            f"{where}.output is {shown(output)}, expected a text or a list of parts of the type input_text"
        )
    return {"role": "tool", "tool_call_id": key, "content": output}


def _reasoning(where: str, item: dict[str, Any]) -> dict[str, Any]:
    parts = item.get("content") or item.get("summary") or []
    if not isinstance(parts, list) or not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        raise ValueError(f"{where} is {shown(item)}, expected reasoning whose content is a list of texts")
    return {"role": "assistant", "content": "", "reasoning_content": "\n".join(part["text"] for part in parts)}


_READ: Mapping[str, Callable[[str, dict[str, Any]], dict[str, Any]]] = {
    "message": _plain, "function_call": _call, "function_call_output": _result, "reasoning": _reasoning,
}  # fmt: skip


def _text(where: str, item: Mapping[str, Any], key: str) -> str:
    if not isinstance(item.get(key), str):
        raise ValueError(f"{where}.{key} is {shown(item.get(key))}, expected a text")
    return str(item[key])


def _turns(items: list[Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of the model's whole turns: its reasoning, its text and its calls are items of their own, and templates
    take them as one message. Reasoning that nothing follows is no turn; an empty answer is one, since templates may ask
    that user and model speak by turns."""
    turns: list[dict[str, Any]] = []
    bare: list[bool] = []  # for each turn, whether it has reasoning alone
    before = ""  # the type of the item before
    for item, message in zip(items, messages, strict=True):
        kind = item.get("type", "message")
        is_models = message["role"] == "assistant"
        continues = before == "reasoning" or (before and kind == "function_call")
        if is_models and continues and kind != "reasoning" and turns:
            turn, bare[-1] = turns[-1], False
            turn["content"] += message["content"]
            if calls := message.get("tool_calls"):
                turn["tool_calls"] = [*turn.get("tool_calls", ()), *calls]
        else:
            turns.append(dict(message))
            bare.append(kind == "reasoning")
        before = kind if is_models else ""
    return [turn for turn, is_bare in zip(turns, bare, strict=True) if not is_bare]


def read_tools(value: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - JSON value
    """The tools as a chat's: there a function's fields stand in an object of their own."""
    if not isinstance(value, list):
        raise ValueError("expected a list of tools")
    return offers.read_tools([_as_chats(tool) for tool in value])


def _as_chats(tool: Any) -> Any:  # noqa: ANN401 - JSON value
    if not isinstance(tool, dict) or tool.get("type") != "function":
        return tool
    return {"type": "function", "function": {key: tool[key] for key in _FUNCTION_KEYS if tool.get(key) is not None}}


def read_tool_choice(value: Any) -> Any:  # noqa: ANN401 - JSON value
    """`tool_choice` as a chat's."""
    if isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("name"), str):
        return {"type": "function", "function": {"name": value["name"]}}
    if not isinstance(value, str):
        raise ValueError('expected one of none, auto, required, or {"type": "function", "name": NAME}')
    offers.read_tool_choice(value)
    return value


def read_text(value: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON value
    """`text.format` as a chat's response_format."""
    stated = fields.mapping(value)
    if set(stated) - {"format", "verbosity"}:
        raise ValueError("expected an object with format alone")
    form = fields.mapping(stated.get("format") or {"type": "text"})
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {key: value for key, value in form.items() if key != "type"}}
