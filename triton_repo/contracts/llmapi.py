"""The tensors of TensorRT-LLM's LLM API layout: names, dtypes and shapes as its own Triton model has them.

Source: NVIDIA/TensorRT-LLM, triton_backend/all_models/llmapi/tensorrt_llm/config.pbtxt and 1/helpers.py, 1.0 to 1.2.
The inputs that later releases add (LoRA, images, named logits processors) are not taken. Dims exclude the batch
dimension. Upstream's model has no batch dimension (max_batch_size 0), so a request to it has exactly these dims.
"""

from __future__ import annotations

from collections.abc import Mapping

from triton_repo.contracts.wire import TritonDtype, WireTensor

# Tensor of the LLM API layout to the tensor of `wire.py` that means the same.
SAME_AS: Mapping[str, str] = {
    "streaming": "stream",
    "sampling_param_best_of": "num_return_sequences",
    "sampling_param_temperature": "temperature",
    "sampling_param_top_k": "top_k",
    "sampling_param_top_p": "top_p",
    "sampling_param_frequency_penalty": "frequency_penalty",
    "sampling_param_presence_penalty": "presence_penalty",
    "sampling_param_max_tokens": "max_tokens",
    "sampling_param_stop": "stop_words",
    "sampling_param_seed": "seed",
    "sampling_param_exclude_input_from_output": "exclude_input_in_output",
    "return_cumulative_logprob": "return_log_probs",
}
# Defaults of helpers.py and SamplingParams that are not the defaults of `wire.py`.
DEFAULT_MAX_TOKENS = 32
DEFAULT_EXCLUDE_INPUT = False


def _optional(name: str, dtype: TritonDtype, dims: tuple[int, ...] = (1,), unit: str = "") -> WireTensor:
    return WireTensor(name=name, dtype=dtype, dims=dims, optional=True, unit=unit)


LLMAPI_INPUTS: tuple[WireTensor, ...] = (
    WireTensor(name="text_input", dtype="STRING", dims=(-1,), unit="the prompt, UTF-8; exactly one"),
    _optional("streaming", "BOOL", unit="true: a response with the text so far after each step; false: one response"),
    _optional("sampling_param_best_of", "INT32", unit="1 only"),
    _optional("sampling_param_temperature", "FP32", unit=">= 0; 0 is greedy"),
    _optional("sampling_param_top_k", "INT32", unit="0 keeps all; 1 is greedy"),
    _optional("sampling_param_top_p", "FP32", unit="0 < p <= 1"),
    _optional("sampling_param_frequency_penalty", "FP32", unit="0 changes nothing"),
    _optional("sampling_param_presence_penalty", "FP32", unit="0 changes nothing"),
    _optional("sampling_param_max_tokens", "INT32", unit=f"new tokens at most; absent is {DEFAULT_MAX_TOKENS}"),
    _optional("sampling_param_stop", "STRING", (-1,), "texts that end the generation and are cut off"),
    _optional("sampling_param_seed", "UINT64"),
    _optional("sampling_param_exclude_input_from_output", "BOOL", unit="absent is false"),
    _optional("sampling_param_return_perf_metrics", "BOOL", unit="fill the outputs of METRICS"),
    _optional("return_finish_reason", "BOOL"),
    _optional("return_stop_reason", "BOOL"),
    _optional("return_cumulative_logprob", "BOOL"),
    _optional("stop", "BOOL", unit="end the request that has the id of this one"),
)

# Outputs other than text_output are sent only if asked for. An output without a value yet is the text "None".
LLMAPI_OUTPUTS: tuple[WireTensor, ...] = (
    WireTensor(name="text_output", dtype="STRING", dims=(-1,), unit="the text so far; in each response all of it"),
    WireTensor(name="finish_reason", dtype="STRING", dims=(-1,), unit="stop, length or cancelled"),
    WireTensor(name="stop_reason", dtype="STRING", dims=(-1,), unit="the stop word that was met"),
    WireTensor(name="cumulative_logprob", dtype="FP32", dims=(-1,), unit="natural logarithm, sum so far"),
)

# Output to the group and the name of its value in RequestPerfMetrics of the library
# (cpp/include/tensorrt_llm/executor/types.h).
METRIC_PATHS: Mapping[str, tuple[str, str]] = {
    "kv_cache_reused_block": ("kv_cache_metrics", "num_reused_blocks"),
    "kv_cache_missed_block": ("kv_cache_metrics", "num_missed_blocks"),
    "kv_cache_alloc_new_blocks": ("kv_cache_metrics", "num_new_allocated_blocks"),
    "kv_cache_alloc_total_blocks": ("kv_cache_metrics", "num_total_allocated_blocks"),
    "kv_cache_hit_rate": ("kv_cache_metrics", "kv_cache_hit_rate"),
    "arrival_time_ns": ("timing_metrics", "arrival_time"),
    "first_scheduled_time_ns": ("timing_metrics", "first_scheduled_time"),
    "first_token_time_ns": ("timing_metrics", "first_token_time"),
    "last_token_time_ns": ("timing_metrics", "last_token_time"),
    "acceptance_rate": ("speculative_decoding", "acceptance_rate"),
    "total_accepted_draft_tokens": ("speculative_decoding", "total_accepted_draft_tokens"),
    "total_draft_tokens": ("speculative_decoding", "total_draft_tokens"),
}


def _metric(name: str) -> WireTensor:
    if name.endswith("_ns"):
        return WireTensor(name=name, dtype="INT64")
    dims = (-1,) if name.startswith("kv_cache") else (1,)
    return WireTensor(name=name, dtype="FP32" if name.endswith("_rate") else "INT32", dims=dims)


METRICS: tuple[WireTensor, ...] = tuple(_metric(name) for name in METRIC_PATHS)
