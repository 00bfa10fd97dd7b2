"""The sync client against a real gRPC server in this process: order, endings, cancellation, deadlines, statuses."""

from __future__ import annotations

import threading

import grpc
import pytest
from fake_triton import FakeServer, deadlines, empty_final, piece, two_pieces
from tritonclient.grpc import service_pb2 as pb

from clients import errors
from clients.generation import Client
from export.errors import MissingPackageError

# Long enough for a busy machine; a test that waits so long has failed.
PATIENCE_S = 30


@pytest.fixture
def client(server: FakeServer):
    with Client(server.url) as client:
        yield client


def test_pieces_come_in_the_order_in_which_they_were_sent(client, request_of):
    pieces = list(client.stream(request_of()))
    assert [(found.text, found.token_ids, found.finish_reason) for found in pieces] == [
        ("def ", (5, 6), None),
        ("main", (7,), "length"),
    ]


def test_a_piece_is_there_before_the_next_one_is_made(server, client, request_of):
    next_wanted = threading.Event()

    def answer(request, context):
        yield piece("first", (1,))
        next_wanted.wait(PATIENCE_S)
        yield piece("second", (2,))
        yield empty_final()

    server.answer = answer
    pieces = client.stream(request_of())
    assert next(pieces).text == "first"
    next_wanted.set()
    assert [found.text for found in pieces] == ["second"]


def test_text_of_many_bytes_a_character_arrives_whole(server, client, request_of):
    texts = ["naïve ", "日本", "🙂", "\n"]
    server.answer = lambda request, context: iter([*(piece(text, (1,)) for text in texts), empty_final()])
    assert [found.text for found in client.stream(request_of(prompt="日本"))] == texts
    assert server.requests[0].raw_input_contents[0] == b"\x06\x00\x00\x00" + "日本".encode()


def test_a_stream_asks_for_pieces_and_a_whole_answer_does_not(server, client, request_of):
    list(client.stream(request_of()))
    whole = client.generate(request_of())
    sent = [dict(zip((t.name for t in r.inputs), r.raw_input_contents, strict=True)) for r in server.requests]
    assert [tensors["stream"] for tensors in sent] == [b"\x01", b"\x00"]
    assert (whole.text, whole.token_ids, whole.finish_reason) == ("def main", (5, 6, 7), "length")
    assert (whole.num_input_tokens, whole.num_output_tokens) == (3, 3)


def two_answers(request, context):
    yield piece("ab", (5,), finish_reason="stop", sequence_index=1)
    yield piece("x", (6,), finish_reason="length", sequence_index=0)
    yield empty_final()


def test_several_answers_are_told_apart_and_are_never_taken_for_one(server, client, request_of):
    server.answer = two_answers
    several = request_of(num_return_sequences=2)
    assert [(one.text, one.finish_reason) for one in client.generate_all(several)] == [("x", "length"), ("ab", "stop")]
    assert [found.sequence_index for found in client.stream(several)] == [1, 0]
    with pytest.raises(errors.RequestRejected, match="num_return_sequences is 2, and generate gives one answer"):
        client.generate(several)
    assert len(server.requests) == 2


@pytest.mark.parametrize(("version", "asked"), [("2.68.0", "true"), ("2.51.0", None)])
def test_errors_as_statuses_are_asked_only_of_a_server_that_survives_it(server, client, request_of, version, asked):
    server.version = version
    client.generate(request_of())
    assert server.metadata.get("triton_grpc_error") == asked


def test_nothing_is_sent_until_the_first_piece_is_asked_for(server, client, request_of):
    pieces = client.stream(request_of())
    assert server.requests == []
    pieces.close()


def test_a_value_that_no_tensor_holds_is_refused_when_the_stream_is_made(client, request_of):
    with pytest.raises(errors.RequestRejected, match="out of range"):
        client.stream(request_of(max_tokens=2**40))


def test_closing_the_generator_cancels_the_request_on_the_server(server, client, request_of, calls_of):
    server.answer = server.endless
    calls, pieces = calls_of(client), client.stream(request_of())
    assert next(pieces).text == "def "
    pieces.close()
    assert [call.cancelled() for call in calls] == [True]
    assert server.cancelled.wait(PATIENCE_S)


def test_an_exception_in_the_reader_cancels_the_request_on_the_server(server, client, request_of, calls_of):
    server.answer = server.endless
    calls = calls_of(client)

    def read():
        for _ in client.stream(request_of()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read()
    assert [call.cancelled() for call in calls] == [True]
    assert server.cancelled.wait(PATIENCE_S)


def test_closing_the_client_ends_a_stream_that_another_thread_reads(server, request_of):
    server.answer = server.endless
    client, seen = Client(server.url), []

    def read():
        try:
            for found in client.stream(request_of()):
                seen.append(found.text)
                started.set()
        except errors.RequestCancelled as error:
            seen.append(error)

    started, reader = threading.Event(), threading.Thread(target=read)
    reader.start()
    assert started.wait(PATIENCE_S)
    client.close()
    reader.join(PATIENCE_S)
    assert server.cancelled.wait(PATIENCE_S)
    assert [type(item) for item in seen] == [str, errors.RequestCancelled]


def test_the_deadline_ends_the_stream_and_the_servers_work(server, client, request_of):
    server.answer = server.endless
    for timeout_s in deadlines(server):
        with pytest.raises(errors.DeadlineExceeded, match=r"generating with phixtral at .*: DEADLINE_EXCEEDED"):
            list(client.stream(request_of(timeout_s=timeout_s)))
    assert server.cancelled.wait(PATIENCE_S)


FAILURES = [status for status in grpc.StatusCode if status.name not in ("OK", "UNAVAILABLE")]


@pytest.mark.parametrize("status", FAILURES)
def test_a_status_after_some_pieces_keeps_them_and_raises_our_error(server, client, request_of, status):
    server.answer = server.failing(status, "the server's words")
    pieces = client.stream(request_of())
    assert next(pieces).text == "def "
    with pytest.raises(
        errors.BY_STATUS[status.name], match=f"{server.url}: {status.name}: the server's words"
    ) as found:
        next(pieces)
    assert isinstance(found.value.__cause__, grpc.RpcError)


def test_a_stream_that_ends_early_is_broken_not_finished(server, client, request_of):
    server.answer = lambda request, context: iter([piece("def ", (5, 6))])
    with pytest.raises(errors.StreamBroken, match="the stream ended after 1 pieces without a final one"):
        client.generate(request_of())


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("no pages left", errors.ServerFailed),
        ("INVALID_ARGUMENT: top_p: found 7", errors.RequestRejected),
        ("UNAVAILABLE: Exceeds maximum queue size", errors.ServerOverloaded),
    ],
)
def test_an_error_text_among_the_responses_is_raised_by_its_kind(server, client, request_of, text, kind):
    server.answer = lambda request, context: iter([pb.ModelStreamInferResponse(error_message=text)])
    with pytest.raises(kind, match=text):
        client.generate(request_of())


def test_a_status_that_the_servers_text_repeats_is_said_once(server, client, request_of):
    server.answer = server.failing(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT: top_p: found 7")
    with pytest.raises(errors.RequestRejected, match=f"{server.url}: INVALID_ARGUMENT: top_p"):
        client.generate(request_of())


@pytest.mark.parametrize("as_text", [True, False])
def test_an_unknown_model_is_met_with_the_names_there_are(server, client, request_of, as_text):
    message = "Request for unknown model: 'phixtrl' is not found"
    server.answer = server.failing(grpc.StatusCode.NOT_FOUND, message)
    if as_text:
        server.answer = lambda request, context: iter([pb.ModelStreamInferResponse(error_message=message)])
    with pytest.raises(errors.ModelNotFound, match=r"did you mean phixtral\? The server has: phixtral"):
        client.generate(request_of(model="phixtrl"))


def test_leaving_at_the_last_piece_cancels_nothing(server, client, request_of):
    ended = threading.Event()

    def answer(request, context):
        yield from two_pieces(request, context)
        ended.set()

    server.answer = answer
    pieces = client.stream(request_of())
    assert [found.finish_reason for found in (next(pieces), next(pieces))] == [None, "length"]
    pieces.close()
    assert ended.is_set()


def test_a_full_queue_is_told_from_a_server_that_is_not_there(server, client, request_of):
    server.answer = server.failing(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
    with pytest.raises(errors.ServerOverloaded, match="Exceeds maximum queue size"):
        client.generate(request_of())


def test_a_model_that_failed_to_load_is_told_with_its_reason(server, client, request_of):
    server.states = (("phixtral", "UNAVAILABLE", "engine.json is missing"),)
    server.answer = server.failing(grpc.StatusCode.UNAVAILABLE, "no available versions")
    with pytest.raises(errors.ModelNotReady, match=r"engine.json is missing"):
        client.generate(request_of())


def test_a_server_that_is_not_there_is_a_failed_connection_and_not_ready(request_of):
    with Client("127.0.0.1:1") as client:
        assert not client.server_ready()
        with pytest.raises(errors.ConnectionFailed, match=r"127.0.0.1:1: UNAVAILABLE"):
            client.generate(request_of())


def test_an_address_with_a_scheme_is_refused():
    with pytest.raises(
        errors.AddressInvalid, match="http://x:8000: found a scheme; give HOST:PORT of the server's gRPC"
    ):
        Client("http://x:8000")


@pytest.mark.parametrize("url", ["", "localhost", ":8001", "::1:8001", "x:0", "x:65536", "a b:1", "\udc80:1", None])
def test_an_address_without_host_and_port_is_refused(url):
    with pytest.raises(errors.AddressInvalid, match=r"expected HOST:PORT"):
        Client(url)


@pytest.mark.parametrize("url", ["localhost:8001", "[::1]:8001", "[fe80::1%eth0]:8001", "a-b.example.org:65535"])
def test_an_address_of_host_and_port_is_taken(url, monkeypatch):
    opened, channel = [], grpc.insecure_channel

    def open_channel(target, **settings):
        opened.append(target)
        return channel(target, **settings)

    monkeypatch.setattr(grpc, "insecure_channel", open_channel)
    Client(url).close()
    assert opened == [url]


def test_a_timeout_that_grpcs_clock_cannot_hold_waits_long_instead_of_failing_at_once(client, request_of):
    assert client.generate(request_of(timeout_s=1e10)).text == "def main"


def test_a_closed_client_says_so(server, request_of):
    client = Client(server.url)
    client.generate(request_of())
    client.close()
    for use in (client.models, client.server_ready, lambda: client.generate(request_of())):
        with pytest.raises(errors.RequestRejected, match=f"{server.url}.*: this client is closed; make a new one"):
            use()


def test_a_name_that_utf8_cannot_hold_is_refused(client):
    with pytest.raises(errors.RequestRejected, match="its name is .*, expected a text that UTF-8 can hold"):
        client.model_ready("\udc80")


def test_the_states_of_server_and_models_are_told(server, client):
    server.states = (("phixtral", "READY", ""), ("mixtral", "UNAVAILABLE", "why"))
    assert client.server_ready()
    assert (client.model_ready("phixtral"), client.model_ready("mixtral")) == (True, False)
    assert [(model.name, model.ready, model.reason) for model in client.models()] == [
        ("mixtral", False, "why"),
        ("phixtral", True, ""),
    ]


def test_several_threads_may_share_a_client(client, request_of):
    texts = []
    threads = [threading.Thread(target=lambda: texts.append(client.generate(request_of()).text)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert texts == ["def main"] * 4


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "grpc", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'moeship\[client\]'"):
        Client("127.0.0.1:1")
