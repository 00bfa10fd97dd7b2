"""Calls in an answer, read as it comes: what the readers of all forms share, and the choice among them."""

from __future__ import annotations

import re
import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from clients.gateway.api.tools.forms import Form
from clients.gateway.texts import Marks, ModelTexts

NONE, AUTO, REQUIRED, NAMED = "none", "auto", "required", "named"  # whether an answer may or must have calls
_SIZE = 2048  # characters that are read at once, so that a reader cuts no long text again and again

Deltas = list[dict[str, Any]]


class Reader(Protocol):
    """Reads what an answer has beside its text, such as calls, as the answer comes."""

    def read(self, text: str, token_ids: Sequence[int], *, is_last: bool, is_cut: bool = False) -> Deltas:
        """The deltas of OpenAI's messages that a piece of an answer adds. `is_cut`: it is the last since there is no
        room for more."""

    def finish_reason(self, reason: str | None) -> str | None:
        """The finish reason of an answer that ends for the given one."""


class FirstCall:
    """Of what another reader gives, no call behind the first, for requests whose `parallel_tool_calls` is false. vLLM
    does the same (vllm/entrypoints/openai/utils.py)."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def read(self, text: str, token_ids: Sequence[int], *, is_last: bool, is_cut: bool = False) -> Deltas:
        deltas = self._reader.read(text, token_ids, is_last=is_last, is_cut=is_cut)
        return [delta for delta in deltas if not any(call["index"] for call in delta.get("tool_calls", ()))]

    def finish_reason(self, reason: str | None) -> str | None:
        return self._reader.finish_reason(reason)


class CallReader(ABC):
    """Reads the calls in one answer as it comes, and gives deltas of OpenAI's messages.

    A call's name is given once its arguments begin, and they as they come. Text around calls is content. White space
    before a call is left out, and so is text behind one that is white space alone. What is begun like a call and is
    none is content.
    """

    start = "{"  # what each call begins with, behind the form's begin

    def __init__(self, form: Form, texts: ModelTexts, kind: str) -> None:
        self.num_calls = 0  # calls whose arguments are whole
        self._form, self._kind = form, kind
        signs = _special(form, texts)
        self._marks = Marks(signs, texts) if signs else None
        self._begin = re.compile("|".join(map(re.escape, form.begins))) if form.begins else None
        self._left = ""  # what is not read yet
        self._space: list[str] = []  # white space that is given with what follows it
        self._opening: list[str] = []  # what was read since the begin, given as content where no call follows
        self._num_begun = 0
        self._is_behind = False  # a call: no text but white space came since
        self._is_cut = False
        self._read: Callable[[bool], Deltas] = self._in_text
        if kind in (REQUIRED, NAMED):
            self._read = self._in_calls
        elif form.may_be_bare:
            self._read = self._at_begin

    def read(self, text: str, token_ids: Sequence[int], *, is_last: bool, is_cut: bool = False) -> Deltas:
        """The deltas that a piece of an answer adds. `is_cut`: it is the last since there is no room for more."""
        if self._marks is not None:
            text = self._marks.put_back(text, token_ids)
        found: Deltas = []
        self._is_cut = is_cut
        for place in range(0, len(text) or 1, _SIZE):
            self._left += text[place : place + _SIZE]
            found += self._read_left(is_last and place + _SIZE >= len(text))
        return found

    def _read_left(self, is_last: bool) -> Deltas:
        found: Deltas = []
        while True:
            reading, size = self._read, len(self._left)
            found += reading(is_last)
            if self._read == reading and len(self._left) == size:
                return found

    def finish_reason(self, reason: str | None) -> str | None:
        """The finish reason of an answer that ends for the given one. As OpenAI's, it is "stop" where the request named
        the function, and "length" where the answer was cut. A call counts once its arguments are whole: of what lacks
        behind them, a brace or a sign of the end, nothing is lost."""
        return "tool_calls" if reason == "stop" and self.num_calls and self._kind != NAMED else reason

    def _in_text(self, is_last: bool) -> Deltas:
        text = self._left
        found = None if self._begin is None else self._begin.search(text)
        if found is not None:
            self._left = text[found.end() :]
            given = self._given(text[: found.start()])
            self._opening, self._space = [*self._space, found[0]], []
            self._begun_by(found[0])
            return given
        part = 0 if is_last else self._partial(text)
        self._left = text[len(text) - part :]
        given = self._given(text[: len(text) - part])
        if is_last:
            space, self._space = "".join(self._space), []
            return given if self._is_behind else [*given, *content(space)]
        return given

    def _given(self, text: str) -> Deltas:
        """A text as content, but for the white space at its end."""
        body = text.rstrip()
        if not body:
            if text:
                self._space.append(text)
            return []
        self._is_behind = False
        given = "".join((*self._space, body))
        self._space = [text[len(body) :]] if len(body) < len(text) else []
        return content(given)

    def _partial(self, text: str) -> int:
        """How many characters at the end of a text may belong to a begin."""
        most = max(map(len, self._form.begins), default=1) - 1
        ends = (text[len(text) - size :] for size in range(min(most, len(text)), 0, -1))
        return next((len(end) for end in ends if any(begin.startswith(end) for begin in self._form.begins)), 0)

    def _begun_by(self, begin: str) -> None:  # noqa: ARG002 - of use to readers of forms with several
        self._read = self._in_calls

    def _at_begin(self, is_last: bool) -> Deltas:
        """At the begin of an answer that may be a call without a begin."""
        rest = self._left.lstrip()
        if len(rest) < len(self._left):
            self._space.append(self._left[: len(self._left) - len(rest)])
        self._left = rest
        if rest.startswith(self.start):
            self._opening, self._space = self._space, []
            self._read = self._in_calls
        elif rest or is_last:
            self._read = self._in_text
        return []

    def _in_calls(self, is_last: bool) -> Deltas:
        """Before a call, or behind the last one."""
        form, text = self._form, self._left
        rest = text.lstrip(string.whitespace + form.between)
        if len(rest) < len(text):
            self._opening.append(text[: len(text) - len(rest)])
        self._left = rest
        if rest and rest.startswith(self.start):
            self._begin_call()
            return []
        end = form.end or ""
        if not is_last and (self.start.startswith(rest) or (end.startswith(rest) and rest != end)):
            return []  # nothing yet, or a part of a sign
        opening, self._opening = "".join(self._opening), []
        has_read = not opening or opening.isspace()
        if end and rest.startswith(end) and has_read:
            self._left = rest.removeprefix(end)
        self._read = self._in_text
        return content("" if has_read else opening)

    @abstractmethod
    def _begin_call(self) -> None:
        """At the start of a call."""

    def _no_call(self, text: str = "") -> Deltas:
        """What was read since the begin, and some text behind it, are no call."""
        opening, self._opening = "".join(self._opening), []
        self._read = self._in_text
        return content(opening + text)

    def _call(self, name: str) -> dict[str, Any]:
        self._num_begun += 1
        call = {"index": self._num_begun - 1, "id": self._form.call_id(), "type": "function",
                "function": {"name": name, "arguments": ""}}  # fmt: skip
        return {"tool_calls": [call]}

    def _arguments(self, text: str) -> dict[str, Any]:
        return {"tool_calls": [{"index": self._num_begun - 1, "function": {"arguments": text}}]}

    def _ended(self) -> None:
        self.num_calls += 1
        self._opening, self._is_behind = [], True


def message_of(deltas: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The message that deltas add up to. Its content is null where it has calls alone."""
    texts, reasoning = list[str](), list[str]()
    calls, arguments = list[dict[str, Any]](), list[list[str]]()
    for delta in deltas:
        texts.append(delta.get("content", ""))
        reasoning.append(delta.get("reasoning_content", ""))
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls.append({key: value for key, value in call.items() if key != "index"})
                arguments.append([])
            arguments[-1].append(call["function"]["arguments"])
    for call, parts in zip(calls, arguments, strict=True):
        call["function"] = {**call["function"], "arguments": "".join(parts)}
    text = "".join(texts)
    message = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    if thought := "".join(reasoning):
        message["reasoning_content"] = thought
    return {**message, "tool_calls": calls} if calls else message


def content(text: str) -> Deltas:
    """A text as deltas."""
    return [{"content": text}] if text else []


def _special(form: Form, texts: ModelTexts) -> dict[int, str]:
    """The signs of a form that are special tokens, by their ids."""
    ids = {texts.tokenizer.backend.token_to_id(sign): sign for sign in (*form.begins, *form.others)}
    return {token: sign for token, sign in ids.items() if token in texts.special}
