"""ONNX Runtime behind TensorRT-LLM's token tensors: what is read, how responses look, and how requests are stopped."""

from __future__ import annotations

import time

import numpy as np
import pytest
from served import Sent

from triton_repo.contracts.ensemble import ADDED_ENGINE_NAMES, ADDED_TOKEN_INPUTS, ENGINE_NAMES, TOKEN_INPUTS
from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.errors import RequestError
from triton_repo.runtime.batching.alone import answered
from triton_repo.runtime.batching.loading import start
from triton_repo.runtime.options import SamplingOptions, SamplingPlan
from triton_repo.runtime.sampling import Sampler
from triton_repo.runtime.steps import token_engine
from triton_repo.runtime.steps.answer_keys import key_tensor
from triton_repo.runtime.steps.token_engine import Request, TokenEngine, stopped_response, token_request
from triton_repo.runtime.steps.token_request import TAKEN_INPUTS, read_token_request
from triton_repo.runtime.text.words import pack_words

TEXT = "return 😀 hello 語."
_DTYPES = {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": bool}
DTYPES = {tensor.name: _DTYPES.get(tensor.dtype) for tensor in (*TOKEN_INPUTS, *ADDED_TOKEN_INPUTS)}


def tensors(**values) -> dict[str, np.ndarray]:
    """Tensors of a request for a prompt of three tokens and 50 new ones; values replace or add."""
    given = {"input_ids": [5, 6, 7], "request_output_len": 50, **values}
    given.setdefault("input_lengths", len(given["input_ids"]))
    return {
        name: pack_words(value)[None] if name.endswith("words_list") else np.atleast_2d(np.array(value, DTYPES[name]))
        for name, value in given.items()
    }


def read(**values):
    return read_token_request(tensors(**values), max_sequence=64, num_tokens=300)


def refusal(**values) -> str:
    with pytest.raises(RequestError) as caught:
        read(**values)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "temperature", "top_k", "top_p"),
    [
        ({}, 0.0, 0, 0.0),
        ({"runtime_top_k": 0, "runtime_top_p": 0.0}, 0.0, 0, 0.0),
        ({"runtime_top_k": 5}, 1.0, 5, 0.0),
        ({"runtime_top_p": 0.5, "temperature": 0.7}, 0.7, 0, 0.5),
        ({"runtime_top_k": 5, "runtime_top_p": -1.0}, 1.0, 5, 0.0),
        ({"runtime_top_k": 0, "runtime_top_p": 1.0}, 1.0, 0, 1.0),
    ],
)
def test_the_defaults_are_the_cpp_backends(given, temperature, top_k, top_p):
    options = read(**given).plan.options
    assert (options.top_k, options.top_p, options.random_seed) == (top_k, top_p, 0)
    assert options.sampling_temperature == temperature


def test_every_tensor_that_is_taken_is_read():
    request = read(
        temperature=0.7, runtime_top_k=4, runtime_top_p=0.9, min_tokens=2, repetition_penalty=1.1, presence_penalty=0.5,
        frequency_penalty=0.25, seed=2**64 - 1, return_log_probs=True, end_id=9, streaming=True,
        stop_words_list=[[1, 2], [3]], bad_words_list=[[4]], exclude_input_in_output=False,
        return_num_input_tokens=True, return_num_output_tokens=True, min_p=0.05, num_log_probs=3,
        num_return_sequences=3, return_prompt_log_probs=True, embedding_bias=[0.0] * 7 + [-2.5] + [0.0] * 291 + [4.0],
        return_routed_experts=True,
    )  # fmt: skip
    assert request.plan.options == SamplingOptions(
        temperature=0.7, top_k=4, top_p=0.9, min_length=2, repetition_penalty=1.1, presence_penalty=0.5,
        frequency_penalty=0.25, random_seed=2**64 - 1, return_log_probs=True, min_p=0.05, num_log_probs=3,
        logit_bias=((7, -2.5), (299, 4.0)),
    )  # fmt: skip
    assert (request.plan.prompt_ids, request.plan.end_ids, request.most_tokens) == ((5, 6, 7), (9,), 50)
    assert (request.stop_words, request.bad_words) == (((1, 2), (3,)), ((4,),))
    assert (request.streaming, request.echo, request.count_input_tokens) == (True, True, True)
    assert (request.num_sequences, request.wants_prompt, request.wants_routing) == (3, True, True)


def test_a_padded_prompt_is_cut_and_an_output_beyond_the_context_too():
    request = read(input_ids=[5, 6, 7, 0, 0], input_lengths=3, request_output_len=1000)
    assert (request.plan.prompt_ids, request.most_tokens) == ((5, 6, 7), 61)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": [5, 300]}, "input_ids: found an id outside 0 to 299"),
        ({"input_ids": list(range(64))}, "input_ids: found 64 tokens, expected at most 63"),
        ({"input_lengths": 4}, "input_lengths: found 4, expected 1 to the 3 tokens"),
        ({"request_output_len": 0}, "request_output_len: found 0, expected 1 or more"),
        ({"beam_width": 2}, "beam_width: found 2, expected 1"),
        ({"return_context_logits": True}, "return_context_logits: found true, expected false"),
        ({"end_id": 300}, "end_id: found 300, expected a token id below 300"),
        ({"runtime_top_k": -1}, "runtime_top_k: found -1, expected 0 or more"),
        ({"num_return_sequences": 0}, "num_return_sequences: found 0, expected 1 to 16"),
        ({"num_return_sequences": 17}, "num_return_sequences: found 17, expected 1 to 16"),
        ({"min_p": 1.5}, "min_p: found 1.5, expected 0 <= min_p <= 1"),
        ({"num_log_probs": 21}, "num_log_probs: found 21, expected 0 to 20"),
        ({"embedding_bias": [1.0, 2.0]}, "embedding_bias: found 2 numbers, expected 300, one for each token"),
        ({"embedding_bias": [float("nan")] * 300}, "embedding_bias: found NaN or a number beyond 1024000"),
        ({"embedding_bias": [-float("inf")] * 300}, "embedding_bias: found NaN or a number beyond 1024000"),
        ({"temperature": -1.0}, "temperature: found -1.0, expected 0, or 0.001 to 1000"),
    ],
)
def test_a_bad_value_is_named_as_its_tensor(given, message):
    assert message in refusal(**given)


def test_a_prompt_and_words_of_any_size_are_refused_before_they_are_read():
    huge = {"input_ids": np.zeros((1, 20_000_000), np.int32), "request_output_len": np.array([[4]])}
    words = {"stop_words_list": np.zeros((1, 2, 10_000_000), np.int32)}
    started = time.process_time()
    with pytest.raises(RequestError, match="input_ids: found 20000000 tokens, expected at most 63") as caught:
        read_token_request({**huge, **words}, 64, 300)
    assert "stop_words_list: found 20000000 values, expected two rows of at most 131072 each" in str(caught.value)
    # Reading them into Python takes seconds.
    assert time.process_time() - started < 0.5


def test_every_problem_is_reported_and_so_is_a_missing_prompt():
    text = refusal(request_output_len=0, beam_width=2, end_id=-5)
    assert text.count("\n  - ") == 3
    with pytest.raises(RequestError, match="input_ids: found no token"):
        read_token_request({"request_output_len": np.array([[4]])}, 64, 300)
    broken = tensors()
    broken["stop_words_list"] = np.array([[[1, 2], [2, 1]]])
    with pytest.raises(RequestError, match=r"stop_words_list: found the ends \[2, 1\]"):
        read_token_request(broken, 64, 300)


def test_one_prompt_a_request_with_or_without_its_batch_dimension():
    batch = tensors() | {"input_ids": np.array([[5, 6, 7], [8, 9, 10]], dtype=np.int32)}
    with pytest.raises(RequestError, match="input_ids: found a batch of 2, expected 1"):
        read_token_request(batch, 64, 300)
    flat = tensors() | {"input_ids": np.array([5, 6, 7], dtype=np.int32)}
    assert read_token_request(flat, 64, 300).plan.prompt_ids == (5, 6, 7)


def test_all_that_preprocessing_sends_is_taken_and_known():
    assert {*ENGINE_NAMES.values(), *ADDED_ENGINE_NAMES.values()} <= TAKEN_INPUTS <= set(DTYPES)


@pytest.fixture
def responses(scripted, byte_level):
    """All responses to a request for the scripted text, each with whether it is the last."""

    def ask(text=TEXT, is_cancelled=lambda: False, **values):
        session = scripted(text)
        given = {"input_ids": byte_level.encode("def "), "end_id": byte_level.eos_token_id, **values}
        request = read_token_request(tensors(**given), session.max_sequence, byte_level.size)
        return list(answered(session, lambda outlet: token_request(request, byte_level.size, outlet), is_cancelled))

    return ask


def tokens_of(response) -> list[int]:
    ids = response["output_ids"]
    assert ids.shape[:2] == response["sequence_length"].shape == (1, 1)
    assert response["sequence_length"][0, 0] == ids.shape[2]
    assert ids.dtype == response["sequence_length"].dtype == np.int32
    return ids[0, 0].tolist()


def test_a_stream_is_a_token_a_response_and_ends_with_none_at_the_end_token(responses, byte_level):
    found = responses(streaming=True)
    assert [tokens_of(response) for response, _ in found] == [*([token] for token in byte_level.encode(TEXT)), []]
    assert [is_last for _, is_last in found] == [False] * (len(found) - 1) + [True]


def test_without_a_stream_all_tokens_come_at_once_after_the_prompt_where_it_is_wanted(responses, byte_level):
    [(response, is_last)] = responses()
    assert (tokens_of(response), is_last) == (byte_level.encode(TEXT), True)
    [(response, _)] = responses(exclude_input_in_output=False)
    assert tokens_of(response) == [*byte_level.encode("def "), *byte_level.encode(TEXT)]


def test_the_length_ends_a_stream_with_its_last_token(responses, byte_level):
    found = responses(streaming=True, request_output_len=3)
    assert [tokens_of(response) for response, _ in found] == [[token] for token in byte_level.encode(TEXT)[:3]]
    assert [is_last for _, is_last in found] == [False, False, True]


def test_stop_words_end_a_stream_and_their_tokens_are_shown(responses, byte_level):
    ids = byte_level.encode(TEXT)
    found = responses(streaming=True, stop_words_list=[[1, 2], ids[3:6], [9, 9, 9]])
    assert [token for response, _ in found for token in tokens_of(response)] == ids[:6]
    assert found[-1][1]


def test_the_last_token_of_a_bad_word_is_never_chosen_after_the_others(responses, byte_level):
    ids = byte_level.encode(TEXT)
    [(response, _)] = responses(bad_words_list=[ids[2:4]], request_output_len=6)
    # The script scores no other token, so that the lowest id is chosen instead: the end token.
    assert (tokens_of(response), byte_level.eos_token_id) == (ids[:3], 0)


def test_log_probabilities_are_those_of_all_tokens_so_far_and_the_sum_knows_the_end_token(responses):
    found = responses("ab", streaming=True, return_log_probs=True)
    logs = [response["output_log_probs"][0, 0].tolist() for response, _ in found]
    sums = [float(response["cum_log_probs"][0, 0]) for response, _ in found]
    assert [len(values) for values in logs] == [1, 2, 2]
    assert sums[:2] == pytest.approx([logs[0][0], sum(logs[1])])
    assert sums[2] < sums[1]
    assert all("output_log_probs" not in response for response, _ in responses("ab", streaming=True))


def test_counts_come_where_they_are_asked_for(responses, byte_level):
    found = responses("ab", streaming=True, return_num_input_tokens=True, return_num_output_tokens=True)
    assert {int(response["num_input_tokens"][0, 0]) for response, _ in found} == {len(byte_level.encode("def "))}
    assert [int(response["num_output_tokens"][0, 0]) for response, _ in found] == [1, 1, 0]


def test_a_request_that_nobody_waits_for_ends_with_a_response_of_nothing(responses):
    asked = []
    found = responses(streaming=True, is_cancelled=lambda: asked.append(0) or len(asked) > 4)
    assert [len(tokens_of(response)) for response, _ in found] == [1, 1, 1, 1, 0]
    assert found[-1][1]


def submit(engine, request_id="", key=None, is_cancelled=lambda: False, **values) -> Sent:
    """A request under way, with the key of its answer where an ensemble would give it one."""
    given = tensors(**values) | ({} if key is None else {"answer_key": key_tensor(key)})
    sent = Sent(Request, request_id=request_id, tensors=given, is_cancelled=is_cancelled)
    engine.submit(sent.request)
    return sent


@pytest.fixture
def engine(scripted):
    """An engine of one slot that writes a long text."""
    engine = TokenEngine(start(scripted("ab" * 2000, max_sequence=8192), ModelParameters(slots=1, memory_budget=8192)))
    yield engine
    engine.runner.close()


def test_a_request_to_stop_ends_the_one_that_runs_and_the_one_that_waits(engine):
    running = submit(engine, "a", request_output_len=8000, streaming=True)
    running.next()  # it runs
    waiting = submit(engine, "b", request_output_len=8000)
    assert engine.runner.stop("b") == 1
    assert engine.runner.stop("a") == 1
    assert tokens_of(running.last()[0]) == tokens_of(waiting.last()[0]) == []
    assert len(tokens_of(submit(engine, "c", request_output_len=2).last()[0])) == 2
    assert engine.runner.stop("a") == engine.runner.stop("never there") == 0


def test_a_request_is_stopped_by_its_key_too_and_one_without_an_id_by_no_empty_name(engine):
    running = submit(engine, "", key="k1", request_output_len=8000, streaming=True)
    running.next()
    waiting = submit(engine, "", key="k2", request_output_len=8000)
    assert engine.runner.stop("") == 0
    assert [engine.runner.stop("k2"), engine.runner.stop("k1")] == [1, 1]
    for sent, key in ((waiting, b"k2"), (running, b"k1")):
        last, _ = sent.last()
        assert (tokens_of(last), last["answer_key"].item(), last["is_cancelled"].item()) == ([], key, True)


def test_keys_come_back_with_each_response_and_what_is_not_upstreams_only_beside_one(engine, byte_level):
    keyed = submit(engine, key="k", request_output_len=2, streaming=True).all()
    assert [response["answer_key"].item() for response in keyed] == [b"k", b"k"]
    assert [response["is_cancelled"].item() for response in keyed] == [False, False]
    plain = submit(engine, request_output_len=2, streaming=True).all()
    assert {name for response in plain for name in response} == {"output_ids", "sequence_length", "sequence_index"}


def test_a_request_to_stop_is_answered_by_nothing_or_beside_a_key_by_no_tokens():
    assert stopped_response({}) is None
    response = stopped_response({"answer_key": key_tensor("k")})
    assert tokens_of(response) == []
    assert (response["answer_key"].item(), response["is_cancelled"].item()) == (b"k", True)


def test_a_step_that_has_nothing_to_send_probes_now_and_then(engine, monkeypatch):
    monkeypatch.setattr(token_engine, "PROBE_INTERVAL_S", 0.05)
    running = submit(engine, "a", request_output_len=8000, streaming=True)
    running.next()
    waiting = submit(engine, key="k", request_output_len=2)
    probe, is_last = waiting.next()
    assert (set(probe), probe["answer_key"].item(), is_last) == ({"is_probe", "answer_key"}, b"k", False)
    engine.runner.stop("a")
    assert len(tokens_of(waiting.last()[0])) == 2


def test_a_bad_request_is_refused_while_another_runs(engine):
    running = submit(engine, "a", request_output_len=8000, streaming=True)
    running.next()
    assert isinstance(submit(engine, "b", request_output_len=0).last(), RequestError)
    assert engine.runner.stop("a") == 1


def test_requests_without_an_id_end_in_any_order(scripted):
    session = scripted("ab" * 2000, max_sequence=8192)
    engine = TokenEngine(start(session, ModelParameters(slots=2, memory_budget=16384)))
    running = submit(engine, request_output_len=8000, streaming=True)
    running.next()
    for _ in range(2):  # in the other slot
        assert len(tokens_of(submit(engine, request_output_len=2, streaming=True).last()[0])) == 1
    engine.runner.close()
    assert tokens_of(running.last()[0]) == []


def test_the_sampler_is_the_one_of_models_without_steps():
    options = SamplingOptions(temperature=1.0, top_k=50, random_seed=11)
    request = read(temperature=1.0, runtime_top_k=50, seed=11)
    logits = np.random.default_rng(3).normal(size=300).astype(np.float32)
    plan = SamplingPlan(options=options, prompt_ids=(5, 6, 7), end_ids=())
    ours, theirs = Sampler(plan, 300), Sampler(request.plan, 300)
    assert [ours.choose(logits).token_id for _ in range(50)] == [theirs.choose(logits).token_id for _ in range(50)]
