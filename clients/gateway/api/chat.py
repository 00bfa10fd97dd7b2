"""/v1/chat/completions: a conversation that the model's chat template turns into a prompt."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from clients.gateway.api import fields
from clients.gateway.api.answers import CUT, Usage, chat_log_probs, finish_reason, now, routing_of
from clients.gateway.api.channels import channels_of
from clients.gateway.api.guides import FORMAT
from clients.gateway.api.messages import read_messages
from clients.gateway.api.sampling import (
    LOG_PROBS,
    ROUTING,
    SHARED,
    UNREAD,
    Prompt,
    counts_each,
    generation_request,
    wants_usage,
)
from clients.gateway.api.tools import offers
from clients.gateway.api.tools.forms import Form, form_of
from clients.gateway.api.tools.reading import AUTO, NONE, FirstCall, Reader, message_of
from clients.gateway.api.values import read_values
from clients.gateway.errors import invalid
from clients.gateway.events import Events, TextEvent, Whole, event, joined, renamed
from clients.gateway.guard import Record
from clients.gateway.state import Gateway
from clients.gateway.texts import INPUT_IDS, ModelTexts
from clients.messages import Generation, GenerationRequest
from triton_repo.contracts.piece import Piece

EFFORT = "reasoning_effort"

FIELDS = fields.Fields(
    taken={
        **SHARED,
        "messages": read_messages,
        "max_tokens": fields.integer(1, fields.MOST_TOKENS),
        "max_completion_tokens": fields.integer(1, fields.MOST_TOKENS),
        "logprobs": fields.boolean,
        "top_logprobs": fields.integer(0, LOG_PROBS),
        offers.TOOLS: offers.read_tools,
        offers.CHOICE: offers.read_tool_choice,
        offers.PARALLEL: fields.boolean,
        EFFORT: fields.one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"),
        # vLLM's
        "add_generation_prompt": fields.boolean,
        "continue_final_message": fields.boolean,
        "chat_template_kwargs": fields.mapping,
    },
    unread=UNREAD | {"prediction", "verbosity"},
    neutral={
        "modalities": (["text"],),
        "audio": (),
        "function_call": ("none",),
        "functions": ([],),
        "web_search_options": (),
    },
)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request for a chat completion that was read and checked."""

    values: Mapping[str, Any]
    request: GenerationRequest
    texts: ModelTexts
    log_probs: bool
    includes_usage: bool
    head: Mapping[str, Any]  # what every object of the answer begins with, without its kind
    form: Form  # of the model's calls

    def call_reader(self) -> Reader | None:
        """What reads the calls and channels in one answer; None where it can have none."""
        kind = offers.choice_of(self.values)
        reader: Reader | None = None
        if kind in (NONE, AUTO):
            reader = channels_of(self.texts, has_tools=kind == AUTO)
        reader = reader or offers.reader_of(self.form, self.texts, self.values)
        return FirstCall(reader) if reader and not self.values.get(offers.PARALLEL, True) else reader

    @property
    def names(self) -> Mapping[str, str]:
        """The fields that the server's refusals name, where the request has them by other names."""
        return {FORMAT: offers.TOOLS} if offers.is_required(self.values) else {}


async def respond(gateway: Gateway, record: Record, body: Mapping[str, Any]) -> Response:
    """The response to a body. Raises ApiError."""
    call = await read_call(gateway, record, body)
    usage = Usage(record)
    if call.values.get("stream"):
        return Events(_events(gateway, call, usage), gateway.settings.limits.unread_s)
    return Whole(lambda: _whole(gateway, call, usage))


async def read_call(gateway: Gateway, record: Record, body: Mapping[str, Any]) -> Call:
    """Check a body and render its messages. Raises ApiError."""
    model, values = await read_values(gateway, record, body, FIELDS)
    if "messages" not in values:
        raise invalid("messages", "you must provide messages")
    log_probs, top = values.get("logprobs", False), values.get("top_logprobs")
    if top is not None and not log_probs:
        raise invalid("top_logprobs", "found a number, and logprobs is not true; send logprobs true beside it")
    texts = await gateway.texts(model)
    form = form_of(texts.template or "")
    prompt = await _prompt(gateway, model, values, texts, form)
    guide = await offers.required_format(gateway, model, values, form) if offers.is_required(values) else None
    return Call(
        values=values,
        request=generation_request(
            values if guide is None else {**values, FORMAT: guide},
            prompt=prompt,
            max_tokens=_max_tokens(values),
            request_id=record.triton_id(),
            timeout_s=gateway.settings.limits.answer_s,
            log_probs=(top or 0) if log_probs else None,
        ),
        texts=texts,
        log_probs=log_probs,
        includes_usage=wants_usage(values),
        head={"id": f"chatcmpl-{record.id}", "created": now(), "model": model},
        form=form,
    )


def _max_tokens(values: Mapping[str, Any]) -> int:
    """The most new tokens; without a wish as many as the context has room for."""
    old, new = values.get("max_tokens"), values.get("max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise invalid("max_tokens", f"found {old}, and max_completion_tokens says {new}; send one of the two")
    return int(new or old or fields.MOST_TOKENS)


async def rendered(gateway: Gateway, model: str, values: Mapping[str, Any], texts: ModelTexts) -> str:
    """The conversation of a body as the model's template renders it. Raises ApiError."""
    renderer = await gateway.renderer(model)
    continues = values.get("continue_final_message", False)
    if continues and values.get("add_generation_prompt"):
        raise invalid("continue_final_message", "found true, and add_generation_prompt too; send one of the two")
    return await renderer.render(
        values["messages"],
        add_generation_prompt=values.get("add_generation_prompt", not continues),
        continue_final_message=continues,
        tools=offers.shown_tools(values, texts.template or ""),
        variables={**_effort(values, texts.template or ""), **values.get("chat_template_kwargs", {})},
    )


def _effort(values: Mapping[str, Any], template: str) -> dict[str, str]:
    """The variable by which a template, such as gpt-oss's, tells the model how much to reason. Raises ApiError for a
    template that reads none."""
    effort = values.get(EFFORT, "none")
    if effort != "none" and EFFORT not in template:
        raise invalid(EFFORT, f"found {effort}, and this model's chat template has no place for it; leave it out")
    return {} if effort == "none" else {EFFORT: effort}


async def _prompt(gateway: Gateway, model: str, values: Mapping[str, Any], texts: ModelTexts, form: Form) -> Prompt:
    """The prompt of a conversation. A template writes the begin token itself, where a model has one, so that the
    tokenizer must add none: such a model is sent the tokens, if it takes any."""
    text = await rendered(gateway, model, values, texts)
    if not text:
        raise invalid(
            "messages", "the model's chat template makes an empty text of them, expected at least a character"
        )
    if offers.is_required(values):
        text += form.prefill
    if texts.adds_tokens and INPUT_IDS in await gateway.pool.inputs(model):
        texts.check_length("messages", size=len(text.encode()))
        return Prompt(text, tuple(await texts.encode(text, adds=False)))
    return Prompt(text)


async def _whole(gateway: Gateway, call: Call, usage: Usage) -> dict[str, Any]:
    """The answer as one object."""
    choices = []
    with renamed(call.names):
        generations = await gateway.pool.generate_all(call.request)
    for generation in generations:
        usage.add(generation)
        reader = call.call_reader()
        if reader is None:
            message = {"role": "assistant", "content": generation.text, "refusal": None}
        else:
            is_cut = generation.finish_reason == CUT
            message = message_of(reader.read(generation.text, generation.token_ids, is_last=True, is_cut=is_cut))
        choices.append(_choice(call, generation, {"message": message}, reader))
    return {"object": "chat.completion", **call.head, "choices": choices, "usage": usage.to_json()}


def _choice(call: Call, part: Generation | Piece, words: dict[str, Any], reader: Reader | None) -> dict[str, Any]:
    reason = finish_reason(part)
    choice = {
        "index": part.sequence_index,
        **words,
        "logprobs": chat_log_probs(call.texts, part) if call.log_probs else None,
        "finish_reason": reason if reader is None else reader.finish_reason(reason),
        **routing_of(part),
    }
    return {**choice, "token_ids": list(part.token_ids)} if call.values.get("return_token_ids") else choice


async def _events(gateway: Gateway, call: Call, usage: Usage) -> AsyncGenerator[bytes, None]:
    """The answer piece by piece. The first event of a choice has the role alone."""
    head = {"object": "chat.completion.chunk", **call.head}
    extra, counts = {"usage": None} if call.includes_usage else {}, counts_each(call.values)
    texts: dict[int, TextEvent] = {}  # index of a choice that has begun to its events of a text alone
    readers: dict[int, Reader | None] = {}  # the same to what reads its calls
    shows_more = call.log_probs or call.values.get("return_token_ids") or call.values.get(ROUTING)

    def event_of(choice: dict[str, Any]) -> bytes:
        return event({**head, "choices": [choice], **({"usage": usage.to_json()} if counts else extra)})

    def plain(index: int, delta: dict[str, Any]) -> bytes:
        return event_of({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def begin(index: int) -> bytes:
        texts[index] = TextEvent(lambda text: plain(index, {"content": text}))
        readers[index] = call.call_reader()
        return plain(index, {"role": "assistant", "content": "", "refusal": None})

    def events_of(piece: Piece) -> bytes:
        usage.add(piece)
        index = piece.sequence_index
        data = b"" if index in texts else begin(index)
        reader, reason = readers[index], piece.finish_reason
        if reader is not None:
            # All but the last delta go ahead, so that what belongs to a piece's tokens is one event.
            deltas = reader.read(piece.text, piece.token_ids, is_last=reason is not None, is_cut=reason == CUT)
            data += b"".join(plain(index, delta) for delta in deltas[:-1])
            delta = deltas[-1] if deltas else {}
        elif reason is None and not shows_more and not counts:  # counts change from event to event
            return data + texts[index](piece.text) if piece.text else data
        else:
            delta = {"content": piece.text} if piece.text else {}
        if delta or reason or (shows_more and piece.token_ids):
            data += event_of(_choice(call, piece, {"delta": delta}, reader))
        return data

    with renamed(call.names):
        async with aclosing(gateway.pool.stream(call.request)) as pieces:
            async for waiting in pieces:
                for data in joined(map(events_of, waiting)):
                    yield data
    if call.includes_usage:
        yield event({**head, "choices": [], "usage": usage.to_json()})
