"""What the load generator reads from servers: tokens, ends and errors, over gRPC and over server-sent events."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from bench_standin import works
from fake_triton import FakeServer, at_the_end_of, empty_final, piece

from clients.bench.generator import apply
from clients.bench.load import Lengths, Load, Sampling, Work
from clients.bench.records import Arrival
from clients.bench.targets.endpoints import Endpoints, common_model, opened_endpoints
from clients.bench.targets.openai import GUESSED, OpenAITarget, opened
from clients.bench.targets.triton import TritonTarget
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
from export.errors import ConfigError

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

    async def indexed(request):
        states = [{"name": name, "version": "1", "state": "READY"} for name in (*models, "preprocessing")]
        return web.json_response([*states, {"name": "broken", "state": "UNAVAILABLE", "reason": "x"}])

    app = web.Application()
    paths = ("/v1/completions", "/v1/chat/completions", "/v2/models/m/generate_stream")
    app.add_routes([*(web.post(path, complete) for path in paths), web.get("/v1/models", listed)])
    app.add_routes([web.post("/v2/repository/index", indexed)])
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
        ([chunk("a"), chunk(""), chunk("b", "length", error=None)], [1, 0, 1], GUESSED),
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


@pytest.mark.parametrize("kind", ["completions", "generate"])
def test_a_server_that_does_not_list_its_models_in_time_is_said(monkeypatch, kind):
    monkeypatch.setattr("clients.bench.targets.http.LISTING_S", 0.05)

    async def main(url):
        async with opened_endpoints(Endpoints(urls=(url,), kind=kind)):
            pass

    message = "listing the models of .*no complete answer in time; check that the"
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(DeadlineExceeded, match=message):
        asyncio.run(main(f"http://127.0.0.1:{silent.getsockname()[1]}"))


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


def opened_answers(answer, kind, work=WORK, **fields):
    """All arrivals from an endpoint of a kind, its target, and the bodies that the server got."""

    async def main():
        async with (
            http_server(answer) as (url, bodies),
            opened_endpoints(Endpoints(urls=(url,), kind=kind, **fields)) as (target, model),
        ):
            assert model == "m"
            return await all_of(target, work), target, bodies

    return asyncio.run(main())


def test_a_chat_sends_a_message_and_reads_its_deltas():
    def delta(text, **more):
        return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None, **more}]}

    found = [delta("", **{"delta": {"role": "assistant"}}), delta("a"), delta("b", finish_reason="stop"), USAGE]
    arrivals, target, [body] = opened_answers(events(*found), "chat")
    assert [arrival.tokens for arrival in arrivals] == [0, 1, 1, 0]
    assert [arrival.finish_reason for arrival in arrivals] == [None, None, "stop", None]
    assert body["messages"] == [{"role": "user", "content": "one two"}]
    assert "prompt" not in body
    assert target.counting == GUESSED


@pytest.mark.parametrize(
    "field",
    [{"reasoning": "so"}, {"reasoning_content": "so"}, {"refusal": "no"}, {"tool_calls": [{"index": 0}]}],
)
def test_whatever_the_model_writes_in_a_chat_is_its_first_token(field):
    """vLLM names the field of thoughts `reasoning` since 0.11 (docs.vllm.ai, Reasoning Outputs)."""
    deltas = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in (field, {"content": "a"})]
    arrivals, _, _ = opened_answers(events(*deltas, USAGE), "chat")
    assert [arrival.tokens for arrival in arrivals] == [1, 1, 0]


def test_the_generate_extension_sends_tensors_by_name_and_reads_its_events():
    """The events are those of a Triton 2.51: a tensor of one value is written as that value."""
    found = [
        {"model_name": "m", "text_output": "a", "token_ids": [5, 6], "finish_reason": "", "num_input_tokens": 2,
         "num_output_tokens": 2},
        {"model_name": "m", "text_output": "b", "token_ids": 7, "finish_reason": "length", "num_input_tokens": 2,
         "num_output_tokens": 3},
    ]  # fmt: skip
    arrivals, _, [body] = opened_answers(events(*found, done=False), "generate")
    assert [arrival.tokens for arrival in arrivals] == [2, 1]
    assert arrivals[-1] == Arrival(tokens=1, finish_reason="length", num_input_tokens=2, num_output_tokens=3)
    assert body == {
        "text_input": "one two", "max_tokens": 5, "stream": True, "temperature": 0.5, "top_k": 7, "seed": 9,
        "end_id": -1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "kind", "message"),
    [
        ([{"token_ids": [1]}], StreamBroken, "ended without a finish reason"),
        (["["], StreamBroken, "an event cannot be read"),
        ([{"error": "out of memory"}], ServerFailed, "out of memory"),
    ],
)
def test_an_answer_of_the_generate_extension_that_cannot_be_read_is_an_error(found, kind, message):
    with pytest.raises(kind, match=message):
        opened_answers(events(*found, done=False), "generate")


def test_a_key_goes_with_every_request():
    keys = []

    async def answer(request, body):
        keys.append(request.headers.get("Authorization"))
        return await events(chunk("a", "stop"))(request, body)

    opened_answers(answer, "completions", api_key="secret")
    assert keys == ["Bearer secret"]


@pytest.mark.parametrize(
    ("listed", "asked", "found"),
    [
        ({"a": ["m"], "b": ["m"]}, None, "m"),
        ({"a": ["m", "n"], "b": ["m"]}, "m", "m"),
        ({"a": ["m", "n"], "b": ["m"]}, None, "do not list the same models: a has m, n; b has m; give --model"),
        ({"a": ["m"], "b": ["n"]}, None, "no model in common: a has m; b has n"),
        ({"a": ["m"], "b": ["n"]}, "m", "b has n; expected m at every address"),
        ({"a": ["m", "n"]}, None, "a has m, n; give --model"),
        ({"a": []}, None, "a has none; give --model"),
    ],
)
def test_the_model_of_several_endpoints(listed, asked, found):
    if len(found) == 1:
        assert common_model(listed, asked) == found
        return
    with pytest.raises(ConfigError, match=found):
        common_model(listed, asked)


def test_the_servers_number_of_tokens_is_shared_among_chunks_that_name_none():
    async def main():
        answer = events(chunk("a"), chunk("b"), chunk("c", "length"), {**USAGE, "usage": {"completion_tokens": 8}})
        async with http_server(answer) as (url, _), opened(url, None) as target:
            return await apply(target, Load(streams=1, requests=1), works())

    [record] = asyncio.run(main()).records
    assert [tokens for _, tokens in record.arrivals] == [2, 3, 3]
    assert record.num_tokens == record.num_output_tokens == 8
