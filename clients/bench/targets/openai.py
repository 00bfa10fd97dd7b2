"""Servers of OpenAI's completions and chat API with server-sent events, such as llama.cpp's, vLLM's and moeship's
gateway, as the load generator uses them.

The API does not say how many tokens a chunk has. `_tokens` counts them by what the server adds: token ids (vLLM and the
gateway), or the number of predicted tokens so far (llama.cpp). A chunk of another server with text counts as one token;
where the server states the number of the whole answer at its end, that number is shared among the chunks.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clients.bench.load import Work
from clients.bench.records import Arrival
from clients.bench.targets.http import (
    MOST_DETAILS,
    UNREADABLE,
    asked_for_models,
    count_of,
    events,
    library_errors,
    opened_session,
    read_json,
    refusal,
)
from clients.errors import ModelNotFound, ServerFailed, StreamBroken, what_exists
from triton_repo.contracts.model_state import ModelState
from triton_repo.contracts.tls.client import ClientTls

if TYPE_CHECKING:
    from aiohttp import ClientSession

COMPLETIONS, CHAT = "completions", "chat"
GUESSED = "one token for each chunk with text, or the server's number for the whole answer shared among them"
# Fields of a delta that hold what the model wrote. Thoughts are `reasoning` of vLLM, and `reasoning_content` of
# DeepSeek's API, llama.cpp and the gateway.
_OUTPUT = ("content", "reasoning_content", "reasoning", "tool_calls", "function_call", "refusal")
_PATHS = {COMPLETIONS: "/v1/completions", CHAT: "/v1/chat/completions"}


@dataclass(kw_only=True)
class OpenAITarget:
    """A model of a server at `url` (http://HOST:PORT, without /v1). `extra` is added to the body of every request. With
    `endpoint` CHAT a prompt is sent as the only message of a user."""

    session: ClientSession
    url: str
    model: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    endpoint: str = COMPLETIONS
    counting: str = GUESSED

    async def answer(self, work: Work) -> AsyncGenerator[Arrival, None]:
        """Send one request and yield what arrives. Raises ClientError."""
        doing = f"generating with {self.model} at {self.url}"
        so_far, ended = 0, False
        async with (
            library_errors(doing),
            self.session.post(self._path, json=self._body(work), allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise await refusal(doing, response)
            async for data in events(response):
                if data == "[DONE]":
                    ended = True
                    break
                arrival, so_far = self._read(doing, data, so_far)
                yield arrival
        if not ended:
            raise StreamBroken(f"{doing}: the stream ended after {so_far} tokens without [DONE]")

    @property
    def _path(self) -> str:
        return f"{self.url}{_PATHS[self.endpoint]}"

    def _body(self, work: Work) -> dict[str, Any]:
        sampling = work.sampling
        body: dict[str, Any] = {
            "model": self.model,
            **(
                {"messages": [{"role": "user", "content": work.prompt}]}
                if self.endpoint == CHAT
                else {"prompt": work.prompt}
            ),
            "max_tokens": work.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "seed": work.seed,
            **self.extra,
        }
        for name in ("temperature", "top_k", "top_p"):
            if getattr(sampling, name) is not None:
                body[name] = getattr(sampling, name)
        if sampling.ignore_end:
            body["ignore_eos"] = True  # llama.cpp and vLLM have this field; OpenAI's API has none
        return body

    def _read(self, doing: str, data: str, so_far: int) -> tuple[Arrival, int]:
        """What one event brought, and the number of tokens so far. Raises StreamBroken and ServerFailed."""
        try:
            event = json.loads(data)
            if event.get("error"):
                raise ServerFailed(f"{doing}: {str(event['error'])[:MOST_DETAILS]}")
            choice = event["choices"][0] if event.get("choices") else {}
            tokens, how = _tokens(event, choice, so_far)
            usage = event.get("usage") or {}
            arrival = Arrival(
                tokens=tokens,
                guessed=how == GUESSED,
                finish_reason=choice.get("finish_reason"),
                num_input_tokens=count_of(usage.get("prompt_tokens")),
                num_output_tokens=count_of(usage.get("completion_tokens")),
            )
        except UNREADABLE as error:
            raise StreamBroken(f"{doing}: an event cannot be read ({error!r}): {data[:MOST_DETAILS]}") from error
        if tokens:
            self.counting = how
        return arrival, so_far + tokens


def _tokens(event: Mapping[str, Any], choice: Mapping[str, Any], so_far: int) -> tuple[int, str]:
    """The number of tokens of a chunk, and how they were counted."""
    if isinstance(ids := choice.get("token_ids"), list):
        return len(ids), "the token ids of each chunk"
    timings = event.get("timings")
    if isinstance(timings, dict) and "predicted_n" in timings:
        return max(0, int(timings["predicted_n"]) - so_far), "the number of predicted tokens that each chunk states"
    delta = choice.get("delta") or {}
    return int(bool(choice.get("text")) or any(delta.get(name) for name in _OUTPUT)), GUESSED


@asynccontextmanager
async def opened(
    url: str,
    model: str | None,
    timeout_s: float | None = None,
    extra: Mapping[str, Any] | None = None,
    tls: ClientTls | None = None,
) -> AsyncIterator[OpenAITarget]:
    """A target at `url`; `model` None chooses the server's only model. Raises ClientError, MissingPackageError, and
    TlsError for files of `tls` that cannot be used."""
    async with opened_session(url, timeout_s, tls) as session:
        url = base_of(url)
        yield OpenAITarget(
            session=session, url=url, model=model or _only(await listed_models(session, url), url), extra=extra or {}
        )


def base_of(url: str) -> str:
    """The address before /v1."""
    return url.rstrip("/").removesuffix("/v1")


async def listed_models(session: ClientSession, url: str) -> Sequence[str]:
    """The names of the server's models. Raises ClientError."""
    doing = f"listing the models of {url}"
    async with asked_for_models(session, "GET", f"{url}/v1/models", doing) as response:
        if response.status != 200:
            raise await refusal(doing, response)
        found = await read_json(doing, response)
        try:
            return [str(model["id"]) for model in found["data"]]
        except (KeyError, TypeError) as error:
            raise StreamBroken(f"{doing}: the answer cannot be read: {error!r}") from error


def _only(names: Sequence[str], url: str) -> str:
    if len(names) != 1:
        states = [ModelState(name=name, version="", state="READY", reason="") for name in names]
        raise ModelNotFound(f"listing the models of {url}: give --model. {what_exists('', states)}")
    return names[0]
