"""Renders chat templates in processes of their own, which have bounded memory and time.

A template comes with a checkpoint, and the conversation from a client. Jinja's sandbox keeps a template from all but
making text, but not from looping or from making gigabytes of it. Such a render ends with its process, after `RENDER_S`
of the processor's time, and others go on beside it in up to `MOST_PROCESSES`.

    renderer = Renderer(template, special_tokens)
    text = await renderer.render(messages, add_generation_prompt=True)

Both sides send JSON behind its length in four bytes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import signal
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from clients.gateway.errors import DEFAULT_RETRY_S, OVERLOADED, ApiError, unavailable
from export.tokenizer.chat_template import ChatTemplate, Messages, TemplateError

logger = logging.getLogger(__name__)

RENDER_S = 1.0  # of the processor; a conversation of megabytes takes a tenth of it
START_S = 5.0  # of the processor, for a process to start and compile its template
LONGEST_S = 20.0  # by the clock, for both, on a machine whose processors are all taken
MOST_PROCESSES = 4  # of one template
MOST_IDLE = 2  # of them that stay for the next conversation
MOST_WAITING = 256  # conversations that wait for a process
WAIT_S = 10.0  # before one that waits is refused
MOST_BYTES = 512 << 20  # of a process's address space
MOST_TEXT = 16 << 20  # bytes of a rendered text
_LENGTH = struct.Struct("<I")
_ROOT = Path(__file__).parents[2]


class Renderer:
    """One template, and the processes that render it, which are started when they are needed. Use it in one loop."""

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        self._first = {"template": template, "special_tokens": dict(special_tokens)}
        self._idle: list[asyncio.subprocess.Process] = []
        self._room = asyncio.Semaphore(MOST_PROCESSES)
        self._num_waiting = 0
        self._is_retired = False

    async def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation. Raises ApiError for a template that refuses it, fails, or takes too long, and
        where too many conversations wait."""
        job = {
            "messages": messages, "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message, "tools": tools, "variables": dict(variables or {}),
        }  # fmt: skip
        await self._enter()
        try:
            answer = await self._rendered(job)
        finally:
            self._room.release()
        if "error" in answer:
            raise _refused(answer["error"])
        return str(answer["text"])

    def retire(self) -> None:
        """End the processes once they have nothing to do."""
        self._is_retired = True
        while self._idle:
            _kill(self._idle.pop())

    async def close(self) -> None:
        """End the processes that wait, and those that render as soon as they have ended."""
        waiting = list(self._idle)
        self.retire()
        await asyncio.gather(*(process.wait() for process in waiting))

    async def _enter(self) -> None:
        """Wait for a process. Raises ApiError where others take them all for too long."""
        if self._num_waiting >= MOST_WAITING:
            raise _busy()
        self._num_waiting += 1
        try:
            async with asyncio.timeout(WAIT_S):
                await self._room.acquire()
        except TimeoutError:
            raise _busy() from None
        finally:
            self._num_waiting -= 1

    async def _rendered(self, job: dict[str, Any]) -> dict[str, Any]:
        """What a process answers. Raises ApiError for one that ended instead."""
        process = None
        try:
            async with asyncio.timeout(LONGEST_S):
                try:
                    process = self._taken() or await self._start()
                except OSError as error:
                    logger.warning("no process can be started for a chat template: %s", error)
                    raise unavailable("this gateway can start no process for the model's chat template at present; "
                                      "send the request again") from None  # fmt: skip
                try:
                    answer = await _ask(process, job)
                except (OSError, asyncio.IncompleteReadError):
                    if await process.wait() == -signal.SIGPROF:
                        raise _refused(f"it took longer than {RENDER_S:g} s") from None
                    raise _refused("it took more memory than it may, or made too long a text") from None
            if not self._is_retired and len(self._idle) < MOST_IDLE:
                self._idle.append(process)
                process = None
            return answer
        except TimeoutError:
            raise _refused(f"it took longer than {LONGEST_S:g} s") from None
        finally:
            if process is not None:
                _kill(process)

    def _taken(self) -> asyncio.subprocess.Process | None:
        """A process that waits; None for none. Those that something else ended are passed over."""
        while self._idle:
            process = self._idle.pop()
            if process.returncode is None:
                return process
        return None

    async def _start(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-c", "from clients.gateway.rendering import serve; serve()",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(_ROOT), "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.stdin is not None
        try:
            process.stdin.write(_framed({**self._first, "render_s": RENDER_S, "start_s": START_S}))
        except RuntimeError as error:  # uvloop's, for a pipe that was closed meanwhile
            _kill(process)
            raise BrokenPipeError(str(error)) from error
        return process


async def _ask(process: asyncio.subprocess.Process, job: dict[str, Any]) -> dict[str, Any]:
    reader, writer = process.stdout, process.stdin
    assert reader is not None
    assert writer is not None
    writer.write(_framed(job))
    await writer.drain()
    (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    answer: dict[str, Any] = json.loads(await reader.readexactly(size))
    return answer


def _kill(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    if process.stdin is not None:
        process.stdin.close()


def _busy() -> ApiError:
    return ApiError(
        "more conversations wait for the model's chat template than this gateway renders; send it again later",
        status=429, kind=OVERLOADED, code="rate_limit_exceeded", retry_s=DEFAULT_RETRY_S,
    )  # fmt: skip


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
    if first is None:
        return
    template, problem = None, ""
    # The default action of the timer's signal ends this process, whatever the template's code does.
    signal.setitimer(signal.ITIMER_PROF, first["start_s"])
    try:
        template = ChatTemplate(first["template"], first["special_tokens"], extra="gateway")
    except TemplateError as error:
        problem = str(error)
    while (job := _read(source)) is not None:
        signal.setitimer(signal.ITIMER_PROF, first["render_s"])
        answer = {"error": problem} if template is None else _answer(template, job)
        signal.setitimer(signal.ITIMER_PROF, 0)
        target.write(_framed(answer))
        target.flush()


def _answer(template: ChatTemplate, job: dict[str, Any]) -> dict[str, str]:
    try:
        text = template.render(
            job["messages"], add_generation_prompt=job["add_generation_prompt"],
            continue_final_message=job["continue_final_message"], tools=job["tools"], variables=job["variables"],
        )  # fmt: skip
        text.encode()
    except (TemplateError, UnicodeEncodeError) as error:
        return {"error": str(error)}
    return {"text": text} if len(text) <= MOST_TEXT else {"error": f"it made {len(text)} characters"}


def _read(source: BinaryIO) -> dict[str, Any] | None:
    head = source.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    value: dict[str, Any] = json.loads(source.read(_LENGTH.unpack(head)[0]))
    return value
