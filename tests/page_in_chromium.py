"""A Chromium that opens the playground, and a model that says what a test tells it to."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources

import grpc
from fake_triton import at_the_end_of, empty_final, piece

from triton_repo.runtime.text.detokenizer import Detokenizer

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# A browser that asks nobody but the gateway for anything.
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
PATIENCE_MS = 15_000
DESKTOP, PHONE = (1280, 800), (360, 720)
END_ID = 256  # of the tokenizer of tests/checkpoints.py
LAYERS, EXPERTS = 3, 4
# Log-probabilities of the tokens of an answer, in turn.
LIKELY = tuple(map(math.log, (0.9, 0.5, 0.04)))


def missing() -> str:
    """What these tests lack here, and how to get it; "" for nothing."""
    for package in ("playwright", "axe_playwright_python"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install -e '.[dev]'"
    return "" if _program() else f"no Chromium is installed ({', '.join(PROGRAMS)}): apt-get install chromium"


def _program() -> str | None:
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@contextmanager
def chromium() -> Iterator:
    """A headless browser. Only one test module may hold it at a time, since the driver's loop runs in the thread that
    tests run in."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_program(), args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def axe() -> str:
    """The source of axe-core."""
    return (resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")


def routing(number: int):
    """The experts of the token of that number: two of four in each of three layers."""
    heavy, light = 0.75 - 0.05 * (number % 3), 0.25 + 0.05 * (number % 3)
    return tuple(
        (((number + layer) % (EXPERTS - 1), heavy), ((number + layer + 1) % (EXPERTS - 1), light))
        for layer in range(LAYERS)
    )


class Says:
    """An answer for `FakeServer`: a text in a tokenizer's tokens, one a piece, then the end token if there is one. It
    pauses before the token number `pause` until `go_on` is set. Log-probabilities and experts come where they are asked
    for."""

    def __init__(
        self, tokenizer, text: str, *, alternative: str = " or", end: int | None = None, pause: int = -1
    ) -> None:
        self._tokenizer, self._end, self._pause = tokenizer, end, pause
        self._ids = tokenizer.encode(text)
        self._alternative = tokenizer.encode(alternative)[0]
        self.go_on = threading.Event()

    def __call__(self, request, context):
        at_the_end_of(context, self.go_on.set)
        asked = {tensor.name for tensor in request.inputs}
        detokenizer = Detokenizer(self._tokenizer)
        ids = [*self._ids, *([self._end] if self._end is not None else [])]
        held = []
        for number, token in enumerate(ids):
            if number == self._pause:
                self.go_on.wait()
            if not context.is_active():
                return
            held.append((number, token))
            is_last = number == len(ids) - 1
            text = "" if token == self._end else detokenizer.push(token)
            if is_last:
                text += detokenizer.flush()
            if text or is_last:
                yield self._piece(asked, text, held, len(ids) if is_last else 0)
                held = []
        yield empty_final()

    def _piece(self, asked, text, held, whole):
        likely = [LIKELY[number % len(LIKELY)] for number, _ in held]
        fields = {}
        if "num_log_probs" in asked:
            fields["top_log_probs"] = tuple(
                ((token, value), (self._alternative, math.log(0.03)))
                for (_, token), value in zip(held, likely, strict=True)
            )
        if "return_routed_experts" in asked:
            fields |= {"routing": tuple(routing(number) for number, _ in held), "num_experts": EXPERTS}
        reason = "" if not whole else "length" if self._end is None else "stop"
        made = piece(text, [token for _, token in held], finish_reason=reason, num_output=held[-1][0] + 1,
                     log_probs=likely if "return_log_probs" in asked else False, **fields)  # fmt: skip
        return made


class Playground:
    """An open page, what its console said, and the addresses that it asked."""

    def __init__(self, page, url: str) -> None:
        self.page, self.url = page, url
        self.console: list[str] = []
        self.asked: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        self._listeners = {
            "console": lambda message: self.console.append(f"{message.type}: {message.text}"),
            "pageerror": lambda error: self.console.append(f"error: {error}"),
            "request": lambda request: self.asked.append(request.url),
        }
        for event, listener in self._listeners.items():
            page.on(event, listener)
        page.goto(url)
        page.locator("#model", has_text="reading the models").wait_for(state="detached")

    def leave(self) -> None:
        """Forget the page, which another test may open again."""
        for event, listener in self._listeners.items():
            self.page.remove_listener(event, listener)
        self.page.unroute_all()

    def send(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def ask(self, text: str) -> str:
        """The whole answer to a message."""
        before = self.page.locator(".turn").count()
        self.send(text)
        self.page.locator(".turn .foot-buttons button").nth(0).wait_for()
        turn = self.page.locator(".turn").nth(before)
        turn.locator(".foot-buttons button").first.wait_for()
        return turn.locator(".answer").text_content()

    def shows(self, text: str) -> None:
        """Wait until an answer is this text. The page's policy allows no waiting for a script's value."""
        self.page.locator(".answer", has_text=re.compile(f"^{re.escape(text)}$")).wait_for()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).last.text_content()

    def problems(self) -> list[str]:
        """What the console said, beside the browser's own word of a response with a status of failure."""
        return [line for line in self.console if "Failed to load resource" not in line]


def sent(server, place: int = -1) -> dict[str, bytes]:
    """The tensors of a request."""
    request = server.requests[place]
    return {tensor.name: raw for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)}


def prompt_of(server) -> str:
    return sent(server)["text_input"][4:].decode()


def full(request, context):
    """An answer of a server that has no room."""
    yield from ()
    context.abort(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE: 16 requests wait already; send it again in about 7 s")
