"""The tensors on the wire: names, dtypes and shapes that every served model takes and gives, whichever engine runs.

Names and dtypes are those of TensorRT-LLM 1.2's `ensemble` model (triton_backend/all_models/inflight_batcher_llm/
ensemble/config.pbtxt upstream), so that NVIDIA's own clients drive our servers unchanged. `ADDED_INPUTS` and
`ADDED_OUTPUTS` are tensors that upstream does not have; NVIDIA's clients neither send nor read them.
`COMPATIBILITY_INPUTS` are older names, and inputs that our clients do not need. Upstream's inputs for prompt tables
and LoRA are not taken. Dims exclude the batch dimension: a request carries [1, *dims].

A request means what it means upstream: a temperature without top_k and top_p is greedy, and a stream never repeats the
prompt. Where a tensor differs from upstream, its `differs` says how. The sources are in
tests/triton_repo/contracts/test_upstream_semantics.py.

This module imports only the standard library, so that a client can use it alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TritonDtype = Literal["STRING", "INT32", "INT64", "UINT64", "FP32", "BOOL"]
# Label in config.pbtxt to label in a request or response. The two differ only for texts.
WIRE_DTYPES: dict[TritonDtype, str] = {
    "STRING": "BYTES", "INT32": "INT32", "INT64": "INT64", "UINT64": "UINT64", "FP32": "FP32", "BOOL": "BOOL",
}  # fmt: skip
# The names of numpy's dtypes; a text is an object.
NUMPY_DTYPES: dict[str, str] = {
    "STRING": "object", "INT32": "int32", "INT64": "int64", "UINT64": "uint64", "FP32": "float32", "BOOL": "bool",
}  # fmt: skip

# Most answers to one prompt, most biases of a request, and of how many of the likeliest tokens log-probabilities come.
MOST_SEQUENCES = 16
MOST_BIASES = 1024
MOST_LOG_PROBS = 20
# What an answer can be kept to, by the names that TensorRT-LLM's Triton models take. Its library has one more.
GUIDE_TYPES = ("json", "json_schema", "regex", "ebnf_grammar")
UNSERVED_GUIDE_TYPES = ("structural_tag",)
MOST_GUIDE_BYTES = 65_536


@dataclass(frozen=True, kw_only=True)
class WireTensor:
    """One input or output of a served model."""

    name: str
    dtype: TritonDtype
    dims: tuple[int, ...] = (1,)  # without the batch dimension; -1 is any length
    optional: bool = False
    unit: str = ""  # meaning, unit and bounds
    differs: str = ""  # what TensorRT-LLM 1.2 does differently with this tensor, and why


def _optional(
    name: str, dtype: TritonDtype, unit: str, *, differs: str = "", dims: tuple[int, ...] = (1,)
) -> WireTensor:
    return WireTensor(name=name, dtype=dtype, dims=dims, optional=True, unit=unit, differs=differs)


_UPSTREAM_INPUTS: tuple[WireTensor, ...] = (
    WireTensor(
        name="text_input",
        dtype="STRING",
        unit="the prompt, UTF-8",
        differs="here bytes that are not UTF-8 and texts without a token are refused; there they fail later",
    ),
    WireTensor(name="max_tokens", dtype="INT32", unit="new tokens at most, >= 1; cut to the room in the context"),
    _optional("stream", "BOOL", "true: one response for each piece; false: one response with the whole answer"),
    _optional(
        "temperature",
        "FP32",
        "0, or 0.001 to 1000; absent is 1; 0 is greedy; has no effect where top_k, top_p and min_p are all 0 or absent",
        differs="there 0 divides the logits by a tiny number, which is greedy except for near ties; any size is taken",
    ),
    _optional(
        "top_k",
        "INT32",
        "draw among the k likeliest tokens; 1 is greedy; 0 or absent sets no limit if top_p or min_p is sent, else it "
        "is greedy",
        differs="there more than 1024 counts as 1024 (TOP_K_MAX), a limit of its kernels",
    ),
    _optional(
        "top_p",
        "FP32",
        "draw among the likeliest tokens whose probabilities sum to p, 0 < p <= 1; 1 draws among all; 0 or absent sets "
        "no limit if top_k or min_p is sent, else it is greedy",
        differs="there a negative value counts as absent; here it is refused, since it is no probability",
    ),
    _optional(
        "min_tokens",
        "INT32",
        "new tokens that must come before an end token may; stop words end an answer at any time",
        differs="there it holds only for end_id (NVIDIA/TensorRT-LLM#4776), and 1 counts as none (#1935); here it "
        "holds for all end tokens, and a request is refused if its engine is TensorRT-LLM's and there are several",
    ),
    _optional(
        "repetition_penalty",
        "FP32",
        "0.001 to 1000; 1 changes nothing; counts the tokens of prompt and output",
        differs="there any value above 0 is taken; beyond these bounds float32 overflows",
    ),
    _optional(
        "presence_penalty",
        "FP32",
        "-1000 to 1000; 0 changes nothing; counts the tokens of the output",
        differs="there any number is taken; beyond these bounds float32 loses the logits",
    ),
    _optional(
        "frequency_penalty",
        "FP32",
        "-1000 to 1000; 0 changes nothing; counts the tokens of the output",
        differs="there any number is taken; beyond these bounds float32 loses the logits",
    ),
    _optional(
        "seed",
        "UINT64",
        "the same seed gives the same text; absent: a seed is drawn",
        differs="there absent is 0, so that equal requests get equal samples",
    ),
    _optional(
        "stop_words",
        "STRING",
        "texts that end the generation and are cut off",
        dims=(-1,),
        differs="there the tokens of each word are matched and stay in the answer; here the text is matched, whatever "
        "tokens the model spells it with, and text that could begin a word is kept back until that is decided",
    ),
    _optional(
        "bad_words",
        "STRING",
        "texts that are never produced",
        dims=(-1,),
        differs="there, and in an ensemble here, the tokens that spell each word are kept out; the model without steps "
        "here keeps the text out, whatever tokens the model would spell it with",
    ),
    _optional("end_id", "INT32", "replaces the model's own end tokens; -1: none"),
    _optional("pad_id", "INT32", "accepted for compatibility; nothing is padded"),
    _optional("beam_width", "INT32", "1 only", differs="there up to the max_beam_width of the engine"),
    _optional(
        "return_log_probs",
        "BOOL",
        "fill the log-probability outputs",
        differs="there these outputs hold zeros unless asked for; here they are absent",
    ),
    _optional(
        "exclude_input_in_output",
        "BOOL",
        "absent is true; false: an answer in one response begins with the prompt; a stream never repeats the prompt",
        differs="there absent takes the value in the engine's config, false in its template, and the prompt is decoded "
        "from its tokens; here the prompt comes back as it was sent",
    ),
    _optional(
        "num_return_sequences",
        "INT32",
        f"1 to {MOST_SEQUENCES} answers to the prompt, told apart by sequence_index; absent is 1; a stream gives the "
        "pieces of all of them as they come, else each answer is one response",
        differs="there any number is taken",
    ),
    _optional(
        "guided_decoding_guide_type",
        "STRING",
        f"what the answer is kept to: {', '.join(GUIDE_TYPES)}; absent or empty: nothing; json: any JSON object",
        differs="there an unknown type counts as absent, here it is refused; there json is an array too",
    ),
    _optional(
        "guided_decoding_guide",
        "STRING",
        f"the JSON schema, the regular expression that the whole answer matches, or the EBNF grammar whose rule root "
        f"the answer is; at most {MOST_GUIDE_BYTES} bytes; absent for json",
        differs="there keywords of a schema that the library does not know are ignored; here they are refused",
    ),
)

# TensorRT-LLM's Triton models have no tensor for these. Min-p, the bias by ids and the log-probabilities are named as
# vLLM's and TensorRT-LLM's own parameters for Python, where these have names (min_p, logit_bias).
ADDED_INPUTS: tuple[WireTensor, ...] = (
    _optional(
        "min_p",
        "FP32",
        "draw among the tokens that are at least min_p times as likely as the likeliest one, 0 < min_p <= 1, after the "
        "temperature and before top_k and top_p; 0 or absent sets no limit",
    ),
    _optional(
        "logit_bias_ids",
        "INT32",
        f"token ids, each once, {MOST_BIASES} at most, to whose logits the numbers in logit_bias_values are added "
        "before penalties and temperature",
        dims=(-1,),
    ),
    _optional(
        "logit_bias_values", "FP32", "-1000 to 1000, one for each of logit_bias_ids, in the same order", dims=(-1,)
    ),
    _optional(
        "num_log_probs",
        "INT32",
        f"number of likeliest tokens that fill top_token_ids and top_log_probs, 0 to {MOST_LOG_PROBS}",
    ),
    # TensorRT-LLM's model `tensorrt_llm` has this input; its ensemble makes it of the text.
    _optional(
        "input_ids",
        "INT32",
        "the prompt as token ids, taken as they are, in place of a text; text_input is then empty",
        dims=(-1,),
    ),
    _optional("return_prompt_log_probs", "BOOL", "fill prompt_token_ids and prompt_log_probs"),
    _optional("return_routed_experts", "BOOL", "fill routed_experts, expert_weights and num_experts; mixtures only"),
)
# What our own clients send.
INPUTS: tuple[WireTensor, ...] = (*_UPSTREAM_INPUTS, *ADDED_INPUTS)

# Inputs that are served as well as INPUTS. Our own clients never send them in a request for text.
COMPATIBILITY_INPUTS: tuple[WireTensor, ...] = (
    _optional("min_length", "INT32", "min_tokens under its older name"),
    _optional("random_seed", "UINT64", "seed under its older name"),
    _optional(
        "embedding_bias_words",
        "STRING",
        "texts; the text's number in embedding_bias_weights is added to the logit of each of its tokens",
        dims=(-1,),
        differs="there a begin token that the tokenizer puts around texts gets the number too",
    ),
    _optional(
        "embedding_bias_weights",
        "FP32",
        "-1000 to 1000, one for each of embedding_bias_words, in the same order",
        dims=(-1,),
        differs="there any number is taken",
    ),
    _optional("length_penalty", "FP32", "accepted; it would weigh beams, and there are none"),
    _optional("return_num_input_tokens", "BOOL", "accepted; the count always comes", differs="there only if asked for"),
    _optional(
        "return_num_output_tokens",
        "BOOL",
        "accepted; the count always comes",
        differs="there only if asked for, and counted for this response; here counted for the answer so far",
    ),
    _optional("return_context_logits", "BOOL", "false only"),
    _optional("return_generation_logits", "BOOL", "false only"),
    _optional("return_perf_metrics", "BOOL", "false only"),
    # Upstream has this input in its model `tensorrt_llm`, not in its ensemble.
    _optional(
        "stop",
        "BOOL",
        "true ends the requests in flight that have the id of this one; nothing else of this request is then read",
    ),
)
# Tensor to the name of its value in GenerationOptions and GenerationRequest, where the two names differ.
FIELD_NAMES = {"text_input": "prompt", "min_tokens": "min_length", "seed": "random_seed"}

# Outputs with log-probabilities are sent only if asked for: these two by return_log_probs.
OUTPUTS: tuple[WireTensor, ...] = (
    WireTensor(name="text_output", dtype="STRING", unit="the text of a piece when streaming, else the whole text"),
    WireTensor(
        name="cum_log_probs",
        dtype="FP32",
        unit="natural logarithm, sum so far, in the distribution that the model gives",
        differs="there in the distribution after penalties and temperature",
    ),
    WireTensor(
        name="output_log_probs",
        dtype="FP32",
        dims=(-1,),
        unit="natural logarithm, one for each token of this response",
        differs="there with a dimension for beams in front",
    ),
    WireTensor(name="sequence_index", dtype="INT32", unit="which of the answers to the prompt, from 0 on"),
    WireTensor(name="batch_index", dtype="INT32", unit="0"),
)

# Outputs that TensorRT-LLM does not have. finish_reason is "" until the last response, then one of FINISH_REASONS.
ADDED_OUTPUTS: tuple[WireTensor, ...] = (
    WireTensor(name="finish_reason", dtype="STRING"),
    WireTensor(name="token_ids", dtype="INT32", dims=(-1,), unit="the tokens of this response"),
    WireTensor(name="num_input_tokens", dtype="INT32", unit="tokens of the prompt"),
    WireTensor(name="num_output_tokens", dtype="INT32", unit="tokens produced so far"),
    WireTensor(
        name="top_token_ids",
        dtype="INT32",
        dims=(-1, -1),
        unit="for each token of this response the likeliest ids at its place, num_log_probs of them, the likeliest "
        "first; the chosen token need not be among them",
    ),
    WireTensor(
        name="top_log_probs",
        dtype="FP32",
        dims=(-1, -1),
        unit="natural logarithms of the probabilities of top_token_ids, in the distribution that the model gives",
    ),
    WireTensor(
        name="prompt_token_ids",
        dtype="INT32",
        dims=(-1,),
        unit="the tokens of the prompt, in the first response of each sequence",
    ),
    WireTensor(
        name="prompt_log_probs",
        dtype="FP32",
        dims=(-1,),
        unit="natural logarithm, one for each token of the prompt from the second on, and so one less than "
        "prompt_token_ids: no model gives a probability for the first",
    ),
    WireTensor(
        name="prompt_top_token_ids",
        dtype="INT32",
        dims=(-1, -1),
        unit="for each token of prompt_log_probs the likeliest ids at its place, num_log_probs of them, where both are "
        "asked for",
    ),
    WireTensor(
        name="prompt_top_log_probs",
        dtype="FP32",
        dims=(-1, -1),
        unit="natural logarithms of the probabilities of prompt_top_token_ids",
    ),
    WireTensor(
        name="routed_experts",
        dtype="INT32",
        dims=(-1, -1, -1),
        unit="for each token of this response and each layer that has experts the experts that were chosen, in the "
        "checkpoint's numbers, the heaviest first: at the position that the token's logits come from, which is that "
        "of the token before it",
    ),
    WireTensor(
        name="expert_weights",
        dtype="FP32",
        dims=(-1, -1, -1),
        unit="the weight of each of routed_experts in its layer's output",
    ),
    WireTensor(name="num_experts", dtype="INT32", unit="experts of each layer that has some"),
)

FINISH_REASONS = ("stop", "length", "cancelled")
