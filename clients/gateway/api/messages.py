"""Reads the messages of a conversation into what chat templates are given: a role and a text each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.errors import kind_of, shown
from export.files.reading import parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_MESSAGES = 4096
# What clients send along with an answer that they were given: null, or of no use to a template.
_UNREAD = frozenset({"refusal", "annotations", "audio", "function_call"})
_PASSED = ("name", "tool_calls", "tool_call_id", "reasoning_content")


def read_messages(value: Any, name: str = "messages") -> list[dict[str, Any]]:  # noqa: ANN401 - JSON value
    """The messages in a field. Raises ValueError that says which is wrong."""
    if not isinstance(value, list) or not value:
        raise ValueError("expected a list of messages, at least one")
    if len(value) > MOST_MESSAGES:
        raise ValueError(f"expected at most {MOST_MESSAGES} messages")
    return [_message(f"{name}[{place}]", message) for place, message in enumerate(value)]


def _message(where: str, value: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON value
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, not {kind_of(value)}")
    role = value.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role is {shown(role)}, expected one of {', '.join(ROLES)}")
    unknown = [key for key in value if key not in (*_PASSED, *_UNREAD, "role", "content")]
    if unknown:
        raise ValueError(f"{where} has {shown(unknown[0])}, expected role, content, {', '.join(_PASSED)}; leave it out")
    calls = value.get("tool_calls")
    # OpenAI's newer models call the system's role developer; templates know it as system.
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    message["content"] = _content(f"{where}.content", value, may_be_absent=role == "assistant" and bool(calls))
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ValueError(f"{where}.tool_calls is {shown(calls)}, expected a list of objects")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if value.get(key) is not None and not isinstance(value[key], str):
            raise ValueError(f"{where}.{key} is {shown(value[key])}, expected a text")
    passed = {key: value[key] for key in _PASSED if value.get(key) is not None}
    return message | passed | ({"tool_calls": [_call(call) for call in calls]} if calls else {})


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A call as templates write it: OpenAI's API has the arguments as a text of JSON, transformers' templates as the
    object (docs/source/en/chat_extras.md)."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = parse_json(function["arguments"], standard=True)
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _content(where: str, message: Mapping[str, Any], *, may_be_absent: bool) -> str:
    """The text of a message; parts of it are joined."""
    content = message.get("content")
    if content is None and may_be_absent:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError(f"{where} is {shown(content)}, expected a text or a list of parts of the type text")
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text"):
            raise ValueError(
                f"{where}[{place}] is {shown(part)}, expected a part of the type text: models here read text"
            )
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}[{place}].text is {shown(part.get('text'))}, expected a text")
        texts.append(part["text"])
    return "".join(texts)
