"""Reads one request to a model on TensorRT-LLM's LLM API: tensors in, checked options and fields of SamplingParams out.

    request = read_request({"text_input": array([b"def "]), "sampling_param_max_tokens": array([32])})
    fields = sampling_fields(plan_generation(request.options, ...), model_end_ids=(2,), penalties=False)
    SamplingParams(**fields)

Names of fields are those of tensorrt_llm/sampling_params.py, 1.0 to 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_repo.contracts.llmapi import DEFAULT_EXCLUDE_INPUT, DEFAULT_MAX_TOKENS, SAME_AS
from triton_repo.contracts.wire import COMPATIBILITY_INPUTS, INPUTS
from triton_repo.errors import RequestError
from triton_repo.runtime.features import TENSORRT_LLM_LACKS, refuse_features, refuse_minimum_of_several
from triton_repo.runtime.options import GenerationOptions, GenerationPlan, refusal
from triton_repo.runtime.request_reading import read_options

Tensors = Mapping[str, npt.NDArray[Any]]
# The LLM API's inputs that ask for outputs.
FINISH_REASON, STOP_REASON, LOGPROB = "return_finish_reason", "return_stop_reason", "return_cumulative_logprob"
PERF_METRICS = "sampling_param_return_perf_metrics"
# Inputs that both sets of tensors have.
_SHARED = {"text_input", "stop"}
_WIRE_ONLY = {tensor.name for tensor in (*INPUTS, *COMPATIBILITY_INPUTS)} - _SHARED
_LLMAPI_NAMES = {wire_name: llmapi_name for llmapi_name, wire_name in SAME_AS.items()}


@dataclass(frozen=True, kw_only=True)
class LlmRequest:
    """What a request asks for."""

    options: GenerationOptions
    wanted: frozenset[str] | None = None  # inputs of the LLM API that ask for outputs; None for the wire's tensors


def read_request(tensors: Tensors, most_prompt_bytes: int | None = None) -> LlmRequest:
    """Find out which of the two sets of tensors a request has, and read its options as `read_options` does. Raises
    RequestError that lists every problem with the names of the tensors in the request, also for features that
    TensorRT-LLM is not asked for.
    """
    wire, llmapi = _WIRE_ONLY & tensors.keys(), tensors.keys() - _WIRE_ONLY - _SHARED
    if wire and llmapi:
        raise refusal(
            [
                f"found {sorted(wire)[0]} beside {sorted(llmapi)[0]}, expected tensors of one contract only; "
                "leave the others out"
            ]
        )
    if wire:
        return LlmRequest(options=_read(tensors, most_prompt_bytes))
    renamed = {SAME_AS.get(name, name): tensor for name, tensor in tensors.items()}
    renamed.setdefault("max_tokens", np.array([DEFAULT_MAX_TOKENS], dtype=np.int32))
    renamed.setdefault("exclude_input_in_output", np.array([DEFAULT_EXCLUDE_INPUT]))
    if "temperature" in renamed:  # in the LLM API a temperature alone draws; on the wire it is greedy
        renamed.setdefault("top_p", np.array([1.0], dtype=np.float32))
    asking = (FINISH_REASON, STOP_REASON, LOGPROB, PERF_METRICS)
    wanted = frozenset(name for name in asking if name in tensors and tensors[name].any())
    try:
        return LlmRequest(options=_read(renamed, most_prompt_bytes), wanted=wanted)
    except RequestError as error:
        raise RequestError(_with_llmapi_names(str(error)), kind=error.kind) from error


def _read(tensors: Tensors, most_prompt_bytes: int | None) -> GenerationOptions:
    options = read_options(tensors, most_prompt_bytes)
    refuse_features(options, TENSORRT_LLM_LACKS, "TensorRT-LLM's engine")
    return options


def _with_llmapi_names(message: str) -> str:
    """A refusal in which each problem has the name of the LLM API's tensor in place of the wire's."""
    return re.sub(r"(?<=\n  - )\w+(?=: )", lambda found: _LLMAPI_NAMES.get(found[0], found[0]), message)


def sampling_fields(plan: GenerationPlan, model_end_ids: tuple[int, ...], *, penalties: bool) -> dict[str, Any]:
    """The fields of SamplingParams for a request; fields that keep their default are absent. `model_end_ids` are the
    end tokens of the model.

    Stop words are not sent: the LLM would match one tokenisation of each, but a text has several. Raises RequestError
    for options that the LLM would accept and ignore.
    """
    options = plan.options
    problems = [
        f"{name}: found {value:g}, expected {neutral:g}; TensorRT-LLM's PyTorch sampler ignores it up to 1.2 "
        "(NVIDIA/TensorRT-LLM#16485): leave it out"
        for name, value, neutral in (
            ("repetition_penalty", options.repetition_penalty, 1.0),
            ("presence_penalty", options.presence_penalty, 0.0),
            ("frequency_penalty", options.frequency_penalty, 0.0),
        )
        if value != neutral and not penalties
    ]
    if options.bad_words:
        problems.append(
            f"bad_words: found {options.bad_words[0]!r}, expected none; TensorRT-LLM's PyTorch sampler has no "
            "bad words: leave them out"
        )
    if problems:
        raise refusal(problems)
    refuse_minimum_of_several(plan)
    end_ids = plan.end_ids or model_end_ids
    fields = {
        "max_tokens": plan.most_tokens,
        "end_id": end_ids[0],
        "stop_token_ids": list(plan.end_ids[1:]) or None,
        "ignore_eos": not plan.end_ids or None,
        "include_stop_str_in_output": True,  # without it, the end token would be missing
        "detokenize": False,
        "min_tokens": options.min_length or None,
        "repetition_penalty": options.repetition_penalty if options.repetition_penalty != 1 else None,
        "presence_penalty": options.presence_penalty or None,
        "frequency_penalty": options.frequency_penalty or None,
        "seed": options.random_seed,
        "logprobs": 1 if options.return_log_probs else None,
        **_choice_fields(options),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _choice_fields(options: GenerationOptions) -> dict[str, Any]:
    """The fields that say how tokens are chosen. A greedy choice is sent as top_k 1, which every release takes; some
    refuse a temperature of 0. For some samplers a temperature without top_k and top_p is greedy too, so top_p is sent
    as well: TRTLLMSampler (regularizeTopKTopP of cpp/tensorrt_llm/kernels/samplingTopKKernels.h), and PyTorch's before
    1.1 (request_strategy of tensorrt_llm/_torch/pyexecutor/sampler.py).
    """
    temperature = options.sampling_temperature
    if not temperature:
        return {"top_k": 1}
    cut = 0 < options.top_p < 1
    return {
        "temperature": temperature,
        "top_k": options.top_k or None,
        "top_p": options.top_p if cut else None if options.top_k else 1.0,
    }
