"""Servers of OpenAI's completions API with server-sent events, such as llama.cpp's and vLLM's, as the load generator
uses them.

The API does not say how many tokens a chunk has. `_tokens` counts them by what the server adds: token ids (vLLM), or
the number of predicted tokens so far (llama.cpp). A chunk of another server with text counts as one token.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clients.bench.load import Work
from clients.bench.records import Arrival
from clients.errors import (
    AccessDenied,
    AddressInvalid,
    ClientError,
    ConnectionFailed,
    ConnectionLost,
    DeadlineExceeded,
    ModelNotFound,
    RequestRejected,
    ServerFailed,
    ServerOverloaded,
    StreamBroken,
    TlsFailed,
    what_exists,
)
from export.optional import optional_package
from triton_repo.contracts.model_state import ModelState
from triton_repo.contracts.tls.client import ClientTls

if TYPE_CHECKING:
    from types import ModuleType

    from aiohttp import ClientResponse, ClientSession

_BY_STATUS: dict[int, type[ClientError]] = {
    401: AccessDenied, 403: AccessDenied, 404: ModelNotFound, 408: DeadlineExceeded, 429: ServerOverloaded,
    503: ServerOverloaded, 504: DeadlineExceeded,
}  # fmt: skip
_MOST_DETAILS = 400  # characters of a server's error that a message repeats
_MOST_LINE = 1 << 24  # bytes of one event


def require_aiohttp() -> ModuleType:
    with optional_package("aiohttp", "measuring a server over HTTP", "load"):
        import aiohttp
    return aiohttp


@dataclass(kw_only=True)
class OpenAITarget:
    """A model of a server at `url` (http://HOST:PORT, without /v1). `extra` is added to the body of every request."""

    session: ClientSession
    url: str
    model: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    counting: str = "one token for each chunk with text"

    async def answer(self, work: Work) -> AsyncGenerator[Arrival, None]:
        """Send one request and yield what arrives. Raises ClientError."""
        doing = f"generating with {self.model} at {self.url}"
        so_far, ended = 0, False
        async with _errors(doing), self.session.post(f"{self.url}/v1/completions", json=self._body(work)) as response:
            if response.status != 200:
                raise await _refusal(doing, response)
            async for data in _events(response):
                if data == "[DONE]":
                    ended = True
                    break
                arrival, so_far = self._read(doing, data, so_far)
                yield arrival
        if not ended:
            raise StreamBroken(f"{doing}: the stream ended after {so_far} tokens without [DONE]")

    def _body(self, work: Work) -> dict[str, Any]:
        sampling = work.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": work.prompt,
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
            if "error" in event:
                raise ServerFailed(f"{doing}: {str(event['error'])[:_MOST_DETAILS]}")
            choice = event["choices"][0] if event.get("choices") else {}
            tokens, how = _tokens(event, choice, so_far)
            usage = event.get("usage") or {}
            arrival = Arrival(
                tokens=tokens,
                finish_reason=choice.get("finish_reason"),
                num_input_tokens=usage.get("prompt_tokens"),
                num_output_tokens=usage.get("completion_tokens"),
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise StreamBroken(f"{doing}: an event cannot be read ({error!r}): {data[:_MOST_DETAILS]}") from error
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
    return int(bool(choice.get("text"))), "one token for each chunk with text"


async def _events(response: ClientResponse) -> AsyncIterator[str]:
    """The data of each server-sent event. These servers write one `data:` line for each event."""
    async for line in response.content:
        if line.startswith(b"data:"):
            yield line[5:].strip().decode()


async def _refusal(doing: str, response: ClientResponse) -> ClientError:
    details = " ".join((await response.text(errors="replace")).split())[:_MOST_DETAILS]
    kind = _BY_STATUS.get(response.status, RequestRejected if response.status < 500 else ServerFailed)
    return kind(f"{doing}: HTTP status {response.status}: {details}", status=str(response.status))


@asynccontextmanager
async def _errors(doing: str) -> AsyncIterator[None]:
    """Turn aiohttp's errors into ours."""
    library = require_aiohttp()
    try:
        yield
    except (library.ClientConnectorCertificateError, library.ClientConnectorSSLError) as error:
        raise TlsFailed(f"{doing}: {error}; check --tls-ca, or whether the server encrypts") from error
    except library.ClientConnectorError as error:
        raise ConnectionFailed(f"{doing}: {error}") from error
    except library.InvalidURL as error:
        raise AddressInvalid(f"{doing}: found {error}, expected http://HOST:PORT") from error
    except TimeoutError as error:
        raise DeadlineExceeded(f"{doing}: no complete answer in time") from error
    except (library.ClientError, ConnectionError) as error:
        raise ConnectionLost(f"{doing}: {error!r}") from error
    except ValueError as error:  # aiohttp's for a line without end
        raise StreamBroken(f"{doing}: {error}") from error


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
    library = require_aiohttp()
    if not url.startswith(("http://", "https://")):
        raise AddressInvalid(f"connecting to {url}: expected http://HOST:PORT, or the same with https")
    url = url.rstrip("/").removesuffix("/v1")
    limits = library.ClientTimeout(total=timeout_s)
    # Each request has a connection of its own, as llama.cpp's server closes one after an answer without saying so.
    connector = library.TCPConnector(limit=0, force_close=True, ssl=tls.context() if tls else True)
    async with library.ClientSession(timeout=limits, connector=connector, read_bufsize=_MOST_LINE) as session:
        yield OpenAITarget(
            session=session, url=url, model=model or await _the_one_model(session, url), extra=extra or {}
        )


async def _the_one_model(session: ClientSession, url: str) -> str:
    doing = f"listing the models of {url}"
    async with _errors(doing), session.get(f"{url}/v1/models") as response:
        if response.status != 200:
            raise await _refusal(doing, response)
        try:
            names = [str(model["id"]) for model in (await response.json(content_type=None))["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise StreamBroken(f"{doing}: the answer cannot be read: {error!r}") from error
    if len(names) != 1:
        states = [ModelState(name=name, version="", state="READY", reason="") for name in names]
        raise ModelNotFound(f"{doing}: give --model. {what_exists('', states)}")
    return names[0]
