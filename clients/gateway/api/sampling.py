"""The fields that completions and chat completions share, and the request to Triton that they become.

OpenAI's API draws from the whole distribution where a request names neither temperature nor top_p; the text contract is
greedy there. So both are always sent. Fields that only vLLM's API has, and the contract too, are taken by vLLM's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clients.errors import RequestRejected
from clients.gateway.api import fields
from clients.gateway.api.guides import FORMAT, read_format
from clients.gateway.errors import ApiError, invalid, unsupported
from clients.gateway.state import Gateway
from clients.messages import GenerationRequest
from triton_repo.contracts.wire import MOST_BIASES, MOST_LOG_PROBS, MOST_SEQUENCES

MOST_STOPS, MOST_STOP_BYTES = 1024, 1024  # the text contract's
_LEAST_TEMPERATURE = 0.001  # of the contract; below it the likeliest token is as good as certain

ROUTING = "return_routed_experts"  # ours alone: the experts of each token, beside it
SHARED: Mapping[str, fields.Read] = {
    "model": fields.text(256),
    "temperature": fields.number(0, 2),
    "top_p": fields.number(0, 1),
    "n": fields.integer(1, MOST_SEQUENCES),
    "stop": fields.words(MOST_STOPS, MOST_STOP_BYTES),
    "seed": fields.integer(-(2**63), 2**64 - 1),
    "presence_penalty": fields.number(-2, 2),
    "frequency_penalty": fields.number(-2, 2),
    "logit_bias": fields.biases(MOST_BIASES, -100, 100),
    "stream": fields.boolean,
    "stream_options": fields.within(
        "stream_options",
        {"include_usage": fields.boolean, "continuous_usage_stats": fields.boolean},  # the latter is vLLM's
        unread=frozenset({"include_obfuscation"}),
    ),
    FORMAT: read_format,
    # vLLM's
    "top_k": fields.integer(-1, fields.MOST_TOKENS),
    "min_p": fields.number(0, 1),
    "repetition_penalty": fields.number(0.001, 1000),
    "min_tokens": fields.integer(0, fields.MOST_TOKENS),
    "bad_words": fields.words(MOST_STOPS, MOST_STOP_BYTES),
    "ignore_eos": fields.boolean,
    "return_token_ids": fields.boolean,
    ROUTING: fields.boolean,
}
# OpenAI's fields that say who asks, how an answer is billed or stored, and where it runs.
UNREAD = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention",
    }
)  # fmt: skip
LOG_PROBS = MOST_LOG_PROBS


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, and its tokens where they are sent in place of the text."""

    text: str
    ids: tuple[int, ...] | None = None


def generation_request(
    values: Mapping[str, Any],
    *,
    prompt: Prompt,
    max_tokens: int,
    request_id: str,
    timeout_s: float,
    log_probs: int | None,
    prompt_log_probs: bool = False,
) -> GenerationRequest:
    """The request to Triton for one prompt. `log_probs`: of how many of the likeliest tokens; None for no
    log-probabilities. Raises ApiError."""
    temperature, top_p, top_k = values.get("temperature", 1.0), values.get("top_p", 1.0), values.get("top_k", 0)
    if temperature < _LEAST_TEMPERATURE or top_p == 0:
        temperature, top_p, top_k = 0.0, 1.0, 1
    seed, (guide_type, guide) = values.get("seed"), values.get(FORMAT, ("", ""))
    try:
        return GenerationRequest(
            model=values["model"],
            prompt=prompt.text if prompt.ids is None else "",
            input_ids=prompt.ids,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k if top_k > 0 else None,
            min_p=values.get("min_p") or None,
            min_length=values.get("min_tokens") or None,
            repetition_penalty=values.get("repetition_penalty"),
            presence_penalty=values.get("presence_penalty") or None,
            frequency_penalty=values.get("frequency_penalty") or None,
            logit_bias=values.get("logit_bias") or None,
            random_seed=None if seed is None else seed % 2**64,
            stop_words=values.get("stop") or None,
            bad_words=values.get("bad_words") or None,
            end_id=-1 if values.get("ignore_eos") else None,
            return_log_probs=True if log_probs is not None else None,
            num_log_probs=log_probs or None,
            return_prompt_log_probs=True if prompt_log_probs else None,
            guided_decoding_guide_type=guide_type or None,
            guided_decoding_guide=guide or None,
            exclude_input_in_output=True,  # TensorRT-LLM's ensembles may repeat the prompt where this is absent
            return_routed_experts=values.get(ROUTING) or None,
            num_return_sequences=values["n"] if values.get("n", 1) > 1 else None,
            request_id=request_id,
            timeout_s=timeout_s,
        )
    except RequestRejected as error:
        raise ApiError(str(error)) from error


async def check_routing(gateway: Gateway, model: str, values: Mapping[str, Any]) -> None:
    """Raise ApiError for a request for the experts of its tokens, if the model has no such input."""
    if values.get(ROUTING) and ROUTING not in await gateway.pool.inputs(model):
        raise unsupported(ROUTING, "found true, and this model's server does not tell which experts computed a token; "
                          "leave it out")  # fmt: skip


def required_model(values: Mapping[str, Any]) -> str:
    """The model that a request names. Raises ApiError."""
    if not values.get("model"):
        raise invalid("model", "you must provide a model parameter; /v1/models lists them")
    return str(values["model"])


def wants_usage(values: Mapping[str, Any]) -> bool:
    """Whether the last event of a stream has the counts of tokens. Raises ApiError for options without a stream."""
    options = values.get("stream_options")
    if options is not None and not values.get("stream"):
        raise invalid("stream_options", "found options of a stream, and stream is not true; leave one of the two out")
    return bool((options or {}).get("include_usage"))


def counts_each(values: Mapping[str, Any]) -> bool:
    """Whether each event of a stream has the counts so far. As with vLLM that takes `include_usage` too."""
    options = values.get("stream_options") or {}
    return bool(options.get("include_usage") and options.get("continuous_usage_stats"))
