"""Answers of gpt-oss: reasoning and content by the channels of OpenAI's harmony format."""

from __future__ import annotations

import itertools

import pytest
from fake_triton import empty_final, piece
from gateway_in_thread import CHATML
from harmony_tokenizer import write_harmony_tokenizer
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from clients.gateway.api.channels import channels_of
from clients.gateway.api.tools.reading import message_of
from clients.gateway.texts import ModelTexts, read_texts

FINAL = "<|start|>assistant<|channel|>final<|message|>"
ANSWER = f"<|channel|>analysis<|message|>Größe 2+2?<|end|>{FINAL}It is 4 é.<|return|>"
CASES = {
    ANSWER: ("Größe 2+2?", "It is 4 é."),
    "<|channel|>final<|message|>Yes.<|return|>": ("", "Yes."),
    # a preamble is for the user, and messages of a kind are parted
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
    f"<|start|>assistant<|channel|>analysis<|message|>b<|end|>{FINAL}c<|return|>": ("a\nb", "I look.\nc"),
    # calls of tools, addressed in either place
    '<|channel|>analysis<|message|>a<|end|><|start|>assistant to=functions.get<|channel|>commentary <|constrain|>json'
    '<|message|>{"x": 1}<|call|>': ("a", 'to=functions.get {"x": 1}'),
    '<|channel|>commentary to=functions.get <|constrain|>json<|message|>{"x": 1}<|call|>': (
        "", 'to=functions.get {"x": 1}',
    ),
    ' to=functions.get<|channel|>commentary<|message|>{}<|call|>': ("", "to=functions.get {}"),
    "<|channel|>analysis to=browser.search<|message|>{}<|call|>": ("", "to=browser.search {}"),
    # no channel: an answer that a guide holds to a schema, and one that goes on in a message of the conversation
    '{"answer": 4}<|return|>': ("", '{"answer": 4}'),
    "to 4, and to<|return|>": ("", "to 4, and to"),
    "to=4": ("", "to=4"),
    # ended early: within a header, the reasoning, before any text
    "<|channel|>analysis<|message|>Because": ("Because", ""),
    "<|channel|>analysis<|message|>Because<|end|><|start|>assis": ("Because", ""),
    "<|channel|>anal": ("", ""),
    "": ("", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harmony")
    write_harmony_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def texts(folder) -> ModelTexts:
    return read_texts(folder)


def told(deltas):
    """The reasoning and the content of deltas."""
    return tuple("".join(delta.get(name, "") for delta in deltas) for name in ("reasoning_content", "content"))


def pushed(texts, tokens, pieces, *, has_tools=False):
    """The deltas of each of some pieces of (text, number of tokens); the last one ends the answer."""
    channels, left, given = channels_of(texts, has_tools=has_tools), list(tokens), []
    for place, (text, count) in enumerate(pieces):
        own, left = left[:count], left[count:]
        given.append(channels.read(text, own, is_last=place == len(pieces) - 1))
    return given, told([delta for deltas in given for delta in deltas]), channels


@pytest.mark.parametrize("late", [0, 1, 4])
@pytest.mark.parametrize("answer", CASES)
def test_reasoning_and_content_are_told_apart_however_late_the_text_is(texts, answer, late):
    """Text comes with its token, or some tokens later, as where a server looks for stop words."""
    tokens = texts.tokenizer.encode(answer)
    settled = [texts.tokenizer.decode(tokens[:count]).rstrip("\ufffd") for count in range(len(tokens) + 1)]
    known = [settled[max(0, count - late)] for count in range(len(tokens))] + [texts.tokenizer.decode(tokens)]
    pieces = [(after[len(before) :], 1) for before, after in itertools.pairwise(known)] or [("", 0)]
    assert pushed(texts, tokens, pieces)[1] == CASES[answer]
    assert pushed(texts, tokens, [(texts.tokenizer.decode(tokens), len(tokens))])[1] == CASES[answer]


def test_text_is_given_as_soon_as_it_comes(texts):
    tokens = texts.tokenizer.encode(ANSWER)
    settled = [texts.tokenizer.decode(tokens[:count]).rstrip("\ufffd") for count in range(len(tokens) + 1)]
    pieces = [(after[len(before) :], 1) for before, after in itertools.pairwise(settled)]
    given, _, _ = pushed(texts, tokens, pieces)
    shown = [told(deltas) for token, deltas in zip(tokens, given, strict=True) if token not in texts.special]
    assert "".join(reasoning + content for reasoning, content in shown) == "Größe 2+2?It is 4 é."
    assert not any(reasoning and content for reasoning, content in shown)
    guided = texts.tokenizer.encode('{"a": 1}')
    given, _, _ = pushed(texts, guided, [(texts.tokenizer.decode([token]), 1) for token in guided])
    assert all(content for _, content in map(told, given))


def test_a_character_that_a_sign_cuts_belongs_to_the_message_before(texts):
    whole = texts.tokenizer.encode(f"<|channel|>analysis<|message|>x é<|end|>{FINAL}y")
    place = next(at for at, token in enumerate(whole) if texts.token_bytes(token) == b"\xa9")
    tokens = [*whole[:place], *whole[place + 1 :]]
    assert pushed(texts, tokens, [(texts.tokenizer.decode(tokens), len(tokens))])[1] == ("x \ufffd", "y")


def test_an_answer_that_a_stop_word_ends_has_the_text_before_it(texts):
    tokens = texts.tokenizer.encode(ANSWER.removesuffix("<|return|>"))
    text = texts.tokenizer.decode(tokens)
    found = pushed(texts, tokens, [(text[: text.index(" 4")], len(tokens))])[1]
    assert found == ("Größe 2+2?", "It is")


def test_a_model_without_the_formats_tokens_has_no_channels(tiny_engine):
    assert channels_of(read_texts(tiny_engine), has_tools=True) is None


CALLS = (
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant to=functions.get<|channel|>commentary <|constrain|>json"
    '<|message|>{"x": "é"}<|call|>',
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary to=functions.get <|constrain|>json"
    '<|message|>{"x": "é"}<|call|>',
)


@pytest.mark.parametrize("answer", CALLS)
def test_a_message_to_a_function_is_a_call_where_the_request_offers_tools(texts, answer):
    tokens = texts.tokenizer.encode(answer)
    settled = [texts.tokenizer.decode(tokens[:count]).rstrip("\ufffd") for count in range(len(tokens) + 1)]
    pieces = [(after[len(before) :], 1) for before, after in itertools.pairwise(settled)]
    given, _, channels = pushed(texts, tokens, pieces, has_tools=True)
    message = message_of(delta for deltas in given for delta in deltas)
    assert (message["reasoning_content"], message["content"]) == ("a", None)
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "get", "arguments": '{"x": "é"}'}
    assert channels.finish_reason("stop") == "tool_calls"
    cut, _, channels = pushed(texts, tokens[:-2], pieces[:-2], has_tools=True)
    assert channels.finish_reason("length") == "length"
    assert message_of(delta for deltas in cut for delta in deltas)["tool_calls"][0]["function"]["name"] == "get"


@pytest.fixture
def harmony(gateway_of, server, folder, texts, tmp_path):
    """A gateway in front of a gpt-oss that answers token by token."""
    tokens = texts.tokenizer.encode(ANSWER)

    def answer(request, context):
        given = ""
        for place, token in enumerate(tokens):
            text = texts.tokenizer.decode(tokens[: place + 1]).rstrip("\ufffd")
            is_last = place == len(tokens) - 1
            reason = "stop" if is_last else ""
            yield piece(text[len(given) :], (token,), finish_reason=reason, num_output=place + 1)
            given = text
        yield empty_final()

    server.answer = answer
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    return gateway_of(tokenizers={"": folder}, chat_template=template)


ASK = {"model": "phixtral", "messages": [{"role": "user", "content": "2+2?"}]}


def test_a_chats_message_has_the_final_channel_and_the_reasoning_beside_it(harmony):
    (choice,) = harmony.client().chat.completions.create(**ASK).choices
    assert (choice.message.content, choice.message.reasoning_content) == ("It is 4 é.", "Größe 2+2?")


@pytest.mark.parametrize("more", [{}, {"extra_body": {"return_token_ids": True}}])
def test_a_streamed_chat_has_deltas_of_either(harmony, texts, more):
    chunks = list(harmony.client().chat.completions.create(**ASK, stream=True, **more))
    deltas = [chunk.choices[0].delta.to_dict() for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Größe 2+2?"
    assert "".join(delta.get("content", "") for delta in deltas) == "It is 4 é."
    first = next(place for place, delta in enumerate(deltas) if delta.get("content"))
    assert not any("reasoning_content" in delta for delta in deltas[first:])
    assert chunks[-1].choices[0].finish_reason == "stop"
    if more:
        ids = [token for chunk in chunks for token in chunk.choices[0].to_dict().get("token_ids", [])]
        assert ids == texts.tokenizer.encode(ANSWER)


def test_a_response_has_the_final_channel_and_the_reasoning_beside_it(harmony):
    client = harmony.client()
    whole = client.responses.create(model="phixtral", input="2+2?")
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert (whole.output[0].content[0].text, whole.output_text) == ("Größe 2+2?", "It is 4 é.")
    events = list(client.responses.create(model="phixtral", input="2+2?", stream=True))
    for one in events:
        TypeAdapter(ResponseStreamEvent).validate_python(one.to_dict())
    assert "".join(one.delta for one in events if one.type == "response.reasoning_text.delta") == "Größe 2+2?"
    assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == "It is 4 é."
    assert events[-1].response.output_text == "It is 4 é."
