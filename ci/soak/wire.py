"""Connections that no client of ours makes: torn in the middle, or never read."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from types import TracebackType

import grpc
from tritonclient.grpc import service_pb2_grpc

from clients.wire import build_request
from soak.served import Served
from soak.wishes import Wish

_CHUNK = 1 << 16


class Relay:
    """Passes bytes between one client and the server, until it is told to stop reading or to tear the connections.

    A client behind it cannot say goodbye: the server sees what it sees when a machine loses power (with `reset`, a
    connection that is reset).
    """

    def __init__(self, url: str) -> None:
        host, _, port = url.rpartition(":")
        self._address = (host.strip("[]"), int(port))
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._reads = asyncio.Event()
        self._reads.set()
        self.url = ""

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.url = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.tear(reset=False)

    def stop_reading(self) -> None:
        """Read nothing more of what the server sends."""
        self._reads.clear()

    async def tear(self, *, reset: bool) -> None:
        """End all connections at once; with `reset` by a reset instead of an end."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            if reset and (end := writer.get_extra_info("socket")) is not None:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            their_reader, their_writer = await asyncio.open_connection(*self._address, limit=_CHUNK)
        except OSError:
            writer.transport.abort()
            return
        self._writers += [writer, their_writer]
        self._tasks += [
            asyncio.create_task(self._pass_on(reader, their_writer, always=True)),
            asyncio.create_task(self._pass_on(their_reader, writer, always=False)),
        ]

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, always: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                if not always:
                    await self._reads.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@contextlib.asynccontextmanager
async def raw_call(
    served: Served, url: str, wishes: Sequence[Wish]
) -> AsyncIterator[tuple[grpc.aio.Channel, grpc.aio.StreamStreamCall]]:
    """A ModelStreamInfer call of its own connection to the server or a relay, with these requests. It stays open for
    more of them."""
    async with served.channel(url, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        call = stub.ModelStreamInfer()
        for wish in wishes:
            await call.write(build_request(wish.request, stream=True))
        yield channel, call
