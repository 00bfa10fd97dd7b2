"""A server of OpenAI's completions that answers a prompt with a text made of it, and files of requests for it."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Reply = tuple[int, Any, dict[str, str]]  # status, body (bytes as they are, else as JSON), headers


def text_for(prompt: str) -> str:
    return f"answer to {prompt[::-1]}"


def completion(body: dict[str, Any]) -> Reply:
    prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
    if "prompt" in body:
        choice["text"] = text_for(prompt)
    else:
        choice["message"] = {"role": "assistant", "content": text_for(prompt)}
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    return 200, {"id": "x", "model": body["model"], "choices": [choice], "usage": usage}, {}


@dataclass
class BatchServer:
    """What the server answers; what it was asked, in the order of arrival."""

    models: tuple[str, ...] | None = ("tiny",)  # None: it does not list them
    answer: Callable[[dict[str, Any]], Reply] = completion
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def asked(self) -> Counter[str]:
        """How often each prompt came."""
        return Counter(body["prompt"] for body in self.bodies)


@contextmanager
def batch_server(**fields: Any) -> Iterator[BatchServer]:
    standin = BatchServer(**fields)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self):
            if standin.models is None:
                self._send(404, {}, {})
            else:
                self._send(200, {"object": "list", "data": [{"id": name} for name in standin.models]}, {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with standin.lock:
                standin.bodies.append(body)
                standin.headers.append(dict(self.headers))
                standin.paths.add(self.path)
            self._send(*standin.answer(body))

        def _send(self, status, body, headers):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_):
            """A client that was killed."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        standin.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield standin
        finally:
            server.shutdown()
            thread.join()


def openai_line(number: int, **body: Any) -> str:
    """A line of OpenAI's batch file format; keywords add fields to the body or replace them."""
    made = {"model": "tiny", "prompt": f"prompt {number}", **body}
    return json.dumps({"custom_id": f"id-{number}", "method": "POST", "url": "/v1/completions", "body": made})


def write_batch(path: Path, num_lines: int) -> Path:
    path.write_text("".join(openai_line(number) + "\n" for number in range(num_lines)))
    return path


def read_answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def is_whole(path: Path, num_lines: int) -> bool:
    """Whether an output of `write_batch` has each prompt once, in order, with its own answer."""
    found = [(line["custom_id"], line["response"]["body"]["choices"][0]["text"]) for line in read_answers(path)]
    return found == [(f"id-{number}", text_for(f"prompt {number}")) for number in range(num_lines)]
