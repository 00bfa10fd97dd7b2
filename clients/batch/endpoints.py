"""The servers that a batch is sent to: OpenAI's HTTP API (http://HOST:PORT), or Triton's gRPC (HOST:PORT).

Both answer with a status and a body of OpenAI's API. For a Triton these are the ones that our gateway would give: the
fields of a completion are read by the gateway's tables, and an error has the status that the gateway gives it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from clients.batch.lines import COMPLETIONS, Answer, Request, code_of
from clients.errors import (
    AccessDenied,
    AddressInvalid,
    ClientError,
    ConnectionFailed,
    ModelNotFound,
    ModelNotReady,
    StreamBroken,
    TlsFailed,
)
from clients.generation import AsyncClient, check_address
from export.optional import optional_package
from triton_repo.contracts.ensemble import STEP_MODELS
from triton_repo.contracts.tls.client import ClientTls

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

MOST_ANSWER = 64 << 20  # bytes of an answer over HTTP
MOST_RETRY_S = 3600.0  # a longer wait that a server asks for counts as this long
CHECK_S = 10.0
_MOST_DETAILS = 400  # characters of a server's error that a message repeats
_SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?")


class EndpointAway(Exception):  # noqa: N818 - named after what happened, as the errors of clients/errors.py
    """An endpoint that cannot be asked at present, whatever the request. Nothing was computed."""


class Endpoint(Protocol):
    """A server. Use it in the loop in which it was opened."""

    url: str

    async def models(self) -> frozenset[str] | None:
        """Its ready models; None if it does not tell. Raises ClientError."""

    async def ask(self, request: Request, request_id: str) -> Answer:
        """The answer to one request. Raises EndpointAway, and AccessDenied for credentials that it does not accept."""

    async def close(self) -> None:
        """End the requests in progress."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """How to reach endpoints. `key` is sent to those over HTTP."""

    timeout_s: float
    models: frozenset[str] = frozenset()  # that they had when the batch began
    key: str | None = None
    tls: ClientTls | None = None


def check_url(url: str) -> None:
    """Raise AddressInvalid for an address that neither kind of endpoint has."""
    if "://" not in url:
        check_address(url)
    elif not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", url):
        raise AddressInvalid(
            f"connecting to {url}: expected http://HOST:PORT or https://HOST:PORT, or HOST:PORT for gRPC"
        )


def open_endpoint(url: str, access: Access) -> Endpoint:
    """The endpoint at an address. Call it in the running loop. Raises AddressInvalid, MissingPackageError, and TlsError
    for files of TLS that cannot be used."""
    check_url(url)
    return OpenAIEndpoint(url, access) if "://" in url else TritonEndpoint(url, access)


def retry_after(value: str | None) -> float | None:
    """The seconds that a header Retry-After asks to wait, at most MOST_RETRY_S; None where it is absent or neither a
    number nor a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return None
    value = value.strip()
    if _SECONDS.fullmatch(value):
        return min(float(value), MOST_RETRY_S)
    with suppress(ValueError, TypeError):
        at = parsedate_to_datetime(value)
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        return min(max(0.0, (at - datetime.now(UTC)).total_seconds()), MOST_RETRY_S)
    return None


def _require_aiohttp() -> ModuleType:
    with optional_package("aiohttp", "sending a batch over HTTP", "batch"):
        import aiohttp
    return aiohttp


class OpenAIEndpoint:
    """A server of OpenAI's HTTP API."""

    def __init__(self, url: str, access: Access) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._library = _require_aiohttp()
        self._access = access
        headers = {} if access.key is None else {"Authorization": f"Bearer {access.key}"}
        tls = access.tls.context() if access.tls else True
        self._session: ClientSession = self._library.ClientSession(
            timeout=self._library.ClientTimeout(total=access.timeout_s, sock_connect=CHECK_S),
            connector=self._library.TCPConnector(limit=0, ssl=tls),
            headers=headers,
        )

    async def close(self) -> None:
        await self._session.close()

    async def models(self) -> frozenset[str] | None:
        doing = f"listing the models of {self.url}"
        limit = self._library.ClientTimeout(total=CHECK_S)
        try:
            async with self._session.get(f"{self.url}/v1/models", timeout=limit, allow_redirects=False) as response:
                if response.status in (401, 403):
                    raise AccessDenied(f"{doing}: HTTP status {response.status}; give --api-key or --api-key-env")
                if response.status in (404, 405, 501):
                    return None
                if response.status != 200:
                    raise ConnectionFailed(
                        f"{doing}: HTTP status {response.status}: {await _beginning(response)}",
                        remedy=ConnectionFailed.over_http,
                    )
                found = json.loads(await _read(response))
                return frozenset(str(model["id"]) for model in found["data"])
        except (self._library.ClientConnectorCertificateError, self._library.ClientConnectorSSLError) as error:
            raise TlsFailed(f"{doing}: {error}; check --tls-ca, or whether the server encrypts") from error
        except (self._library.ClientError, TimeoutError, OSError) as error:
            reason = f"no answer within {CHECK_S:g} s" if isinstance(error, TimeoutError) else error
            raise ConnectionFailed(f"{doing}: {reason}", remedy=ConnectionFailed.over_http) from error
        except (ValueError, KeyError, TypeError) as error:
            raise StreamBroken(f"{doing}: the answer cannot be read ({error!r})") from error

    async def ask(self, request: Request, request_id: str) -> Answer:
        headers = {"X-Request-Id": request_id, "Content-Type": "application/json"}
        try:
            data = json.dumps(request.body).encode()
        except RecursionError:
            return Answer(error=("invalid_line", "found values nested too deeply to be sent"))
        try:
            async with self._post(request.url, data, headers) as response:
                answer = await self._read_answer(response, request)
        except (self._library.ClientConnectorError, self._library.ConnectionTimeoutError) as error:
            raise EndpointAway(f"{self.url}: {error}") from error
        except TimeoutError:
            return Answer(error=("timeout", f"no whole answer within {self._access.timeout_s:g} s"))
        except (self._library.ClientError, OSError) as error:
            return Answer(error=("connection_lost", f"the connection ended before the answer did ({error!r})"))
        if answer.status == 401:
            raise AccessDenied(f"asking {self.url}: HTTP status 401: {str(answer.body)[:_MOST_DETAILS]}")
        is_unknown = answer.status == 404 and code_of(answer.body) == "model_not_found"
        if is_unknown and request.body.get("model") in self._access.models:
            raise EndpointAway(f"{self.url}: it had the model at first, and does not have it at present")
        return answer

    def _post(self, url: str, data: bytes, headers: Mapping[str, str]) -> AbstractAsyncContextManager[ClientResponse]:
        # Followed redirects would send the prompt, and with some servers the key, to where nobody meant them to go.
        return self._session.post(f"{self.url}{url}", data=data, headers=headers, allow_redirects=False)

    async def _read_answer(self, response: ClientResponse, request: Request) -> Answer:
        identity = response.headers.get("x-request-id", "")
        hint = retry_after(response.headers.get("retry-after"))
        try:
            data = await _read(response)
        except _TooLarge:
            return Answer(error=("answer_too_large", f"the answer has more than {MOST_ANSWER} bytes"))
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            text = data[: 4 * _MOST_DETAILS].decode(errors="replace")[:_MOST_DETAILS]
            if response.status == 200:
                return Answer(error=("unreadable_answer", f"the answer to {request.url} is no JSON: {text}"))
            body = {"error": {"message": text, "type": "no_json", "param": None, "code": None}}
        return Answer(status=response.status, request_id=identity, body=body, retry_s=hint)


class _TooLarge(Exception):  # noqa: N818
    pass


async def _read(response: ClientResponse) -> bytes:
    parts, num_bytes = [], 0
    async for part in response.content.iter_any():
        parts.append(part)
        num_bytes += len(part)
        if num_bytes > MOST_ANSWER:
            raise _TooLarge
    return b"".join(parts)


async def _beginning(response: ClientResponse) -> str:
    with suppress(_TooLarge):
        return " ".join((await _read(response)).decode(errors="replace").split())[:_MOST_DETAILS]
    return "a body that is too large"


class TritonEndpoint:
    """A Triton with a model of the text contract, over gRPC. It answers completions alone."""

    def __init__(self, url: str, access: Access) -> None:
        self.url, self._access = url, access
        with optional_package("starlette", "reading a batch for a Triton", "batch"):
            from clients.gateway.api import sampling
            from clients.gateway.api.fields import MOST_TOKENS, Fields, integer, text
        self._sampling = sampling
        self._fields = Fields(
            taken={**sampling.SHARED, "prompt": text(MOST_ANSWER), "max_tokens": integer(1, MOST_TOKENS)},
            unread=sampling.UNREAD,
            neutral={"best_of": (1,), "suffix": ("",), "echo": (False,), "logprobs": ()},
        )
        self._client = AsyncClient(url, tls=access.tls)

    async def close(self) -> None:
        await self._client.close()

    async def models(self) -> frozenset[str] | None:
        states = await self._client.models()
        return frozenset(state.name for state in states if state.ready and state.name not in STEP_MODELS)

    async def ask(self, request: Request, request_id: str) -> Answer:
        from clients.gateway.api.answers import now
        from clients.gateway.errors import ApiError, of_client

        try:
            choices, usage = await self._generate(request, request_id)
        except ApiError as error:
            return Answer(status=error.status, request_id=request_id, body=error.body(), retry_s=error.retry_s)
        except ClientError as error:
            had_model = request.body.get("model") in self._access.models
            lost_model = isinstance(error, (ModelNotFound, ModelNotReady)) and had_model
            if lost_model or isinstance(error, (ConnectionFailed, TlsFailed)):
                raise EndpointAway(str(error)) from error
            seen = of_client(error)
            return Answer(status=seen.status, request_id=request_id, body=seen.body(), retry_s=seen.retry_s)
        body = {
            "id": f"cmpl-{request_id}", "object": "text_completion", "created": now(), "model": request.body["model"],
            "choices": choices, "usage": usage,
        }  # fmt: skip
        return Answer(status=200, request_id=request_id, body=body)

    async def _generate(self, request: Request, request_id: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        from clients.gateway.api.answers import finish_reason, routing_of
        from clients.gateway.errors import invalid

        if request.url != COMPLETIONS:
            raise invalid(
                "url", f"found {request.url}, and a Triton over gRPC answers {COMPLETIONS} alone; send the batch to a "
                "gateway over HTTP (`moeship gateway`), which has the other paths",
            )  # fmt: skip
        values = self._fields.read(request.body)
        if not values.get("prompt"):
            raise invalid("prompt", "found none or an empty text, expected at least one character")
        wanted = self._sampling.generation_request(
            values,
            prompt=self._sampling.Prompt(values["prompt"]),
            max_tokens=values.get("max_tokens", 16),  # OpenAI's default
            request_id=request_id,
            timeout_s=self._access.timeout_s,
            log_probs=None,
        )
        answers = await self._client.generate_all(wanted)
        choices = [
            {"index": one.sequence_index, "text": one.text, "logprobs": None, "finish_reason": finish_reason(one),
             **routing_of(one)}
            for one in answers
        ]  # fmt: skip
        prompt = answers[0].num_input_tokens if answers else None
        output = sum(len(one.token_ids) if one.num_output_tokens is None else one.num_output_tokens for one in answers)
        return choices, {
            "prompt_tokens": prompt, "completion_tokens": output, "total_tokens": (prompt or 0) + output,
        }  # fmt: skip
