"""The tensors on the wire: names, dtypes and shapes that every served model takes and gives, whichever engine runs.

Names and dtypes are those of TensorRT-LLM 1.2's `ensemble` model (triton_backend/all_models/inflight_batcher_llm/
ensemble/config.pbtxt upstream), so that NVIDIA's own clients drive our servers unchanged; `COMPATIBILITY_INPUTS` are
those that our clients have no use for and older names, `OURS` are additions that NVIDIA's clients ignore. Its inputs
for prompt tables, LoRA and guided decoding are not taken. Dims exclude the batch dimension: a request carries
[1, *dims].

What a request means is upstream's too: a temperature without top_k and top_p is greedy, and a stream never repeats the
prompt. Each tensor says where it differs (`differs`); the sources are in
tests/triton_repo/contracts/test_upstream_semantics.py.

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
# The names of numpy's dtypes; a text is an object.
NUMPY_DTYPES: dict[str, str] = {
    "STRING": "object", "INT32": "int32", "INT64": "int64", "UINT64": "uint64", "FP32": "float32", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WireTensor:
    """One input or output. `dims` without the batch dimension; -1 is any length. `differs`: how TensorRT-LLM 1.2 takes
    or gives the tensor otherwise, and why.
    """

    name: str
    dtype: TritonDtype
    dims: tuple[int, ...] = (1,)
    optional: bool = False
    unit: str = ""
    differs: str = ""


def _optional(
    name: str, dtype: TritonDtype, unit: str, *, differs: str = "", dims: tuple[int, ...] = (1,)
) -> WireTensor:
    return WireTensor(name=name, dtype=dtype, dims=dims, optional=True, unit=unit, differs=differs)


INPUTS: tuple[WireTensor, ...] = (
    WireTensor(
        name="text_input",
        dtype="STRING",
        unit="the prompt, UTF-8",
        differs="bytes that are not UTF-8, and a text without a token, are refused here and fail there",
    ),
    WireTensor(name="max_tokens", dtype="INT32", unit="new tokens at most, >= 1; cut to the room in the context"),
    _optional("stream", "BOOL", "one response a piece instead of one in all"),
    _optional(
        "temperature",
        "FP32",
        "0, or 0.001 to 1000; absent is 1; 0 is greedy; without effect where top_k and top_p are both 0 or absent",
        differs="there 0 divides by a tiny number, which is greedy but for near ties, and any size is taken",
    ),
    _optional(
        "top_k",
        "INT32",
        "draw among the k likeliest; 1 is greedy; 0 or absent is no limit beside a top_p, else greedy",
        differs="there more than 1024 counts as 1024 (TOP_K_MAX), a limit of its kernels",
    ),
    _optional(
        "top_p",
        "FP32",
        "draw among the likeliest that sum to p, 0 < p <= 1; 1 draws among all; 0 or absent is no limit beside a "
        "top_k, else greedy",
        differs="there a negative one counts as absent; here it is refused, being no probability",
    ),
    _optional(
        "min_tokens",
        "INT32",
        "new tokens before an end token may come; stop words end an answer at any time",
        differs="there it holds for end_id alone (NVIDIA/TensorRT-LLM#4776), and 1 counts as none (#1935); here it "
        "holds for all end tokens, and where an engine of TensorRT-LLM cannot keep that the request is refused",
    ),
    _optional(
        "repetition_penalty",
        "FP32",
        "0.001 to 1000; 1 changes nothing; it sees prompt and output",
        differs="there anything above 0 is taken; beyond these bounds float32 overflows",
    ),
    _optional(
        "presence_penalty",
        "FP32",
        "-1000 to 1000; 0 changes nothing; it sees the output",
        differs="there any number is taken; beyond these bounds float32 loses the logits",
    ),
    _optional(
        "frequency_penalty",
        "FP32",
        "-1000 to 1000; 0 changes nothing; it sees the output",
        differs="there any number is taken; beyond these bounds float32 loses the logits",
    ),
    _optional(
        "seed",
        "UINT64",
        "same seed, same text; absent draws one",
        differs="there absent is 0, so that all who ask the same get the same sample",
    ),
    _optional(
        "stop_words",
        "STRING",
        "texts that end the generation and are cut off",
        dims=(-1,),
        differs="there the tokens of each word are matched, and stay in the answer; here the text is, however the "
        "model spells it, and text that could begin a word is kept back until that is decided",
    ),
    _optional(
        "bad_words",
        "STRING",
        "texts that are never produced",
        dims=(-1,),
        differs="there, and in an ensemble here, the tokens that spell each word are kept out; in the model without "
        "steps the text is, however the model would spell it",
    ),
    _optional("end_id", "INT32", "replaces the model's own end tokens; -1: none"),
    _optional("pad_id", "INT32", "accepted for compatibility; nothing is padded"),
    _optional("beam_width", "INT32", "1 only", differs="there up to the engine's max_beam_width"),
    _optional(
        "return_log_probs",
        "BOOL",
        "fill the log-probability outputs",
        differs="there those outputs hold zeros where they were not asked for; here they are absent",
    ),
    _optional(
        "exclude_input_in_output",
        "BOOL",
        "absent is true; false begins a whole answer with the prompt; a stream never repeats it",
        differs="there absent is what the engine's config says, whose template says false, and the prompt comes back "
        "decoded from its tokens; here it comes back as it was sent",
    ),
)

# Accepted and served beside INPUTS; in a request for text our own clients never send them.
COMPATIBILITY_INPUTS: tuple[WireTensor, ...] = (
    _optional("min_length", "INT32", "min_tokens under its older name"),
    _optional("random_seed", "UINT64", "seed under its older name"),
    _optional("num_return_sequences", "INT32", "1 only", differs="there several sequences come, told by their index"),
    _optional("length_penalty", "FP32", "accepted; it concerns beams, and there are none"),
    _optional(
        "return_num_input_tokens", "BOOL", "accepted; the count always comes", differs="there only where asked for"
    ),
    _optional(
        "return_num_output_tokens",
        "BOOL",
        "accepted; the count always comes",
        differs="there only where asked for, and of the response; here of the answer so far",
    ),
    _optional("return_context_logits", "BOOL", "false only"),
    _optional("return_generation_logits", "BOOL", "false only"),
    _optional("return_perf_metrics", "BOOL", "false only"),
    # As upstream's `tensorrt_llm` has it, which its ensemble does not.
    _optional(
        "stop",
        "BOOL",
        "true ends the requests in flight that bear this one's id; nothing else of the request is then read",
    ),
)
# Tensors whose value has another name in our options and requests.
FIELD_NAMES = {"text_input": "prompt", "min_tokens": "min_length", "seed": "random_seed"}

# The log-probability outputs come only if return_log_probs asks for them.
OUTPUTS: tuple[WireTensor, ...] = (
    WireTensor(name="text_output", dtype="STRING", unit="a piece when streaming, else the whole text"),
    WireTensor(
        name="cum_log_probs",
        dtype="FP32",
        unit="natural log, sum so far; of the model's own distribution",
        differs="there of the distribution after penalties and temperature",
    ),
    WireTensor(
        name="output_log_probs",
        dtype="FP32",
        dims=(-1,),
        unit="natural log, one a token of this response",
        differs="there with an axis of beams before it",
    ),
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
