"""The playground in a real Chromium, at a gateway in front of a server that says what each test tells it to."""

from __future__ import annotations

import re

import grpc
import pytest
from fake_triton import FakeServer, fake_server, piece, two_pieces
from page_in_chromium import EXPERTS, LAYERS, PATIENCE_MS, Says, axe, chromium, missing

from clients.gateway.settings import Settings, read_keys
from clients.generation import Client, GenerationRequest
from export.tokenizer.loading import load_tokenizer

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
END_ID = 256
DESKTOP, PHONE = (1280, 800), (360, 720)
KEY = "a-key-of-sixteen-characters"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def tokenizer(tiny_engine):
    return load_tokenizer(tiny_engine)


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


def sent(server, place: int = -1) -> dict[str, bytes]:
    """The tensors of a request."""
    request = server.requests[place]
    return {tensor.name: raw for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)}


def prompt_of(server) -> str:
    return sent(server)["text_input"][4:].decode()


# Streaming.


def test_an_answer_is_shown_as_it_is_written(open_page, server, tokenizer):
    server.answer = says = Says(tokenizer, "def main", pause=3)
    opened = open_page()
    page = opened.page
    assert page.evaluate("document.activeElement.id") == "prompt"
    opened.send("hello")
    opened.shows("def")
    assert (page.is_visible("#stop"), page.is_visible("#send")) == (True, False)
    assert page.get_attribute(".answer", "aria-busy") == "true"
    says.go_on.set()
    page.wait_for_selector(".foot-buttons button")
    assert opened.text(".answer") == "def main"
    assert re.fullmatch(r"first token \d+ ms[\d.]+ tokens/s8 tokensended at the limit of tokens", opened.text(".facts"))
    assert (page.is_visible("#stop"), page.is_visible("#send")) == (False, True)
    assert page.get_attribute(".answer", "aria-busy") == "false"
    assert opened.text("#status") == "Answer 1 has ended, 8 tokens: def main"
    assert (page.input_value("#prompt"), opened.problems()) == ("", [])


def test_the_page_asks_nobody_but_the_gateway_and_stores_nothing(open_page, server, tokenizer):
    server.answer = Says(tokenizer, "ok")
    opened = open_page()
    opened.ask("hello")
    assert all(address.startswith(opened.url) for address in opened.asked)
    assert len(opened.asked) > 8
    stored = "[document.cookie, localStorage.length, sessionStorage.length]"
    assert opened.page.evaluate(stored) == ["", 0, 0]


def test_a_line_begins_with_shift_and_an_empty_message_is_not_sent(open_page, server, tokenizer):
    server.answer = Says(tokenizer, "ok")
    opened = open_page()
    page = opened.page
    opened.send("  ")
    assert page.locator(".turn").count() == 0
    page.fill("#prompt", "one")
    page.press("#prompt", "Shift+Enter")
    page.keyboard.type("two")
    opened.page.press("#prompt", "Enter")
    page.wait_for_selector(".foot-buttons button")
    assert prompt_of(server) == "<|user|>one\ntwo\n<|assistant|>"


def test_a_conversation_goes_on_with_what_was_said_and_the_system_prompt(open_page, server, tokenizer):
    server.answer = Says(tokenizer, "four", end=END_ID)
    opened = open_page()
    opened.page.fill("#system", "Be brief.")
    opened.ask("2+2?")
    assert opened.ask("sure?") == "fourend"
    assert prompt_of(server) == "<|system|>Be brief.\n<|user|>2+2?\n<|assistant|>four\n<|user|>sure?\n<|assistant|>"
    assert "ended by itself" in opened.text(".facts")
    opened.page.click("#clear")
    assert (opened.page.locator(".turn").count(), opened.page.is_visible("#empty")) == (0, True)
    opened.page.click("#clear")
    assert opened.page.locator(".turn").count() == 2


def test_a_completion_continues_the_text_itself(open_page, server, tokenizer):
    server.answer = Says(tokenizer, "main():", end=END_ID)
    opened = open_page()
    opened.page.check("input[value=completion]", force=True)
    assert not opened.page.is_visible("#system")
    assert opened.ask("def ") == "main():end"
    assert prompt_of(server) == "def "
    opened.page.locator(".token").nth(2).click()
    assert opened.text("#token-title") == "“i”"
    assert opened.page.locator(".likely tr").all_text_contents() == ["i chosen4.0 %", "␣3.0 %"]


def test_the_settings_reach_the_server(open_page, server, tokenizer):
    server.answer = Says(tokenizer, "ok")
    opened = open_page()
    values = {"temperature": "0.5", "top_p": "0.25", "top_k": "7", "min_p": "0.125", "max_tokens": "99", "seed": "12",
              "stop_words": "\\n\nab c"}  # fmt: skip
    for name, value in values.items():
        opened.page.fill(f"#{name}", value)
    opened.ask("x")
    found = sent(server)
    assert found["temperature"] == b"\x00\x00\x00\x3f"
    assert (found["top_p"], found["min_p"]) == (b"\x00\x00\x80\x3e", b"\x00\x00\x00\x3e")
    assert (found["top_k"][0], found["max_tokens"][0], found["seed"][0]) == (7, 99, 12)
    assert found["stop_words"] == b"\x02\x00\x00\x00\\n\x04\x00\x00\x00ab c"
    assert found["num_log_probs"][0] == 5
    assert found["return_routed_experts"] == b"\x01"


def test_a_setting_that_no_server_takes_is_said_before_it_is_sent(open_page, server):
    opened = open_page()
    opened.page.fill("#temperature", "3")
    opened.send("x")
    assert opened.page.evaluate("document.activeElement.id") == "temperature"
    assert opened.text("#status").startswith("Temperature: ")
    assert (server.requests, opened.page.input_value("#prompt")) == ([], "x")


# Stopping.


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_a_stopped_answer_keeps_its_text_and_ends_on_the_server(open_page, server, how):
    server.answer = server.stoppable
    server.version = "2.51.0"  # is asked to stop; a later one has its call cancelled
    opened = open_page()
    page = opened.page
    opened.send("x")
    opened.shows("def ")
    if how == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    page.wait_for_selector(".foot-buttons button")
    assert server.stopped.wait(10)
    assert (opened.text(".answer"), opened.text(".error")) == ("def ", "")
    assert "stopped" in opened.text(".facts")
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert opened.problems() == []


# Errors.


def broken(request, context):
    yield piece("def ", (5, 6), num_output=2)
    context.abort(grpc.StatusCode.INTERNAL, "INTERNAL: it broke")


def full(request, context):
    yield from ()
    context.abort(grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE: 16 requests wait already; send it again in about 7 s")


def test_an_error_in_an_answer_keeps_the_text_and_the_message_can_be_sent_again(open_page, server, tokenizer):
    server.answer = Says(tokenizer, "first")
    opened = open_page()
    opened.ask("one")
    server.answer = broken
    assert opened.ask("two") == "def "
    assert opened.page.get_attribute(".turn:last-child .error", "role") == "alert"
    assert "the model's server failed" in opened.text(".error")
    assert opened.page.locator(".asked-text").all_text_contents() == ["one", "two"]
    server.answer = Says(tokenizer, "third")
    opened.ask("three")
    # What failed is no part of the conversation, what was said before it is.
    assert prompt_of(server) == "<|user|>one\n<|assistant|>first\n<|user|>three\n<|assistant|>"
    server.answer = Says(tokenizer, "second")
    opened.page.click("text=Send again")
    opened.shows("second")
    assert "".join(opened.page.locator(".error").all_text_contents()) == ""
    assert prompt_of(server) == "<|user|>one\n<|assistant|>first\n<|user|>two\n<|assistant|>"


def test_an_answer_stays_where_another_one_fails_or_is_stopped_before_it_begins(open_page, server, tokenizer):
    server.answer = Says(tokenizer, "first", end=END_ID)
    opened = open_page()
    page = opened.page
    opened.ask("one")
    page.locator(".token").nth(2).click()
    for answer, button in ((broken, "Another answer"), (full, "Send again")):
        server.answer = answer
        page.click(f"text={button}")
        page.locator(".error", has_text=re.compile("server")).wait_for()
        page.locator("text=Send again").wait_for()
        assert opened.text(".answer") == "firstend"
    server.answer = Says(tokenizer, "x", pause=0)
    page.click("text=Send again")
    page.wait_for_selector(".waiting")
    page.keyboard.press("Escape")
    page.locator("text=Another answer").wait_for()
    assert (opened.text(".answer"), opened.text(".error")) == ("firstend", "")
    assert "ended by itself" in opened.text(".facts")
    server.answer = Says(tokenizer, "four")
    opened.ask("two")
    assert prompt_of(server) == "<|user|>one\n<|assistant|>first\n<|user|>two\n<|assistant|>"


def test_the_page_follows_the_text_only_while_its_end_is_in_view(open_page, server, tokenizer):
    server.answer = says = Says(tokenizer, "a\n" * 90, pause=120)
    opened = open_page()
    page = opened.page
    opened.send("x")
    page.locator(".token").nth(119).wait_for(state="attached")
    below = "((box) => box.scrollHeight - box.scrollTop - box.clientHeight)(document.querySelector('#turns'))"
    assert page.evaluate(below) < 5
    page.evaluate("document.querySelector('#turns').scrollTop = 0")
    says.go_on.set()
    page.wait_for_selector(".foot-buttons button")
    assert page.evaluate("document.querySelector('#turns').scrollTop") == 0


def test_a_full_server_and_one_that_is_away_are_told_in_plain_words(open_page, server, gateway_of):
    server.answer = full
    opened = open_page()
    opened.ask("x")
    assert opened.text(".error").startswith("The server has as many requests as it can take.")
    assert "The server says after 7 s." in opened.text(".error")
    opened.page.route("**/v1/chat/completions", lambda route: route.abort())
    opened.ask("y")
    assert opened.text(".error") == "The gateway cannot be reached. Look whether it runs, and send this again."
    for body, expected in (
        ("data: {\n\n", "The gateway sent something that is no JSON. The answer is not whole."),
        ('data: {"choices":[]}\n\n', "The connection ended before the answer did."),
    ):
        opened.page.route("**/v1/chat/completions", lambda route, _, body=body: route.fulfill(body=body))
        opened.ask("z")
        assert opened.text(".error") == expected
    assert opened.problems() == []


def test_a_page_without_the_key_is_told_so_and_the_key_stays_in_its_field(open_page, server, tokenizer, tmp_path):
    (tmp_path / "keys").write_text(KEY)
    server.answer = Says(tokenizer, "ok")
    opened = open_page(settings={"keys": read_keys(tmp_path / "keys")})
    page = opened.page
    assert "Enter a key in the settings" in opened.text("#trouble .error")
    page.fill("#key", KEY)
    page.press("#key", "Tab")
    page.wait_for_selector("#trouble", state="detached")
    assert opened.ask("x") == "ok"
    assert page.get_attribute("#key", "type") == "password"
    assert not any(KEY in address for address in opened.asked)
    assert KEY not in page.evaluate("JSON.stringify([document.documentElement.outerHTML, {...localStorage}])")
    page.reload()
    page.wait_for_selector("#trouble")
    assert page.input_value("#key") == ""


def test_a_model_that_cannot_chat_or_tell_experts_is_shown_as_one(open_page, server, tokenizer, tmp_path):
    server.more_inputs = ()
    opened = open_page(settings={"tokenizers": {}, "chat_template": None})
    page = opened.page
    assert page.is_disabled("input[value=chat]")
    assert page.is_checked("input[value=completion]")
    assert (page.is_disabled("#routing"), page.is_disabled("#logprobs")) == (True, True)
    server.answer = Says(tokenizer, "ok")
    assert opened.ask("x") == "ok"
    assert not {"return_routed_experts", "return_log_probs"} & set(sent(server))


def test_a_server_that_refuses_the_experts_alone_is_asked_without_them(open_page, server, tokenizer):
    says = Says(tokenizer, "ok")

    def dense(request, context):
        if "return_routed_experts" in {tensor.name for tensor in request.inputs}:
            told = "INVALID_ARGUMENT: reading the request: return_routed_experts: found true, expected false"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, told)
        yield from says(request, context)

    server.answer = dense
    opened = open_page()
    assert opened.ask("x") == "ok"
    assert opened.text(".note") == "This model gives no experts: it has none, or its server does not tell them."
    assert not opened.page.is_visible("#experts")


# Text of the model is never more than text.

EVIL = "<img src=x onerror=hacked=1><script>hacked=1</script><b>&amp;</b><svg onload=hacked=1>"


def test_text_of_the_model_never_becomes_part_of_the_page(open_page, server, tokenizer):
    server.answer = Says(tokenizer, EVIL, alternative="<")
    opened = open_page()
    page = opened.page
    models = {"data": [{"id": name} for name in ("phixtral", EVIL)]}
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    page.reload()
    page.locator("#model option").nth(1).wait_for(state="attached")
    assert page.locator("#model option").all_text_contents() == ["phixtral", EVIL]
    before = page.evaluate("document.querySelectorAll('img, script, svg, b').length")
    assert opened.ask(EVIL) == EVIL
    page.locator(".token").first.click()
    assert opened.text("#token-title") == "“<”"

    def fails(request, context):
        yield from ()
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"INVALID_ARGUMENT: {EVIL}")

    server.answer = fails
    opened.ask(EVIL)
    assert "<img src=x onerror=hacked=1>" in opened.text(".error")
    page.select_option("#model", EVIL)
    opened.ask("x")
    assert opened.text(".error").startswith("The gateway does not serve this model. Choose another one.")
    assert opened.text(".answered .who") == EVIL
    facts = page.locator(".facts b").count()
    assert page.evaluate("document.querySelectorAll('img, script, svg, b').length") == before + facts
    assert page.evaluate("typeof hacked") == "undefined"
    assert opened.problems() == []


# Tokens and experts.


def test_a_token_shows_its_probability_and_what_else_could_have_come(open_page, server, tokenizer):
    server.answer = Says(tokenizer, "abcdef", end=END_ID)
    opened = open_page()
    page = opened.page
    opened.ask("x")
    page.locator(".token").nth(1).hover()
    assert page.locator(".token").nth(1).get_attribute("title") == "b 50.0 %"
    page.locator(".token").nth(1).click()
    assert page.locator(".likely tr").all_text_contents() == ["b chosen50.0 %", "␣3.0 %"]
    assert page.locator(".token.unlikely").all_text_contents() == ["c", "f"]
    doubt = "[...document.querySelectorAll('.token')].map((one) => getComputedStyle(one).backgroundColor)"
    colours = page.evaluate(doubt)
    assert len({*colours[:3]}) == 3  # surer and surer tokens have other colours
    assert colours[0] == colours[3]
    page.locator(".token.end").click()
    assert opened.text("#token-title") == "The answer's end"


def test_tokens_are_chosen_by_keyboard_and_told_to_a_screen_reader(open_page, server, tokenizer):
    server.answer = Says(tokenizer, "ab cd")
    opened = open_page()
    page = opened.page
    opened.ask("x")
    page.press("#prompt", "Shift+Tab")
    for _ in range(4):
        if page.evaluate("document.activeElement.className") == "answer":
            break
        page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.className") == "answer"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key, expected in (("ArrowRight", "a"), ("ArrowRight", "b"), ("End", "d"), ("ArrowLeft", "c"), ("Home", "a")):
        page.keyboard.press(key)
        assert opened.text(".token.selected") == expected
    page.locator(".token.selected").wait_for()
    assert opened.text("#status") == "a, 90.0 %, experts of the first layer 0 and 1"
    assert page.get_attribute("#status", "aria-live") == "polite"


def test_a_character_of_several_tokens_is_one_piece_of_text_with_all_of_them(open_page, server, tokenizer):
    server.answer = Says(tokenizer, "é😀b")
    opened = open_page()
    page = opened.page
    assert opened.ask("x") == "é😀b"
    assert page.locator(".token").all_text_contents() == ["é", "😀", "b"]
    page.locator(".token").nth(1).click()
    assert page.locator(".likely").count() == 4


def test_the_experts_of_tokens_and_of_the_answer_are_drawn(open_page, server, tokenizer):
    server.answer = Says(tokenizer, "abcd")
    opened = open_page()
    page = opened.page
    opened.ask("x")
    page.locator(".token").nth(1).click()
    assert page.locator("#load rect").count() == LAYERS * EXPERTS
    # Token 1 has experts 1 and 2 in layer 0, 2 and 0 in layer 1, 0 and 1 in layer 2.
    rows = page.locator(".layers tbody tr").all_text_contents()
    assert rows == ["01 70 %2 30 %", "12 70 %0 30 %", "20 70 %1 30 %"]
    assert page.locator("#load .ring").count() == 2 * LAYERS
    titles = page.locator("#load rect title").all_text_contents()
    assert titles[:4] == [f"layer 0, expert {expert}: {count} of 4 tokens" for expert, count in enumerate((3, 3, 2, 0))]
    assert "Choices over all layers" in opened.text("#experts-note")
    assert page.locator("#legend li").all_text_contents() == [f"expert {expert}" for expert in range(EXPERTS)]
    assert "The heaviest expert of 4 tokens in 3 layers." in page.get_attribute("#map", "aria-label")
    # A column of the map is a token; its colours are those of the heaviest experts.
    pixels = """([token, layer]) => {
      const map = document.querySelector('#map'), wide = Number(map.dataset.wide);
      const scale = map.width / map.getBoundingClientRect().width;
      const [x, y] = [(token + 0.3) * wide * scale, (5 + (layer + 0.4) * 16) * scale];
      return [...map.getContext('2d').getImageData(x, y, 1, 1).data].slice(0, 3).join();
    }"""
    named = "(name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim()"
    hexes = [page.evaluate(named, f"--e{expert}") for expert in range(3)]
    colours = [",".join(str(int(one[place : place + 2], 16)) for place in (1, 3, 5)) for one in hexes]
    assert len(set(colours)) == 3
    for token in range(4):
        for layer in range(LAYERS):
            assert page.evaluate(pixels, [token, layer]) == colours[(token + layer) % 3]
    wide = int(page.get_attribute("#map", "data-wide"))
    page.locator("#map").click(position={"x": 3.5 * wide, "y": 8})
    assert opened.text(".token.selected") == "d"


def test_what_was_not_asked_for_is_not_shown(open_page, server, tokenizer):
    server.answer = Says(tokenizer, "ab")
    opened = open_page()
    opened.page.uncheck("#routing")
    opened.page.uncheck("#logprobs")
    opened.ask("x")
    assert not {"return_routed_experts", "return_log_probs"} & set(sent(server))
    opened.page.locator(".token").first.click()
    assert "nothing of this text's tokens" in opened.text("#alternatives")
    assert not opened.page.is_visible("#experts")


def test_a_real_models_answer_is_shown_with_the_experts_that_its_client_is_told(open_page, served_phixtral):
    settings = {"tritons": (served_phixtral.grpc_url,), "tokenizers": {"": served_phixtral.engine}}
    opened = open_page(settings=settings)
    page = opened.page
    page.check("input[value=completion]", force=True)
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "12")
    shown = opened.ask("def main(")
    with Client(served_phixtral.grpc_url) as client:
        request = GenerationRequest(
            model=served_phixtral.model, prompt="def main(", max_tokens=12, return_routed_experts=True
        )
        expected = client.generate(request)
    assert shown.removesuffix("end") == expected.text
    assert opened.problems() == []
    page.focus(".answer")
    page.keyboard.press("End")
    rows = page.locator(".layers tbody tr").all_text_contents()
    assert [[int(cell) for cell in re.findall(r"(?:^\d|%)\s*(\d)(?= )", row)] for row in rows] == [
        [expert for expert, _ in layer] for layer in expected.routing[-1]
    ]
    assert page.locator("#load rect").count() == len(rows) * expected.num_experts


# Sizes, colours, and people who do not see or point.


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone"])
def test_axe_finds_nothing_and_the_page_fits(open_page, server, tokenizer, size, scheme):
    opened = open_page(size, color_scheme=scheme)
    page = opened.page
    page.evaluate(axe())
    server.answer = Says(tokenizer, "Experts of a mixture are many: " * 4, end=END_ID)
    steps = {
        "empty": lambda: None,
        "token": lambda: (opened.ask("What is a mixture?"), page.locator(".token").nth(3).click()),
        "settings": lambda: page.click("#tab-settings"),
        "error": lambda: (setattr(server, "answer", full), opened.ask("x")),
    }
    for state, step in steps.items():
        step()
        found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        assert [(state, one["id"], one["impact"], one["nodes"][0]["html"]) for one in found] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        for name in ("#prompt", "#model", "#clear"):
            box = page.locator(name).bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= size[0]
            assert box["y"] + box["height"] <= size[1]
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 3 * 60) == (scheme == "dark")


def test_on_a_phone_the_panel_opens_and_closes(open_page, server, tokenizer):
    server.answer = Says(tokenizer, "ab")
    opened = open_page(PHONE, has_touch=True)
    page = opened.page
    assert not page.is_visible("#panel")
    page.click("#panel-toggle")
    assert (page.is_visible("#temperature"), page.get_attribute("#panel-toggle", "aria-expanded")) == (True, "true")
    page.click("#panel-close")
    assert (page.is_visible("#panel"), page.get_attribute("#panel-toggle", "aria-expanded")) == (False, "false")
    opened.ask("x")
    page.locator(".token").first.tap()
    assert page.is_visible("#token")
    page.keyboard.press("Escape")
    assert not page.is_visible("#panel")


def test_every_control_is_reached_by_tab_and_shows_that_it_has_the_focus(open_page):
    opened = open_page()
    page = opened.page
    page.focus(".skip")
    page.keyboard.press("Shift+Tab")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => {
              const one = document.activeElement, shown = one.type === 'radio' ? one.nextElementSibling : one;
              return [one.id || one.name || one.className || one.tagName, getComputedStyle(shown).outlineStyle];
            }"""
        )
        if found[0] == "BODY" or (reached and found[0] == reached[0]):
            break
        assert found[1] != "none", found
        reached.append(found[0])
    assert reached == [
        "skip", "model", "mode", "clear", "prompt", "send", "tab-settings", "system", "temperature",
        "max_tokens", "top_p", "top_k", "min_p", "seed", "stop_words", "logprobs", "routing", "key",
    ]  # fmt: skip
    page.focus("#tab-settings")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-tokens"
    assert page.is_visible("#tokens")


def test_nothing_moves_for_those_who_want_it_so(open_page, server, tokenizer):
    server.answer = says = Says(tokenizer, "ab", pause=0)
    page = open_page().page
    page.fill("#prompt", "x")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".waiting")
    moving = "getComputedStyle(document.querySelector('.waiting')).animationName"
    assert page.evaluate(moving) == "pulse"
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(moving) == "none"
    page.emulate_media(reduced_motion="null")
    says.go_on.set()


# The parts of the page that take streams apart, alone.


def test_events_are_read_however_their_bytes_are_cut(open_page):
    opened = open_page()
    stream = 'data: {"n":1}\r\n\r\n: comment\ndata:{"n":\ndata: 2}\n\nevent: x\rdata: {"n":"é😀"}\r\rdata: [DONE]\n\n'
    found = opened.page.evaluate(
        """async (stream) => {
          const { chunks } = await import('/playground/api.js');
          const bytes = new TextEncoder().encode(stream), all = [];
          for (const size of [1, 2, 3, 7, 1000]) {
            window.fetch = async () => new Response(new ReadableStream({ start(sink) {
              for (let at = 0; at < bytes.length; at += size) sink.enqueue(bytes.slice(at, at + size));
              sink.close();
            } }));
            const read = [];
            for await (const chunk of chunks('x', {}, '', new AbortController().signal)) read.push(chunk.n);
            all.push(read);
          }
          return all;
        }""",
        stream,
    )
    assert found == [[1, 2, "é😀"]] * 5


SHARED = (
    ("a b", ["a", " b"], [["a", 1], [" b", 1]]),
    ("b c", [" b", " c"], [["b", 1], [" c", 1]]),  # the first space of a text dropped
    ("é!", [[0xC3], [0xA9], "!"], [["é", 2], ["!", 1]]),
    ("", ["<|end|>"], [["", 1]]),
    ("a", ["a", "<|end|>"], [["a", 1], ["", 1]]),
    ("ab", ["ab", "stop"], [["ab", 1], ["", 1]]),  # what a stop word cut off
    ("xyz", ["a"], [["xyz", 1]]),
    ("xyz", [], [["xyz", 0]]),
    ("", [], []),
)


def test_a_chunks_text_is_shared_among_its_tokens(open_page):
    given = [
        (text, [{"text": "?", "bytes": list(one.encode()) if isinstance(one, str) else one} for one in tokens])
        for text, tokens, _ in SHARED
    ]
    found = open_page().page.evaluate(
        """async (given) => {
          const { runs } = await import('/playground/tokens.js');
          return given.map(([text, tokens]) => runs({ text, tokens }).map((run) => [run.text, run.tokens.length]));
        }""",
        given,
    )
    assert found == [expected for _, _, expected in SHARED]
