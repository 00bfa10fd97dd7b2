"""The parameters of TensorRT-LLM 1.2's `tensorrt_llm` model: typed values in, the texts of config.pbtxt out.

Names and meanings are upstream's (triton_backend/all_models/inflight_batcher_llm/tensorrt_llm/config.pbtxt, read by
triton_backend/inflight_batcher_llm/src/model_instance_state.cc and model_state.cc). A value that is None is not written
to the file, and the backend uses its own default. There are no parameters for encoders and draft
models, since no engine of ours has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

from export.errors import listing
from triton_repo.contracts.model_parameters import WORLD_SIZE_KEY
from triton_repo.errors import RepositoryError

ENGINE_PATH_KEY = "gpt_model_path"
# Field to key in config.pbtxt, where the two differ.
_KEYS = {"batching_strategy": "gpt_model_type"}
# Fields that config.pbtxt has in `dynamic_batching`, not among the parameters.
_QUEUE = ("max_queue_size", "max_queue_delay_microseconds")
# Parameters that are the same in every repository of ours. Normalised log-probabilities would be over the top-k alone,
# and so always 0 for a greedy choice (cpp/tensorrt_llm/kernels/samplingTopKKernels.cu); ours are over the vocabulary.
# The backend has no default for the last one and for those of guided decoding; an empty text means none.
_FIXED = {
    "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
    "max_beam_width": "1",
    "exclude_input_in_output": "true",
    "normalize_log_probs": "false",
    "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
    "tokenizer_dir": "",
}
_GUIDED, _TOKENIZER_INFO = "guided_decoding_backend", "xgrammar_tokenizer_info_path"


def _option(default: Any, text: str, *, choices: tuple[str, ...] = (), above_zero: bool = False) -> Any:  # noqa: ANN401
    return field(default=default, metadata={"help": text, "choices": choices, "above_zero": above_zero})


@dataclass(frozen=True, kw_only=True)
class TensorrtLlmParameters:
    """The metadata of a field holds its help text, its choices, and whether it must be above 0. A float is at most
    1."""

    batching_strategy: str = _option(
        "inflight_fused_batching", "how requests share the engine", choices=("inflight_fused_batching", "V1")
    )
    batch_scheduler_policy: str = _option(
        "guaranteed_no_evict",
        "which requests may begin while the key/value cache is nearly full",
        choices=("guaranteed_no_evict", "max_utilization"),
    )
    max_queue_size: int = _option(0, "requests that may wait; 0 is any number")
    max_queue_delay_microseconds: int = _option(0, "microseconds to wait for a fuller batch")
    kv_cache_free_gpu_mem_fraction: float | None = _option(
        None, "share of the GPU memory that the weights leave free, for the key/value cache", above_zero=True
    )
    max_tokens_in_paged_kv_cache: int | None = _option(None, "tokens in the key/value cache", above_zero=True)
    max_attention_window_size: tuple[int, ...] | None = _option(
        None, "tokens that attention looks back, one number a layer; fewer numbers are repeated", above_zero=True
    )
    sink_token_length: int | None = _option(None, "first tokens that stay in a sliding window")
    kv_cache_host_memory_bytes: int | None = _option(
        None, "bytes of host memory for cache blocks that later requests may reuse"
    )
    kv_cache_onboard_blocks: bool | None = _option(None, "copy reused blocks from host memory back to the GPU")
    enable_kv_cache_reuse: bool | None = _option(
        None, "keep the cache of a prompt for later requests that begin alike (if the engine can)"
    )
    enable_chunked_context: bool | None = _option(None, "read long prompts in parts between other requests' steps")
    gpu_device_ids: tuple[int, ...] | None = _option(None, "GPUs, one for each rank")
    participant_ids: tuple[int, ...] | None = _option(None, "MPI ranks, one for each rank of the engine")
    num_nodes: int | None = _option(None, "machines that share the engine", above_zero=True)
    gpu_weights_percent: float | None = _option(
        None, "share of the weights kept on the GPU, for an engine that was built to stream weights"
    )
    decoding_mode: str | None = _option(None, "how tokens are drawn", choices=("top_k", "top_p", "top_k_top_p"))
    enable_context_fmha_fp32_acc: bool | None = _option(None, "sum attention over prompts in float32")
    multi_block_mode: bool | None = _option(None, "spread the attention of one step over more blocks of the GPU")
    cuda_graph_mode: bool | None = _option(None, "record steps as CUDA graphs and replay them")
    cuda_graph_cache_size: int | None = _option(None, "CUDA graphs kept")
    cancellation_check_period_ms: int | None = _option(
        None, "milliseconds between checks for cancelled requests", above_zero=True
    )
    stats_check_period_ms: int | None = _option(None, "milliseconds between readings of statistics", above_zero=True)
    iter_stats_max_iterations: int | None = _option(None, "iterations whose statistics are kept")
    request_stats_max_iterations: int | None = _option(None, "iterations whose statistics by request are kept")
    lora_cache_optimal_adapter_size: int | None = _option(None, "rank that LoRA's cache is laid out for")
    lora_cache_max_adapter_size: int | None = _option(None, "highest rank of a LoRA")
    lora_cache_gpu_memory_fraction: float | None = _option(
        None, "share of the GPU memory that the weights leave free, for LoRA's cache", above_zero=True
    )
    lora_cache_host_memory_bytes: int | None = _option(None, "bytes of host memory for LoRA's cache")
    lora_prefetch_dir: str | None = _option(None, "folder of LoRAs to load at the start")
    guided_decoding_backend: str | None = _option(
        None, "the library that keeps answers to JSON schemas and grammars", choices=("xgrammar",)
    )

    def to_texts(
        self, *, engine_path: str, world_size: int, paged_context_fmha: bool, tokenizer_info_path: str = ""
    ) -> dict[str, str]:
        """Key to text, of all values that are not None. Raises RepositoryError that lists every value that the backend
        or this engine would refuse. Guided decoding reads the tokenizer from `tokenizer_info_path`."""
        problems = [*_value_problems(self), *self._engine_problems(world_size, paged_context_fmha)]
        if problems:
            raise RepositoryError(f"setting up tensorrt_llm:{listing(problems, most=len(problems))}")
        # The backend's own default is to reuse the cache, even if the engine was built without support for it.
        reuse = paged_context_fmha if self.enable_kv_cache_reuse is None else self.enable_kv_cache_reuse
        values = {**vars(self), "enable_kv_cache_reuse": reuse}
        texts = {
            _KEYS.get(name, name): _text(value)
            for name, value in values.items()
            if value is not None and name not in _QUEUE
        }
        guided = {_GUIDED: "", _TOKENIZER_INFO: tokenizer_info_path if self.guided_decoding_backend else ""}
        return {**_FIXED, **guided, **texts, ENGINE_PATH_KEY: engine_path, WORLD_SIZE_KEY: str(world_size)}

    def _engine_problems(self, world_size: int, paged_context_fmha: bool) -> Iterator[str]:
        for name in ("enable_kv_cache_reuse", "enable_chunked_context"):
            if getattr(self, name) and not paged_context_fmha:
                yield (
                    f"{name} needs an engine with paged context attention, and this one was built without; build it "
                    "with use_paged_context_fmha, or leave it off"
                )
        for name in ("gpu_device_ids", "participant_ids"):
            ids = getattr(self, name)
            if ids and (len(set(ids)) < len(ids) or (len(ids) != world_size and self.num_nodes in (None, 1))):
                yield f"{name} is {_text(ids)}, expected {world_size} different ones, one for each rank of the engine"


def _value_problems(parameters: TensorrtLlmParameters) -> Iterator[str]:
    for option in fields(parameters):
        value = getattr(parameters, option.name)
        choices, above_zero = option.metadata["choices"], option.metadata["above_zero"]
        if value is None or isinstance(value, bool):
            continue
        if choices and value not in choices:
            yield f"{option.name} is {value!r}, expected one of {', '.join(choices)}"
        elif isinstance(value, str):
            if not value:
                yield f"{option.name} is empty; leave it out for none"
        else:
            numbers = value if isinstance(value, tuple) else (value,)
            highest = 1 if isinstance(value, float) else math.inf
            if not numbers or not all((n > 0 if above_zero else n >= 0) and n <= highest for n in numbers):
                limits = ("above 0" if above_zero else "0 or more") + (" and 1 at most" if highest == 1 else "")
                yield f"{option.name} is {_text(value)}, expected {limits}"


def _text(value: Any) -> str:  # noqa: ANN401 - as many types as there are fields
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def value_types() -> dict[str, type]:
    """Field to the type of its values, None aside: str, int, float, bool, or tuple for several whole numbers."""
    kinds = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(TensorrtLlmParameters).items()}
    return {name: getattr(options[0], "__origin__", options[0]) for name, options in kinds.items()}
