"""Tokens, their probabilities and experts; the page's sizes, colours and keys; how it takes streams apart."""

from __future__ import annotations

import re

import pytest
from page_in_chromium import DESKTOP, END_ID, EXPERTS, LAYERS, PHONE, Says, axe, full, missing, sent

from clients.generation import Client, GenerationRequest

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


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
        "max_tokens", "top_p", "top_k", "min_p", "seed", "stop_words", "tools", "logprobs", "routing", "key",
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
