"""The items of a response, made of a chat's deltas, with the events that tell of them as they grow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MESSAGE, CALL, REASONING = "message", "function_call", "reasoning"
Event = tuple[str, dict[str, Any]]  # its type, and its fields beside type and sequence number


class Items:
    """Grows by deltas of one answer. Each item is over when another one begins, or the answer ends. `key`: what the
    items' ids have in common.

    The events and their order are those of OpenAI's API (openai.types.responses), as vLLM and openai-agents have them:
    an item is added, its parts and deltas follow, and it is done.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self._items: list[dict[str, Any]] = []
        self._text: list[str] = []  # what the last item has of its text or arguments
        self._is_open = False

    def add(self, delta: Mapping[str, Any]) -> Iterator[Event]:
        """The events of a chat's delta."""
        if text := delta.get("reasoning_content"):
            yield from self._grow(REASONING, text)
        if text := delta.get("content"):
            yield from self._grow(MESSAGE, text)
        for call in delta.get("tool_calls", ()):
            function = call["function"]
            if "id" in call:
                yield from self._begin(CALL, {"call_id": call["id"], "name": function["name"], "arguments": ""})
            if function["arguments"]:
                self._text.append(function["arguments"])
                yield self._event("response.function_call_arguments.delta", delta=function["arguments"])

    def end(self, *, is_cut: bool) -> Iterator[Event]:
        """The events of the answer's end. An answer without any text is a message without one."""
        if not self._items:
            yield from self._begin(MESSAGE, {"role": "assistant", "content": []})
        yield from self._close("incomplete" if is_cut else "completed")

    def whole(self) -> list[dict[str, Any]]:
        """All items that are over."""
        return self._items[: len(self._items) - self._is_open]

    def _grow(self, kind: str, text: str) -> Iterator[Event]:
        if not self._is_open or self._items[-1]["type"] != kind:
            new = {"role": "assistant", "content": []} if kind == MESSAGE else {"summary": [], "content": []}
            yield from self._begin(kind, new)
        self._text.append(text)
        if kind == MESSAGE:
            yield self._event("response.output_text.delta", content_index=0, delta=text, logprobs=[])
        else:
            yield self._event("response.reasoning_text.delta", content_index=0, delta=text)

    def _begin(self, kind: str, fields: Mapping[str, Any]) -> Iterator[Event]:
        yield from self._close("completed")
        place = len(self._items)
        name = {MESSAGE: "msg", CALL: "fc", REASONING: "rs"}[kind]
        key = f"{name}_{self._key}" + (f"_{place}" if place else "")
        item = {"type": kind, "id": key, "status": "in_progress", **fields}
        self._items.append(item)
        self._text, self._is_open = [], True
        yield "response.output_item.added", {"output_index": place, "item": item}
        if kind != CALL:
            yield self._event("response.content_part.added", content_index=0, part=_part(kind, ""))

    def _close(self, status: str) -> Iterator[Event]:
        if not self._is_open:
            return
        item, text = self._items[-1], "".join(self._text)
        kind, self._is_open = item["type"], False
        if kind == CALL:
            self._items[-1] = {**item, "status": status, "arguments": text}
            yield self._event("response.function_call_arguments.done", name=item["name"], arguments=text)
        else:
            part = _part(kind, text)
            self._items[-1] = {**item, "status": status, "content": [part]}
            if kind == MESSAGE:
                yield self._event("response.output_text.done", content_index=0, text=text, logprobs=[])
            else:
                yield self._event("response.reasoning_text.done", content_index=0, text=text)
            yield self._event("response.content_part.done", content_index=0, part=part)
        yield "response.output_item.done", {"output_index": len(self._items) - 1, "item": self._items[-1]}

    def _event(self, kind: str, **fields: Any) -> Event:  # noqa: ANN401 - JSON values
        return kind, {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, **fields}


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == REASONING:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
