"""/v1/models, /tokenize, /detokenize and /health."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from clients.gateway.api import chat, fields
from clients.gateway.api.messages import read_messages
from clients.gateway.api.sampling import ROUTING, required_model
from clients.gateway.api.tools import offers
from clients.gateway.errors import ApiError, invalid
from clients.gateway.guard import Record
from clients.gateway.state import Gateway
from clients.gateway.texts import ModelTexts
from export.errors import MoeshipError

_LONGEST_TEXT = 1 << 20  # characters that are tokenized in one request
_MOST_IDS = 1 << 18


def read_ids(value: Any) -> list[int]:  # noqa: ANN401 - JSON value
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**31 for item in value):
        raise ValueError("expected a list of token ids")
    if len(value) > _MOST_IDS:
        raise ValueError(f"expected at most {_MOST_IDS} token ids")
    return list(value)


# vLLM's fields for these two.
TOKENIZE = fields.Fields(
    taken={
        "model": fields.text(256),
        "prompt": fields.text(_LONGEST_TEXT),
        "messages": read_messages,
        "add_special_tokens": fields.boolean,
        "add_generation_prompt": fields.boolean,
        "continue_final_message": fields.boolean,
        "return_token_strs": fields.boolean,
        offers.TOOLS: offers.read_tools,
        "chat_template_kwargs": fields.mapping,
    },
    neutral={},
)
DETOKENIZE = fields.Fields(taken={"model": fields.text(256), "tokens": read_ids}, neutral={})


async def models(gateway: Gateway) -> dict[str, Any]:
    """The list of models that are ready."""
    return {"object": "list", "data": [await _model(gateway, name) for name in gateway.pool.models()]}


async def model(gateway: Gateway, name: str) -> dict[str, Any]:
    """One model. Raises ApiError."""
    gateway.check_model(name)
    return await _model(gateway, name)


async def _model(gateway: Gateway, name: str) -> dict[str, Any]:
    """A model as OpenAI's API lists it. `max_model_len`, its context in tokens, is vLLM's."""
    found: dict[str, Any] = {"id": name, "object": "model", "created": 0, "owned_by": "moeship"}
    try:
        texts = await gateway.texts_if_any(name)
    except MoeshipError:  # requests that need the tokenizer are told what is wrong with it
        texts = None
    if texts is not None and texts.context is not None:
        found["max_model_len"] = texts.context
    # Ours alone: whether requests for chats, log-probabilities and the experts of tokens can be answered.
    found["moeship"] = {
        "chat": texts is not None and texts.template is not None,
        "logprobs": texts is not None,
        ROUTING: ROUTING in await gateway.pool.inputs(name),
    }
    return found


async def tokenize(gateway: Gateway, record: Record, body: Mapping[str, Any]) -> dict[str, Any]:
    """The token ids of a text, or of messages as the chat template renders them. Raises ApiError."""
    values = TOKENIZE.read(body)
    record.model = name = required_model(values)
    texts = await gateway.texts(name)
    if ("prompt" in values) == ("messages" in values):
        raise invalid("prompt", "expected either a prompt or messages")
    text = values.get("prompt", "")
    if "messages" in values:
        text = await chat.rendered(gateway, name, values, texts)
    # A template writes the begin token itself, so that a chat's tokens have none added (chat.py).
    adds = values.get("add_special_tokens", "messages" not in values)
    ids = await texts.encode(text, adds=adds)
    found: dict[str, Any] = {"count": len(ids), "max_model_len": texts.context, "tokens": ids}
    if values.get("return_token_strs"):
        found["token_strs"] = await asyncio.to_thread(_token_texts, texts, ids)
    return found


def _token_texts(texts: ModelTexts, token_ids: Sequence[int]) -> list[str]:
    return [texts.token_bytes(token).decode(errors="replace") for token in token_ids]


async def detokenize(gateway: Gateway, record: Record, body: Mapping[str, Any]) -> dict[str, Any]:
    """The text of token ids, special tokens included. Raises ApiError."""
    values = DETOKENIZE.read(body)
    record.model = name = required_model(values)
    texts = await gateway.texts(name)
    if "tokens" not in values:
        raise invalid("tokens", "you must provide tokens")
    unknown = next((token for token in values["tokens"] if token >= texts.tokenizer.size), None)
    if unknown is not None:
        raise invalid("tokens", f"found the token id {unknown}, expected ids below {texts.tokenizer.size}")
    return {"prompt": await texts.decode(values["tokens"])}


def health(gateway: Gateway) -> dict[str, Any]:
    """Whether a model can be asked. Raises ApiError with status 503 where none can."""
    models = gateway.pool.models() if any(triton.is_up for triton in gateway.pool.tritons) else []
    if not models:
        raise ApiError(
            "no model can be asked at present", status=503, kind="server_error", code="unavailable", retry_s=2
        )
    return {"status": "ok", "models": models}
