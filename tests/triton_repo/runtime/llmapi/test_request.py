"""From a request's tensors, in either contract, to SamplingParams; and model.yaml there and back."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from triton_repo.contracts.llmapi_settings import LlmSettings, TextSettings, TritonSettings, read_settings
from triton_repo.errors import RepositoryError, RequestError
from triton_repo.runtime.llmapi.request import read_request, sampling_fields
from triton_repo.runtime.options import GenerationOptions, GenerationPlan

SETTINGS = LlmSettings(
    llm={"model": "checkpoint", "backend": "pytorch", "tensor_parallel_size": 2, "kv_cache_config": {"x": 0.5}},
    triton=TritonSettings(),
    text=TextSettings(end_token_ids=(2, 7), max_sequence=640),
)


def text(*words: str) -> np.ndarray:
    return np.array([word.encode() for word in words], dtype=np.object_)


def number(value, dtype) -> np.ndarray:
    return np.array([value], dtype=dtype)


def fields(penalties: bool = False, end_ids: tuple[int, ...] = (2, 7), **options) -> dict:
    asked = GenerationOptions(prompt="x", max_tokens=5, **options)
    plan = GenerationPlan(options=asked, prompt_ids=(1, 9), end_ids=end_ids, most_tokens=5)
    return sampling_fields(plan, (2, 7), penalties=penalties)


def test_the_llm_apis_tensors_mean_what_the_contracts_do():
    request = read_request(
        {
            "text_input": text("def "), "streaming": number(True, bool),
            "sampling_param_max_tokens": number(9, "int32"),
            "sampling_param_temperature": number(0.7, "float32"), "sampling_param_top_k": number(5, "int32"),
            "sampling_param_top_p": number(0.9, "float32"), "sampling_param_seed": number(2**63 + 5, "uint64"),
            "sampling_param_stop": text("\n\n", "end"), "sampling_param_exclude_input_from_output": number(True, bool),
            "sampling_param_frequency_penalty": number(0.5, "float32"), "sampling_param_best_of": number(1, "int32"),
            "sampling_param_presence_penalty": number(0.25, "float32"), "return_finish_reason": number(True, bool),
            "return_stop_reason": number(False, bool), "return_cumulative_logprob": number(True, bool),
        }
    )  # fmt: skip
    assert request.options == GenerationOptions(
        prompt="def ", max_tokens=9, stream=True, temperature=0.7, top_k=5, top_p=0.9, random_seed=2**63 + 5,
        stop_words=("\n\n", "end"), frequency_penalty=0.5, presence_penalty=0.25, return_log_probs=True,
    )  # fmt: skip
    assert request.wanted == {"return_finish_reason", "return_cumulative_logprob"}


def test_a_silent_request_has_upstreams_defaults_and_the_contracts_its_own():
    silent = read_request({"text_input": text("def ")})
    assert silent.options == GenerationOptions(prompt="def ", max_tokens=32, exclude_input_in_output=False)
    assert silent.wanted == frozenset()
    ours = read_request({"text_input": text("def "), "max_tokens": number(4, "int32")})
    assert ours.options == GenerationOptions(prompt="def ", max_tokens=4, exclude_input_in_output=True)
    assert ours.wanted is None


def test_a_request_in_both_contracts_is_refused():
    with pytest.raises(RequestError, match="found max_tokens beside streaming, expected tensors of one contract"):
        read_request(
            {"text_input": text("x"), "max_tokens": number(4, "int32"), "streaming": number(True, bool)}
        )  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"sampling_param_max_tokens": number(0, "int32")}, "sampling_param_max_tokens: found 0, expected 1 or more"),
        ({"sampling_param_top_p": number(2, "float32")}, "sampling_param_top_p: found 2.0, expected 0 <= top_p <= 1"),
        ({"sampling_param_best_of": number(3, "int32")}, "sampling_param_best_of: found 3, expected 1"),
        ({"min_p": number(0.5, "float32"), "max_tokens": number(3, "int32")}, "min_p: found 0.5, expected 0.0; Tens"),
        ({"sampling_param_temperature": number(np.nan, "float32")}, "sampling_param_temperature: found nan"),
        ({"text_input": text("x", "y")}, "text_input: found 2 values, expected 1"),
        ({"text_input": np.array([b"\xff"], dtype=np.object_)}, "byte 0 is 0xff"),
    ],
)
def test_a_refusal_names_the_tensors_that_the_request_used(tensors, problem):
    with pytest.raises(RequestError) as caught:
        read_request({"text_input": text("x"), **tensors})
    assert problem in str(caught.value)
    assert caught.value.kind == "INVALID_ARG"


def test_a_plain_request_is_greedy_and_ends_at_the_models_end_tokens():
    assert fields() == {
        "max_tokens": 5, "end_id": 2, "stop_token_ids": [7], "include_stop_str_in_output": True, "detokenize": False,
        "top_k": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "choice"),
    [
        ({"temperature": 0.7}, {"top_k": 1}),
        ({"temperature": 0.7, "top_p": 1.0}, {"temperature": 0.7, "top_p": 1.0}),
        ({"temperature": 0.7, "top_k": 40}, {"temperature": 0.7, "top_k": 40}),
        ({"temperature": 0.7, "top_k": 40, "top_p": 0.9}, {"temperature": 0.7, "top_k": 40, "top_p": 0.9}),
        ({"top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"top_k": 1, "temperature": 0.7}, {"top_k": 1}),
        ({"temperature": 0.0, "top_p": 0.5}, {"top_k": 1}),
        ({"temperature": 0.5, "top_p": 0.0}, {"top_k": 1}),
    ],
)
def test_how_tokens_are_chosen_is_said_as_every_release_takes_it(options, choice):
    found = fields(**options)
    assert {name: found[name] for name in ("temperature", "top_k", "top_p") if name in found} == choice


def test_the_rest_is_passed_on():
    found = fields(random_seed=3, min_length=2, return_log_probs=True, stop_words=("a",), end_ids=(2,))
    assert (found["seed"], found["min_tokens"], found["logprobs"]) == (3, 2, 1)
    assert "stop" not in found
    without_end = fields(end_ids=())
    assert (without_end["ignore_eos"], without_end["end_id"], without_end.get("stop_token_ids")) == (True, 2, None)


@pytest.mark.parametrize(
    ("given", "temperature"), [({}, 0.0), ({"temperature": 0.7}, 0.7), ({"temperature": 0.7, "top_k": 1}, 0.0)]
)
def test_a_temperature_alone_draws_in_the_llm_apis_tensors_and_not_in_the_wires(given, temperature):
    dtypes = {"temperature": "float32", "top_k": "int32"}
    theirs = {f"sampling_param_{name}": number(value, dtypes[name]) for name, value in given.items()}
    assert read_request({"text_input": text("x"), **theirs}).options.sampling_temperature == temperature
    ours = {name: number(value, dtypes[name]) for name, value in given.items()}
    wire = read_request({"text_input": text("x"), "max_tokens": number(1, "int32"), **ours})
    assert wire.options.sampling_temperature == 0


def test_a_minimum_that_the_llm_would_keep_from_one_end_token_alone_is_refused():
    with pytest.raises(RequestError, match="min_tokens: found 2 beside the end tokens 2, 7, expected 0"):
        fields(min_length=2)


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_that_the_sampler_would_ignore_are_refused_unless_it_is_said_to_apply_them(name):
    with pytest.raises(RequestError, match=f"{name}: found 1.5, expected .*NVIDIA/TensorRT-LLM#16485.*leave it out"):
        fields(**{name: 1.5})
    assert fields(penalties=True, **{name: 1.5})[name] == 1.5
    assert not {"repetition_penalty", "presence_penalty", "frequency_penalty"} & fields(penalties=True).keys()


def test_bad_words_are_refused():
    with pytest.raises(RequestError, match="bad_words: found 'x', expected none"):
        fields(penalties=True, bad_words=("x",))


def test_settings_are_what_they_were_written_as(tmp_path):
    (tmp_path / "model.yaml").write_text(SETTINGS.to_yaml())
    assert read_settings(tmp_path / "model.yaml") == SETTINGS
    assert yaml.safe_load(SETTINGS.to_yaml())["triton_config"] == {
        "max_batch_size": 1, "decoupled": True, "cancellation_check_period_ms": 100,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"trust_remote_code": True}, "trust_remote_code cannot be set"),
        ({"tokenizer": "elsewhere"}, "tokenizer cannot be set"),
        ({"backend": "tensorrt"}, "backend is 'tensorrt', expected 'pytorch'"),
        ({"model": None}, "model is None, expected a folder beside model.yaml or an absolute path"),
        ({"triton_config": {"max_batch_size": 1, "decoupled": False}}, "decoupled is false, expected true"),
        ({"triton_config": {"cancellation_check_period_ms": 0}}, "cancellation_check_period_ms 0, expected"),
        ({"triton_config": {"max_batch": 1}}, "triton_config: keys missing or unknown: max_batch"),
        ({"moeship": {"end_token_ids": [], "max_sequence": 9}}, "needs an end token and a max_sequence"),
        ({"moeship": None}, "moeship is None, expected an object"),
    ],
)
def test_settings_that_are_not_served_are_refused_with_the_file(tmp_path, changes, problem):
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(SETTINGS.to_yaml()) | changes))
    with pytest.raises(RepositoryError) as caught:
        read_settings(path)
    assert str(caught.value).startswith(f"reading {path}: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize("content", [None, "[1, 2]", "{", "a: b: c"])
def test_a_file_that_is_no_settings_is_refused(tmp_path, content):
    path = tmp_path / "model.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RepositoryError, match=r"(?s)reading .*model\.yaml: .*; package the checkpoint again"):
        read_settings(path)
