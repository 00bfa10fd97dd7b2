"""The fake server running in this process, and a maker of requests for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from fake_triton import FakeServer
from tritonclient.grpc import service_pb2_grpc

from clients.generation import AsyncClient, Client
from clients.messages import GenerationRequest


@pytest.fixture
def server() -> Iterator[FakeServer]:
    servicer = FakeServer()
    grpc_server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, grpc_server)
    servicer.url = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
    grpc_server.start()
    yield servicer
    servicer.cancelled.set()
    servicer.stopped.set()
    grpc_server.stop(grace=None).wait()


@pytest.fixture
def calls_of() -> Callable[..., list[Any]]:
    """Keeps the calls of a client's streams from now on. grpc cancels a call that nobody refers to any more, and so
    would cover for a client that does not."""

    def keep(client: Client | AsyncClient) -> list[Any]:
        calls, begin = [], client._stub.ModelStreamInfer

        def begin_and_keep(*arguments, **named):
            calls.append(begin(*arguments, **named))
            return calls[-1]

        client._stub.ModelStreamInfer = begin_and_keep
        return calls

    return keep


@pytest.fixture
def request_of() -> Callable[..., GenerationRequest]:
    """Makes a request for the fake server's model; keywords add or replace fields."""

    def make(**fields) -> GenerationRequest:
        return GenerationRequest(**{"model": "phixtral", "prompt": "def main(", "max_tokens": 8, **fields})

    return make
