"""One live Triton with the same engine twice: as one model, and as an ensemble. A client cannot tell the two apart."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from google.protobuf import text_format
from live_triton import LiveTriton
from tritonclient.grpc import InferenceServerClient, InferInput, InferRequestedOutput, service_pb2
from tritonclient.utils import np_to_triton_dtype

from clients import errors
from clients.generation import Client, GenerationRequest
from export.tokenizer.loading import load_tokenizer
from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.contracts.piece import join
from triton_repo.packaging.model_config import read_config
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.serving.server import ServerOptions, running_server

SINGLE, STEPS = "alone", "steps"
NO_END_ID = -1
PROMPTS = (
    "def main(", "x", " ", "\n\n", "import os\n", "class A:\n    pass", "naïve café", "Ångström ñ ß", "日本語の文章",
    "漢字", "😀", "👩‍👩‍👧 family", "🏳️‍🌈", "e\u0301 combining", "مرحبا", "Ωμέγα", "a" * 200, "1 + 1 =",
    "\t\ttabs", "<|endoftext|>after",
)  # fmt: skip
# Put into a served model.py: each token decoded alone, as if it were whole characters.
FAULT = """
from triton_repo.runtime import answer


class _Alone(answer.Detokenizer):
    def push(self, token_id):
        return self._tokenizer.decode([token_id])

    def flush(self):
        return ""


answer.Detokenizer = _Alone
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory, tiny_engine):
    folder = tmp_path_factory.mktemp("both") / "repository"
    package_engine(
        PackageOptions(engine=tiny_engine, name=SINGLE, output=folder, onnxruntime=ModelParameters(threads=1))
    )
    package_engine(
        PackageOptions(
            engine=tiny_engine, name=STEPS, output=folder, onnxruntime=ModelParameters(threads=1), layout="ensemble"
        )
    )
    return folder


@pytest.fixture(scope="module")
def live(repository):
    with running_server(ServerOptions(repository=repository)) as server, LiveTriton(server) as triton:
        yield triton


@pytest.fixture(scope="module")
def client(live):
    with Client(live.server.grpc_url) as client:
        yield client


@pytest.fixture(scope="module")
def free(client):
    """A greedy answer of the model alone, its tokens and text."""
    return client.generate(request_to(SINGLE, max_tokens=60, end_id=NO_END_ID))


@pytest.fixture(scope="module")
def in_text_alone(free, tiny_engine) -> str:
    """Three characters of the answer that its tokens do not spell, so that the engine does not see them: among them is
    what stands for bytes that are no character."""
    tokenizer, tokens = load_tokenizer(tiny_engine), list(free.token_ids)

    def is_spelled(word: str) -> bool:
        ids = tokenizer.encode(word)
        return any(tokens[start : start + len(ids)] == ids for start in range(len(tokens)))

    words = (free.text[start : start + 3] for start in range(10, len(free.text) - 3))
    return next(word for word in words if not is_spelled(word))


def request_to(model: str, **fields) -> GenerationRequest:
    return GenerationRequest(**{"model": model, "prompt": "def ", "max_tokens": 24, **fields})


def parts(pieces) -> list:
    """What a client gets, piece by piece, but for log-probabilities."""
    return [
        (piece.text, piece.token_ids, piece.finish_reason, piece.num_input_tokens, piece.num_output_tokens)
        for piece in pieces
    ]


def merged_like(pieces, merged) -> list:
    """Pieces joined to those of a server that merges pieces which wait to be sent."""
    left = list(pieces)
    groups = []
    for end in (piece.num_output_tokens for piece in merged):
        size = 1 + next(
            place for place, piece in enumerate(left) if piece.num_output_tokens == end or piece is left[-1]
        )
        groups.append(join(left[:size]))
        left = left[size:]
    assert not left
    return groups


def ask_both(client, **fields):
    """The pieces of both models, which must be the same; returns the ensemble's. Then the same of a whole answer."""
    alone, steps = (list(client.stream(request_to(model, **fields))) for model in (SINGLE, STEPS))
    steps, sent = merged_like(steps, alone), steps
    assert parts(steps) == parts(alone)
    whole_alone, whole_steps = (client.generate(request_to(model, **fields)) for model in (SINGLE, STEPS))
    assert parts([whole_steps]) == parts([whole_alone])
    assert whole_steps.text == "".join(piece.text for piece in steps)
    for found, expected in zip([*steps, whole_steps], [*alone, whole_alone], strict=True):
        assert found.log_probs == pytest.approx(expected.log_probs, rel=1e-5, abs=1e-5)
        assert found.cum_log_prob == (expected.cum_log_prob and pytest.approx(expected.cum_log_prob, rel=1e-5))
    return sent


@pytest.mark.parametrize("prompt", PROMPTS)
def test_each_prompt_has_the_same_answer_streamed_and_whole(client, prompt):
    pieces = ask_both(client, prompt=prompt)
    assert pieces[-1].finish_reason in ("stop", "length")


@pytest.mark.parametrize("seed", [1, 2**63 + 5, 2**64 - 1])
def test_a_seeded_sample_is_the_same(client, seed):
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_length": 3, "repetition_penalty": 1.2}
    ask_both(client, random_seed=seed, presence_penalty=0.3, frequency_penalty=0.1, return_log_probs=True, **options)
    other = client.generate(request_to(STEPS, random_seed=7, **options))
    assert other != client.generate(request_to(STEPS, random_seed=8, **options))


def test_min_p_a_bias_and_the_likeliest_tokens_are_the_same(client, tiny_engine):
    often, never_chosen = load_tokenizer(tiny_engine).encode(" self")[0], 5
    options = {"min_p": 0.02, "temperature": 1.2, "random_seed": 4, "logit_bias": {often: 6.5, never_chosen: -1000.0}}
    for fields in ({"num_log_probs": 4, "return_log_probs": True, **options}, {"num_log_probs": 1}):
        alone, steps = (client.generate(request_to(model, **fields)) for model in (SINGLE, STEPS))
        assert alone.token_ids == steps.token_ids
        assert len(alone.top_log_probs) == len(alone.token_ids) > 3
        for ours, theirs in zip(alone.top_log_probs, steps.top_log_probs, strict=True):
            assert [token for token, _ in ours] == [token for token, _ in theirs]
            assert len(ours) == fields["num_log_probs"]
            assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], abs=1e-5)
        if "logit_bias" in fields:
            assert alone.token_ids.count(often) > client.generate(request_to(SINGLE)).token_ids.count(often)
    streamed = list(client.stream(request_to(STEPS, num_log_probs=2)))
    assert all(len(piece.top_log_probs) == len(piece.token_ids) for piece in streamed)


def test_the_experts_of_each_token_are_the_same_streamed_or_not(client):
    alone, steps = (client.generate(request_to(model, return_routed_experts=True)) for model in (SINGLE, STEPS))
    streamed = join(client.stream(request_to(STEPS, return_routed_experts=True)))
    assert len(alone.routing) == len(alone.token_ids) > 3
    # Steps with drafts round weights in another way.
    for other in (steps, streamed):
        found, expected = np.array(other.routing), np.array(alone.routing)  # [tokens, layers, K, expert and weight]
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found[..., 0], expected[..., 0])
        np.testing.assert_allclose(found[..., 1], expected[..., 1], atol=1e-5)
    assert alone.num_experts == steps.num_experts == 5


def test_a_sample_without_a_seed_is_another_each_time(client):
    sampled = request_to(STEPS, temperature=1.0, end_id=NO_END_ID)
    assert client.generate(sampled).token_ids != client.generate(sampled).token_ids


def test_an_end_token_ends_both_with_its_log_probability(client, free):
    pieces = ask_both(client, end_id=free.token_ids[7], max_tokens=60, return_log_probs=True)
    first = free.token_ids.index(free.token_ids[7])
    assert (pieces[-1].finish_reason, pieces[-1].token_ids[-1]) == ("stop", free.token_ids[7])
    assert pieces[-1].num_output_tokens == first + 1
    assert pieces[-1].log_probs[-1] < 0
    ask_both(client, end_id=free.token_ids[0], max_tokens=60)


def test_a_stop_word_of_one_token_and_one_across_tokens_end_both(client, tiny_engine, free, in_text_alone):
    tokenizer = load_tokenizer(tiny_engine)
    token = next(token for token in free.token_ids[5:] if tokenizer.decode([token]).isalnum())
    for word in (tokenizer.decode([token]), free.text[10:13], free.text[20:22], in_text_alone):
        pieces = ask_both(client, stop_words=("never there", word), max_tokens=60, end_id=NO_END_ID)
        assert pieces[-1].finish_reason == "stop"
        assert "".join(piece.text for piece in pieces) == free.text[: free.text.index(word)]


def test_the_context_and_the_prompt_before_the_answer_are_the_same(client):
    pieces = ask_both(client, prompt="x" * 600, max_tokens=10_000, end_id=NO_END_ID)
    assert pieces[-1].finish_reason == "length"


def test_a_whole_answer_repeats_the_prompt_where_it_is_asked_to_and_a_stream_never_does(client):
    for model in (SINGLE, STEPS):
        expected = client.generate(request_to(model)).text
        asked = request_to(model, exclude_input_in_output=False)
        assert client.generate(asked).text == f"def {expected}"
        assert "".join(piece.text for piece in client.stream(asked)) == expected


def test_a_bad_word_of_one_token_never_appears(client, tiny_engine, free):
    tokenizer = load_tokenizer(tiny_engine)
    word = next(text for token in free.token_ids if (text := tokenizer.decode([token])).isalnum())
    answer = client.generate(request_to(STEPS, max_tokens=60, end_id=NO_END_ID, bad_words=(word,)))
    assert tokenizer.encode(word)[0] in free.token_ids
    assert tokenizer.encode(word)[0] not in answer.token_ids


def test_requests_side_by_side_have_the_answers_that_each_has_alone(client):
    requests = [request_to(STEPS, prompt=prompt, stop_words=("zz",)) for prompt in PROMPTS[:8]]
    alone = [client.generate(request) for request in requests]
    with ThreadPoolExecutor(max_workers=8) as pool:
        assert list(pool.map(client.generate, requests)) == alone


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0, "top_p": 7.0},
        {"temperature": -1.0},
        {"prompt": "x" * 2000},
        {"end_id": 99_999},
        {"beam_width": 3},
        {"stop_words": ("", "\udc80"[:0], "a"), "top_k": -1},
    ],
)
def test_a_refusal_reads_the_same(client, bad):
    found = []
    for model in (SINGLE, STEPS):
        with pytest.raises(errors.RequestRejected) as caught:
            client.generate(request_to(model, **bad))
        found.append(str(caught.value).replace(model, "M"))
    assert found[0] == found[1]
    assert client.generate(request_to(STEPS)).finish_reason


def num_stopped(live) -> int:
    """How many requests under way the engine was told to stop."""
    return len(re.findall(r"stopped the request \S+ \(1 in progress\)", live.server.log.read_text()))


def test_a_stop_word_that_the_text_alone_shows_frees_the_engine(live, in_text_alone):
    asked = {"text_input": "def ", "max_tokens": 600, "end_id": NO_END_ID, "stop_words": [in_text_alone]}
    before = num_stopped(live)
    responses = live.ask(STEPS, stream=True, **asked)
    assert num_stopped(live) == before + 1
    # The last piece comes before the engine has ended; the end of the stream follows it.
    assert [response.final for response in responses] == [False] * (len(responses) - 1) + [True]
    assert responses[-2].outputs["finish_reason"] == [b"stop"]


def infer_inputs(**arrays) -> list[InferInput]:
    """Inputs as NVIDIA's clients make them, [1, n]."""
    inputs = []
    for name, array in arrays.items():
        made = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        made.set_data_from_numpy(array)
        inputs.append(made)
    return inputs


def stream_of(live, model: str, request_id: str, **arrays) -> list:
    """All results of a request sent as NVIDIA's clients send theirs (inflight_batcher_llm_client.py and
    end_to_end_grpc_client.py of TensorRT-LLM)."""
    results, errors_found = [], []
    with InferenceServerClient(live.server.grpc_url) as nvidia:
        nvidia.start_stream(lambda result, error: (errors_found if error else results).append(error or result))
        nvidia.async_stream_infer(model, infer_inputs(**arrays), request_id=request_id)
        nvidia.stop_stream()
    assert errors_found == []
    return results


def test_nvidias_text_client_is_answered(live, client):
    results = stream_of(
        live, STEPS, "nvidia-1", text_input=np.array([["def "]], dtype=object), max_tokens=np.array([[12]], np.int32),
        bad_words=np.array([[""]], dtype=object), stop_words=np.array([[""]], dtype=object),
        stream=np.array([[True]]), beam_width=np.array([[1]], np.int32), temperature=np.array([[1.0]], np.float32),
        top_k=np.array([[1]], np.int32), top_p=np.array([[0.0]], np.float32), seed=np.array([[0]], np.uint64),
        length_penalty=np.array([[1.0]], np.float32), return_log_probs=np.array([[False]]),
    )  # fmt: skip
    text = "".join(result.as_numpy("text_output")[0].decode() for result in results)
    assert text == client.generate(request_to(SINGLE, max_tokens=12)).text


@pytest.mark.parametrize("model", [SINGLE, STEPS])
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("exclude", [True, False])
def test_nvidias_output_check_passes(live, client, model, streaming, exclude):
    """What `end_to_end_grpc_client.py --check-outputs` sends and expects: temperature 1.0 is sent always and is greedy,
    the prompt comes first in a whole answer alone. It asks for one output."""
    prompt = "def main("
    sent = infer_inputs(
        text_input=np.array([[prompt]], dtype=object), max_tokens=np.array([[12]], np.int32),
        stream=np.array([[streaming]]), beam_width=np.array([[1]], np.int32),
        temperature=np.array([[1.0]], np.float32), exclude_input_in_output=np.array([[exclude]]),
    )  # fmt: skip
    results, failures = [], []
    with InferenceServerClient(live.server.grpc_url) as nvidia:
        nvidia.start_stream(lambda result, error: (failures if error else results).append(error or result))
        nvidia.async_stream_infer(
            model,
            sent,
            outputs=[InferRequestedOutput("text_output")],
            request_id=f"check-{model}-{streaming}-{exclude}",
        )
        nvidia.stop_stream()
    assert failures == []
    found = "".join(result.as_numpy("text_output")[0].decode() for result in results)
    expected = client.generate(request_to(SINGLE, prompt=prompt, max_tokens=12)).text
    assert found == (expected if streaming or exclude else prompt + expected)


def test_nvidias_token_client_is_answered(live, client, tiny_engine):
    ids = load_tokenizer(tiny_engine).encode_prompt("def ")
    asked = {
        "input_ids": np.array([ids], np.int32), "input_lengths": np.array([[len(ids)]], np.int32),
        "request_output_len": np.array([[12]], np.int32), "beam_width": np.array([[1]], np.int32),
        "temperature": np.array([[1.0]], np.float32), "runtime_top_k": np.array([[1]], np.int32),
        "runtime_top_p": np.array([[0.0]], np.float32), "len_penalty": np.array([[1.0]], np.float32),
        "repetition_penalty": np.array([[1.0]], np.float32), "end_id": np.array([[-1]], np.int32),
        "pad_id": np.array([[0]], np.int32), "return_log_probs": np.array([[True]]),
        "return_context_logits": np.array([[False]]), "return_generation_logits": np.array([[False]]),
    }  # fmt: skip
    expected = client.generate(request_to(SINGLE, max_tokens=12, end_id=NO_END_ID, return_log_probs=True))
    streamed = stream_of(live, "tensorrt_llm", "nvidia-2", streaming=np.array([[True]]), **asked)
    assert [result.as_numpy("output_ids").tolist() for result in streamed] == [[[[t]]] for t in expected.token_ids]
    assert all(result.as_numpy("sequence_length").tolist() == [[1]] for result in streamed)
    [whole] = stream_of(live, "tensorrt_llm", "nvidia-3", streaming=np.array([[False]]), **asked)
    assert whole.as_numpy("output_ids").tolist() == [[list(expected.token_ids)]]
    assert whole.as_numpy("output_log_probs").ravel() == pytest.approx(expected.log_probs, rel=1e-5)


def test_nvidias_stop_request_ends_the_one_of_its_id(live, tiny_engine):
    # Hot draws repeat nothing that a draft could guess, so that the answer takes its time.
    hot = {"temperature": 50.0, "top_p": 1.0, "seed": 3}
    call, ended = live.call(STEPS, "stop-me", text_input="x", max_tokens=600, end_id=NO_END_ID, stream=True, **hot)
    next(call)
    one = np.ones((1, 1), np.int32)
    stream_of(
        live, "tensorrt_llm", "stop-me", input_ids=one, input_lengths=one, request_output_len=one,
        stop=np.array([[True]]),
    )  # fmt: skip
    last = None
    for message in call:
        assert not message.error_message
        last = message.infer_response if message.infer_response.outputs else last
        if message.infer_response.parameters["triton_final_response"].bool_param:
            ended.set()
    assert "stopped the request 'stop-me' (1 in progress)" in live.server.log.read_text()
    assert b"cancelled" in b"".join(last.raw_output_contents)


def generate_over_http(live, **fields) -> dict:
    body = json.dumps({"text_input": "def ", "max_tokens": 6, "stop_words": "", "bad_words": "", **fields}).encode()
    url = f"{live.server.http_url}/v2/models/{STEPS}/generate"
    with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=30) as response:
        return json.load(response)


def test_the_http_generate_endpoint_answers_in_json(live, client):
    answer = generate_over_http(live)
    assert answer["text_output"] == client.generate(request_to(SINGLE, max_tokens=6)).text
    assert answer["num_output_tokens"] == 6


def test_over_http_a_bad_request_has_status_400(live):
    with pytest.raises(urllib.error.HTTPError) as caught:
        generate_over_http(live, max_tokens=0)
    with caught.value as answer:
        assert answer.code == 400
        assert "max_tokens: found 0, expected 1 or more" in json.load(answer)["error"]


def test_the_server_reports_the_configurations_that_packaging_meant(live, repository):
    for name in (STEPS, "preprocessing", "tensorrt_llm", "postprocessing"):
        reported = live.stub.ModelConfig(service_pb2.ModelConfigRequest(name=name)).config
        meant = read_config(repository / name / "config.pbtxt")
        if name == STEPS:
            # Triton finds that an ensemble is decoupled from its steps.
            assert reported.model_transaction_policy.decoupled
            reported.ClearField("model_transaction_policy")
        for server_own in ("version_policy", "optimization", "default_model_filename"):
            reported.ClearField(server_own)
        for group in reported.instance_group:
            group.ClearField("name")
        assert text_format.MessageToString(reported) == text_format.MessageToString(meant)


def test_only_the_engines_process_holds_onnxruntime_and_none_holds_torch(live):
    mapped = {}
    for child in psutil.Process(live.server.process.pid).children():
        words = " ".join(child.cmdline())
        for name in ("preprocessing", "tensorrt_llm", "postprocessing"):
            if f"/{name}/" in words:
                mapped[name] = {region.path for region in child.memory_maps()}
    holding = {name for name, paths in mapped.items() if any("onnxruntime" in path for path in paths)}
    assert (set(mapped), holding) == ({"preprocessing", "tensorrt_llm", "postprocessing"}, {"tensorrt_llm"})
    assert not [path for paths in mapped.values() for path in paths if "/torch/" in path]


def test_a_detokenizer_that_breaks_characters_is_seen_by_these_comparisons(tmp_path, tiny_engine, client):
    folder = tmp_path / "repository"
    package_engine(
        PackageOptions(
            engine=tiny_engine, name=STEPS, output=folder, onnxruntime=ModelParameters(threads=1), layout="ensemble"
        )
    )
    model = folder / "postprocessing" / "1" / "model.py"
    model.write_text(model.read_text(encoding="utf-8").replace("\nLAST = ", f"{FAULT}\nLAST = "), encoding="utf-8")
    with running_server(ServerOptions(repository=folder)) as server, Client(server.grpc_url) as faulty:
        differ = [
            prompt
            for prompt in PROMPTS
            if parts(faulty.stream(request_to(STEPS, prompt=prompt)))
            != parts(client.stream(request_to(SINGLE, prompt=prompt)))
        ]
    assert len(differ) > len(PROMPTS) / 2
