"""A gateway that serves in a thread of this process, in front of a server that answers as each test tells it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
from gateway_in_thread import CHATML, Gateway, running

from clients.gateway.settings import Settings


@pytest.fixture(scope="session")
def run_gateway() -> Callable[[Settings], AbstractContextManager[Gateway]]:
    """Runs a gateway of given settings."""
    return running


@pytest.fixture
def gateway_of(server, tiny_engine, tmp_path) -> Iterator[Callable[..., Gateway]]:
    """Starts a gateway in front of the fake server; keywords add or replace settings."""
    template = tmp_path / "template.jinja"
    template.write_text(CHATML)
    with contextlib.ExitStack() as stack:

        def start(**options) -> Gateway:
            given = {"tritons": (server.url,), "tokenizers": {"": tiny_engine}, "chat_template": template, **options}
            return stack.enter_context(running(Settings(**given)))

        yield start


@pytest.fixture
def gateway(gateway_of) -> Gateway:
    return gateway_of()
