"""Takes apart the channels of an answer in OpenAI's harmony format, which gpt-oss writes.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>

    channels = channels_of(texts, has_tools=False)      # None for a model whose tokenizer has no such tokens
    channels.read(piece.text, piece.token_ids, is_last=False)      # [{"reasoning_content": "..."}]

The channel analysis is reasoning. The channel final is content, and so is commentary that is addressed to nobody, which
is meant for the user. A message to a function is a call, where the request offers tools; any other message to a tool is
content behind `to=NAME `. Messages of one kind are parted by a line break. An answer that begins without a channel, as
one that a guide holds to a schema, is content.

The format's signs are special tokens, which an answer's text does not show. So the tokens say how much of the text
belongs to which message, and the text itself is the server's, which may end earlier, at a stop word.
Source: github.com/openai/harmony, docs/format.md; vLLM shows commentary to nobody since vllm-project/vllm#32114.
"""

from __future__ import annotations

import codecs
import re
import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clients.gateway.texts import ModelTexts

HEADER, REASONING, CONTENT, CALL = "header", "reasoning_content", "content", "tool_calls"  # kinds of an answer's text
_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_NEEDED = frozenset((_START, _CHANNEL, _MESSAGE, "<|end|>"))
_TO = re.compile(r"\bto=(\S+)")
_NOBODY = ("user", "all", "assistant")  # whom a message without a tool may name
_FUNCTIONS = "functions."


@dataclass
class _Run:
    """So many characters of the answer's text, which belong together; `kind` None: not known yet. `begins`: a message
    begins with them, and `before` is given ahead of its text. `function` is the one that a CALL names."""

    kind: str | None
    size: int = 0
    begins: bool = False
    before: str = ""
    function: str = ""


def channels_of(texts: ModelTexts, *, has_tools: bool) -> Channels | None:
    """What takes one answer of a model apart; None for a model without channels. `has_tools`: the request offers
    tools."""
    signs = texts.signs
    return Channels(texts, signs, has_tools=has_tools) if _NEEDED.issubset(signs.values()) else None


class Channels:
    """The channels of one answer. `signs`: id of a special token -> its text."""

    def __init__(self, texts: ModelTexts, signs: Mapping[int, str], *, has_tools: bool) -> None:
        self.num_calls = 0  # calls that are whole
        self._texts, self._signs, self._has_tools = texts, signs, has_tools
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._header = ""  # of the message that begins; what may be one, at the answer's begin
        self._is_begin = True
        self._runs: deque[_Run] = deque([_Run(None)])  # whose text was not given yet; the last one grows
        self._waiting = ""  # text that came and belongs to runs of no known kind
        self._given: set[str] = set()  # kinds of which some text was given
        self._num_begun = 0  # calls that were given

    def read(
        self,
        text: str,
        token_ids: Sequence[int],
        *,
        is_last: bool,
        is_cut: bool = False,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        """The deltas of OpenAI's messages that a piece of an answer adds. The text of a token may come in a later
        piece. `is_cut`: it is the last since there is no room for more, as with other readers."""
        for token in token_ids:
            sign = self._signs.get(token)
            if sign is None:
                self._add(self._decoder.decode(self._texts.token_bytes(token)))
            else:
                self._add(self._decoder.decode(b"", final=True))
                self._turn(sign)
        self._waiting += text
        if is_last:
            self._add(self._decoder.decode(b"", final=True))
            self._settle(CONTENT)
            self._runs[-1].size = max(self._runs[-1].size, len(self._waiting))
        return self._deltas()

    def finish_reason(self, reason: str | None) -> str | None:
        """The finish reason of an answer that ends for the given one."""
        return "tool_calls" if reason == "stop" and self.num_calls else reason

    def _add(self, text: str) -> None:
        run = self._runs[-1]
        run.size += len(text)
        if run.kind in (HEADER, None):
            self._header += text
        if self._is_begin and text and not _may_address(self._header):
            self._is_begin = False
            self._settle(CONTENT)

    def _turn(self, sign: str) -> None:
        """A special token."""
        kind = self._runs[-1].kind
        if sign in (_START, _CHANNEL) and kind not in (HEADER, None):
            self._runs.append(_Run(HEADER))
            self._header = ""
        if sign == _CHANNEL:
            self._settle(HEADER)
            self._header += f" {_CHANNEL}"
        elif sign == _CONSTRAIN:
            self._header += " "
        elif sign == _MESSAGE:
            self._settle(HEADER)
            self._runs.append(self._message())
            self._header = ""
        elif sign in _ENDS and kind is not None:
            self.num_calls += kind == CALL
            self._runs.append(_Run(CONTENT))
        self._is_begin = self._is_begin and sign not in (_START, _CHANNEL, _MESSAGE)

    def _message(self) -> _Run:
        """The message that begins behind the header."""
        channel = self._header.partition(_CHANNEL)[2].split()[:1]
        addressed = _TO.search(self._header.replace(_CHANNEL, " "))
        if addressed is None or addressed[1] in _NOBODY:
            return _Run(REASONING if channel == ["analysis"] else CONTENT, begins=True)
        if self._has_tools and addressed[1].startswith(_FUNCTIONS):
            return _Run(CALL, begins=True, function=addressed[1].removeprefix(_FUNCTIONS))
        return _Run(CONTENT, begins=True, before=f"to={addressed[1]} ")

    def _settle(self, kind: str) -> None:
        """What the run of no known kind is."""
        for run in self._runs:
            if run.kind is None:
                run.kind = kind
                self._header = "" if kind == CONTENT else self._header

    def _deltas(self) -> list[dict[str, Any]]:
        """Give what is known of the text that waits."""
        found: list[dict[str, Any]] = []
        while (run := self._runs[0]).kind is not None:
            taken, self._waiting = self._waiting[: run.size], self._waiting[run.size :]
            run.size -= len(taken)
            found += self._of(run, taken)
            if run.size or len(self._runs) == 1:
                break
            self._runs.popleft()
        return found

    def _of(self, run: _Run, text: str) -> list[dict[str, Any]]:
        """The deltas of some text of a run."""
        kind = run.kind
        if kind == CALL:
            begun = [self._begun(run.function)] if run.begins else []
            run.begins = False
            call = {"index": self._num_begun - 1, "function": {"arguments": text}}
            return [*begun, {CALL: [call]}] if text else begun
        if kind in (HEADER, None) or not text:
            return []
        if run.begins:
            text = ("\n" if kind in self._given else "") + run.before + text
            run.begins = False
        self._given.add(str(kind))
        return [{str(kind): text}]

    def _begun(self, name: str) -> dict[str, Any]:
        self._num_begun += 1
        call = {"index": self._num_begun - 1, "id": f"call_{secrets.token_hex(12)}", "type": "function",
                "function": {"name": name, "arguments": ""}}  # fmt: skip
        return {CALL: [call]}


def _may_address(text: str) -> bool:
    """Whether the begin of an answer may be that of a header: " to=functions.NAME"."""
    found = text.lstrip()
    return found.startswith("to=") or "to=".startswith(found)
