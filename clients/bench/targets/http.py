"""What targets over HTTP share: the session, server-sent events, and errors as ours."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

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
)
from export.optional import optional_package
from triton_repo.contracts.tls.client import ClientTls

if TYPE_CHECKING:
    from types import ModuleType

    from aiohttp import ClientResponse, ClientSession

_BY_STATUS: dict[int, type[ClientError]] = {
    401: AccessDenied, 403: AccessDenied, 404: ModelNotFound, 408: DeadlineExceeded, 429: ServerOverloaded,
    503: ServerOverloaded, 504: DeadlineExceeded,
}  # fmt: skip
LISTING_S = 10.0  # seconds that a server has to list its models
MOST_DETAILS = 400  # characters of a server's error that a message repeats
_MOST_LINE = 1 << 24  # bytes of one event
# What reading an event of another form than expected raises.
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)


def require_aiohttp() -> ModuleType:
    with optional_package("aiohttp", "measuring a server over HTTP", "load"):
        import aiohttp
    return aiohttp


async def events(response: ClientResponse) -> AsyncIterator[str]:
    """The data of each server-sent event. These servers write one `data:` line for each event."""
    async for line in response.content:
        if line.startswith(b"data:"):
            yield line[5:].strip().decode()


def count_of(value: Any) -> int | None:  # noqa: ANN401 - whatever a server sends
    """A number of tokens in all, None where the server states none. Raises TypeError for anything else."""
    if value is not None and type(value) is not int:
        raise TypeError(f"found {value!r} as a number of tokens")
    return value


async def refusal(doing: str, response: ClientResponse) -> ClientError:
    details = " ".join((await response.text(errors="replace")).split())[:MOST_DETAILS]
    kind = _BY_STATUS.get(response.status, RequestRejected if response.status < 500 else ServerFailed)
    return kind(f"{doing}: HTTP status {response.status}: {details}", status=str(response.status))


@asynccontextmanager
async def library_errors(doing: str, *, remedy: str | None = None) -> AsyncIterator[None]:
    """Turn aiohttp's errors into ours. `remedy` is for an answer that does not come in time."""
    library = require_aiohttp()
    try:
        yield
    except (library.ClientConnectorCertificateError, library.ClientConnectorSSLError) as error:
        raise TlsFailed(f"{doing}: {error}; check --tls-ca, or whether the server encrypts") from error
    except library.ClientConnectorError as error:
        raise ConnectionFailed(f"{doing}: {error}", remedy=ConnectionFailed.over_http) from error
    except library.InvalidURL as error:
        raise AddressInvalid(f"{doing}: found {error}, expected http://HOST:PORT") from error
    except TimeoutError as error:
        raise DeadlineExceeded(f"{doing}: no complete answer in time", remedy=remedy) from error
    except (library.ClientError, ConnectionError) as error:
        raise ConnectionLost(f"{doing}: {error!r}") from error
    except ValueError as error:  # aiohttp's for a line without end
        raise StreamBroken(f"{doing}: {error}") from error


async def read_json(doing: str, response: ClientResponse) -> Any:  # noqa: ANN401 - whatever a server sends
    """The JSON of a whole answer. Raises StreamBroken."""
    try:
        return await response.json(content_type=None)
    except ValueError as error:
        raise StreamBroken(f"{doing}: the answer cannot be read: {error!r}") from error


@asynccontextmanager
async def asked_for_models(
    session: ClientSession,
    method: str,
    url: str,
    doing: str,
    **fields: Any,  # noqa: ANN401 - of aiohttp's request
) -> AsyncIterator[ClientResponse]:
    """The response to a request that lists models. Raises ClientError, also where it takes longer than LISTING_S."""
    limit = require_aiohttp().ClientTimeout(total=LISTING_S)
    async with (
        library_errors(doing, remedy=ConnectionFailed.over_http),
        session.request(method, url, timeout=limit, allow_redirects=False, **fields) as response,
    ):
        yield response


def _allow_connections() -> None:
    """Let this process open as many connections as its user may. Most shells allow 1,024 at first, and a request beyond
    that would fail as if the server were gone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # of a system that allows fewer than its own limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@asynccontextmanager
async def opened_session(
    url: str, timeout_s: float | None, tls: ClientTls | None, api_key: str | None = None
) -> AsyncIterator[ClientSession]:
    """A session for requests to `url`. Raises AddressInvalid, MissingPackageError, and TlsError for files of `tls` that
    cannot be used."""
    library = require_aiohttp()
    _allow_connections()
    if not url.startswith(("http://", "https://")):
        raise AddressInvalid(f"connecting to {url}: expected http://HOST:PORT, or the same with https")
    limits = library.ClientTimeout(total=timeout_s)
    # Each request has a connection of its own, as llama.cpp's server closes one after an answer without saying so.
    connector = library.TCPConnector(limit=0, force_close=True, ssl=tls.context() if tls else True)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with library.ClientSession(
        timeout=limits, connector=connector, read_bufsize=_MOST_LINE, headers=headers
    ) as session:
        yield session
