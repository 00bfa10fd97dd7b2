"""The page in a Chromium that a module shares, at a gateway in front of a server that says what tests tell it to."""

from __future__ import annotations

import pytest
from fake_triton import FakeServer, fake_server, two_pieces
from page_in_chromium import DESKTOP, Playground, chromium

from clients.gateway.settings import Settings
from export.tokenizer.loading import load_tokenizer


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def tokenizer(tiny_engine):
    return load_tokenizer(tiny_engine)


@pytest.fixture(scope="module")
def fake():
    """A server for all tests of this module."""
    with fake_server() as fake:
        yield fake


@pytest.fixture
def server(fake):
    """The server as it is at first."""
    fake.answer, fake.version, fake.states = two_pieces, FakeServer.version, FakeServer.states
    fake.more_inputs = FakeServer.more_inputs
    fake.requests.clear()
    for event in (fake.stopped, fake.started, fake.cancelled):
        event.clear()
    return fake


@pytest.fixture(scope="module")
def shared_gateway(run_gateway, fake, tiny_engine, tmp_path_factory):
    template = tmp_path_factory.mktemp("playground") / "template.jinja"
    template.write_text(
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}<|assistant|>"
    )
    with run_gateway(Settings(tritons=(fake.url,), tokenizers={"": tiny_engine}, chat_template=template)) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def shared_page(browser):
    """A tab for every test that wants no other. A new one costs half a second of processor."""
    context = browser.new_context(viewport={"width": DESKTOP[0], "height": DESKTOP[1]})
    yield context.new_page()
    context.close()


@pytest.fixture
def open_page(browser, gateway_of, shared_gateway, shared_page):
    """Opens the page; keywords are those of the browser's context, and `settings` those of a gateway of its own."""
    opened, contexts = [], []

    def start(size=DESKTOP, *, settings=None, **options) -> Playground:
        gateway = shared_gateway if settings is None else gateway_of(**settings)
        page = shared_page
        if options or size != DESKTOP:
            contexts.append(browser.new_context(viewport={"width": size[0], "height": size[1]}, **options))
            page = contexts[-1].new_page()
        opened.append(Playground(page, f"{gateway.url}/"))
        return opened[-1]

    yield start
    for playground in opened:
        playground.leave()
    for context in contexts:
        context.close()
