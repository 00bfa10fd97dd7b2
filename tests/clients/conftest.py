"""The fake server running in this process, and a maker of requests for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_triton import FakeServer, fake_server

from clients.generation import AsyncClient, Client
from clients.messages import GenerationRequest


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


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
