"""/v1/responses: OpenAI's newer form of a conversation, for clients that ask for texts by it.

Each request is turned into one for a chat completion (`chat.py`) and answered by that. Nothing is stored: a
conversation is continued by sending it again, and `previous_response_id` is refused.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import Response

from clients.gateway.api import chat, fields
from clients.gateway.api.answers import Usage, finish_reason
from clients.gateway.api.channels import channels_of
from clients.gateway.api.messages import read_messages
from clients.gateway.api.sampling import UNREAD
from clients.gateway.errors import invalid
from clients.gateway.events import Events, Whole, event, joined, renamed
from clients.gateway.guard import Record
from clients.gateway.state import Gateway
from triton_repo.contracts.piece import Piece


def read_input(value: Any) -> list[Any]:  # noqa: ANN401 - JSON value
    """The messages; a text is one of the user."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError("expected a text or a list of messages, at least one")
    return read_messages([_message(item) for item in value], "input")


def _message(item: Any) -> Any:  # noqa: ANN401 - JSON value
    """A message without what says that it is one, and what an earlier answer added to it."""
    if not isinstance(item, dict) or item.get("type", "message") != "message":
        raise ValueError("expected messages alone: tools are taken by /v1/chat/completions, and nothing is stored")
    return {key: value for key, value in item.items() if key not in ("type", "id", "status")}


def read_text(value: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON value
    """`text.format` as a chat's response_format."""
    stated = fields.mapping(value)
    if set(stated) - {"format", "verbosity"}:
        raise ValueError("expected an object with format alone")
    form = fields.mapping(stated.get("format") or {"type": "text"})
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {key: value for key, value in form.items() if key != "type"}}


FIELDS = fields.Fields(
    taken={
        "model": fields.text(256),
        "input": read_input,
        "instructions": fields.text(1 << 20),
        "max_output_tokens": fields.integer(1, fields.MOST_TOKENS),
        "temperature": fields.number(0, 2),
        "top_p": fields.number(0, 1),
        "stream": fields.boolean,
        "stream_options": fields.within("stream_options", {}, unread=frozenset({"include_obfuscation"})),
        "text": read_text,
    },
    unread=UNREAD | {"parallel_tool_calls"},
    neutral={
        "previous_response_id": (), "conversation": (), "background": (False,), "include": ([],), "tools": ([],),
        "tool_choice": ("auto", "none"), "truncation": ("disabled",), "reasoning": (), "prompt": (),
        "top_logprobs": (0,), "max_tool_calls": (),
    },
)  # fmt: skip

# The fields of a chat to those of a response that they are made of.
_NAMES = {"messages": "input", "response_format": "text.format", "max_tokens": "max_output_tokens",
          "max_completion_tokens": "max_output_tokens"}  # fmt: skip


async def respond(gateway: Gateway, record: Record, body: Mapping[str, Any]) -> Response:
    """The response to a body. Raises ApiError."""
    values = FIELDS.read(body)
    if "input" not in values:
        raise invalid("input", "you must provide an input")
    system = [{"role": "system", "content": values["instructions"]}] if values.get("instructions") else []
    asked = {
        "model": values.get("model"), "messages": [*system, *values["input"]], "temperature": values.get("temperature"),
        "top_p": values.get("top_p"), "max_completion_tokens": values.get("max_output_tokens"),
        "response_format": values.get("text"),
    }  # fmt: skip
    with renamed(_NAMES):
        call = await chat.read_call(gateway, record, asked)
    answer = _Answer(call, record, values)
    if values.get("stream"):
        return Events(_events(gateway, call, answer), gateway.settings.limits.unread_s, last=b"")
    return Whole(lambda: _whole(gateway, call, answer))


def _shown_format(form: Mapping[str, Any] | None) -> dict[str, Any]:
    """The format of an answer in the form of Responses, of a chat's."""
    return {"type": "text"} if form is None else {"type": form["type"], **form.get("json_schema", {})}


class _Answer:
    """The objects that an answer is made of."""

    def __init__(self, call: chat.Call, record: Record, values: Mapping[str, Any]) -> None:
        self._call, self._values = call, values
        self.usage = Usage(record)
        self.id, self.item_id = f"resp_{record.id}", f"msg_{record.id}"
        self._sent = 0

    def response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        values, usage = self._values, self.usage.to_json()
        is_over = status != "in_progress"
        return {
            "id": self.id, "object": "response", "created_at": self._call.head["created"], "status": status,
            "error": None, "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": values.get("instructions"), "max_output_tokens": values.get("max_output_tokens"),
            "model": self._call.head["model"], "output": output, "parallel_tool_calls": True,
            "previous_response_id": None, "store": False, "temperature": values.get("temperature", 1.0),
            "text": {"format": _shown_format(values.get("text"))}, "tool_choice": "auto", "tools": [],
            "top_p": values.get("top_p", 1.0), "truncation": "disabled", "metadata": {},
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            } if is_over else None,
        }  # fmt: skip

    def item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "message", "id": self.item_id, "status": status, "role": "assistant", "content": content}

    def event(self, kind: str, **content: Any) -> bytes:  # noqa: ANN401 - JSON values
        """One event, numbered."""
        data = event({"type": kind, "sequence_number": self._sent, **content})
        self._sent += 1
        return f"event: {kind}\n".encode() + data

    def part_event(self, kind: str, **content: Any) -> bytes:  # noqa: ANN401 - JSON values
        """An event of the answer's text."""
        return self.event(kind, item_id=self.item_id, output_index=0, content_index=0, **content)


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(reason: str | None) -> str:
    return "incomplete" if reason == "length" else "completed"


def _content(deltas: Sequence[Mapping[str, Any]]) -> str:
    """What of an answer is no reasoning."""
    return "".join(delta.get("content", "") for delta in deltas)


async def _whole(gateway: Gateway, call: chat.Call, answer: _Answer) -> dict[str, Any]:
    """The answer as one object."""
    with renamed(_NAMES):
        (generation,) = await gateway.pool.generate_all(call.request)
    answer.usage.add(generation)
    status = _status(finish_reason(generation))
    text = generation.text
    if channels := channels_of(call.texts, has_tools=False):
        text = _content(channels.read(text, generation.token_ids, is_last=True))
    return answer.response(status, [answer.item(status, [_text(text)])])


async def _events(gateway: Gateway, call: chat.Call, answer: _Answer) -> AsyncGenerator[bytes, None]:
    """The answer piece by piece."""
    text, status, has_begun = "", "completed", False
    channels = channels_of(call.texts, has_tools=False)

    def events_of(piece: Piece) -> bytes:
        nonlocal text, status, has_begun
        data = b""
        if not has_begun:
            has_begun = True
            begun = answer.response("in_progress", [])
            data += answer.event("response.created", response=begun)
            data += answer.event("response.in_progress", response=begun)
            data += answer.event("response.output_item.added", output_index=0, item=answer.item("in_progress", []))
            data += answer.part_event("response.content_part.added", part=_text(""))
        answer.usage.add(piece)
        status = _status(finish_reason(piece))
        delta = piece.text
        if channels is not None:
            delta = _content(channels.read(delta, piece.token_ids, is_last=piece.finish_reason is not None))
        text += delta
        if delta:
            data += answer.part_event("response.output_text.delta", delta=delta, logprobs=[])
        return data

    with renamed(_NAMES):
        async with aclosing(gateway.pool.stream(call.request)) as pieces:
            async for waiting in pieces:
                for data in joined(map(events_of, waiting)):
                    yield data
    item = answer.item(status, [_text(text)])
    yield (
        answer.part_event("response.output_text.done", text=text, logprobs=[])
        + answer.part_event("response.content_part.done", part=_text(text))
        + answer.event("response.output_item.done", output_index=0, item=item)
        + answer.event(f"response.{status}", response=answer.response(status, [item]))
    )
