"""How clients end a request early: by a request to stop where the server may not survive a call that is cancelled."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing, suppress

import pytest
from fake_triton import FakeServer, deadlines

from clients import errors, streams
from clients.generation import AsyncClient, Client

PATIENCE_S = 30
OLD = "2.51.0"
DEADLINE = "DEADLINE_EXCEEDED: .*Deadline Exceeded"  # of gRPC, or as gRPC says it


@pytest.fixture
def server(server: FakeServer) -> FakeServer:
    """One that answers until it is asked to stop."""
    server.version, server.answer = OLD, server.stoppable
    return server


def leave_by_closing(server, request):
    with Client(server.url) as client:
        pieces = client.stream(request())
        next(pieces)
        pieces.close()


def leave_by_an_exception(server, request):
    with Client(server.url) as client, suppress(KeyboardInterrupt):
        for _ in client.stream(request()):
            raise KeyboardInterrupt


def leave_by_the_deadline(server, request):
    with Client(server.url) as client:
        for timeout_s in deadlines(server):
            with pytest.raises(errors.DeadlineExceeded, match=DEADLINE):
                list(client.stream(request(timeout_s=timeout_s)))


def leave_by_the_deadline_of_a_whole_answer(server, request):
    with Client(server.url) as client:
        for timeout_s in deadlines(server):
            with pytest.raises(errors.DeadlineExceeded):
                client.generate(request(timeout_s=timeout_s))


def leave_by_closing_the_client(server, request):
    client, seen, begun = Client(server.url), [], threading.Event()

    def read():
        try:
            for piece in client.stream(request()):
                seen.append(piece.text)
                begun.set()
        except errors.RequestCancelled as error:
            seen.append(error.status)

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(PATIENCE_S)
    client.close()
    reader.join(PATIENCE_S)
    assert seen == ["def ", "CANCELLED"]


def leave_by_closing_the_client_that_nobody_reads(server, request):
    client = Client(server.url)
    pieces = client.stream(request())
    next(pieces)
    client.close()
    with pytest.raises(errors.RequestCancelled):
        next(pieces)


async def leave_by_aclosing(server, client, request):
    async with aclosing(client.stream(request())) as pieces:
        await anext(pieces)


async def leave_by_cancelling_the_task(server, client, request):
    begun = asyncio.Event()

    async def read():
        async for _ in client.stream(request()):
            begun.set()

    task = asyncio.create_task(read())
    await asyncio.wait_for(begun.wait(), PATIENCE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_by_a_timeout(server, client, request):
    for timeout_s in deadlines(server):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await client.generate(request())


async def leave_by_the_async_deadline(server, client, request):
    for timeout_s in deadlines(server):
        with pytest.raises(errors.DeadlineExceeded, match=DEADLINE):
            await client.generate(request(timeout_s=timeout_s))


async def leave_by_closing_the_async_client(server, client, request):
    async def read_on():
        async for _ in pieces:
            pass

    pieces = client.stream(request())
    await anext(pieces)  # the server has the request
    task = asyncio.create_task(read_on())
    await client.close()
    with pytest.raises(errors.RequestCancelled):
        await task


def in_loop(leave):
    async def main(server, request):
        async with AsyncClient(server.url) as client:
            await leave(server, client, request)

    return lambda server, request: asyncio.run(main(server, request))


WAYS = [
    leave_by_closing, leave_by_an_exception, leave_by_the_deadline, leave_by_the_deadline_of_a_whole_answer,
    leave_by_closing_the_client, leave_by_closing_the_client_that_nobody_reads,
]  # fmt: skip
ASYNC_WAYS = [
    leave_by_aclosing, leave_by_cancelling_the_task, leave_by_a_timeout, leave_by_the_async_deadline,
    leave_by_closing_the_async_client,
]  # fmt: skip
every_way = pytest.mark.parametrize(
    "leave",
    [pytest.param(way, id=way.__name__) for way in WAYS]
    + [pytest.param(in_loop(way), id=way.__name__) for way in ASYNC_WAYS],
)


@every_way
def test_a_request_is_ended_by_another_that_bears_its_id_and_no_call_is_cancelled(server, request_of, leave):
    leave(server, request_of)
    assert server.stops == [request.id for request in server.requests]
    assert len(server.stops) == 1
    assert not server.cancelled.is_set()


@every_way
@pytest.mark.parametrize("kind", ["a server that is safe", "a model that does not know stop"])
def test_elsewhere_the_call_is_cancelled(server, request_of, leave, kind):
    if kind == "a server that is safe":
        server.version = "2.57.0"
    else:
        server.takes_stop = False
    leave(server, request_of)
    assert server.cancelled.wait(PATIENCE_S)
    assert server.stops == []


@every_way
def test_a_server_that_does_not_react_is_asked_again_and_its_call_cancelled_after_all(
    server, request_of, leave, monkeypatch
):
    monkeypatch.setattr(streams, "STOP_PATIENCE_S", 0.5)
    monkeypatch.setattr(streams, "STOP_INTERVAL_S", 0.1)
    server.obeys_stop = False
    leave(server, request_of)
    assert server.cancelled.wait(PATIENCE_S)
    assert len(server.stops) > 1


def test_an_answer_that_has_ended_is_left_alone(server, request_of):
    server.stopped.set()
    with Client(server.url) as client:
        assert client.generate(request_of()).finish_reason == "cancelled"
        pieces = client.stream(request_of())
        assert [piece.finish_reason for piece in (next(pieces), next(pieces))] == [None, "cancelled"]
        pieces.close()
    assert server.stops == []
    assert not server.cancelled.is_set()
