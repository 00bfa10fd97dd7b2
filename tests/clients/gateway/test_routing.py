"""The experts of each token through OpenAI's API, as a field of ours."""

from __future__ import annotations

import openai
import pytest
from fake_triton import empty_final, piece

FIRST = (((0, 0.75), (3, 0.25)), ((2, 0.5), (1, 0.5)))  # of one token: two layers, two experts each
SECOND = FIRST[::-1]
MESSAGES = [{"role": "user", "content": "hi"}]
ASKED = {"return_routed_experts": True}


@pytest.fixture
def routed(server):
    def answer(request, context):
        asked = "return_routed_experts" in {tensor.name for tensor in request.inputs}
        first, second = ((FIRST, SECOND), (SECOND,)) if asked else ((), ())
        yield piece("", (5, 6), num_output=2, routing=first, num_experts=4 if asked else None)
        yield piece("b", (7,), num_output=3, finish_reason="stop", routing=second, num_experts=4 if asked else None)
        yield empty_final()

    server.answer = answer
    return server


def ask(gateway, endpoint, **options):
    client = gateway.client()
    if endpoint == "chat":
        return client.chat.completions.create(model="phixtral", messages=MESSAGES, **options)
    return client.completions.create(model="phixtral", prompt="hi", **options)


@pytest.mark.parametrize("endpoint", ["chat", "text"])
def test_a_whole_answer_has_the_experts_of_all_of_its_tokens(gateway, routed, endpoint):
    (choice,) = ask(gateway, endpoint, extra_body=ASKED).choices
    assert choice.moeship == {
        "routed_experts": [[[0, 3], [2, 1]], [[2, 1], [0, 3]], [[2, 1], [0, 3]]],
        "expert_weights": [[[0.75, 0.25], [0.5, 0.5]], [[0.5, 0.5], [0.75, 0.25]], [[0.5, 0.5], [0.75, 0.25]]],
        "num_experts": 4,
    }
    assert not hasattr(ask(gateway, endpoint).choices[0], "moeship")


@pytest.mark.parametrize("endpoint", ["chat", "text"])
def test_each_chunk_has_the_experts_of_its_tokens_though_it_has_no_text(gateway, routed, endpoint):
    chunks = [chunk.choices[0] for chunk in ask(gateway, endpoint, extra_body=ASKED, stream=True) if chunk.choices]
    found = [choice.moeship["routed_experts"] for choice in chunks if hasattr(choice, "moeship")]
    assert found == [[[[0, 3], [2, 1]], [[2, 1], [0, 3]]], [[[2, 1], [0, 3]]]]


def test_a_completion_that_shows_the_prompt_alone_has_no_experts(gateway, routed):
    options = {"max_tokens": 0, "echo": True, "extra_body": ASKED}
    assert not hasattr(ask(gateway, "text", **options).choices[0], "moeship")
    assert not any(hasattr(chunk.choices[0], "moeship") for chunk in ask(gateway, "text", stream=True, **options))


@pytest.mark.parametrize("endpoint", ["chat", "text"])
def test_a_model_without_the_input_is_refused_by_name(gateway_of, server, endpoint):
    server.more_inputs = ()
    with pytest.raises(openai.BadRequestError) as caught:
        ask(gateway_of(), endpoint, extra_body=ASKED)
    assert (caught.value.param, caught.value.code) == ("return_routed_experts", "unsupported_parameter")
    assert server.requests == []


@pytest.mark.parametrize("inputs", [(), ("return_routed_experts",)])
def test_the_list_of_models_says_what_each_can_be_asked_for(gateway_of, server, tmp_path, inputs):
    server.more_inputs = inputs
    (model,) = gateway_of().client().models.list().data
    assert model.moeship == {"chat": True, "logprobs": True, "return_routed_experts": bool(inputs)}
    (bare,) = gateway_of(tokenizers={}).client().models.list().data
    assert bare.moeship == {"chat": False, "logprobs": False, "return_routed_experts": bool(inputs)}
