"""The asyncio client against the same server: order, endings, cancelled tasks, deadlines, statuses."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import grpc
import pytest
from fake_triton import FakeServer, deadlines, empty_final, piece

from clients import errors
from clients.generation import AsyncClient
from clients.streams import gathered

# Long enough for a busy machine; a test that waits so long has failed.
PATIENCE_S = 30


@pytest.fixture
def run_with_client(server: FakeServer):
    """Runs `use(client)` in a loop of its own, with a client for the fake server."""

    def run(use, url: str | None = None):
        async def main():
            async with AsyncClient(url or server.url) as client:
                return await use(client)

        return asyncio.run(main())

    return run


async def read_all(client: AsyncClient, request):
    return [found async for found in client.stream(request)]


def test_pieces_come_in_order_and_end_with_the_reason(run_with_client, request_of):
    pieces = run_with_client(lambda client: read_all(client, request_of()))
    assert [(found.text, found.token_ids, found.finish_reason) for found in pieces] == [
        ("def ", (5, 6), None),
        ("main", (7,), "length"),
    ]


def test_pieces_that_wait_come_together(server, run_with_client, request_of):
    def fast(request, context):
        for number in range(1, 33):
            yield piece(str(number), (5,), num_output=number)
        yield empty_final()

    async def slow_reader(client):
        found = []
        async for pieces in client.stream_waiting(request_of()):
            found.append([one.text for one in pieces])
            await asyncio.sleep(0.05)
        return found

    server.answer = fast
    found = run_with_client(slow_reader)
    assert [text for texts in found for text in texts] == [str(number) for number in range(1, 33)]
    assert len(found) < 32


def test_what_came_before_an_error_is_given_out_first():
    def parts():
        yield (1, 2)
        yield (3,)
        raise ValueError

    found = gathered(parts())
    assert next(found) == [1, 2, 3]
    with pytest.raises(ValueError):
        next(found)


def test_several_answers_are_told_apart_and_are_never_taken_for_one(server, run_with_client, request_of):
    server.answer = lambda request, context: iter(
        [
            piece("ab", (5,), finish_reason="stop", sequence_index=1),
            piece("x", (6,), finish_reason="stop"),
            empty_final(),
        ]
    )
    several = request_of(num_return_sequences=2)
    assert [one.text for one in run_with_client(lambda client: client.generate_all(several))] == ["x", "ab"]
    with pytest.raises(errors.RequestRejected, match="call generate_all"):
        run_with_client(lambda client: client.generate(several))


def test_a_whole_answer_is_the_pieces_together(server, run_with_client, request_of):
    whole = run_with_client(lambda client: client.generate(request_of()))
    assert (whole.text, whole.token_ids, whole.finish_reason) == ("def main", (5, 6, 7), "length")
    assert server.metadata["triton_grpc_error"] == "true"


def test_cancelling_the_task_cancels_the_request_on_the_server(server, run_with_client, request_of):
    server.answer = server.endless

    async def use(client):
        started = asyncio.Event()

        async def read():
            async for _ in client.stream(request_of()):
                started.set()

        task = asyncio.create_task(read())
        await asyncio.wait_for(started.wait(), PATIENCE_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await asyncio.to_thread(server.cancelled.wait, PATIENCE_S)

    assert run_with_client(use)


def test_closing_the_generator_cancels_the_request_on_the_server(server, run_with_client, request_of):
    server.answer = server.endless

    async def use(client):
        async with aclosing(client.stream(request_of())) as pieces:
            assert (await anext(pieces)).text == "def "
        return await asyncio.to_thread(server.cancelled.wait, PATIENCE_S)

    assert run_with_client(use)


def test_the_deadline_ends_the_stream_and_the_servers_work(server, run_with_client, request_of):
    server.answer = server.endless
    for timeout_s in deadlines(server):
        request = request_of(timeout_s=timeout_s)
        with pytest.raises(errors.DeadlineExceeded, match=r"phixtral at .*: DEADLINE_EXCEEDED"):
            run_with_client(lambda client, request=request: read_all(client, request))
    assert server.cancelled.wait(PATIENCE_S)


@pytest.mark.parametrize("status", [status for status in grpc.StatusCode if status.name not in ("OK", "UNAVAILABLE")])
def test_every_status_raises_our_error(server, run_with_client, request_of, status):
    server.answer = server.failing(status, "the server's words")
    with pytest.raises(errors.BY_STATUS[status.name], match=f"{server.url}: {status.name}: the server's words"):
        run_with_client(lambda client: client.generate(request_of()))


def test_a_stream_that_ends_early_is_broken_not_finished(server, run_with_client, request_of):
    server.answer = lambda request, context: iter([piece("def ", (5, 6))])
    with pytest.raises(errors.StreamBroken, match="without a final one"):
        run_with_client(lambda client: client.generate(request_of()))


def test_an_unknown_model_is_met_with_the_names_there_are(server, run_with_client, request_of):
    server.answer = server.failing(grpc.StatusCode.NOT_FOUND, "unknown model")
    with pytest.raises(errors.ModelNotFound, match=r"did you mean phixtral\?"):
        run_with_client(lambda client: client.generate(request_of(model="phixtrl")))


def test_a_full_queue_is_told_from_a_server_that_is_not_there(server, run_with_client, request_of):
    server.answer = server.failing(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
    with pytest.raises(errors.ServerOverloaded, match="Exceeds maximum queue size"):
        run_with_client(lambda client: client.generate(request_of()))
    with pytest.raises(errors.ConnectionFailed, match=r"127.0.0.1:1: UNAVAILABLE"):
        run_with_client(lambda client: client.generate(request_of()), url="127.0.0.1:1")


def test_the_states_of_server_and_models_are_told(run_with_client):
    async def use(client):
        return await client.server_ready(), await client.model_ready("phixtral"), await client.models()

    server_ready, model_ready, models = run_with_client(use)
    assert server_ready
    assert model_ready
    assert [model.name for model in models] == ["phixtral"]
    assert not run_with_client(lambda client: client.server_ready(), url="127.0.0.1:1")


def test_a_timeout_that_grpcs_clock_cannot_hold_waits_long_instead_of_failing_at_once(run_with_client, request_of):
    assert run_with_client(lambda client: client.generate(request_of(timeout_s=1e10))).text == "def main"


def test_a_closed_client_says_so(server, run_with_client, request_of):
    async def use(client):
        await client.generate(request_of())
        await client.close()
        for ask in (client.models, client.server_ready, lambda: client.generate(request_of())):
            with pytest.raises(errors.RequestRejected, match=f"{server.url}.*: this client is closed; make a new one"):
                await ask()

    run_with_client(use)


def test_many_streams_share_a_client(run_with_client, request_of):
    async def use(client):
        return await asyncio.gather(*(client.generate(request_of()) for _ in range(4)))

    assert [whole.text for whole in run_with_client(use)] == ["def main"] * 4
