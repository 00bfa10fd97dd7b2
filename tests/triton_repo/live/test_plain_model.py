"""One live Triton: what it reports, what it streams, what it refuses, and that it goes on."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request

import grpc
import psutil
import pytest
from google.protobuf import text_format
from live_triton import Refused
from serve_command import wait_until
from tritonclient.grpc import model_config_pb2, service_pb2

from export.tokenizer.loading import load_tokenizer
from triton_repo.contracts.piece import join
from triton_repo.packaging.model_config import read_config
from triton_repo.runtime.options import GenerationOptions
from triton_repo.runtime.single.generation import generate
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session

CANCELLED = r"cancelled after (\d+) tokens"
PROMPTS = (
    "def main(", "x", " ", "\n\n", "import os\n", "class A:\n    pass", "naïve café", "Ångström ñ ß", "日本語の文章",
    "漢字", "😀", "👩‍👩‍👧 family", "🏳️‍🌈", "e\u0301 combining", "مرحبا", "Ωμέγα", "a" * 200, "1 + 1 =",
    "\t\ttabs", "<|endoftext|>after",
)  # fmt: skip


@pytest.fixture(scope="module")
def in_process(tiny_engine):
    """Answers with the same engine in this process."""
    session, tokenizer = Session(open_engine(tiny_engine), threads=1), load_tokenizer(tiny_engine)
    return lambda **fields: join(generate(session, tokenizer, GenerationOptions(**fields)))


def test_the_server_reports_the_configuration_that_packaging_meant(live, repository):
    reported = live.stub.ModelConfig(service_pb2.ModelConfigRequest(name="tiny")).config
    meant = read_config(repository / "tiny" / "config.pbtxt")
    # What the server fills in for itself, whatever auto-completion is set to.
    for server_own in ("version_policy", "optimization", "default_model_filename"):
        reported.ClearField(server_own)
    reported.instance_group[0].ClearField("name")
    assert text_format.MessageToString(reported) == text_format.MessageToString(meant)
    assert reported.model_transaction_policy.decoupled
    assert reported.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
    assert reported.max_batch_size == 1


@pytest.mark.parametrize("prompt", PROMPTS)
def test_streamed_pieces_the_whole_text_and_the_in_process_text_are_the_same(live, in_process, prompt):
    streamed = live.ask("tiny", text_input=prompt, max_tokens=24, stream=True)
    [whole] = live.ask("tiny", text_input=prompt, max_tokens=24, stream=False)
    answer = in_process(prompt=prompt, max_tokens=24)
    assert "".join(response.text for response in streamed) == whole.text == answer.text
    assert tuple(token for response in streamed for token in response.outputs["token_ids"]) == answer.token_ids
    assert [response.final for response in streamed] == [False] * (len(streamed) - 1) + [True]
    reasons = [response.outputs["finish_reason"] for response in streamed]
    assert reasons == [[b""]] * (len(streamed) - 1) + [[answer.finish_reason.encode()]]


def test_a_seeded_sample_is_the_same_over_the_wire_and_in_process(live, in_process):
    asked = {"max_tokens": 24, "temperature": 0.9, "top_p": 0.8, "top_k": 50, "random_seed": 2**63 + 5}
    expected = in_process(prompt="def ", **asked).text
    assert live.text("tiny", text_input="def ", **asked) == expected
    assert live.text("tiny", text_input="def ", stream=True, **asked) == expected
    assert live.text("tiny", text_input="def ", **{**asked, "random_seed": 6}) != expected


def test_log_probabilities_come_when_asked_for_and_sum_up(live, in_process):
    asked = {"max_tokens": 12, "return_log_probs": True}
    streamed = live.ask("tiny", text_input="def ", stream=True, **asked)
    expected = in_process(prompt="def ", **asked)
    log_probs = [value for response in streamed for value in response.outputs["output_log_probs"]]
    assert log_probs == pytest.approx(expected.log_probs, abs=1e-5)
    assert streamed[-1].outputs["cum_log_probs"] == pytest.approx([sum(expected.log_probs)], abs=1e-4)
    [silent] = live.ask("tiny", text_input="def ", max_tokens=2)
    assert not {"cum_log_probs", "output_log_probs"} & set(silent.outputs)


def test_responses_have_the_shapes_that_nvidias_clients_read(live):
    [response] = live.ask(
        "tiny", text_input="def ", max_tokens=5, stream=False, beam_width=1, temperature=1.0, num_return_sequences=1,
        exclude_input_in_output=False, end_id=256, pad_id=256, top_k=1, seed=7, min_tokens=5, bad_words=[""],
        stop_words=[""], length_penalty=1.0, return_num_input_tokens=True, return_log_probs=True,
    )  # fmt: skip
    assert response.shapes == {
        "text_output": [1], "sequence_index": [1, 1], "batch_index": [1, 1], "finish_reason": [1, 1],
        "token_ids": [1, 5], "num_input_tokens": [1, 1], "num_output_tokens": [1, 1], "cum_log_probs": [1, 1],
        "output_log_probs": [1, 5],
    }  # fmt: skip
    assert response.text.startswith("def ")
    assert response.outputs["num_input_tokens"] == [4]
    assert response.outputs["num_output_tokens"] == [5]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"text_input": "", "max_tokens": 4}, "text_input: found '', expected at least one character"),
        ({"text_input": "x", "max_tokens": 0}, "max_tokens: found 0, expected 1 or more"),
        ({"text_input": b"\xff", "max_tokens": 4}, "byte 0 is 0xff"),
        ({"text_input": "x", "max_tokens": 4, "temperature": float("nan")}, "temperature: found nan"),
        ({"text_input": "x" * 640, "max_tokens": 4}, "found a prompt of 640 tokens, expected at most 639"),
        ({"text_input": "x", "max_tokens": 4, "end_id": 257}, "end_id: found 257, expected a token id below 257"),
        ({"text_input": "x", "max_tokens": 4, "beam_width": 3}, "beam_width: found 3, expected 1"),
    ],
)
def test_a_bad_request_is_an_invalid_argument_and_the_server_goes_on(live, asked, message):
    for stream in (True, False):
        with pytest.raises(Refused) as caught:
            live.ask("tiny", stream=stream, **asked)
        assert str(caught.value).startswith("INVALID_ARGUMENT: ")
        assert message in str(caught.value)
    assert live.text("tiny", text_input="x", max_tokens=2)


def test_stop_words_end_the_stream_before_the_word(live, in_process):
    free = in_process(prompt="def ", max_tokens=40).text
    word = free[10:13]
    streamed = live.ask("tiny", text_input="def ", max_tokens=40, stream=True, stop_words=[word, "never there"])
    assert "".join(response.text for response in streamed) == free[: free.index(word)]
    assert streamed[-1].outputs["finish_reason"] == [b"stop"]


def test_cancellation_ends_the_generation_and_frees_the_slot(live):
    asked = {"max_tokens": 639, "end_id": -1, "temperature": 1.0, "random_seed": 1}
    before = len(re.findall(CANCELLED, live.server.log.read_text()))
    call, _ = live.call("slow", text_input="x", stream=True, **asked)
    next(call)
    call.cancel()
    # The model has one slot: this answer comes only once the cancelled request has left it.
    assert live.text("slow", text_input="x", max_tokens=2)
    [produced] = wait_until(lambda: re.findall(CANCELLED, live.server.log.read_text())[before:])
    assert 0 < int(produced) < 639
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() == grpc.StatusCode.CANCELLED


def test_a_damaged_engine_is_not_served_and_the_other_model_is(live):
    states = {state.name: state for state in live.server.models}
    assert states["tiny"].ready
    assert states["damaged"].state == "UNAVAILABLE"
    assert re.search(r"model.onnx.data: \S+ \(bytes \d+ to \d+\): found SHA-256", states["damaged"].reason)
    call, ended = live.call("damaged", text_input="x", max_tokens=2)
    assert "'damaged' has no available versions" in next(call).error_message
    ended.set()


def test_metrics_are_served_on_their_own_port(live):
    with urllib.request.urlopen(live.server.metrics_url, timeout=10) as response:
        assert b'nv_inference_request_success{model="tiny"' in response.read()


def test_the_http_generate_endpoint_answers_in_json(live):
    body = json.dumps({"text_input": "def ", "max_tokens": 6, "stop_words": "", "bad_words": ""}).encode()
    url = f"{live.server.http_url}/v2/models/tiny/generate"
    with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=30) as response:
        answer = json.load(response)
    assert answer["text_output"] == live.text("tiny", text_input="def ", max_tokens=6)
    assert answer["num_output_tokens"] == 6


def test_http_generate_gives_one_value_bare_and_others_as_a_flat_list(live):
    """As docs/wire.md says of Triton's endpoint: clients that read JSON must know it."""
    url = f"{live.server.http_url}/v2/models/tiny/generate"

    def answer(max_tokens):
        body = json.dumps({"text_input": "def ", "max_tokens": max_tokens, "num_log_probs": 2, "end_id": -1}).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=30) as response:
            return json.load(response)

    one, two = answer(1), answer(2)
    assert one["token_ids"] == two["token_ids"][0]
    assert (len(two["token_ids"]), len(two["top_token_ids"])) == (2, 4)
    assert two["top_token_ids"][:2] == one["top_token_ids"]


def test_over_http_a_bad_request_has_status_400(live):
    body = json.dumps({"text_input": "def ", "max_tokens": 0, "stop_words": "", "bad_words": ""}).encode()
    url = f"{live.server.http_url}/v2/models/tiny/generate"
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=30)
    with caught.value as answer:
        assert answer.code == 400
        assert "max_tokens: found 0, expected 1 or more" in json.load(answer)["error"]


def test_the_model_process_holds_onnxruntime_and_no_torch(live):
    [stub] = [
        child for child in psutil.Process(live.server.process.pid).children() if "tiny" in " ".join(child.cmdline())
    ]
    mapped = {region.path for region in stub.memory_maps()}
    assert any("onnxruntime" in path for path in mapped)
    assert not [path for path in mapped if "/torch/" in path]
