"""The tensors between the models of an ensemble: text to tokens, tokens to tokens, tokens to text.

The ensemble has the name of the deployment and the tensors of `wire.py`. Its steps:

    preprocessing   text and options of a request  -> token ids and options, and the plan of the answer (ANSWER)
    postprocessing  ANSWER, token ids and options  -> the same token ids and options, after ANSWER is registered
    tensorrt_llm    token ids and options          -> responses with token ids
    postprocessing  token ids                      -> the tensors of `wire.py`

`tensorrt_llm` has the tensors of TensorRT-LLM 1.2's model of that name, whichever runs the engine: TensorRT-LLM's C++
backend or ONNX Runtime (triton_backend/all_models/inflight_batcher_llm/tensorrt_llm/config.pbtxt upstream). The tensors
of the other steps have upstream's names where upstream has them (ensemble/, preprocessing/ and
postprocessing/config.pbtxt there). Dims exclude the batch dimension. This module imports only `wire.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from triton_repo.contracts.wire import ADDED_OUTPUTS, COMPATIBILITY_INPUTS, INPUTS, OUTPUTS

PREPROCESSING = "preprocessing"
TOKEN_ENGINE = "tensorrt_llm"
POSTPROCESSING = "postprocessing"
STEP_MODELS = (PREPROCESSING, TOKEN_ENGINE, POSTPROCESSING)


@dataclass(frozen=True, kw_only=True)
class ModelTensor:
    """One input or output of a step."""

    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)  # without the batch dimension; -1 is any length
    optional: bool = False
    scalar: bool = False  # shape [1] in a request, [] for the model
    ragged: bool = False  # requests of different lengths may be batched


def _scalar(name: str, dtype: str, *, optional: bool = True) -> ModelTensor:
    return ModelTensor(name=name, dtype=dtype, optional=optional, scalar=True)


def _ragged(name: str, dtype: str, *dims: int) -> ModelTensor:
    return ModelTensor(name=name, dtype=dtype, dims=dims, optional=True, ragged=True)


# Upstream's template leaves two data types open: that of logits, and that of prompt tables and encoder features.
LOGITS_DTYPE = "FP32"
_TABLE_DTYPE = "FP16"

# Inputs of `tensorrt_llm`, in upstream's order.
TOKEN_INPUTS: tuple[ModelTensor, ...] = (
    _ragged("input_ids", "INT32", -1),
    _ragged("encoder_input_features", _TABLE_DTYPE, -1, -1),
    _scalar("encoder_output_lengths", "INT32"),
    _scalar("input_lengths", "INT32", optional=False),
    _scalar("request_output_len", "INT32", optional=False),
    _scalar("num_return_sequences", "INT32"),
    _ragged("draft_input_ids", "INT32", -1),
    _ragged("decoder_input_ids", "INT32", -1),
    _scalar("decoder_input_lengths", "INT32"),
    _ragged("draft_logits", LOGITS_DTYPE, -1, -1),
    _scalar("draft_acceptance_threshold", "FP32"),
    _scalar("end_id", "INT32"),
    _scalar("pad_id", "INT32"),
    _ragged("stop_words_list", "INT32", 2, -1),
    _ragged("bad_words_list", "INT32", 2, -1),
    _ragged("embedding_bias", "FP32", -1),
    _scalar("beam_width", "INT32"),
    _scalar("temperature", "FP32"),
    _scalar("runtime_top_k", "INT32"),
    _scalar("runtime_top_p", "FP32"),
    _scalar("runtime_top_p_min", "FP32"),
    _scalar("runtime_top_p_decay", "FP32"),
    _scalar("runtime_top_p_reset_ids", "INT32"),
    _scalar("len_penalty", "FP32"),
    _scalar("early_stopping", "BOOL"),
    _scalar("repetition_penalty", "FP32"),
    _scalar("min_tokens", "INT32"),
    _scalar("beam_search_diversity_rate", "FP32"),
    _scalar("presence_penalty", "FP32"),
    _scalar("frequency_penalty", "FP32"),
    _scalar("seed", "UINT64"),
    _scalar("return_log_probs", "BOOL"),
    _scalar("return_context_logits", "BOOL"),
    _scalar("return_generation_logits", "BOOL"),
    _scalar("return_perf_metrics", "BOOL"),
    _scalar("return_num_input_tokens", "BOOL"),
    _scalar("return_num_output_tokens", "BOOL"),
    _scalar("exclude_input_in_output", "BOOL"),
    _scalar("stop", "BOOL"),
    _scalar("streaming", "BOOL"),
    _ragged("prompt_embedding_table", _TABLE_DTYPE, -1, -1),
    _ragged("prompt_table_extra_ids", "UINT64", -1),
    _scalar("prompt_vocab_size", "INT32"),
    _ragged("cross_attention_mask", "BOOL", -1, -1),
    ModelTensor(name="mrope_rotary_cos_sin", dtype="FP32", dims=(-1,), optional=True),
    ModelTensor(name="mrope_position_deltas", dtype="INT64", optional=True),
    _scalar("lora_task_id", "UINT64"),
    _ragged("lora_weights", "FP16", -1, -1),
    _ragged("lora_config", "INT32", -1, 3),
    _ragged("context_phase_params", "UINT8", -1),
    _ragged("skip_cross_attn_blocks", "BOOL", 1),
    _ragged("retention_token_range_starts", "INT32", -1),
    _ragged("retention_token_range_ends", "INT32", -1),
    _ragged("retention_token_range_priorities", "INT32", -1),
    _ragged("retention_token_range_durations_ms", "INT32", -1),
    _ragged("retention_decode_priority", "INT32", 1),
    _ragged("retention_decode_duration_ms", "INT32", 1),
    _ragged("guided_decoding_guide_type", "STRING", 1),
    _ragged("guided_decoding_guide", "STRING", 1),
    _ragged("lookahead_window_size", "INT32", 1),
    _ragged("lookahead_ngram_size", "INT32", 1),
    _ragged("lookahead_verification_set_size", "INT32", 1),
)


def _output(name: str, dtype: str, *dims: int) -> ModelTensor:
    return ModelTensor(name=name, dtype=dtype, dims=dims or (1,))


TOKEN_OUTPUTS: tuple[ModelTensor, ...] = (
    _output("output_ids", "INT32", -1, -1),
    _output("sequence_length", "INT32", -1),
    _output("cum_log_probs", "FP32", -1),
    _output("output_log_probs", "FP32", -1, -1),
    _output("context_logits", LOGITS_DTYPE, -1, -1),
    _output("generation_logits", LOGITS_DTYPE, -1, -1, -1),
    _output("batch_index", "INT32"),
    _output("sequence_index", "INT32"),
    _output("context_phase_params", "UINT8", -1),
    _output("kv_cache_alloc_new_blocks", "INT32"),
    _output("kv_cache_reused_blocks", "INT32"),
    _output("kv_cache_alloc_total_blocks", "INT32"),
    _output("arrival_time_ns", "INT64"),
    _output("first_scheduled_time_ns", "INT64"),
    _output("first_token_time_ns", "INT64"),
    _output("last_token_time_ns", "INT64"),
    _output("acceptance_rate", "FP32"),
    _output("total_accepted_draft_tokens", "INT32"),
    _output("total_draft_tokens", "INT32"),
    _output("num_input_tokens", "INT32"),
    _output("num_output_tokens", "INT32"),
)
# Tensors that only an engine on ONNX Runtime has, beside upstream's. It sends the answer's key back with each response
# to a request that has a key. `is_cancelled`: the response ends an answer that no client waits for. `is_probe`: the
# response has no tokens and asks whether a client still waits.
ENGINE_KEY_INPUT = _scalar("answer_key", "STRING")
ENGINE_KEY_OUTPUT = _output("answer_key", "STRING")
ENGINE_CANCELLED = _output("is_cancelled", "BOOL")
ENGINE_PROBE = _output("is_probe", "BOOL")
# Tensors of contracts/wire.py that upstream's engine does not have. The outputs of likeliest tokens and of experts
# are for the tokens of one response; an end token, which no response shows, has its row behind them. Those of
# the prompt are in the first response of each sequence. `is_complete`: a guide lets nothing follow.
ADDED_TOKEN_INPUTS = (
    _scalar("min_p", "FP32"),
    _scalar("num_log_probs", "INT32"),
    _scalar("return_prompt_log_probs", "BOOL"),
    _scalar("return_routed_experts", "BOOL"),
)
ADDED_TOKEN_OUTPUTS = (
    _output("top_token_ids", "INT32", -1, -1),
    _output("top_log_probs", "FP32", -1, -1),
    _output("prompt_token_ids", "INT32", -1),
    _output("prompt_log_probs", "FP32", -1),
    _output("prompt_top_token_ids", "INT32", -1, -1),
    _output("prompt_top_log_probs", "FP32", -1, -1),
    _output("routed_experts", "INT32", -1, -1, -1),
    _output("expert_weights", "FP32", -1, -1, -1),
    _output("num_experts", "INT32"),
    _output("is_complete", "BOOL"),
)
# The outputs that answers are made of. Every engine gives them.
ANSWER_OUTPUTS = ("output_ids", "sequence_length", "cum_log_probs", "output_log_probs")

# Name on the wire to name in preprocessing.
_UPSTREAM_QUERY_NAMES = {
    "text_input": "QUERY", "max_tokens": "REQUEST_OUTPUT_LEN", "stop_words": "STOP_WORDS_DICT",
    "bad_words": "BAD_WORDS_DICT",
}  # fmt: skip
QUERY_NAMES: dict[str, str] = {
    tensor.name: _UPSTREAM_QUERY_NAMES.get(tensor.name, tensor.name.upper())
    for tensor in (*INPUTS, *COMPATIBILITY_INPUTS)
}
PREPROCESSING_INPUTS: tuple[ModelTensor, ...] = tuple(
    ModelTensor(name=QUERY_NAMES[tensor.name], dtype=tensor.dtype, dims=tensor.dims, optional=tensor.optional)
    for tensor in (*INPUTS, *COMPATIBILITY_INPUTS)
)

STOP_REQUESTS = "STOP_REQUESTS"
# Outputs of preprocessing that go to the engine: name in preprocessing to name in the engine.
ENGINE_NAMES: dict[str, str] = {
    "INPUT_ID": "input_ids", "REQUEST_INPUT_LEN": "input_lengths", "REQUEST_OUTPUT_LEN": "request_output_len",
    "STOP_WORDS_IDS": "stop_words_list", "BAD_WORDS_IDS": "bad_words_list", "OUT_END_ID": "end_id",
    "OUT_PAD_ID": "pad_id", "RUNTIME_TOP_K": "runtime_top_k", "RUNTIME_TOP_P": "runtime_top_p",
    "TEMPERATURE": "temperature", "SEED": "seed", "MIN_TOKENS": "min_tokens",
    "REPETITION_PENALTY": "repetition_penalty", "PRESENCE_PENALTY": "presence_penalty",
    "FREQUENCY_PENALTY": "frequency_penalty", "EMBEDDING_BIAS": "embedding_bias",
    "RETURN_LOG_PROBS": "return_log_probs", "STREAMING": "streaming", STOP_REQUESTS: "stop",
    "GUIDED_DECODING_GUIDE_TYPE": "guided_decoding_guide_type", "GUIDED_DECODING_GUIDE": "guided_decoding_guide",
}  # fmt: skip
# The same for an engine on ONNX Runtime, which is asked for more.
ADDED_ENGINE_NAMES: dict[str, str] = {
    name.upper(): name for name in ("num_return_sequences", *(tensor.name for tensor in ADDED_TOKEN_INPUTS))
}
ANSWER = ModelTensor(name="ANSWER", dtype="STRING")
ANSWER_KEY = ModelTensor(name="ANSWER_KEY", dtype="STRING", optional=True)
CANCELLED = ModelTensor(name="CANCELLED", dtype="BOOL", optional=True)
PROBE = ModelTensor(name="PROBE", dtype="BOOL", optional=True)
_BY_NAME = {tensor.name: tensor for tensor in (*TOKEN_INPUTS, *ADDED_TOKEN_INPUTS)}
_ENGINE_TENSORS: tuple[ModelTensor, ...] = tuple(
    ModelTensor(name=name, dtype=_BY_NAME[engine_name].dtype, dims=_BY_NAME[engine_name].dims, optional=True)
    for name, engine_name in (ENGINE_NAMES | ADDED_ENGINE_NAMES).items()
)
PREPROCESSING_OUTPUTS: tuple[ModelTensor, ...] = (*_ENGINE_TENSORS, ANSWER, ANSWER_KEY)

# Name in the engine to name in postprocessing.
TOKEN_NAMES: dict[str, str] = {
    "output_ids": "TOKENS_BATCH", "sequence_length": "SEQUENCE_LENGTH", "cum_log_probs": "CUM_LOG_PROBS",
    "output_log_probs": "OUTPUT_LOG_PROBS",
}  # fmt: skip
# The same for an engine on ONNX Runtime, which gives more.
ADDED_TOKEN_NAMES: dict[str, str] = {
    name: name.upper() for name in ("sequence_index", *(tensor.name for tensor in ADDED_TOKEN_OUTPUTS))
}
# Postprocessing is two steps of the ensemble. Before the engine it takes ANSWER and all that goes to the engine, and
# passes the latter on: a step after a decoupled step may not also take inputs from steps before that one. After the
# engine it takes one response of the engine at a time.
POSTPROCESSING_INPUTS: tuple[ModelTensor, ...] = (
    ModelTensor(name=ANSWER.name, dtype=ANSWER.dtype, optional=True),
    ANSWER_KEY,
    *_ENGINE_TENSORS,
    *(
        ModelTensor(name=names[tensor.name], dtype=tensor.dtype, dims=tensor.dims, optional=True)
        for names in (TOKEN_NAMES | ADDED_TOKEN_NAMES,)
        for tensor in (*TOKEN_OUTPUTS, *ADDED_TOKEN_OUTPUTS)
        if tensor.name in names
    ),
    CANCELLED,
    PROBE,
)
_WIRE_OUTPUTS = (*OUTPUTS, *ADDED_OUTPUTS)
TEXT_NAMES: dict[str, str] = {
    tensor.name: "OUTPUT" if tensor.name == "text_output" else tensor.name.upper() for tensor in _WIRE_OUTPUTS
}
POSTPROCESSING_OUTPUTS: tuple[ModelTensor, ...] = (
    *(ModelTensor(name=TEXT_NAMES[tensor.name], dtype=tensor.dtype, dims=tensor.dims) for tensor in _WIRE_OUTPUTS),
    *_ENGINE_TENSORS,
    ANSWER_KEY,
)
