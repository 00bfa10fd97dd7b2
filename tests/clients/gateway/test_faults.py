"""Servers that fail, refuse and come back behind a gateway, and clients that leave or do not read."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from concurrent import futures
from urllib.parse import urlsplit

import grpc
import openai
import pytest
from fake_triton import FakeServer, empty_final, piece, two_pieces
from serve_command import wait_until
from tritonclient.grpc import service_pb2_grpc

from clients.gateway.settings import Limits
from clients.streams import MOST_UNREAD

STREAM = {"model": "phixtral", "prompt": "a", "stream": True}


@contextlib.contextmanager
def another_server(**fields):
    """A second stand-in for Triton."""
    servicer = FakeServer(**fields)
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    servicer.url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(grace=None).wait()


def test_a_server_that_is_silent_before_it_is_sent_a_request_is_away(gateway_of, server, monkeypatch):
    """A frozen process keeps its connections open, and answers nothing."""
    monkeypatch.setattr("clients.generation.STATE_TIMEOUT_S", 2.0)
    server.silent_until = threading.Event()
    with another_server() as other:
        answer = gateway_of(tritons=(server.url, other.url)).client().completions.create(model="phixtral", prompt="a")
        assert answer.choices[0].text == "def main"
        with pytest.raises(openai.InternalServerError) as caught:
            gateway_of(tritons=(server.url,)).client().completions.create(model="phixtral", prompt="a")
    server.silent_until.set()
    assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
    assert not server.requests


def refusing(text: str):
    """Refuses a request as Triton before 2.68 sends it: as a text among the responses."""

    def answer(request, context):
        message = empty_final()
        message.ClearField("infer_response")
        message.error_message = text
        yield message

    return answer


FULL = (
    "UNAVAILABLE: answering the request: 64 requests wait on this server; send it again in about 7 s, or to another "
    "server"
)


@pytest.mark.parametrize("half_closes", [True, False])
@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_goes_ends_its_request_by_asking_the_server(gateway, server, is_stream, half_closes):
    """So does one that closes its sending side alone, which looks alike from here."""
    server.version, server.answer = "2.51.0", server.stoppable
    body = json.dumps({**STREAM, "stream": is_stream}).encode()
    with connected(gateway, "/v1/completions", body) as client:
        assert wait_until(lambda: server.started.is_set())
        if is_stream:
            assert b"def " in client.recv(1 << 16)
        if half_closes:
            client.shutdown(socket.SHUT_WR)
            assert wait_until(lambda: server.stops)
    assert wait_until(lambda: server.stops)
    assert server.stops[0] == server.requests[0].id
    assert wait_until(lambda: gateway.state.pool.tritons[0].in_flight == 0)
    assert not server.cancelled.is_set()


@contextlib.contextmanager
def connected(gateway, path: str, body: bytes):
    """A socket that has sent a request and reads nothing by itself."""
    address = urlsplit(gateway.url)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((address.hostname, address.port))
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        client.sendall(head.encode() + body)
        yield client


def test_of_an_answer_that_nobody_reads_little_is_held_and_its_end_is_not_awaited(gateway_of, server):
    sent = []

    def endless(request, context):
        over = threading.Event()
        context.add_callback(over.set)
        while not over.is_set():
            sent.append(len(sent))
            yield piece("x" * 4000, (5,), num_output=len(sent))

    server.answer = endless
    gateway = gateway_of(limits=Limits(unread_s=4))
    with connected(gateway, "/v1/completions", json.dumps(STREAM).encode()):
        assert wait_until(lambda: len(sent) > MOST_UNREAD and has_settled(sent))
        assert gateway.state.pool.tritons[0].in_flight == 1
        assert wait_until(lambda: gateway.state.pool.tritons[0].in_flight == 0)


def has_settled(items) -> bool:
    """Whether nothing comes for half a second: whatever lies between holds all that it can."""
    before = len(items)
    time.sleep(0.5)
    return len(items) == before


@pytest.mark.parametrize(
    ("problem", "param", "code"),
    [
        ("text_input: found a prompt of 600 tokens, expected at most 511", None, "context_length_exceeded"),
        ("input_ids: found a prompt of 600 tokens, expected at most 511", None, "context_length_exceeded"),
        ("text_input: found bytes that are not UTF-8", None, None),
        ("logit_bias_ids: found 9000, expected token ids below 2000", "logit_bias", None),
        ("stop_words: found 40000 bytes, expected at most 32768", "stop", None),
        ("top_k: found 3, expected 2", "top_k", None),
    ],
)
def test_what_the_server_refuses_is_told_by_the_clients_own_field(gateway, server, problem, param, code):
    """Clients look for the code of a prompt that is too long, and shorten it."""
    server.version = "2.51.0"
    for told in (f"reading the request:\n  - {problem}", f"reading the request: {problem}"):
        server.answer = refusing(f"INVALID_ARGUMENT: {told}")
        with pytest.raises(openai.BadRequestError) as refused:
            gateway.client().completions.create(model="phixtral", prompt="a")
        assert (refused.value.param, refused.value.code) == (param, code)
        begins = "this model's maximum context length is 512 tokens: " in str(refused.value)
        assert begins == (code is not None)  # the words by which LiteLLM and others know it


def test_a_refusal_for_load_comes_with_the_servers_own_time(gateway, server):
    server.version, server.answer = "2.51.0", refusing(FULL)
    with pytest.raises(openai.RateLimitError, match="64 requests wait") as refused:
        gateway.client().completions.create(model="phixtral", prompt="a")
    assert refused.value.response.headers["retry-after"] == "7"
    assert server.url not in str(refused.value)


def test_before_the_first_token_a_request_goes_to_another_server(gateway_of, server):
    server.version, server.answer = "2.51.0", refusing(FULL)
    with another_server() as second:
        gateway = gateway_of(tritons=(server.url, second.url))
        for is_stream in (True, False):
            answer = gateway.client().completions.create(model="phixtral", prompt="a", stream=is_stream)
            text = "".join(chunk.choices[0].text for chunk in answer) if is_stream else answer.choices[0].text
            assert text == "def main"
    assert (len(second.requests), gateway.state.metrics.retries) == (2, len(server.requests))


def test_after_the_first_token_a_stream_ends_with_an_error_and_nothing_is_asked_again(gateway_of, server):
    server.answer = server.failing(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    with another_server() as second:
        second.answer = server.answer
        gateway = gateway_of(tritons=(server.url, second.url))
        stream = gateway.client().completions.create(**STREAM)
        assert next(iter(stream)).choices[0].text == "def "
        with pytest.raises(openai.APIError, match="ended before the answer did"):
            list(stream)
    assert len(server.requests) + len(second.requests) == 1


def test_the_server_with_the_fewest_requests_is_asked(gateway_of, server):
    server.answer = server.endless
    with another_server() as second:
        second.answer = two_pieces
        gateway = gateway_of(tritons=(server.url, second.url))
        with gateway.client().completions.create(**STREAM) as held:
            assert next(iter(held)).choices[0].text == "def "
            for _ in range(3):
                gateway.client().completions.create(model="phixtral", prompt="a")
        assert (len(server.requests), len(second.requests)) in ((1, 3),)


def test_a_server_that_is_away_is_said_to_be_and_asked_again_when_it_is_back(gateway_of):
    with another_server() as first:
        url = first.url
        gateway = gateway_of(tritons=(url,))
        assert gateway.client().completions.create(model="phixtral", prompt="a").choices
    with pytest.raises(openai.InternalServerError, match="cannot be reached") as refused:
        gateway.client().completions.create(model="phixtral", prompt="a")
    assert (refused.value.status_code, refused.value.response.headers["retry-after"]) == (503, "2")
    servicer = FakeServer()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    server.add_insecure_port(url)
    server.start()
    assert wait_until(lambda: gateway.state.pool.tritons[0].is_up)
    assert gateway.client().completions.create(model="phixtral", prompt="a").choices
    server.stop(grace=None).wait()


def test_an_answer_that_the_server_cancelled_is_no_whole_answer(gateway, server):
    def cancelled(request, context):
        yield piece("def ", (5,), num_output=1)
        yield piece("", (), finish_reason="cancelled", num_output=1)
        yield empty_final()

    server.answer = cancelled
    with pytest.raises(openai.InternalServerError, match="ended this answer before its end"):
        gateway.client().completions.create(model="phixtral", prompt="a")
    with pytest.raises(openai.APIError, match="ended this answer before its end"):
        list(gateway.client().completions.create(**STREAM))


def test_an_answer_that_takes_too_long_is_ended(gateway_of, server):
    server.answer = server.endless
    with pytest.raises(openai.InternalServerError) as late:
        gateway_of(limits=Limits(answer_s=0.5)).client().completions.create(model="phixtral", prompt="a")
    assert late.value.status_code == 504
