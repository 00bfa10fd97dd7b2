"""/v1/responses: reads its requests and answers them.

Each request is turned into one for a chat completion (`chat.py`) and answered by that. Nothing is stored: a
conversation is continued by sending it again, and `previous_response_id` is refused.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import Response

from clients.gateway.api import chat, fields
from clients.gateway.api.answers import CUT, Usage, finish_reason
from clients.gateway.api.responses import inputs
from clients.gateway.api.responses.items import Event, Items
from clients.gateway.api.sampling import UNREAD
from clients.gateway.api.tools.offers import CHOICE, PARALLEL, TOOLS
from clients.gateway.errors import invalid
from clients.gateway.events import Events, Whole, event, joined, renamed
from clients.gateway.guard import Record
from clients.gateway.state import Gateway
from clients.messages import Generation
from triton_repo.contracts.piece import Piece

FIELDS = fields.Fields(
    taken={
        "model": fields.text(256),
        "input": inputs.read_input,
        "instructions": fields.text(1 << 20),
        "max_output_tokens": fields.integer(1, fields.MOST_TOKENS),
        "temperature": fields.number(0, 2),
        "top_p": fields.number(0, 1),
        "stream": fields.boolean,
        "stream_options": fields.within("stream_options", {}, unread=frozenset({"include_obfuscation"})),
        "text": inputs.read_text,
        TOOLS: inputs.read_tools,
        CHOICE: inputs.read_tool_choice,
        PARALLEL: fields.boolean,
        "reasoning": fields.within("reasoning", {"effort": fields.text(16)}, unread=frozenset({"summary"})),
    },
    unread=UNREAD,
    neutral={
        "previous_response_id": (), "conversation": (), "background": (False,), "include": ([],),
        "truncation": ("disabled",), "prompt": (), "top_logprobs": (0,), "max_tool_calls": (),
    },
)  # fmt: skip

# The fields of a chat to those of a response that they are made of.
_NAMES = {"messages": "input", "response_format": "text.format", "max_tokens": "max_output_tokens",
          "max_completion_tokens": "max_output_tokens", chat.EFFORT: "reasoning.effort"}  # fmt: skip


async def respond(gateway: Gateway, record: Record, body: Mapping[str, Any]) -> Response:
    """The response to a body. Raises ApiError."""
    values = FIELDS.read(body)
    if "input" not in values:
        raise invalid("input", "you must provide an input")
    system = [{"role": "system", "content": values["instructions"]}] if values.get("instructions") else []
    asked = {
        "model": values.get("model"), "messages": [*system, *values["input"]], "temperature": values.get("temperature"),
        "top_p": values.get("top_p"), "max_completion_tokens": values.get("max_output_tokens"),
        "response_format": values.get("text"), TOOLS: values.get(TOOLS), CHOICE: values.get(CHOICE),
        PARALLEL: values.get(PARALLEL), chat.EFFORT: values.get("reasoning", {}).get("effort"),
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
        self.id = f"resp_{record.id}"
        self.items = Items(record.id)
        self._reader = call.call_reader()
        self._sent = 0

    def read(self, part: Piece | Generation, *, is_last: bool) -> Iterator[Event]:
        """The events of what a part adds."""
        self.usage.add(part)
        reason = finish_reason(part)
        deltas: list[dict[str, Any]] = [{"content": part.text}]
        if self._reader is not None:
            deltas = self._reader.read(part.text, part.token_ids, is_last=is_last, is_cut=reason == CUT)
        for delta in deltas:
            yield from self.items.add(delta)
        if is_last:
            yield from self.items.end(is_cut=reason == CUT)

    def response(self, status: str) -> dict[str, Any]:
        values, usage = self._values, self.usage.to_json()
        is_over = status != "in_progress"
        choice = values.get(CHOICE, "auto")
        return {
            "id": self.id, "object": "response", "created_at": self._call.head["created"], "status": status,
            "error": None, "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": values.get("instructions"), "max_output_tokens": values.get("max_output_tokens"),
            "model": self._call.head["model"], "output": self.items.whole(), PARALLEL: values.get(PARALLEL, True),
            "previous_response_id": None, "store": False, "temperature": values.get("temperature", 1.0),
            "text": {"format": _shown_format(values.get("text"))},
            "tool_choice": choice if isinstance(choice, str) else {"type": "function", **choice["function"]},
            "tools": [{"type": "function", "parameters": None, "strict": None, **tool["function"]}
                      for tool in values.get(TOOLS, ())],
            "top_p": values.get("top_p", 1.0), "truncation": "disabled", "metadata": {},
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            } if is_over else None,
        }  # fmt: skip

    def event(self, kind: str, content: Mapping[str, Any]) -> bytes:
        """One event, numbered."""
        data = event({"type": kind, "sequence_number": self._sent, **content})
        self._sent += 1
        return f"event: {kind}\n".encode() + data


def _status(reason: str | None) -> str:
    return "incomplete" if reason == CUT else "completed"


async def _whole(gateway: Gateway, call: chat.Call, answer: _Answer) -> dict[str, Any]:
    """The answer as one object."""
    with renamed({**_NAMES, **call.names}):
        (generation,) = await gateway.pool.generate_all(call.request)
    for _ in answer.read(generation, is_last=True):
        pass
    return answer.response(_status(generation.finish_reason))


async def _events(gateway: Gateway, call: chat.Call, answer: _Answer) -> AsyncGenerator[bytes, None]:
    """The answer piece by piece."""
    status, has_begun = "completed", False

    def events_of(piece: Piece) -> bytes:
        nonlocal status, has_begun
        events: list[Event] = []
        if not has_begun:
            has_begun = True
            begun = {"response": answer.response("in_progress")}
            events += (("response.created", begun), ("response.in_progress", begun))
        status = _status(piece.finish_reason)
        events += answer.read(piece, is_last=piece.finish_reason is not None)
        return b"".join(answer.event(*one) for one in events)

    with renamed({**_NAMES, **call.names}):
        async with aclosing(gateway.pool.stream(call.request)) as pieces:
            async for waiting in pieces:
                for data in joined(map(events_of, waiting)):
                    yield data
    yield answer.event(f"response.{status}", {"response": answer.response(status)})
