"""Renders chat templates in a process of its own, which has bounded memory and time.

A template comes with a checkpoint, and the conversation from a client. Jinja's sandbox keeps a template from all but
making text, but not from looping or from making gigabytes of it. Such a render ends with its process; the next one gets
a new process.

    renderer = Renderer(template, special_tokens)
    text = await renderer.render(messages, add_generation_prompt=True)

Both sides send JSON behind its length in four bytes.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from clients.gateway.errors import ApiError
from export.tokenizer.chat_template import ChatTemplate, Messages, TemplateError

RENDER_S = 5.0
MOST_BYTES = 512 << 20  # of the process's address space
MOST_TEXT = 16 << 20  # bytes of a rendered text
_LENGTH = struct.Struct("<I")
_ROOT = Path(__file__).parents[2]


class Renderer:
    """One template, and the process that renders it, which is started when it is first needed. Use it in one loop."""

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        self._first = {"template": template, "special_tokens": dict(special_tokens)}
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation. Raises ApiError for a template that refuses it, fails, or takes too long."""
        job = {
            "messages": messages, "add_generation_prompt": add_generation_prompt, "tools": tools,
            "variables": dict(variables or {}),
        }  # fmt: skip
        async with self._lock:
            is_done = False
            try:
                async with asyncio.timeout(RENDER_S):
                    answer = await self._ask(job)
                is_done = True
            except TimeoutError:
                raise _refused(f"it took longer than {RENDER_S:g} s") from None
            except (OSError, asyncio.IncompleteReadError):
                raise _refused("it took more memory than it may, or made too long a text") from None
            finally:
                if not is_done:
                    self._kill()
        if "error" in answer:
            raise _refused(answer["error"])
        return str(answer["text"])

    async def close(self) -> None:
        """End the process."""
        process = self._process
        self._kill()
        if process is not None:
            await process.wait()

    async def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-c", "from clients.gateway.rendering import serve; serve()",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(_ROOT), "OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip
            self._process.stdin.write(_framed(self._first))  # type: ignore[union-attr]  # it is a pipe
        reader, writer = self._process.stdout, self._process.stdin
        assert reader is not None
        assert writer is not None
        writer.write(_framed(job))
        await writer.drain()
        (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        answer: dict[str, Any] = json.loads(await reader.readexactly(size))
        return answer

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            if process.stdin is not None:
                process.stdin.close()


def _framed(value: dict[str, Any]) -> bytes:
    data = json.dumps(value).encode()
    return _LENGTH.pack(len(data)) + data


def _refused(problem: str) -> ApiError:
    return ApiError(f"messages: the model's chat template does not render this conversation: {problem}",
                    param="messages", code="chat_template_failed")  # fmt: skip


def serve() -> None:
    """The program of the process: read conversations from stdin and write their texts to stdout, until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    # Ctrl-C in a terminal reaches this process too, and the gateway ends it after the last answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, target = sys.stdin.buffer, sys.stdout.buffer
    first = _read(source)
    template: ChatTemplate | None = None
    while first is not None and (job := _read(source)) is not None:
        # Where the gateway is killed during a render that does not end, the alarm's default action ends this process.
        signal.alarm(2 * int(RENDER_S))
        try:
            if template is None:
                template = ChatTemplate(first["template"], first["special_tokens"], extra="gateway")
            text = template.render(
                job["messages"], add_generation_prompt=job["add_generation_prompt"], tools=job["tools"],
                variables=job["variables"],
            )  # fmt: skip
            text.encode()
            answer = {"text": text} if len(text) <= MOST_TEXT else {"error": f"it made {len(text)} characters"}
        except (TemplateError, UnicodeEncodeError) as error:
            answer = {"error": str(error)}
        signal.alarm(0)
        target.write(_framed(answer))
        target.flush()


def _read(source: BinaryIO) -> dict[str, Any] | None:
    head = source.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    value: dict[str, Any] = json.loads(source.read(_LENGTH.unpack(head)[0]))
    return value
