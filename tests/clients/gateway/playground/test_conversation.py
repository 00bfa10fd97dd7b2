"""Typing, streaming, stopping, errors and keys; and text of the model, which never is more than text."""

from __future__ import annotations

import re

import grpc
import pytest
from fake_triton import fake_server, piece
from page_in_chromium import END_ID, Says, full, missing, prompt_of, sent

from clients.gateway.settings import read_keys

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
KEY = "a-key-of-sixteen-characters"


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


@pytest.mark.parametrize("seed", [2**53 + 1, 2**64 - 1])
def test_a_seed_of_64_bits_reaches_the_server_as_it_is(open_page, server, tokenizer, seed):
    server.answer = Says(tokenizer, "ok")
    opened = open_page()
    opened.page.fill("#seed", str(seed))
    opened.ask("x")
    assert int.from_bytes(sent(server)["seed"], "little") == seed


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


def test_an_error_in_an_answer_keeps_the_text_and_the_message_can_be_sent_again(open_page, server, tokenizer):
    server.answer = Says(tokenizer, "first")
    opened = open_page()
    opened.ask("one")
    server.answer = broken
    assert opened.ask("two") == "def "
    assert opened.page.get_attribute(".turn:last-child .error", "role") == "alert"
    assert opened.text(".error").startswith("The answer broke off, since the server failed.")
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
        (
            'data: {"error":{"message":"gone","code":"unavailable"}}\n\n',
            "The answer broke off, since the server ended. Send this again in a moment.\ngone",
        ),
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
    for odd in ("ключ", "a key"):  # no header can hold the first
        page.fill("#key", odd)
        page.press("#key", "Tab")
        page.wait_for_function("document.querySelector('#trouble .error')?.textContent.includes('beyond ASCII')")
        page.evaluate("document.querySelector('#trouble').remove()")
    page.fill("#key", KEY)
    page.press("#key", "Tab")
    page.locator("#model", has_text="phixtral").wait_for()  # the models are read once the key is right
    assert not page.is_visible("#trouble")
    assert opened.ask("x") == "ok"
    assert page.get_attribute("#key", "type") == "password"
    assert not any(KEY in address for address in opened.asked)
    assert KEY not in page.evaluate("JSON.stringify([document.documentElement.outerHTML, {...localStorage}])")
    page.reload()
    page.wait_for_selector("#trouble")
    assert page.input_value("#key") == ""


@pytest.fixture
def poor_server():
    """A server whose model has no inputs but the needed ones. The shared gateway would go on to take the shared server
    for such a one until it asks again."""
    with fake_server() as server:
        server.more_inputs = ()
        yield server


def test_a_model_that_cannot_chat_or_tell_experts_is_shown_as_one(open_page, poor_server, tokenizer):
    server = poor_server
    opened = open_page(settings={"tritons": (server.url,), "tokenizers": {}, "chat_template": None})
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
