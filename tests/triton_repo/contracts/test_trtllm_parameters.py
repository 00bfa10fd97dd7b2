"""TensorRT-LLM's parameters: upstream's keys, what is absent, and every value that is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from triton_repo.contracts.trtllm_parameters import TensorrtLlmParameters, value_types
from triton_repo.errors import RepositoryError

UPSTREAM = json.loads((Path(__file__).parents[1] / "tensorrt_llm_model.json").read_text(encoding="utf-8"))
ALL = TensorrtLlmParameters(
    batching_strategy="V1", batch_scheduler_policy="max_utilization", max_queue_size=4, max_queue_delay_microseconds=5,
    kv_cache_free_gpu_mem_fraction=0.5, max_tokens_in_paged_kv_cache=4096, max_attention_window_size=(128, 4096),
    sink_token_length=4, kv_cache_host_memory_bytes=10**9, kv_cache_onboard_blocks=False, enable_kv_cache_reuse=True,
    enable_chunked_context=True, gpu_device_ids=(1, 3), participant_ids=(0, 1), num_nodes=1, gpu_weights_percent=0.0,
    decoding_mode="top_k_top_p", enable_context_fmha_fp32_acc=True, multi_block_mode=False, cuda_graph_mode=True,
    cuda_graph_cache_size=0, cancellation_check_period_ms=10, stats_check_period_ms=20, iter_stats_max_iterations=30,
    request_stats_max_iterations=0, lora_cache_optimal_adapter_size=8, lora_cache_max_adapter_size=64,
    lora_cache_gpu_memory_fraction=0.05, lora_cache_host_memory_bytes=2**30, lora_prefetch_dir="/lora",
    guided_decoding_backend="xgrammar",
)  # fmt: skip
# Of encoders, draft models and logits, which no engine of ours has.
NOT_OFFERED = {
    "cross_kv_cache_fraction", "encoder_model_path", "eagle_choices", "medusa_choices", "lookahead_ngram_size",
    "lookahead_verification_set_size", "lookahead_window_size", "speculative_decoding_fast_logits",
}  # fmt: skip


def texts(parameters=None, **changes) -> dict[str, str]:
    engine = {"engine_path": "/models/tensorrt_llm/1/engine", "world_size": 2, "paged_context_fmha": True, **changes}
    return (parameters or TensorrtLlmParameters()).to_texts(**engine)


def refusal(*, world_size=2, paged_context_fmha=True, **fields) -> str:
    with pytest.raises(RepositoryError) as caught:
        texts(TensorrtLlmParameters(**fields), world_size=world_size, paged_context_fmha=paged_context_fmha)
    return str(caught.value)


def test_every_key_is_upstreams_and_every_one_of_upstreams_is_written_or_not_offered():
    found = set(texts(ALL)) - {"moeship_world_size"}
    assert found <= set(UPSTREAM["parameters"])
    assert set(UPSTREAM["parameters"]) - found == NOT_OFFERED


def test_values_are_written_as_the_backend_reads_them():
    found = texts(ALL)
    assert found["gpt_model_type"] == "V1"
    assert found["max_attention_window_size"] == "128,4096"
    assert found["gpu_device_ids"] == "1,3"
    assert (found["kv_cache_free_gpu_mem_fraction"], found["gpu_weights_percent"]) == ("0.5", "0.0")
    assert (found["cuda_graph_mode"], found["multi_block_mode"]) == ("true", "false")
    assert found["gpt_model_path"] == "/models/tensorrt_llm/1/engine"
    assert found["moeship_world_size"] == "2"
    assert not [key for key in found if key.startswith("max_queue")]


def test_what_is_left_out_is_absent_but_for_what_the_backend_cannot_do_without():
    assert texts() == {
        "gpt_model_type": "inflight_fused_batching", "batch_scheduler_policy": "guaranteed_no_evict",
        "enable_kv_cache_reuse": "true", "FORCE_CPU_ONLY_INPUT_TENSORS": "no", "max_beam_width": "1",
        "exclude_input_in_output": "true", "normalize_log_probs": "false",
        "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
        "tokenizer_dir": "", "guided_decoding_backend": "", "xgrammar_tokenizer_info_path": "",
        "gpt_model_path": "/models/tensorrt_llm/1/engine", "moeship_world_size": "2",
    }  # fmt: skip


def test_guided_decoding_reads_the_tokenizer_only_where_it_is_asked_for():
    path = "/models/tensorrt_llm/1/xgrammar_tokenizer_info.json"
    found = texts(TensorrtLlmParameters(guided_decoding_backend="xgrammar"), tokenizer_info_path=path)
    assert (found["guided_decoding_backend"], found["xgrammar_tokenizer_info_path"]) == ("xgrammar", path)
    found = texts(tokenizer_info_path=path)
    assert (found["guided_decoding_backend"], found["xgrammar_tokenizer_info_path"]) == ("", "")
    assert "guided_decoding_backend is 'llguidance', expected one of xgrammar" in refusal(
        guided_decoding_backend="llguidance"
    )


def test_the_cache_is_reused_where_the_engine_can_and_not_where_it_cannot():
    assert texts(paged_context_fmha=False)["enable_kv_cache_reuse"] == "false"
    assert texts(TensorrtLlmParameters(enable_kv_cache_reuse=False))["enable_kv_cache_reuse"] == "false"


@pytest.mark.parametrize("name", ["enable_kv_cache_reuse", "enable_chunked_context"])
def test_what_needs_paged_context_attention_is_refused_without_it(name):
    text = refusal(paged_context_fmha=False, **{name: True})
    assert f"{name} needs an engine with paged context attention" in text
    assert "build it with use_paged_context_fmha, or leave it off" in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batching_strategy": "v2"}, "batching_strategy is 'v2', expected one of inflight_fused_batching, V1"),
        ({"batch_scheduler_policy": "all"}, "expected one of guaranteed_no_evict, max_utilization"),
        ({"decoding_mode": "medusa"}, "decoding_mode is 'medusa', expected one of top_k, top_p, top_k_top_p"),
        ({"kv_cache_free_gpu_mem_fraction": 0.0}, "is 0.0, expected above 0 and 1 at most"),
        ({"kv_cache_free_gpu_mem_fraction": 1.5}, "is 1.5, expected above 0 and 1 at most"),
        ({"kv_cache_free_gpu_mem_fraction": float("nan")}, "is nan, expected above 0 and 1 at most"),
        ({"gpu_weights_percent": -0.1}, "is -0.1, expected 0 or more and 1 at most"),
        ({"max_queue_size": -1}, "max_queue_size is -1, expected 0 or more"),
        ({"max_tokens_in_paged_kv_cache": 0}, "max_tokens_in_paged_kv_cache is 0, expected above 0"),
        ({"max_attention_window_size": (128, 0)}, "max_attention_window_size is 128,0, expected above 0"),
        ({"max_attention_window_size": ()}, "max_attention_window_size is , expected above 0"),
        ({"gpu_device_ids": (0,)}, "gpu_device_ids is 0, expected 2 different ones, one for each rank"),
        ({"participant_ids": (1, 1)}, "participant_ids is 1,1, expected 2 different ones"),
        ({"lora_prefetch_dir": ""}, "lora_prefetch_dir is empty; leave it out for none"),
    ],
)
def test_a_value_that_the_backend_would_not_take_is_named(fields, message):
    assert message in refusal(**fields)


def test_every_problem_is_reported():
    assert refusal(max_queue_size=-1, num_nodes=0, decoding_mode="x").count("\n  - ") == 3


def test_on_several_machines_the_ids_are_each_machines_own():
    assert texts(TensorrtLlmParameters(gpu_device_ids=(0,), num_nodes=2))["gpu_device_ids"] == "0"


def test_every_field_has_a_type_and_a_help_text():
    kinds = value_types()
    for option in dataclasses.fields(TensorrtLlmParameters):
        assert kinds[option.name] in (str, int, float, bool, tuple)
        assert option.metadata["help"]
        value = getattr(ALL, option.name)
        assert isinstance(value, kinds[option.name])
