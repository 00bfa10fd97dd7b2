"""Stands for TensorRT-LLM's LLM API: what a served model touches of it, without a GPU.

An LLM's answer to a prompt is the prompt's own tokens again, without the start token, then the first end token; where
end tokens are ignored, over and over. Each call is noted in calls.jsonl in the model's folder. Signatures and checks
are those of NVIDIA/TensorRT-LLM 1.2: tensorrt_llm/llmapi/llm.py, tensorrt_llm/sampling_params.py and
tensorrt_llm/executor/result.py.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

__version__ = "1.2.0"
STEP_S = 0.002
START_TOKEN = 1
# Fields of TorchLlmArgs (tensorrt_llm/llmapi/llm_args.py) that a packaged model may set; others are refused, as there.
_ARGUMENTS = {
    "pipeline_parallel_size", "moe_tensor_parallel_size", "moe_expert_parallel_size", "max_seq_len", "kv_cache_config",
    "max_batch_size", "max_num_tokens", "enable_chunked_prefill", "sampler_type", "backend", "guided_decoding_backend",
}  # fmt: skip


@dataclass(slots=True, kw_only=True)
class GuidedDecodingParams:
    json: str | None = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | None = None


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    bad: str | list[str] | None = None
    bad_token_ids: list[int] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: int | None = None
    return_perf_metrics: bool = False
    exclude_input_from_output: bool = True
    ignore_eos: bool = False
    detokenize: bool = True
    guided_decoding: GuidedDecodingParams | None = None

    def __post_init__(self) -> None:
        if self.top_p is not None and (self.top_p < 0 or self.top_p > 1):
            raise ValueError(f"require 0 <= top_p <= 1, got top_p={self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"require top_k >= 0, got top_k={self.top_k}")


@dataclass(slots=True)
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class CompletionOutput:
    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    request_perf_metrics: object | None = None


class RequestOutput:
    """Grows while it is iterated over; whoever has it can abort it."""

    def __init__(self, prompt: list[int], parameters: SamplingParams, streaming: bool) -> None:
        self.outputs = [CompletionOutput()]
        self.finished = False
        self._parameters = parameters
        self._streaming = streaming
        self._aborted = False
        self._prompt = prompt[1:] if prompt[0] == START_TOKEN else prompt

    def abort(self) -> None:
        self._aborted = True

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.finished:
            raise StopAsyncIteration
        await self._step()
        while not self._streaming and not self.finished:
            await self._step()
        return self

    async def _step(self) -> None:
        await asyncio.sleep(STEP_S)
        output, parameters = self.outputs[0], self._parameters
        place = len(output.token_ids)
        if self._aborted:
            return self._finish("cancelled")
        ending = place == len(self._prompt) and not parameters.ignore_eos
        token = parameters.end_id if ending else self._prompt[place % len(self._prompt)]
        output.token_ids.append(token)
        if parameters.logprobs:
            output.logprobs.append({token: Logprob(-0.5, 1)})
        if token == parameters.end_id and not parameters.ignore_eos:
            return self._finish("stop")
        if token in (parameters.stop_token_ids or ()):
            output.stop_reason = token
            if not parameters.include_stop_str_in_output:
                output.token_ids = output.token_ids[:-1]
            return self._finish("stop")
        if place + 1 == parameters.max_tokens:
            self._finish("length")

    def _finish(self, reason: str) -> None:
        self.finished = True
        self.outputs[0].finish_reason = reason
        if self._parameters.return_perf_metrics:
            self.outputs[0].request_perf_metrics = SimpleNamespace(
                kv_cache_metrics=SimpleNamespace(
                    num_reused_blocks=1, num_missed_blocks=2, num_new_allocated_blocks=3, num_total_allocated_blocks=4,
                    kv_cache_hit_rate=0.25,
                ),
                timing_metrics=SimpleNamespace(
                    arrival_time=timedelta(seconds=7), first_scheduled_time=timedelta(seconds=8),
                    first_token_time=timedelta(seconds=9), last_token_time=timedelta(seconds=10, microseconds=1),
                ),
                speculative_decoding=SimpleNamespace(
                    acceptance_rate=0.5, total_accepted_draft_tokens=5, total_draft_tokens=6
                ),
            )  # fmt: skip


class LLM:
    def __init__(
        self, model, tokenizer=None, tokenizer_mode="auto", skip_tokenizer_init=False, trust_remote_code=False,
        tensor_parallel_size=1, dtype="auto", revision=None, tokenizer_revision=None, **kwargs,
    ) -> None:  # fmt: skip
        unknown = sorted(set(kwargs) - _ARGUMENTS)
        if unknown:
            raise ValueError(f"LLM got invalid argument: {unknown[0]}")
        self._folder = Path(model)
        if not (self._folder / "config.json").is_file():
            raise RuntimeError(f"no model at {model}")
        self._skips_tokenizer = skip_tokenizer_init
        self._note(
            arguments={"tensor_parallel_size": tensor_parallel_size, "trust_remote_code": trust_remote_code, **kwargs}
        )

    def generate_async(self, inputs, sampling_params=None, lora_request=None, prompt_adapter_request=None,
                       streaming=False) -> RequestOutput:  # fmt: skip
        if self._skips_tokenizer and sampling_params.end_id is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        asyncio.get_running_loop()  # where there is none, the library's output cannot be awaited
        parameters = {k: v for k, v in dataclasses.asdict(sampling_params).items() if v is not None}
        self._note(inputs=list(inputs), streaming=streaming, parameters=parameters)
        return RequestOutput(list(inputs), sampling_params, streaming)

    def shutdown(self) -> None:
        self._note(shutdown=True)

    def _note(self, **what) -> None:
        with (self._folder / "calls.jsonl").open("a") as file:
            file.write(json.dumps(what) + "\n")
