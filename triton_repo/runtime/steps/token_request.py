"""Reads and checks the options in a request with the tensors of `tensorrt_llm`.

The defaults are those of the C++ backend (triton_backend/inflight_batcher_llm/src/utils.cc upstream): greedy without
runtime_top_k and runtime_top_p, no end token, seed 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_repo.contracts.wire import MOST_BIASES
from triton_repo.runtime.options import NO_END_ID, SamplingOptions, SamplingPlan, refusal, value_problems
from triton_repo.runtime.request_reading import shortest
from triton_repo.runtime.text.words import Words, unpack_words

# Tensor to field of SamplingOptions.
_SAMPLING = {
    "temperature": "temperature", "runtime_top_k": "top_k", "runtime_top_p": "top_p", "min_tokens": "min_length",
    "repetition_penalty": "repetition_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty", "seed": "random_seed", "return_log_probs": "return_log_probs",
    "min_p": "min_p", "num_log_probs": "num_log_probs", "guided_decoding_guide_type": "guided_decoding_guide_type",
    "guided_decoding_guide": "guided_decoding_guide",
}  # fmt: skip
_ONE_ONLY = ("beam_width",)
_FALSE_ONLY = ("return_context_logits", "return_generation_logits", "return_perf_metrics")
# The inputs that an engine on ONNX Runtime takes. Its config.pbtxt does not declare other inputs of
# contracts/ensemble.py.
TAKEN_INPUTS = frozenset(
    {
        "input_ids", "input_lengths", "request_output_len", "end_id", "pad_id", "stop_words_list", "bad_words_list",
        "len_penalty", "return_num_input_tokens", "return_num_output_tokens", "exclude_input_in_output", "stop",
        "streaming", "embedding_bias", "num_return_sequences", "return_prompt_log_probs",
        "return_routed_experts", *_SAMPLING, *_ONE_ONLY, *_FALSE_ONLY,
    }
)  # fmt: skip


_MOST_BIAS = 1000 * MOST_BIASES  # of one token: a bias of each of as many words as there may be


@dataclass(frozen=True, kw_only=True)
class TokenRequest:
    """The checked options of a request."""

    # its end tokens, which min_tokens holds back, include stop words that are end tokens of the model
    plan: SamplingPlan
    end_id: int | None  # the end token, which is not sent; None for none
    most_tokens: int  # new tokens
    streaming: bool
    stop_words: Words
    bad_words: Words
    echo: bool  # an answer in one response begins with the prompt's tokens
    num_sequences: int  # answers to the prompt
    wants_prompt: bool  # the log-probabilities of the prompt's tokens
    wants_routing: bool  # the experts of each token
    count_input_tokens: bool
    count_output_tokens: bool


def read_token_request(
    tensors: Mapping[str, npt.NDArray[Any]],
    max_sequence: int,
    num_tokens: int,
    model_end_ids: tuple[int, ...] = (),
) -> TokenRequest:
    """The options in a request. Raises RequestError that lists every problem. Prompt and output have at most
    `max_sequence` tokens together; the output is shortened if need be. Token ids are below `num_tokens`.

    A request names one end token. If it is one of `model_end_ids`, the others of these that are stop words of one token
    count as end tokens too, so that min_tokens holds them back. TensorRT-LLM holds back only the one
    (NVIDIA/TensorRT-LLM#4776).
    """
    problems: list[str] = []
    given = {name: tensor.item() for name, tensor in tensors.items() if tensor.size == 1}
    prompt_ids = _prompt(tensors, given, problems, max_sequence)
    room = max_sequence - len(prompt_ids)
    most_tokens = given.get("request_output_len", 0)
    if prompt_ids and not all(0 <= token < num_tokens for token in prompt_ids):
        problems.append(f"input_ids: found an id outside 0 to {num_tokens - 1}; encode with the engine's tokenizer")
    if most_tokens < 1:
        problems.append(f"request_output_len: found {most_tokens}, expected 1 or more; ask for at least one token")
    problems += [f"{name}: found {given[name]}, expected 1" for name in _ONE_ONLY if given.get(name, 1) != 1]
    problems += [
        f"{name}: found true, expected false; there is no such output" for name in _FALSE_ONLY if given.get(name)
    ]
    end_id = given.get("end_id", NO_END_ID)
    if not NO_END_ID <= end_id < num_tokens:
        problems.append(f"end_id: found {end_id}, expected a token id below {num_tokens}, or -1 for none")
    values = _sampling(given)
    problems += value_problems(values, {field: name for name, field in _SAMPLING.items()})
    num_sequences = given.get("num_return_sequences", 1)
    problems += value_problems({"num_return_sequences": num_sequences})
    values["logit_bias"] = _biases(tensors, problems, num_tokens)
    words = {name: _words(name, tensors, problems) for name in ("stop_words_list", "bad_words_list")}
    if problems:
        raise refusal(problems)
    return TokenRequest(
        plan=SamplingPlan(
            options=SamplingOptions(**values),
            prompt_ids=prompt_ids,
            end_ids=_end_ids(end_id, words["stop_words_list"], model_end_ids),
        ),
        end_id=None if end_id == NO_END_ID else end_id,
        most_tokens=min(most_tokens, room),
        streaming=given.get("streaming", False),
        stop_words=words["stop_words_list"],
        bad_words=words["bad_words_list"],
        echo=not given.get("exclude_input_in_output", True),
        num_sequences=num_sequences,
        wants_prompt=given.get("return_prompt_log_probs", False),
        wants_routing=given.get("return_routed_experts", False),
        count_input_tokens=given.get("return_num_input_tokens", False),
        count_output_tokens=given.get("return_num_output_tokens", False),
    )


def _end_ids(end_id: int, stop_words: Words, model_end_ids: tuple[int, ...]) -> tuple[int, ...]:
    if end_id == NO_END_ID:
        return ()
    more = model_end_ids if end_id in model_end_ids else ()
    return (end_id, *(token for token in more if token != end_id and (token,) in stop_words))


def _prompt(
    tensors: Mapping[str, npt.NDArray[Any]], given: Mapping[str, Any], problems: list[str], max_sequence: int
) -> tuple[int, ...]:
    if "input_ids" not in tensors or not tensors["input_ids"].size:
        problems.append("input_ids: found no token, expected at least one; send the prompt's")
        return ()
    ids = tensors["input_ids"]
    if ids.ndim == 2 and ids.shape[0] != 1:
        problems.append(f"input_ids: found a batch of {ids.shape[0]}, expected 1; send one request for each prompt")
    length = given.get("input_lengths", ids.size)
    if not 1 <= length <= ids.size:
        problems.append(f"input_lengths: found {length}, expected 1 to the {ids.size} tokens of input_ids")
    if min(length, ids.size) >= max_sequence:
        problems.append(f"input_ids: found {length} tokens, expected at most {max_sequence - 1}; send fewer")
        return ()
    return tuple(ids.reshape(-1)[:length].tolist())


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    values = {field: given[name] for name, field in _SAMPLING.items() if name in given}
    values |= {field: shortest(value) for field, value in values.items() if isinstance(value, float)}
    values |= {field: value.decode(errors="replace") for field, value in values.items() if isinstance(value, bytes)}
    # A top_p of 0 or less counts as absent (getSamplingConfigFromTensors of utils.cc).
    return {"random_seed": 0, **values, "top_p": max(values.get("top_p", 0.0), 0.0)}


def _biases(
    tensors: Mapping[str, npt.NDArray[Any]], problems: list[str], num_tokens: int
) -> tuple[tuple[int, float], ...]:
    """Token ids and what is added to their logits, of embedding_bias [1, V], which has a number for each token."""
    biases = tensors["embedding_bias"].reshape(-1) if "embedding_bias" in tensors else np.zeros(0)
    if not biases.size:
        return ()
    if biases.size != num_tokens:
        problems.append(f"embedding_bias: found {biases.size} numbers, expected {num_tokens}, one for each token")
        return ()
    if not (np.abs(biases) <= _MOST_BIAS).all():
        problems.append(f"embedding_bias: found NaN or a number beyond {_MOST_BIAS}; send a smaller one")
        return ()
    ids = np.flatnonzero(biases)
    return tuple(zip(ids.tolist(), biases[ids].tolist(), strict=True))


def _words(name: str, tensors: Mapping[str, npt.NDArray[Any]], problems: list[str]) -> Words:
    if name not in tensors or not tensors[name].size:
        return ()
    try:
        return unpack_words(tensors[name])
    except ValueError as error:
        problems.append(f"{name}: {error}")
        return ()
