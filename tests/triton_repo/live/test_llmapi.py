"""A live Triton whose models run on the stand-in of TensorRT-LLM's LLM API: both contracts, over gRPC and HTTP."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from google.protobuf import text_format
from live_triton import LiveTriton, Refused
from llmapi_library import STANDIN
from mixtral_checkpoints import write_mixtral_checkpoint
from serve_command import wait_until
from tritonclient.grpc import service_pb2

from clients.generation import Client
from clients.messages import GenerationRequest
from export.tokenizer.loading import load_tokenizer
from triton_repo.errors import ServerError
from triton_repo.packaging.llmapi_package import LlmApiOptions, package_llmapi
from triton_repo.packaging.model_config import read_config
from triton_repo.serving import installation
from triton_repo.serving.server import ServerOptions, running_server

PROMPT = "the quick brown fox — naïve 日本 fox"
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def python_with_the_library(tmp_path_factory) -> Path:
    """A Python that has TensorRT-LLM beside what ours has, as a container's: its bin folder."""
    home = tmp_path_factory.mktemp("python")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = home / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (home / "bin").mkdir()
    for name in ("python", "python3", version):
        (home / "bin" / name).symlink_to(Path(sys.executable).resolve())
    (home / "pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix) / 'bin'}\ninclude-system-site-packages = false\n")
    [ours] = [Path(entry) for entry in sys.path if Path(entry, "numpy").is_dir()]
    for entry in [*ours.iterdir(), STANDIN / "tensorrt_llm"]:
        (packages / entry.name).symlink_to(entry)
    return home / "bin"


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """One model with both contracts, one as upstream's, and one whose model.yaml has an unknown argument."""
    folder = tmp_path_factory.mktemp("llmapi")
    checkpoint = write_mixtral_checkpoint(folder / "checkpoint", seed=5)
    output = folder / "repository"
    for name, max_batch_size in (("mixtral", 1), ("plain", 0), ("broken", 1)):
        package_llmapi(
            LlmApiOptions(
                checkpoint=str(checkpoint), name=name, output=output, max_batch_size=max_batch_size,
                cancellation_check_period_ms=20, max_seq_len=600,
            )
        )  # fmt: skip
    settings = output / "broken" / "1" / "model.yaml"
    settings.write_text("max_sequence_length: 5\n" + settings.read_text())
    return output


@pytest.fixture(scope="module")
def triton(repository, python_with_the_library):
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(installation.sys, "executable", str(python_with_the_library / "python3"))
            server = stack.enter_context(running_server(ServerOptions(repository=repository)))
        yield stack.enter_context(LiveTriton(server))


def calls(repository: Path, model: str = "mixtral") -> list[dict]:
    """What the model's LLM was called with."""
    text = (repository / model / "1" / "checkpoint" / "calls.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_llm_is_started_with_model_yamls_arguments_and_without_remote_code(triton, repository):
    assert calls(repository)[0] == {
        "arguments": {
            "tensor_parallel_size": 1, "trust_remote_code": False, "backend": "pytorch", "pipeline_parallel_size": 1,
            "moe_tensor_parallel_size": 1, "moe_expert_parallel_size": 1, "max_seq_len": 600,
        }
    }  # fmt: skip


def test_the_configuration_is_the_packaged_one_without_auto_completion(triton, repository):
    for model in ("mixtral", "plain"):
        reported = triton.stub.ModelConfig(service_pb2.ModelConfigRequest(name=model)).config
        for server_own in ("version_policy", "optimization", "default_model_filename"):
            reported.ClearField(server_own)
        reported.instance_group[0].ClearField("name")
        meant = read_config(repository / model / "config.pbtxt")
        assert text_format.MessageToString(reported) == text_format.MessageToString(meant)


def test_an_argument_that_the_library_does_not_know_is_the_models_reason(triton):
    states = {state.name: state for state in triton.server.models}
    assert states["mixtral"].ready
    assert states["plain"].ready
    assert "LLM got invalid argument: max_sequence_length" in states["broken"].reason


def test_our_client_streams_from_it_as_from_any_other(triton):
    with Client(triton.server.grpc_url) as client:
        pieces = list(client.stream(GenerationRequest(model="mixtral", prompt=PROMPT, max_tokens=100)))
        whole = client.generate(GenerationRequest(model="mixtral", prompt=PROMPT, max_tokens=100))
    assert "".join(piece.text for piece in pieces) == whole.text == f" {PROMPT}"
    assert pieces[-1].finish_reason == whole.finish_reason == "stop"
    assert len(pieces) > 5


def test_sampling_options_reach_the_llm(triton, repository):
    asked = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 2**63 + 1, "min_tokens": 2, "end_id": -1}
    triton.ask("mixtral", text_input="fox", max_tokens=3, stream=True, return_log_probs=True, **asked)
    [call] = [call for call in calls(repository) if call.get("parameters", {}).get("top_k") == 40]
    wanted = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 2**63 + 1, "min_tokens": 2, "ignore_eos": True,
        "max_tokens": 3, "logprobs": 1, "detokenize": False, "end_id": 2,
    }  # fmt: skip
    assert {name: call["parameters"][name] for name in wanted} == wanted
    assert call["streaming"]
    assert call["inputs"] == load_tokenizer(repository / "mixtral" / "1" / "checkpoint").encode_prompt("fox")


def test_responses_have_the_contracts_shapes(triton):
    [response] = triton.ask("mixtral", text_input="fox", max_tokens=2, return_log_probs=True, end_id=-1)
    assert response.shapes == {
        "text_output": [1], "sequence_index": [1, 1], "batch_index": [1, 1], "finish_reason": [1, 1],
        "token_ids": [1, 2], "num_input_tokens": [1, 1], "num_output_tokens": [1, 1], "cum_log_probs": [1, 1],
        "output_log_probs": [1, 2],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: found 0, expected 1 or more"),
        ({"max_tokens": 4, "repetition_penalty": 1.5}, "repetition_penalty: found 1.5, expected 1"),
        ({"max_tokens": 4, "bad_words": ["x"]}, "bad_words: found 'x', expected none"),
    ],
)
def test_a_refused_request_is_an_invalid_argument_and_the_others_go_on(triton, asked, message):
    with pytest.raises(Refused) as caught:
        triton.ask("mixtral", text_input="fox", stream=True, **asked)
    assert str(caught.value).startswith("INVALID_ARGUMENT: ")
    assert message in str(caught.value)
    assert triton.text("mixtral", text_input="fox", max_tokens=20) == " fox"


def test_cancellation_ends_the_llms_work(triton):
    def cancelled() -> list[str]:
        return re.findall(r"a request was cancelled after (\d+) tokens", triton.server.log.read_text())

    before = len(cancelled())
    call, _ = triton.call("mixtral", text_input=PROMPT, stream=True, max_tokens=500, end_id=-1)
    next(call)
    call.cancel()
    found = wait_until(lambda: cancelled()[before:])
    assert len(found) == 1
    assert 0 < int(found[0]) < 400


def test_requests_are_answered_side_by_side(triton):
    slow, ended = triton.call("mixtral", text_input=PROMPT, stream=True, max_tokens=400, end_id=-1)
    next(slow)
    assert triton.text("mixtral", text_input="fox", max_tokens=20) == " fox"
    assert next(slow).infer_response.outputs  # it goes on
    slow.cancel()
    ended.set()


def post(triton, model: str, body: dict) -> dict:
    url = f"{triton.server.http_url}/v2/models/{model}/generate"
    request = urllib.request.Request(url, data=json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        return json.load(response)


@pytest.mark.parametrize("model", ["mixtral", "plain"])
def test_upstreams_own_request_over_http_is_answered(triton, model):
    # docs/llmapi.md of triton-inference-server/tensorrtllm_backend, "Send request"
    answer = post(triton, model, {"text_input": "The future of AI is", "sampling_param_max_tokens": 10})
    assert answer["text_output"].startswith("The future of AI is The fut")
    full = post(
        triton, model,
        {
            "text_input": "the fox", "return_finish_reason": True, "return_stop_reason": True,
            "return_cumulative_logprob": True, "sampling_param_return_perf_metrics": True,
            "sampling_param_stop": "fox", "sampling_param_exclude_input_from_output": True,
        },
    )  # fmt: skip
    assert (full["text_output"], full["finish_reason"], full["stop_reason"]) == (" the ", "stop", "fox")
    assert full["cumulative_logprob"] < 0
    whole = post(triton, model, {"text_input": "fox", "sampling_param_return_perf_metrics": True})
    assert whole["last_token_time_ns"] == 10_000_001_000
    assert whole["kv_cache_hit_rate"] == 0.25


def test_a_request_is_ended_by_its_id(triton):
    answers = []
    body = {"text_input": PROMPT * 5, "sampling_param_max_tokens": 300, "return_finish_reason": True, "id": "mine"}
    running = threading.Thread(target=lambda: answers.append(post(triton, "plain", body)))
    running.start()
    stop = {"text_input": "", "stop": True, "id": "mine"}
    while running.is_alive():  # it may not have begun yet
        stopped = post(triton, "plain", stop)
        running.join(0.1)
    assert stopped["finish_reason"] == answers[0]["finish_reason"] == "cancelled"


def test_upstreams_grpc_shapes_stream_the_text_so_far(triton):
    request = service_pb2.ModelInferRequest(model_name="plain")
    for name, datatype, content in (
        ("text_input", "BYTES", {"bytes_contents": [b"the fox"]}),
        ("streaming", "BOOL", {"bool_contents": [True]}),
    ):
        tensor = request.inputs.add(name=name, datatype=datatype, shape=[1])
        for key, values in content.items():
            getattr(tensor.contents, key).extend(values)
    texts = []
    for message in triton.stub.ModelStreamInfer(iter([request]), timeout=TIMEOUT_S):
        assert not message.error_message
        texts.append(message.infer_response.raw_output_contents[0][4:].decode())
    assert texts == sorted(texts, key=len)
    assert texts[0].startswith("the fox")
    assert texts[-1] == "the fox the fox"
    assert len(texts) > 2


@pytest.fixture
def one_model(repository, tmp_path) -> Path:
    """A repository of `mixtral` alone."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "mixtral").symlink_to(repository / "mixtral")
    return tmp_path / "one"


def test_the_llm_is_shut_down_with_the_server(one_model, repository, python_with_the_library, monkeypatch):
    monkeypatch.setattr(installation.sys, "executable", str(python_with_the_library / "python3"))
    with running_server(ServerOptions(repository=one_model)) as server:
        assert [model.ready for model in server.models] == [True]
    assert calls(repository)[-1] == {"shutdown": True}


def test_a_python_without_the_library_is_told_with_the_container_that_has_it(one_model):
    with pytest.raises(ServerError) as caught, running_server(ServerOptions(repository=one_model)):
        pass
    assert f"the Python in {sys.prefix} has no TensorRT-LLM (No module named 'tensorrt_llm')" in str(caught.value)
    assert "serve it in nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3" in str(caught.value)
