"""A gateway that serves in a thread of this process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import openai
import uvicorn

from clients.gateway.app import create_app
from clients.gateway.server import Protocol
from clients.gateway.settings import Settings

# A template as models of chats have them.
CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Gateway:
    """A gateway that runs, and where."""

    def __init__(self, app, url: str) -> None:
        self.state, self.url = app.state.gateway, url
        self.clients = []

    def client(self, **options) -> openai.OpenAI:
        given = {"api_key": "none", "max_retries": 0, **options}
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", **given))
        return self.clients[-1]


@contextlib.contextmanager
def running(settings: Settings) -> Iterator[Gateway]:
    app = create_app(settings)
    ready = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            ready.set()

    server = Server(uvicorn.Config(app, port=0, http=Protocol, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    assert ready.wait(30)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        gateway = Gateway(app, f"http://127.0.0.1:{port}")
        yield gateway
    finally:
        for client in gateway.clients:
            client.close()
        server.should_exit = True
        thread.join()
