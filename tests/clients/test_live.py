"""The clients against a running Triton Inference Server with a phixtral: what only the real server can show."""

from __future__ import annotations

import asyncio
import re
from contextlib import aclosing

import pytest
from serve_command import wait_until

from cli.main import main
from clients import errors
from clients.generation import AsyncClient, Client, GenerationRequest

# No token ends the generation, so that its length is known.
NO_END_ID = -1
# Of the slow model: six seconds, more than a cancellation takes to arrive.
ENDLESS_TOKENS = 600


@pytest.fixture
def client(served_phixtral):
    with Client(served_phixtral.grpc_url) as client:
        yield client


@pytest.fixture
def ask(served_phixtral):
    """Makes a greedy request for the served model; keywords add or replace fields."""

    def make(**fields) -> GenerationRequest:
        given = {"model": served_phixtral.model, "prompt": "def main(", "max_tokens": 12, "end_id": NO_END_ID, **fields}
        return GenerationRequest(**given)

    return make


def test_the_server_and_the_model_are_ready(client, served_phixtral):
    assert client.server_ready()
    assert client.model_ready(served_phixtral.model)
    assert not client.model_ready("no-such-model")
    assert served_phixtral.model in {model.name for model in client.models() if model.ready}


def test_the_pieces_together_are_the_whole_answer(client, ask):
    pieces = list(client.stream(ask()))
    whole = client.generate(ask())
    assert "".join(piece.text for piece in pieces) == whole.text
    assert tuple(token for piece in pieces for token in piece.token_ids) == whole.token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert (whole.finish_reason, whole.num_output_tokens, len(whole.token_ids)) == ("length", 12, 12)


def test_log_probabilities_come_one_a_token_and_add_up(client, ask):
    whole = client.generate(ask(return_log_probs=True))
    assert len(whole.log_probs) == 12
    assert whole.cum_log_prob == pytest.approx(sum(whole.log_probs), rel=1e-5)
    assert client.generate(ask()).log_probs == ()


def test_the_same_seed_gives_the_same_text_and_every_option_is_taken(client, ask):
    options = {
        "temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_length": 2, "repetition_penalty": 1.1,
        "presence_penalty": 0.1, "frequency_penalty": 0.1, "random_seed": 2**64 - 1, "stop_words": ("never so",),
        "bad_words": ("nor so",), "pad_id": 0, "beam_width": 1, "exclude_input_in_output": True,
    }  # fmt: skip
    assert client.generate(ask(**options)) == client.generate(ask(**options))


def test_an_unknown_model_is_met_with_the_names_there_are(client, ask, served_phixtral):
    with pytest.raises(errors.ModelNotFound, match=f"The server has: .*{served_phixtral.model}"):
        client.generate(ask(model="no-such-model"))


def test_a_refused_request_says_why_and_the_server_goes_on(client, ask):
    for _ in range(20):
        with pytest.raises(errors.RequestRejected, match="temperature: found -1"):
            client.generate(ask(temperature=-1.0))
    assert client.generate(ask()).finish_reason == "length"


@pytest.fixture
def count_cancellations(served_phixtral):
    """How many requests the model has stopped because they were cancelled; right when it is not at work."""
    return lambda: len(re.findall(r"cancelled after \d+ tokens", served_phixtral.log.read_text(errors="replace")))


def test_closing_a_stream_stops_the_model(served_phixtral, client, ask, calls_of, count_cancellations):
    # Kept, since grpc would cancel a call that nobody refers to any more.
    before, calls = count_cancellations(), calls_of(client)
    pieces = client.stream(ask(model=served_phixtral.slow, max_tokens=ENDLESS_TOKENS))
    next(pieces)
    pieces.close()
    assert client.generate(ask(model=served_phixtral.slow)).finish_reason == "length"
    assert wait_until(lambda: count_cancellations() > before)  # the two requests were computed side by side
    # The stream, the request to stop it, and the whole answer.
    assert (count_cancellations() - before, len(calls)) == (1, 3)


def test_asyncio_streams_side_by_side_give_what_each_gives_alone(served_phixtral, client, ask):
    prompts = ("def main(", "import os", "class A:")

    async def ask_all():
        async with AsyncClient(served_phixtral.grpc_url) as client:
            return await asyncio.gather(*(client.generate(ask(prompt=prompt)) for prompt in prompts))

    assert asyncio.run(ask_all()) == [client.generate(ask(prompt=prompt)) for prompt in prompts]


def test_an_asyncio_stream_that_is_left_early_stops_the_model(served_phixtral, ask, calls_of, count_cancellations):
    before, calls = count_cancellations(), []

    async def leave_and_ask():
        async with AsyncClient(served_phixtral.grpc_url) as client:
            calls.append(calls_of(client))
            async with aclosing(client.stream(ask(model=served_phixtral.slow, max_tokens=ENDLESS_TOKENS))) as pieces:
                await anext(pieces)
            return await client.generate(ask(model=served_phixtral.slow))

    assert asyncio.run(leave_and_ask()).finish_reason == "length"
    assert wait_until(lambda: count_cancellations() > before)
    assert (count_cancellations() - before, len(calls[0])) == (1, 3)


def test_the_command_prints_what_the_client_gets(served_phixtral, client, ask, capsys):
    text = client.generate(ask(end_id=None)).text
    words = ["generate", "--url", served_phixtral.grpc_url, "--model", served_phixtral.model, "--max-tokens", "12"]
    assert main([*words, "def main("]) == 0
    assert capsys.readouterr().out == text + "\n"
