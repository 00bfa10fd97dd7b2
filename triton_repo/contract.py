"""The tensors on the wire: names, dtypes and shapes that every served model takes and gives, whichever engine runs.

Names and dtypes are those of TensorRT-LLM 1.2's `ensemble` model (triton_backend/all_models/inflight_batcher_llm/
ensemble/config.pbtxt upstream), so that NVIDIA's own clients drive our servers unchanged; `COMPATIBILITY_INPUTS` are
those that our clients have no use for and older names, `OURS` are additions that NVIDIA's clients ignore. Its inputs
for prompt tables, LoRA and guided decoding are not taken. Dims exclude the batch dimension: a request carries
[1, *dims]. output_log_probs lacks the beam axis that it has upstream: there are no beams.

This module imports nothing, so that a client can use it alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TritonDtype = Literal["STRING", "INT32", "INT64", "UINT64", "FP32", "BOOL"]
# The label on the wire differs from the one in config.pbtxt for text alone.
WIRE_DTYPES: dict[TritonDtype, str] = {
    "STRING": "BYTES", "INT32": "INT32", "INT64": "INT64", "UINT64": "UINT64", "FP32": "FP32", "BOOL": "BOOL",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WireTensor:
    """One input or output. `dims` without the batch dimension; -1 is any length."""

    name: str
    dtype: TritonDtype
    dims: tuple[int, ...] = (1,)
    optional: bool = False
    unit: str = ""


INPUTS: tuple[WireTensor, ...] = (
    WireTensor(name="text_input", dtype="STRING", unit="the prompt, UTF-8"),
    WireTensor(name="max_tokens", dtype="INT32", unit="new tokens at most, >= 1"),
    WireTensor(name="stream", dtype="BOOL", optional=True, unit="one response a piece instead of one in all"),
    WireTensor(
        name="temperature",
        dtype="FP32",
        optional=True,
        unit=">= 0; 0 is greedy; absent is 1 beside a top_k or top_p that leaves a choice, else greedy",
    ),
    WireTensor(name="top_k", dtype="INT32", optional=True, unit="0 keeps all; 1 is greedy"),
    WireTensor(name="top_p", dtype="FP32", optional=True, unit="0 < p <= 1; 0 as in TensorRT-LLM means off"),
    WireTensor(name="min_tokens", dtype="INT32", optional=True, unit="new tokens before an end id may come"),
    WireTensor(name="repetition_penalty", dtype="FP32", optional=True, unit="> 0; 1 changes nothing"),
    WireTensor(name="presence_penalty", dtype="FP32", optional=True, unit="0 changes nothing"),
    WireTensor(name="frequency_penalty", dtype="FP32", optional=True, unit="0 changes nothing"),
    WireTensor(name="seed", dtype="UINT64", optional=True, unit="same seed, same text; absent draws one"),
    WireTensor(
        name="stop_words",
        dtype="STRING",
        dims=(-1,),
        optional=True,
        unit="texts that end the generation and are cut off",
    ),
    WireTensor(name="bad_words", dtype="STRING", dims=(-1,), optional=True, unit="texts that are never produced"),
    WireTensor(name="end_id", dtype="INT32", optional=True, unit="replaces the model's own end tokens; -1: none"),
    WireTensor(name="pad_id", dtype="INT32", optional=True, unit="accepted for compatibility; nothing is padded"),
    WireTensor(name="beam_width", dtype="INT32", optional=True, unit="1 only"),
    WireTensor(name="return_log_probs", dtype="BOOL", optional=True, unit="fill the log-probability outputs"),
    WireTensor(name="exclude_input_in_output", dtype="BOOL", optional=True, unit="true unless told otherwise"),
)

# Accepted and served beside INPUTS; our own clients never send them.
COMPATIBILITY_INPUTS: tuple[WireTensor, ...] = (
    WireTensor(name="min_length", dtype="INT32", optional=True, unit="min_tokens under its older name"),
    WireTensor(name="random_seed", dtype="UINT64", optional=True, unit="seed under its older name"),
    WireTensor(name="num_return_sequences", dtype="INT32", optional=True, unit="1 only"),
    WireTensor(
        name="length_penalty", dtype="FP32", optional=True, unit="accepted; it concerns beams, and there are none"
    ),
    WireTensor(name="return_num_input_tokens", dtype="BOOL", optional=True, unit="accepted; the count always comes"),
    WireTensor(name="return_num_output_tokens", dtype="BOOL", optional=True, unit="accepted; the count always comes"),
    WireTensor(name="return_context_logits", dtype="BOOL", optional=True, unit="false only"),
    WireTensor(name="return_generation_logits", dtype="BOOL", optional=True, unit="false only"),
    WireTensor(name="return_perf_metrics", dtype="BOOL", optional=True, unit="false only"),
)
# Tensors whose value has another name in our options and requests.
FIELD_NAMES = {"text_input": "prompt", "min_tokens": "min_length", "seed": "random_seed"}

# The log-probability outputs come only if return_log_probs asks for them.
OUTPUTS: tuple[WireTensor, ...] = (
    WireTensor(name="text_output", dtype="STRING", unit="a piece when streaming, else the whole text"),
    WireTensor(name="cum_log_probs", dtype="FP32", unit="natural log, sum so far; of the model's own distribution"),
    WireTensor(name="output_log_probs", dtype="FP32", dims=(-1,), unit="natural log, one a token of this response"),
    WireTensor(name="sequence_index", dtype="INT32", unit="0: one sequence a request"),
    WireTensor(name="batch_index", dtype="INT32", unit="0"),
)

# Beside TensorRT-LLM's. finish_reason is "" until the last response, then one of FINISH_REASONS.
OURS: tuple[WireTensor, ...] = (
    WireTensor(name="finish_reason", dtype="STRING"),
    WireTensor(name="token_ids", dtype="INT32", dims=(-1,), unit="the tokens of this response"),
    WireTensor(name="num_input_tokens", dtype="INT32", unit="tokens of the prompt"),
    WireTensor(name="num_output_tokens", dtype="INT32", unit="tokens produced so far"),
)

FINISH_REASONS = ("stop", "length", "cancelled")
