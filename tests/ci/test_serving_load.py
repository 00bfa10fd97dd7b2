"""Texts and load through our client: what is told as a difference, how moments become figures, how failures are kept.

The server is one in this process that answers as it is told; test_run_tensorrt_llm.py has a real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from fake_triton import FakeServer, empty_final, piece
from tritonclient.grpc import service_pb2_grpc

from clients.generation import AsyncClient, Client, Generation
from export.errors import ConfigError
from export.tokenizer.loading import load_tokenizer

SCRIPTS = Path(__file__).parents[2] / "ci" / "gpu"
ANSWER = {
    "prompt": "def ",
    "text": "main",
    "finish_reason": "length",
    "token_ids": [5, 6, 7],
    "margins": [2.0, 0.25, 1.0],
}
PAUSE_S = 0.03


@pytest.fixture
def load_module(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import serving_load

    return serving_load


@pytest.fixture
def steps_module(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import serving_steps

    return serving_steps


@pytest.fixture
def server():
    servicer = FakeServer()
    grpc_server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, grpc_server)
    servicer.url = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
    grpc_server.start()
    yield servicer
    grpc_server.stop(grace=None).wait()


def answering(token_ids, text="main", reason="length"):
    """One piece a token, the text with the first, a pause before each."""

    def answer(request, context):
        for count, token in enumerate(token_ids, start=1):
            time.sleep(PAUSE_S)
            last = count == len(token_ids)
            yield piece(text if count == 1 else "", (token,), finish_reason=reason if last else "", num_output=count)
        yield empty_final()

    return answer


def trial(steps_module, load_module, engine, tmp_path, **changes):
    load = load_module.Load(prompt_tokens=8, output_tokens=3, concurrency=(1, 2), fewest_requests=2, rounds=1,
                            requests_per_stream=2)  # fmt: skip
    values = {
        "engine": engine, "repository": tmp_path / "repository", "log": tmp_path / "log", "answers": [ANSWER],
        "text_tokens": 3, "judged": True, "rounding": 0.1, "load": load,
    }  # fmt: skip
    return steps_module.Trial(**{**values, **changes})


def measured(module, server, prompts, concurrency):
    async def measure():
        async with AsyncClient(server.url) as client:
            return await module.measure_level(client, "phixtral", prompts, concurrency, 3)

    return asyncio.run(measure())


def test_a_level_keeps_its_streams_busy_and_every_moment(load_module, server):
    server.answer = answering((5, 6, 7))
    prompts = [f"prompt {index}" for index in range(6)]
    found = measured(load_module, server, prompts, 3)
    asked = [request.raw_input_contents[0][4:].decode() for request in server.requests]
    assert sorted(asked) == prompts
    assert (found["tokens"], len(found["samples"])) == (18, 6)
    assert found["wall_s"] >= 0.9 * 6 * PAUSE_S  # two requests one after another in each stream, three pauses each
    assert found["tokens_per_s"] == pytest.approx(18 / found["wall_s"], rel=1e-3)
    for sample in found["samples"]:
        assert [tokens for _, tokens in sample.arrivals] == [1, 1, 1]
        assert (sample.num_input_tokens, sample.finish_reason) == (3, "length")
        assert sample.first_token_s >= 0.9 * PAUSE_S
    first_end = min(sample.arrivals[-1][0] for sample in found["samples"])
    assert sum(sample.sent_s < first_end for sample in found["samples"]) == 3
    level = load_module.summarise(3, [found, found])
    assert level["tokens_per_s"]["n"] == 2
    assert level["time_to_first_token_s"]["n"] == 12
    json.dumps(level)


def test_a_request_that_fails_ends_its_level_with_its_error(load_module, server):
    server.answer = server.failing(grpc.StatusCode.INTERNAL, "out of memory")
    with pytest.raises(load_module.ClientError, match="out of memory"):
        measured(load_module, server, ["a", "b", "c"], 2)
    assert len(server.requests) <= 3


def test_an_answer_without_tokens_is_no_sample(load_module, server):
    server.answer = lambda request, context: iter([piece("", (), finish_reason="stop"), empty_final()])
    with pytest.raises(load_module.ClientError, match="an answer without a token"):
        measured(load_module, server, ["a"], 1)


def test_prompts_begin_at_different_tokens_of_the_text(load_module, tiny_engine):
    tokenizer = load_tokenizer(tiny_engine)
    text = " ".join(map(str, range(900)))
    prompts = load_module.different_prompts(tokenizer, text, 300, 12)
    assert len(set(prompts)) == 300
    assert all(prompt in text for prompt in prompts)
    assert {len(tokenizer.encode(prompt)) for prompt in prompts} == {12}
    with pytest.raises(ConfigError, match="choosing 9 prompts of 3 tokens: the text has"):
        load_module.different_prompts(tokenizer, "1 2 3", 9, 3)


def test_a_load_has_a_prompt_for_every_request_and_a_warm_up(load_module):
    load = load_module.Load()
    assert [load.requests(streams) for streams in (1, 4, 16, 32)] == [8, 16, 64, 128]
    assert load.num_prompts == 4 * (8 + 16 + 64 + 128)


@pytest.mark.parametrize(
    ("token_ids", "reason", "expected_reason", "place"),
    [
        ((5, 6, 7), "length", "length", None),
        ((5, 6, 8), "length", "length", 2),
        ((5, 6), "stop", "stop", None),  # the end token is the engine's own
        ((5, 6), "stop", "length", 2),
        ((5,), "stop", "stop", 1),
        ((), "stop", "length", 0),
        ((5, 6, 7, 9), "length", "stop", 2),
    ],
)
def test_the_first_difference_is_found(steps_module, token_ids, reason, expected_reason, place):
    found = Generation(text="", token_ids=token_ids, finish_reason=reason, num_input_tokens=3, num_output_tokens=3,
                       cum_log_prob=None, log_probs=())  # fmt: skip
    assert steps_module.first_difference(found, {**ANSWER, "finish_reason": expected_reason}) == place


@pytest.mark.parametrize(
    ("token_ids", "text", "changes", "failure"),
    [
        ((5, 6, 7), "main", {}, ""),
        ((5, 9, 9), "other", {"rounding": 0.3}, ""),  # the reference chose by 0.25
        (
            (5, 9, 9),
            "other",
            {},
            "is not the reference's from token 1 on, which it chose by 0.25; rounding explains 0.1",
        ),
        ((5, 9, 9), "other", {"judged": False}, ""),
        ((5, 6, 7), "Main", {"judged": False}, "the tokens are the reference's and the text is not"),
        ((5, 6, 7), "main", {"rounding": float("nan")}, ""),
        ((5, 9, 9), "other", {"rounding": float("nan")}, "rounding explains nan"),
    ],
)
def test_a_text_is_judged_by_what_rounding_explains(
    steps_module, load_module, server, tiny_engine, tmp_path, token_ids, text, changes, failure
):
    server.answer = answering(token_ids, text)
    with Client(server.url) as client:
        asked = trial(steps_module, load_module, tiny_engine, tmp_path, **changes)
        found = steps_module.compare_texts(client, "phixtral", ANSWER, asked)
    assert failure in found["failure"]
    assert bool(found["failure"]) == bool(failure)
    assert found["equals_reference"] == (tuple(token_ids) == (5, 6, 7) and text == "main")
    assert (found["text"], found["reference_text"]) == (text, "main")
    assert found["streamed_equals_whole"] is True


@pytest.fixture
def serving_of(steps_module, server, monkeypatch):
    """(engine, repository, log) -> the fake server, which speaks no HTTP."""
    monkeypatch.setattr(steps_module, "triton_version", lambda endpoint: "2.68.0")

    @contextlib.contextmanager
    def serving(engine, repository, log):
        yield steps_module.Endpoint(grpc_url=server.url, http_url="", model="phixtral", world_size=1)

    return serving


def test_levels_that_fail_leave_what_was_measured(steps_module, load_module, server, tiny_engine, tmp_path, serving_of):
    good, calls = answering((5, 6, 7)), itertools.count()

    def answer(request, context):
        # Two for the text, then two rounds of two requests; the level of two streams then fails.
        yield from (
            good(request, context)
            if next(calls) < 6
            else server.failing(grpc.StatusCode.UNAVAILABLE, "the engine ended")(request, context)
        )

    server.answer = answer
    found, kept = {}, []
    asked = trial(steps_module, load_module, tiny_engine, tmp_path)
    with pytest.raises(steps_module.ServingFailed, match="2 streams: .*the engine ended"):
        steps_module.try_serving(asked, serving_of, lambda: kept.append(json.dumps(found)), found)
    one, two = found["levels"]
    assert one["tokens_per_s"]["median"] > 0
    assert two == {"concurrency": 2, "error": two["error"]}
    assert found["failures"] == []
    assert ["texts" in json.loads(text) for text in kept] == [False, True, True, True]
    assert len(json.loads(kept[-2])["levels"]) == 1


def test_more_tokens_than_the_context_has_are_refused_before_a_server_starts(
    steps_module, load_module, tiny_engine, tmp_path
):
    load = load_module.Load(prompt_tokens=500, output_tokens=100)
    asked = trial(steps_module, load_module, tiny_engine, tmp_path, load=load)
    with pytest.raises(ConfigError, match="600 tokens of a prompt and its answer, .* exceed the context of 640"):
        steps_module.try_serving(asked, None, lambda: None, {})
