"""What the load generator reads from servers: tokens, ends and errors, over gRPC and over server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from bench_standin import works
from fake_triton import FakeServer, at_the_end_of, empty_final, piece

from clients.bench.generator import apply
from clients.bench.load import Lengths, Load, Sampling, Work
from clients.bench.openai import OpenAITarget, opened
from clients.bench.records import Arrival
from clients.bench.triton import TritonTarget
from clients.errors import (
    AccessDenied,
    AddressInvalid,
    ConnectionFailed,
    ConnectionLost,
    DeadlineExceeded,
    ModelNotFound,
    RequestRejected,
    ServerFailed,
    ServerOverloaded,
    StreamBroken,
)
from clients.generation import AsyncClient

WORK = Work(prompt="one two", max_tokens=5, seed=9, sampling=Sampling(temperature=0.5, top_k=7, ignore_end=True))


async def all_of(target, work=WORK):
    return [arrival async for arrival in target.answer(work)]


def test_tokens_over_grpc_are_counted_by_ids_not_by_pieces(server: FakeServer):
    def answer(request, context):
        yield piece("def ", (5, 6), num_output=2)
        yield piece("", (), num_output=2)
        yield piece("main", (7, 8, 9), finish_reason="length", num_output=5)
        yield empty_final()

    server.answer = answer

    async def main():
        async with AsyncClient(server.url) as client:
            return await all_of(TritonTarget(client, "phixtral"))

    arrivals = asyncio.run(main())
    assert [arrival.tokens for arrival in arrivals] == [2, 0, 3]
    assert arrivals[-1] == Arrival(tokens=3, finish_reason="length", num_input_tokens=3, num_output_tokens=5)
    [sent] = server.requests
    values = dict(zip([tensor.name for tensor in sent.inputs], sent.raw_input_contents, strict=True))
    assert values["text_input"] == b"\x07\x00\x00\x00one two"
    assert values["max_tokens"] == (5).to_bytes(4, "little")
    assert values["seed"] == (9).to_bytes(8, "little")
    assert values["end_id"] == b"\xff\xff\xff\xff"
    assert values["top_k"] == (7).to_bytes(4, "little")


def test_a_request_that_is_ended_early_is_ended_on_the_server(server: FakeServer):
    def endless(request, context):
        server.started.set()
        at_the_end_of(context, server.cancelled.set)
        for count in range(1, 1000):
            if server.cancelled.wait(0.001):
                return
            yield piece("x", (7,), num_output=count)

    server.answer = endless
    made = works(max_tokens=Lengths(low=500, high=500), early_share=1.0)

    async def main():
        async with AsyncClient(server.url) as client:
            return await apply(TritonTarget(client, "phixtral"), Load(streams=1, requests=1), made)

    [record] = asyncio.run(main()).records
    assert record.ended_early
    assert record.num_tokens == made.work(0).early_after
    assert server.cancelled.wait(10)


@asynccontextmanager
async def http_server(answer, models=("m",)) -> AsyncIterator[tuple[str, list]]:
    """A server of OpenAI's API in this loop; `answer(request, body)` answers completions. Gives its URL and the bodies
    that it was sent."""
    bodies: list = []

    async def complete(request):
        bodies.append(await request.json())
        return await answer(request, bodies[-1])

    async def listed(request):
        return web.json_response({"object": "list", "data": [{"id": name} for name in models]})

    app = web.Application()
    app.add_routes([web.post("/v1/completions", complete), web.get("/v1/models", listed)])
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", bodies
    finally:
        await runner.cleanup()


def events(*found, done=True):
    """Answers with server-sent events, in pieces that do not end where events do."""

    async def answer(request, body):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        lines = [f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in found]
        data = "".join([": a comment\n\n", *lines, "data: [DONE]\n\n" if done else ""]).encode()
        for start in range(0, len(data), 11):
            await response.write(data[start : start + 11])
        return response

    return answer


def chunk(text, reason=None, **more):
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason, **more.pop("choice", {})}], **more}


USAGE = {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 5}}


def answers(answer, **fields) -> tuple[list[Arrival], OpenAITarget, list]:
    async def main():
        async with http_server(answer) as (url, bodies), opened(url, None, **fields) as target:
            return await all_of(target), target, bodies

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("chunks", "tokens", "counting"),
    [
        (
            [chunk("a", choice={"token_ids": [1, 2]}), chunk("", choice={"token_ids": [3]}),
             chunk("b", "length", choice={"token_ids": [4]})],
            [2, 1, 1],
            "the token ids of each chunk",
        ),
        (
            [chunk("a", timings={"predicted_n": 2}), chunk("b", timings={"predicted_n": 5}),
             chunk("", "length", timings={"predicted_n": 5})],
            [2, 3, 0],
            "the number of predicted tokens that each chunk states",
        ),
        ([chunk("a"), chunk(""), chunk("b", "length")], [1, 0, 1], "one token for each chunk with text"),
    ],
)  # fmt: skip
def test_tokens_of_chunks_are_counted_by_what_the_server_adds(chunks, tokens, counting):
    arrivals, target, bodies = answers(events(*chunks, USAGE), extra={"cache_prompt": False})
    assert [arrival.tokens for arrival in arrivals] == [*tokens, 0]
    assert target.counting == counting
    assert [arrival.finish_reason for arrival in arrivals][-2:] == ["length", None]
    assert (arrivals[-1].num_input_tokens, arrivals[-1].num_output_tokens) == (2, 5)
    assert bodies == [
        {
            "model": "m", "prompt": "one two", "max_tokens": 5, "stream": True,
            "stream_options": {"include_usage": True}, "seed": 9, "cache_prompt": False, "temperature": 0.5, "top_k": 7,
            "ignore_eos": True,
        }
    ]  # fmt: skip


def refusing(status):
    async def answer(request, body):
        return web.Response(status=status, text='{"error": "no\nroom"}')

    return answer


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, RequestRejected), (401, AccessDenied), (404, ModelNotFound), (429, ServerOverloaded), (500, ServerFailed),
     (503, ServerOverloaded)],
)  # fmt: skip
def test_a_status_becomes_the_error_of_its_meaning(status, kind):
    with pytest.raises(
        kind, match=f'generating with m at http://.*: HTTP status {status}: {{"error": "no room"}}'
    ) as e:
        answers(refusing(status))
    assert e.value.status == str(status)


@pytest.mark.parametrize(
    ("found", "kind", "message"),
    [
        ([chunk("a")], StreamBroken, "the stream ended after 1 tokens without"),
        (["{"], StreamBroken, "an event cannot be read"),
        ([{"choices": [7]}], StreamBroken, "an event cannot be read"),
        ([{"choices": [{"text": "a"}], "timings": {"predicted_n": "x"}}], StreamBroken, "an event cannot be read"),
        ([[]], StreamBroken, "an event cannot be read"),
        ([{"error": {"message": "out of memory"}}], ServerFailed, "out of memory"),
    ],
)
def test_an_answer_that_cannot_be_read_is_an_error(found, kind, message):
    with pytest.raises(kind, match=message):
        answers(events(*found, done=False))


def test_a_connection_that_breaks_in_the_middle_is_lost():
    async def answer(request, body):
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(f"data: {json.dumps(chunk('a'))}\n\n".encode())
        request.transport.abort()
        return response

    with pytest.raises(ConnectionLost):
        answers(answer)


def test_a_silent_server_is_given_up_after_the_timeout():
    async def answer(request, body):
        await asyncio.sleep(600)

    with pytest.raises(DeadlineExceeded, match="no complete answer in time"):
        answers(answer, timeout_s=0.05)


def test_a_client_that_leaves_closes_the_connection():
    async def main():
        left = asyncio.Event()

        async def answer(request, body):
            response = web.StreamResponse()
            await response.prepare(request)
            try:
                while True:
                    await response.write(f"data: {json.dumps(chunk('a'))}\n\n".encode())
                    await asyncio.sleep(0.001)
            finally:
                left.set()

        made = works(max_tokens=Lengths(low=50, high=50), early_share=1.0)
        async with http_server(answer) as (url, _), opened(url, "m") as target:
            run = await apply(target, Load(streams=1, requests=1), made)
            await asyncio.wait_for(left.wait(), 10)
        assert run.records[0].ended_early

    asyncio.run(main())


def test_addresses_and_models_that_are_not_there():
    async def main(url, models=("m",)):
        async with http_server(events(), models) as (right, _), opened(url or right, None) as target:
            await all_of(target)

    with pytest.raises(AddressInvalid, match="expected http://HOST:PORT"):
        asyncio.run(main("127.0.0.1:80"))
    with pytest.raises(ConnectionFailed, match="listing the models of http://127.0.0.1:1"):
        asyncio.run(main("http://127.0.0.1:1"))
    with pytest.raises(ModelNotFound, match="give --model. The server has: a, b"):
        asyncio.run(main(None, models=("a", "b")))
