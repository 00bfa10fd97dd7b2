"""Streams text from a served model over gRPC: `Client` for threads, `AsyncClient` with the same methods for asyncio.

    with Client("127.0.0.1:8001") as client:
        for piece in client.stream(GenerationRequest(model="phixtral", prompt="def main(", max_tokens=64)):
            print(piece.text, end="", flush=True)

Each request has its own stream. If the reading ends early (the generator or the client is closed, the task is
cancelled, the deadline is over, or an exception such as Ctrl-C comes), the request is ended on the server too.
`streams.py` says how; it may take some seconds. The errors are those of `clients/errors.py`. Threads may share a
`Client`. Tasks of the loop in which an `AsyncClient` was made may share it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, TypeVar

from clients import wire
from clients._tritonclient import require_grpc, require_messages, require_services
from clients.errors import (
    AddressInvalid,
    ClientError,
    ConnectionFailed,
    RequestRejected,
    TlsFailed,
    depends_on_models,
    error_of,
    may_be_tls,
)
from clients.handshake import handshake_fault
from clients.messages import (
    Generation,
    GenerationRequest,
    check_one_answer,
    check_text,
    collect,
    collect_all,
)
from clients.streams import AsyncStream, Stream, gathered
from triton_repo.contracts.model_state import ModelState
from triton_repo.contracts.piece import Piece
from triton_repo.contracts.tls.client import ClientTls

if TYPE_CHECKING:
    import grpc
    from google.protobuf.message import Message
    from tritonclient.grpc import service_pb2 as pb

__all__ = ["AsyncClient", "Client", "ClientTls", "Generation", "GenerationRequest", "ModelState", "Piece"]

_Item = TypeVar("_Item")

# A name or an IPv4 address, or an IPv6 address in brackets; then the port.
ADDRESS = re.compile(r"([\w.-]+|\[[0-9A-Fa-f:.]+(%[\w.-]+)?\]):(?P<port>[0-9]{1,5})")
# For calls that only read a state.
STATE_TIMEOUT_S = 5.0
# The text of gRPC for a call past its deadline, and our text for a call whose client was closed.
DEADLINE_EXCEEDED = "Deadline Exceeded"
CLOSED = "the client was closed before the answer's end"
# Three years. From about 1e9 s on, gRPC's clock overflows and the call fails at once with DEADLINE_EXCEEDED.
MAX_TIMEOUT_S = 1e8
# A whole answer comes as one message, and gRPC's default limit for a message is 4 MiB. By default gRPC waits up to
# 120 s between attempts to reach a server that was gone; a server that is started again answers sooner. Without its
# probes gRPC takes 64 KiB of an answer that is not read, else up to some megabytes.
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.http2.bdp_probe", 0),
)


class Client:
    """A connection to one server, HOST:PORT. `tls` says how to encrypt; None sends without encryption. Raises TlsError
    for files of it that cannot be used.

    Nothing is sent before the first call, so the server may start later than the client.
    """

    def __init__(self, url: str, *, tls: ClientTls | None = None) -> None:
        self.url, self._tls = url, tls
        self._grpc = require_grpc()
        self._channel = _open(self._grpc, url, tls)
        self._stub = require_services().GRPCInferenceServiceStub(self._channel)
        self._traits: wire.ServerTraits | None = None
        self._takes_stop: dict[str, bool] = {}  # model to whether it has the input `stop`
        self._streams: dict[Stream, pb.ModelInferRequest] = {}  # in progress

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the requests in progress and close the connection. Those who read their answers get RequestCancelled."""
        streams = dict(self._streams)
        for stream in streams:
            stream.is_abandoned = True
        with ThreadPoolExecutor(max_workers=max(1, len(streams))) as pool:
            list(pool.map(self._end, streams, streams.values()))
        self._channel.close()

    def stream(self, request: GenerationRequest) -> Generator[Piece, None, None]:
        """The answer piece by piece. The request is sent when the first piece is read; `close()` of the generator ends
        it."""
        return self._pieces(request, wire.build_request(request, stream=True))

    def generate(self, request: GenerationRequest) -> Generation:
        """The whole answer, which the server sends in one response."""
        check_one_answer(request)
        return collect(self._pieces(request, wire.build_request(request, stream=False)))

    def generate_all(self, request: GenerationRequest) -> tuple[Generation, ...]:
        """The whole answers to the prompt, `num_return_sequences` of them. The server sends each in one response."""
        return collect_all(self._pieces(request, wire.build_request(request, stream=False)))

    def _pieces(self, request: GenerationRequest, message: pb.ModelInferRequest) -> Generator[Piece, None, None]:
        doing, timeout_s = wire.doing(request.model, self.url), _deadline(request.timeout_s)
        reader = wire.StreamReader(doing, log_probs=bool(request.return_log_probs))
        traits = self._server_traits(doing, timeout_s)
        # After the deadline gRPC cancels a call, which may crash an older server.
        limit_s = timeout_s if traits.cancels_safely else None
        try:
            call = self._stub.ModelStreamInfer(iter((message,)), metadata=traits.metadata, timeout=limit_s)
        except ValueError as error:
            raise _closed(doing) from error
        stream = Stream(call)
        self._streams[stream] = message
        try:
            for response in stream.responses(None if traits.cancels_safely else timeout_s):
                if not stream.is_abandoned:
                    yield from reader.read(response)
            if stream.is_abandoned:
                raise self._explain("CANCELLED", CLOSED, doing)
            yield from reader.finish()
        except TimeoutError as error:
            raise self._explain("DEADLINE_EXCEEDED", DEADLINE_EXCEEDED, doing) from error
        except wire.ErrorText as error:
            raise self._explain(error.status, error.details, doing, request.model) from error
        except self._grpc.RpcError as error:
            raise self._explain(error.code().name, error.details(), doing, request.model) from error
        finally:
            self._end(stream, message)
            self._streams.pop(stream, None)

    def _end(self, stream: Stream, message: pb.ModelInferRequest) -> None:
        """Make sure that a request has ended on the server."""
        if stream.has_ended:
            return
        stop = wire.build_stop(message.model_name, message.id)

        def ask(timeout_s: float) -> None:
            with suppress(self._grpc.RpcError, ValueError):  # if this fails, stream.end cancels the call
                list(self._stub.ModelStreamInfer(iter((stop,)), timeout=timeout_s))

        stream.end(ask if self._must_ask_to_stop(message.model_name) else None)

    def _must_ask_to_stop(self, model: str) -> bool:
        """Whether a cancelled call may crash the server and the model can be asked to stop instead."""
        if self._traits is None or self._traits.cancels_safely:
            return False
        if model not in self._takes_stop:
            try:
                self._takes_stop[model] = wire.takes_stop(
                    self._ask("ModelMetadata", f"asking about {model}", name=model)
                )
            except ClientError:
                return False
        return self._takes_stop[model]

    def server_ready(self) -> bool:
        """Whether the server answers and says that it is ready. Raises ClientError for an answer that is neither yes
        nor no."""
        try:
            return bool(self._ask("ServerReady", f"asking {self.url} if it is ready").ready)
        except ConnectionFailed:
            return False

    def model_ready(self, model: str) -> bool:
        """Whether the server says that the model is ready; False if it has no model with that name."""
        check_text(f"asking {self.url} if a model is ready: its name", model)
        return bool(self._ask("ModelReady", f"asking {self.url} if {model} is ready", name=model).ready)

    def models(self) -> tuple[ModelState, ...]:
        """Every model in the server's repository, in the order of names."""
        return wire.read_models(self._ask("RepositoryIndex", f"listing the models of {self.url}"))

    def model_inputs(self, model: str) -> frozenset[str]:
        """The names of a model's inputs. Raises ModelNotFound if the server has no ready model of that name."""
        return wire.read_inputs(self._ask("ModelMetadata", f"asking {self.url} about {model}", name=model))

    def _server_traits(self, doing: str, timeout_s: float | None) -> wire.ServerTraits:
        if self._traits is None:
            answer = self._ask("ServerMetadata", doing, timeout_s=timeout_s)
            self._traits = wire.server_traits(answer.version)
        return self._traits

    def _ask(self, method: str, doing: str, *, timeout_s: float | None = None, **fields: str) -> Message:
        message = getattr(require_messages(), f"{method}Request")(**fields)
        limit_s = STATE_TIMEOUT_S if timeout_s is None else min(timeout_s, STATE_TIMEOUT_S)
        try:
            return getattr(self._stub, method)(message, timeout=limit_s)
        except self._grpc.RpcError as error:
            raise self._explain(error.code().name, error.details(), doing) from error
        except ValueError as error:
            raise _closed(doing) from error

    def _explain(self, status: str, details: str | None, doing: str, model: str | None = None) -> ClientError:
        models = None
        if depends_on_models(model, status):
            with suppress(ClientError):
                models = self.models()
        error = error_of(doing=doing, status=status, details=details or "", model=model, models=models)
        if may_be_tls(error) and (fault := handshake_fault(self.url, self._tls)):
            return TlsFailed(f"{doing}: {fault}", status=status)
        return error


class AsyncClient:
    """`Client` for asyncio. Make it inside the running loop.

    If you stop reading a stream early, it ends when its generator is closed. Use `contextlib.aclosing` to close the
    generator at once, or cancel the task that reads it.
    """

    def __init__(self, url: str, *, tls: ClientTls | None = None) -> None:
        self.url, self._tls = url, tls
        self._grpc = require_grpc()
        self._channel = _open(self._grpc.aio, url, tls)
        self._stub = require_services().GRPCInferenceServiceStub(self._channel)
        self._traits: wire.ServerTraits | None = None
        self._takes_stop: dict[str, bool] = {}  # model to whether it has the input `stop`
        self._streams: dict[AsyncStream, pb.ModelInferRequest] = {}  # in progress

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the requests in progress and close the connection. Those who read their answers get RequestCancelled."""
        streams = dict(self._streams)
        for stream in streams:
            stream.is_abandoned = True
        await asyncio.gather(*(self._end(stream, message) for stream, message in streams.items()))
        await self._channel.close()

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """The answer piece by piece. The request is sent when the first piece is read; `aclose()` of the generator ends
        it."""
        return _one_by_one(self.stream_waiting(request))

    def stream_waiting(self, request: GenerationRequest) -> AsyncGenerator[Sequence[Piece], None]:
        """`stream` for a reader that handles several pieces at a time: each item has all pieces that wait, one or
        more."""
        return self._pieces(request, wire.build_request(request, stream=True))

    async def generate(self, request: GenerationRequest) -> Generation:
        """The whole answer, which the server sends in one response."""
        check_one_answer(request)
        async with aclosing(self._pieces(request, wire.build_request(request, stream=False))) as pieces:
            return collect([piece async for waiting in pieces for piece in waiting])

    async def generate_all(self, request: GenerationRequest) -> tuple[Generation, ...]:
        """The whole answers to the prompt, `num_return_sequences` of them. The server sends each in one response."""
        async with aclosing(self._pieces(request, wire.build_request(request, stream=False))) as pieces:
            return collect_all([piece async for waiting in pieces for piece in waiting])

    async def _pieces(
        self, request: GenerationRequest, message: pb.ModelInferRequest
    ) -> AsyncGenerator[Sequence[Piece], None]:
        doing, timeout_s = wire.doing(request.model, self.url), _deadline(request.timeout_s)
        reader = wire.StreamReader(doing, log_probs=bool(request.return_log_probs))
        traits = await self._server_traits(doing, timeout_s)
        # After the deadline gRPC cancels a call, which may crash an older server.
        limit_s = timeout_s if traits.cancels_safely else None
        try:
            call = self._stub.ModelStreamInfer(iter((message,)), metadata=traits.metadata, timeout=limit_s)
        except self._grpc.aio.UsageError as error:
            raise _closed(doing) from error
        stream = AsyncStream(call)
        self._streams[stream] = message
        try:
            async for responses in stream.responses(None if traits.cancels_safely else timeout_s):
                for pieces in () if stream.is_abandoned else gathered(map(reader.read, responses)):
                    yield pieces
            if stream.is_abandoned:
                raise await self._explain("CANCELLED", CLOSED, doing)
            if last := reader.finish():
                yield last
        except TimeoutError as error:
            raise await self._explain("DEADLINE_EXCEEDED", DEADLINE_EXCEEDED, doing) from error
        except wire.ErrorText as error:
            raise await self._explain(error.status, error.details, doing, request.model) from error
        except self._grpc.RpcError as error:
            raise await self._explain(error.code().name, error.details(), doing, request.model) from error
        finally:
            await self._end(stream, message)
            self._streams.pop(stream, None)

    async def _end(self, stream: AsyncStream, message: pb.ModelInferRequest) -> None:
        """Make sure that a request has ended on the server."""
        if stream.has_ended:
            return
        stop = wire.build_stop(message.model_name, message.id)

        async def ask(timeout_s: float) -> None:
            # If this fails, stream.end cancels the call.
            with suppress(self._grpc.RpcError, self._grpc.aio.UsageError):
                async for _ in self._stub.ModelStreamInfer(iter((stop,)), timeout=timeout_s):
                    pass

        try:
            must_ask = await self._must_ask_to_stop(message.model_name)
        except BaseException:
            await stream.end(None)
            raise
        await stream.end(ask if must_ask else None)

    async def _must_ask_to_stop(self, model: str) -> bool:
        """Whether a cancelled call may crash the server and the model can be asked to stop instead."""
        if self._traits is None or self._traits.cancels_safely:
            return False
        if model not in self._takes_stop:
            try:
                metadata = await self._ask("ModelMetadata", f"asking about {model}", name=model)
            except ClientError:
                return False
            self._takes_stop[model] = wire.takes_stop(metadata)
        return self._takes_stop[model]

    async def server_ready(self) -> bool:
        """Whether the server answers and says that it is ready. Raises ClientError for an answer that is neither yes
        nor no."""
        try:
            return bool((await self._ask("ServerReady", f"asking {self.url} if it is ready")).ready)
        except ConnectionFailed:
            return False

    async def model_ready(self, model: str) -> bool:
        """Whether the server says that the model is ready; False if it has no model with that name."""
        check_text(f"asking {self.url} if a model is ready: its name", model)
        return bool((await self._ask("ModelReady", f"asking {self.url} if {model} is ready", name=model)).ready)

    async def models(self) -> tuple[ModelState, ...]:
        """Every model in the server's repository, in the order of names."""
        return wire.read_models(await self._ask("RepositoryIndex", f"listing the models of {self.url}"))

    async def model_inputs(self, model: str) -> frozenset[str]:
        """The names of a model's inputs. Raises ModelNotFound if the server has no ready model of that name."""
        return wire.read_inputs(await self._ask("ModelMetadata", f"asking {self.url} about {model}", name=model))

    async def _server_traits(self, doing: str, timeout_s: float | None) -> wire.ServerTraits:
        if self._traits is None:
            answer = await self._ask("ServerMetadata", doing, timeout_s=timeout_s)
            self._traits = wire.server_traits(answer.version)
        return self._traits

    async def _ask(self, method: str, doing: str, *, timeout_s: float | None = None, **fields: str) -> Message:
        message = getattr(require_messages(), f"{method}Request")(**fields)
        limit_s = STATE_TIMEOUT_S if timeout_s is None else min(timeout_s, STATE_TIMEOUT_S)
        try:
            return await getattr(self._stub, method)(message, timeout=limit_s)
        except self._grpc.RpcError as error:
            raise await self._explain(error.code().name, error.details(), doing) from error
        except self._grpc.aio.UsageError as error:
            raise _closed(doing) from error

    async def _explain(self, status: str, details: str | None, doing: str, model: str | None = None) -> ClientError:
        models = None
        if depends_on_models(model, status):
            with suppress(ClientError):
                models = await self.models()
        error = error_of(doing=doing, status=status, details=details or "", model=model, models=models)
        if may_be_tls(error) and (fault := await asyncio.to_thread(handshake_fault, self.url, self._tls)):
            return TlsFailed(f"{doing}: {fault}", status=status)
        return error


async def _one_by_one(batches: AsyncGenerator[Sequence[_Item], None]) -> AsyncGenerator[_Item, None]:
    async with aclosing(batches):
        async for batch in batches:
            for item in batch:
                yield item


def check_address(url: str) -> None:
    """Raise AddressInvalid for an address that gRPC could not resolve."""
    if not isinstance(url, str):
        raise AddressInvalid(f"connecting to {url!r}: found no text, expected HOST:PORT")
    if url.startswith(("http://", "https://", "grpc://")):
        raise AddressInvalid(f"connecting to {url}: found a scheme; give HOST:PORT of the server's gRPC")
    address = ADDRESS.fullmatch(url)
    if address is None or not 0 < int(address["port"]) < 2**16:
        raise AddressInvalid(
            f"connecting to {url!r}: expected HOST:PORT, such as 127.0.0.1:8001 or [::1]:8001, with a port below 65536"
        )


def _open(library: ModuleType, url: str, tls: ClientTls | None) -> grpc.Channel | grpc.aio.Channel:
    """A channel of `grpc` or `grpc.aio`. Raises AddressInvalid, and TlsError for files that cannot be used."""
    check_address(url)
    if tls is None:
        return library.insecure_channel(url, options=CHANNEL_OPTIONS)
    return tls.load().channel(library, url, CHANNEL_OPTIONS)


def _deadline(timeout_s: float | None) -> float | None:
    """The timeout that is passed to gRPC for a request's `timeout_s`."""
    return None if timeout_s is None else float(min(timeout_s, MAX_TIMEOUT_S))


def _closed(doing: str) -> RequestRejected:
    """The error of a call on a channel that `close()` has closed, which gRPC refuses before sending anything."""
    return RequestRejected(f"{doing}: this client is closed; make a new one, or close it after the last request")
