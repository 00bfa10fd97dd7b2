"""Reasoning and calls of tools of a gpt-oss, and messages that are written anew."""

from __future__ import annotations

import itertools
import json

import pytest
from fake_triton import empty_final, piece
from harmony_tokenizer import write_harmony_tokenizer
from page_in_chromium import Says, axe, missing, prompt_of

from export.tokenizer.loading import load_tokenizer

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
FINAL = "<|start|>assistant<|channel|>final<|message|>"
ANSWER = f"<|channel|>analysis<|message|>Is 2+2 four?<|end|>{FINAL}It is 4.<|return|>"
CALL = (
    "<|channel|>analysis<|message|>I must look.<|end|><|start|>assistant to=functions.weather<|channel|>commentary "
    '<|constrain|>json<|message|>{"city": "<b>Köln</b>"}<|call|>'
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
TEMPLATE = (
    "{% if tools %}{{ tools[0].function.name }};{% endif %}{% for message in messages %}<|{{ message.role }}|>"
    "{{ message.reasoning_content or '' }}/{{ message.content }}/"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments.city }}){% endfor %}"
    "{{ message.tool_call_id and 'for a call' or '' }}\n{% endfor %}<|assistant|>"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harmony")
    write_harmony_tokenizer(folder)
    return folder


class SaysTokens:
    """An answer in the tokens of gpt-oss, special ones with no text, and a log-probability for each that is asked."""

    def __init__(self, folder, text: str) -> None:
        tokenizer = load_tokenizer(folder)
        tokens = tokenizer.encode(text)
        settled = [tokenizer.decode(tokens[:count]).rstrip("\ufffd") for count in range(len(tokens) + 1)]
        self._pieces = [
            (after[len(before) :], token)
            for token, (before, after) in zip(tokens, itertools.pairwise(settled), strict=True)
        ]

    def __call__(self, request, context):
        asked = "return_log_probs" in {tensor.name for tensor in request.inputs}
        for place, (text, token) in enumerate(self._pieces, 1):
            reason = "stop" if place == len(self._pieces) else ""
            yield piece(text, (token,), finish_reason=reason, num_output=place, log_probs=asked)
        yield empty_final()


@pytest.fixture
def opened(open_page, folder, tmp_path):
    template = tmp_path / "gpt-oss.jinja"
    template.write_text(TEMPLATE)
    return open_page(settings={"tokenizers": {"": folder}, "chat_template": template})


def test_reasoning_is_folded_beside_the_answer_and_is_not_sent_again(opened, server, folder):
    page = opened.page
    server.answer = SaysTokens(folder, ANSWER)
    opened.ask("2+2?")
    texts = "[...document.querySelectorAll('%s .token:not(.mark, .end)')].map((one) => one.textContent).join('')"
    assert page.evaluate(texts % ".thought") == "Is 2+2 four?"
    assert page.evaluate(texts % ".answer") == "It is 4."
    assert page.evaluate("document.querySelectorAll('.token.end').length") == 1
    assert not page.is_visible(".thought")
    assert opened.text("#status").endswith(": It is 4.")
    page.focus(".reasoning summary")
    page.keyboard.press("Enter")
    assert page.is_visible(".thought")
    page.focus(".thought")
    page.keyboard.press("End")
    assert page.evaluate("document.querySelector('.thought .selected') !== null")
    page.evaluate(axe())
    assert page.evaluate("axe.run({resultTypes: ['violations']})")["violations"] == []
    opened.ask("sure?")
    assert prompt_of(server) == "<|user|>/2+2?/\n<|assistant|>/It is 4./\n<|user|>/sure?/\n<|assistant|>"
    assert opened.problems() == []


def test_a_call_is_shown_and_its_result_goes_back_to_the_model(opened, server, folder):
    page = opened.page
    server.answer = SaysTokens(folder, CALL)
    page.fill("#tools", "no list")
    opened.send("Rain?")
    assert page.evaluate("document.activeElement.id") == "tools"
    assert server.requests == []
    page.fill("#tools", json.dumps(TOOLS))
    opened.ask("Rain?")
    assert prompt_of(server) == "weather;<|user|>/Rain?/\n<|assistant|>"
    assert opened.text(".call-name") == "Call of weather"
    assert json.loads(opened.text(".call pre")) == {"city": "<b>Köln</b>"}
    assert "ended with calls" in opened.text(".facts")
    page.evaluate(axe())
    assert page.evaluate("axe.run({resultTypes: ['violations']})")["violations"] == []
    page.fill(".call textarea", "It rains.")
    server.answer = SaysTokens(folder, ANSWER)
    page.click("text=Send the result")
    page.locator(".turn").nth(1).locator(".edit-button, .foot-buttons button").first.wait_for()
    call = "<|assistant|>I must look./None/weather(<b>Köln</b>)\n<|tool|>/It rains./for a call\n<|assistant|>"
    assert prompt_of(server).replace("//weather", "/None/weather") == f"weather;<|user|>/Rain?/\n{call}"
    opened.ask("And later?")
    # The reasoning behind a call is left out once the user has said more.
    assert "I must look." not in prompt_of(server)
    assert "<|tool|>/It rains./for a call" in prompt_of(server)
    assert opened.problems() == []


def test_a_message_is_written_anew_in_its_place(open_page, server, tokenizer):
    server.answer = Says(tokenizer, "one")
    opened = open_page()
    page = opened.page
    opened.ask("first")
    page.click(".edit-button")
    assert page.input_value(".edit") == "first"
    page.keyboard.press("Escape")
    assert (opened.text(".asked-text"), page.evaluate("document.activeElement.className")) == ("first", "edit-button")
    server.answer = Says(tokenizer, "two")
    page.click(".edit-button")
    page.fill(".edit", "second")
    page.keyboard.press("Enter")
    opened.shows("two")
    assert page.locator(".asked-text").all_text_contents() == ["second"]
    assert prompt_of(server) == "<|user|>second\n<|assistant|>"
    assert opened.problems() == []


def test_results_stand_behind_their_call_and_go_with_it(opened, server, folder):
    """Else the model is sent a result whose call it never made, or made long before."""
    page = opened.page
    page.fill("#tools", json.dumps(TOOLS))
    server.answer = SaysTokens(folder, CALL)
    opened.ask("Rain?")
    server.answer = SaysTokens(folder, ANSWER)
    opened.ask("2+2?")
    page.fill(".call textarea", "It rains.")
    page.click("text=Send the result")
    page.locator(".turn").nth(2).wait_for()
    page.locator(".turn").nth(1).locator(".foot-buttons button").first.wait_for()
    assert page.locator(".asked-text").all_text_contents() == ["Rain?", "It rains.", "2+2?"]
    assert prompt_of(server).endswith("<|tool|>/It rains./for a call\n<|assistant|>")
    assert "2+2?" not in prompt_of(server)
    page.locator(".turn").first.locator("text=Another answer").click()
    page.locator(".turn").first.locator(".answer", has_text="It is 4.").wait_for()
    page.locator(".turn").first.locator(".foot-buttons button").first.wait_for()
    opened.ask("And later?")
    assert "It rains." not in prompt_of(server)
    before = len(server.requests)
    page.locator(".turn").nth(1).locator("text=Another answer").click()
    assert "have been replaced" in opened.text(".turn:nth-of-type(2) .error")
    assert len(server.requests) == before
    assert opened.problems() == []


def test_tools_that_are_no_list_hinder_no_completion(opened, server, folder):
    """Their field is hidden then."""
    page = opened.page
    page.fill("#tools", "no list")
    page.check("input[value=completion]", force=True)
    server.answer = SaysTokens(folder, "four")
    opened.ask("2+2 is ")
    assert len(server.requests) == 1
    assert opened.problems() == []
