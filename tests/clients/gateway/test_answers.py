"""What OpenAI's own client makes of the gateway's answers."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from fake_triton import empty_final, piece
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

EXAMPLES = Path(__file__).parents[3] / "examples"


def sent(request) -> dict[str, bytes]:
    """The tensors of a request by name."""
    return {tensor.name: raw for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)}


def test_a_chat_is_the_template_rendered_and_the_answer_a_message(gateway, server):
    answer = gateway.client().chat.completions.create(
        model="phixtral", messages=[{"role": "user", "content": "2+2?"}], temperature=0
    )
    assert sent(server.requests[-1])["text_input"][4:] == b"<|user|>2+2?\n<|assistant|>"
    assert (answer.object, answer.choices[0].message.content) == ("chat.completion", "def main")
    assert (answer.choices[0].finish_reason, answer.usage.total_tokens) == ("length", 6)


def test_a_streamed_chat_comes_piece_by_piece(gateway):
    chunks = list(
        gateway.client().chat.completions.create(
            model="phixtral", messages=[{"role": "user", "content": "hi"}], stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert [chunk.choices[0].delta.content for chunk in chunks[:-1]] == ["", "def ", "main"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, "length"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 3)


@pytest.mark.parametrize(("asks", "expected"), [(True, [2, 3, 3]), (False, [None, None, 3])])
def test_each_event_has_the_counts_so_far_where_they_are_asked_for(gateway, asks, expected):
    options = {"include_usage": True, "continuous_usage_stats": asks}
    client = gateway.client()
    completion = client.completions.create(model="phixtral", prompt="a", stream=True, stream_options=options)
    messages = [{"role": "user", "content": "a"}]
    chat = client.chat.completions.create(model="phixtral", messages=messages, stream=True, stream_options=options)
    for chunks in (list(completion), list(chat)):
        counts = [chunk.usage and chunk.usage.completion_tokens for chunk in chunks[-3:]]
        assert counts == expected
        assert chunks[-1].usage.prompt_tokens == 3


def test_a_completion_of_several_prompts_has_a_choice_for_each_answer_to_each(gateway, server):
    def two(request, context):
        for index in (1, 0):
            yield piece(f"{index}", (5,), finish_reason="stop", num_output=1, sequence_index=index)
        yield empty_final()

    server.answer = two
    answer = gateway.client().completions.create(model="phixtral", prompt=["a", "b"], n=2, echo=True)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]
    assert answer.usage.prompt_tokens == 6


def test_responses_have_the_text_of_a_chat(gateway, server):
    asked = {"model": "phixtral", "input": "2+2?", "instructions": "be brief", "max_output_tokens": 8}
    answer = gateway.client().responses.create(**asked)
    assert sent(server.requests[-1])["text_input"][4:] == b"<|system|>be brief\n<|user|>2+2?\n<|assistant|>"
    assert (answer.output_text, answer.status, answer.usage.output_tokens) == ("def main", "incomplete", 3)
    earlier = [{"role": "user", "content": "a"}, *answer.to_dict()["output"], {"role": "user", "content": "b"}]
    gateway.client().responses.create(model="phixtral", input=earlier)
    expected = b"<|user|>a\n<|assistant|>def main\n<|user|>b\n<|assistant|>"
    assert sent(server.requests[-1])["text_input"][4:] == expected
    with gateway.client().responses.stream(**asked) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert texts == ["def ", "main"]


SCHEMA = {"type": "json_schema", "name": "a", "schema": {"type": "object"}}


@pytest.mark.parametrize("form", [None, {"type": "text"}, {"type": "json_object"}, SCHEMA])
def test_responses_have_all_that_openais_types_ask_for(gateway, server, form):
    """The client itself takes objects of any form, and fails later, at the attribute that is not there."""
    server.more_inputs = ("guided_decoding_guide_type", "guided_decoding_guide")
    asked = {"model": "phixtral", "input": "a", **({"text": {"format": form}} if form else {})}
    with gateway.client().responses.with_streaming_response.create(**asked) as raw:
        answer = TypeAdapter(Response).validate_json(raw.text(), strict=True)
    assert answer.text.format.to_dict() == (form or {"type": "text"})
    with gateway.client().responses.with_streaming_response.create(**asked, stream=True) as raw:
        events = [line.removeprefix("data: ") for line in raw.iter_lines() if line.startswith("data: ")]
    assert len(events) == 10  # four at the begin, two of text, four at the end
    for event in events:
        TypeAdapter(ResponseStreamEvent).validate_json(event, strict=True)


def test_models_are_listed_with_their_context(gateway):
    (model,) = gateway.client().models.list().data
    assert (model.id, model.max_model_len) == ("phixtral", 640)


def test_a_begin_token_stands_before_a_tokenized_text_and_not_before_a_chat(gateway_of):
    """The template writes it, as where the chat is answered."""
    url = f"{gateway_of(tokenizers={'': EXAMPLES / 'tiny-mixtral' / 'checkpoint'}).url}/tokenize"

    def begins(**body) -> bool:
        data = json.dumps({"model": "phixtral", **body}).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as answer:
            return json.load(answer)["tokens"][0] == 1

    messages = [{"role": "user", "content": "hi"}]
    assert begins(prompt="hi")
    assert not begins(messages=messages)
    assert begins(messages=messages, add_special_tokens=True)
