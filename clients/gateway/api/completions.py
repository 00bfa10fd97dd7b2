"""/v1/completions: texts or token ids that the model continues."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from starlette.responses import Response

from clients.gateway.api import fields
from clients.gateway.api.answers import (
    Usage,
    answer_offsets,
    completion_log_probs,
    finish_reason,
    now,
    prompt_offsets,
    routing_of,
)
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
from clients.gateway.api.values import read_values
from clients.gateway.errors import invalid
from clients.gateway.events import Events, TextEvent, Whole, event, joined
from clients.gateway.guard import Record
from clients.gateway.state import Gateway
from clients.gateway.texts import INPUT_IDS, ModelTexts
from clients.messages import Generation, GenerationRequest
from export.errors import shown
from triton_repo.contracts.piece import Piece

DEFAULT_MAX_TOKENS = 16  # OpenAI's
_Part = TypeVar("_Part", Piece, Generation)


def read_prompt(value: Any) -> list[str | tuple[int, ...]]:  # noqa: ANN401 - JSON value
    """The prompts: a text, a list of texts, a list of token ids, or a list of those."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return list(value)
        if _are_ids(value):
            return [tuple(value)]
        if all(isinstance(item, list) and item and _are_ids(item) for item in value):
            return [tuple(item) for item in value]
    raise ValueError("expected a text, a list of texts, a list of token ids, or a list of such lists, none empty")


def _are_ids(value: Sequence[Any]) -> bool:
    return all(type(item) is int and 0 <= item < 2**31 for item in value)


FIELDS = fields.Fields(
    taken={
        **SHARED,
        "prompt": read_prompt,
        "max_tokens": fields.integer(0, fields.MOST_TOKENS),
        "echo": fields.boolean,
        "logprobs": fields.integer(0, LOG_PROBS),
    },
    unread=UNREAD,
    neutral={"best_of": (1,), "suffix": ("",)},
)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request for completions that was read and checked."""

    values: Mapping[str, Any]
    prompts: tuple[Prompt, ...]
    requests: tuple[GenerationRequest, ...]  # one a prompt
    texts: ModelTexts | None  # where tokens are shown
    log_probs: int | None
    echo: bool
    prompt_only: bool  # max_tokens is 0: the token that the model is asked for is left out of the answer
    includes_usage: bool
    head: Mapping[str, Any]  # what every object of the answer begins with

    @property
    def num_answers(self) -> int:
        return int(self.values.get("n", 1))


async def respond(gateway: Gateway, record: Record, body: Mapping[str, Any]) -> Response:
    """The response to a body. Raises ApiError."""
    call = await read_call(gateway, record, body)
    usage = Usage(record)
    if call.values.get("stream"):
        return Events(_events(gateway, call, usage), gateway.settings.limits.unread_s)
    return Whole(lambda: _whole(gateway, call, usage))


async def read_call(gateway: Gateway, record: Record, body: Mapping[str, Any]) -> Call:
    """Check a body. Raises ApiError."""
    model, values = await read_values(gateway, record, body, FIELDS)
    if "prompt" not in values:
        raise invalid("prompt", "you must provide a prompt")
    limits, stated = gateway.settings.limits, values["prompt"]
    if len(stated) > limits.prompts:
        raise invalid(
            "prompt", f"found {len(stated)} prompts, expected at most {limits.prompts}; send several requests"
        )
    log_probs, echo = values.get("logprobs"), values.get("echo", False)
    max_tokens = values.get("max_tokens", DEFAULT_MAX_TOKENS)
    if max_tokens == 0 and not echo:
        raise invalid("max_tokens", "found 0, expected 1 or more where echo is not true; ask for at least one token")
    needs_texts = log_probs is not None or not all(isinstance(prompt, str) for prompt in stated)
    texts = await gateway.texts(model) if needs_texts else None
    takes_ids = INPUT_IDS in await gateway.pool.inputs(model)
    prompts = tuple(
        [Prompt(prompt) if isinstance(prompt, str) else await _of_ids(texts, prompt, takes_ids) for prompt in stated]
    )
    if not all(prompt.text or prompt.ids for prompt in prompts):
        raise invalid("prompt", "found an empty text, expected at least one character")
    return Call(
        values=values,
        prompts=prompts,
        requests=tuple(
            generation_request(
                values,
                prompt=prompt,
                max_tokens=max(1, max_tokens),
                request_id=record.triton_id(),
                timeout_s=limits.answer_s,
                log_probs=log_probs,
                prompt_log_probs=echo and log_probs is not None,
            )
            for prompt in prompts
        ),
        texts=texts,
        log_probs=log_probs,
        echo=echo,
        prompt_only=max_tokens == 0,
        includes_usage=wants_usage(values),
        head={"id": f"cmpl-{record.id}", "object": "text_completion", "created": now(), "model": model},
    )


async def _of_ids(texts: ModelTexts | None, token_ids: tuple[int, ...], takes_ids: bool) -> Prompt:
    """The prompt of these tokens. A model that takes no token ids gets the text that is encoded to them. Raises
    ApiError where there is none."""
    assert texts is not None
    texts.check_length("prompt", tokens=len(token_ids))
    unknown = next((token for token in token_ids if token >= texts.tokenizer.size), None)
    if unknown is not None:
        raise invalid("prompt", f"found the token id {unknown}, expected ids below {texts.tokenizer.size}")
    text = await texts.decode(token_ids)
    if takes_ids:
        return Prompt(text, token_ids)
    if await texts.encode(text, adds=True) != list(token_ids):
        raise invalid(
            "prompt", f"the token ids {shown(list(token_ids))} are not those that the model's tokenizer makes of their "
            "text, and this model is sent texts; send a text",
        )  # fmt: skip
    return Prompt(text)


async def _whole(gateway: Gateway, call: Call, usage: Usage) -> dict[str, Any]:
    """The answer as one object."""
    room = asyncio.Semaphore(gateway.settings.limits.prompts_at_once)

    async def ask(place: int, request: GenerationRequest) -> list[dict[str, Any]]:
        async with room:
            generations = await gateway.pool.generate_all(request)
        shown_parts = [_without_tokens(part) if call.prompt_only else part for part in generations]
        for part in shown_parts:
            usage.add(part, place)
        return [_choice(call, place, part) for part in shown_parts]

    try:
        async with asyncio.TaskGroup() as group:  # the first error ends the others
            tasks = [group.create_task(ask(place, request)) for place, request in enumerate(call.requests)]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    choices = [choice for task in tasks for choice in task.result()]
    return {**call.head, "choices": choices, "usage": usage.to_json()}


def _choice(call: Call, place: int, generation: Generation) -> dict[str, Any]:
    reason = finish_reason(generation)
    choice: dict[str, Any] = {
        "index": place * call.num_answers + generation.sequence_index,
        "text": (call.prompts[place].text if call.echo else "") + generation.text,
        "logprobs": None,
        "finish_reason": "length" if call.prompt_only else reason,
    }
    if call.texts is not None and call.log_probs is not None:
        prompt = call.prompts[place].text if call.echo else None
        choice["logprobs"], _ = _log_probs(call.texts, generation, 0, prompt)
    if call.values.get("return_token_ids"):
        choice["token_ids"] = list(generation.token_ids)
    return {**choice, **routing_of(generation)}


async def _events(gateway: Gateway, call: Call, usage: Usage) -> AsyncGenerator[bytes, None]:
    """The answer piece by piece. Prompts are answered one after the other."""
    extra, counts = {"usage": None} if call.includes_usage else {}, counts_each(call.values)
    texts: dict[int, TextEvent] = {}  # index of a choice to its events of a text alone
    shows_more = call.log_probs is not None or call.values.get("return_token_ids") or call.values.get(ROUTING)
    is_plain = not (shows_more or counts or call.prompt_only)  # events differ in their texts alone

    def event_of(choice: dict[str, Any]) -> bytes:
        return event({**call.head, "choices": [choice], **({"usage": usage.to_json()} if counts else extra)})

    def one_event(place: int, piece: Piece, offsets: dict[int, int]) -> bytes:
        shown_part = _without_tokens(piece) if call.prompt_only else piece
        usage.add(shown_part, place)
        if is_plain and piece.finish_reason is None and piece.sequence_index in offsets:
            if not piece.text:
                return b""
            index = place * call.num_answers + piece.sequence_index
            if index not in texts:
                texts[index] = TextEvent(lambda text: event_of(_plain(index, text)))
            return texts[index](piece.text)
        choice = _part(call, place, shown_part, offsets)
        return b"" if choice is None else event_of(choice)

    for place, request in enumerate(call.requests):
        offsets: dict[int, int] = {}  # sequence to the offset behind the text of its tokens so far
        async with aclosing(gateway.pool.stream(request)) as pieces:
            async for waiting in pieces:
                for data in joined(one_event(place, piece, offsets) for piece in waiting):
                    yield data
    if call.includes_usage:
        yield event({**call.head, "choices": [], "usage": usage.to_json()})


def _part(call: Call, place: int, piece: Piece, offsets: dict[int, int]) -> dict[str, Any] | None:
    """What a piece adds to a choice; None for one that shows nothing."""
    text, reason = piece.text, finish_reason(piece)
    if call.prompt_only:
        reason = reason and "length"
    is_first = piece.sequence_index not in offsets
    offset = offsets.setdefault(piece.sequence_index, 0)
    begins = is_first and call.echo
    if begins:
        text = call.prompts[place].text + text
    shows_tokens = call.log_probs is not None or call.values.get("return_token_ids") or call.values.get(ROUTING)
    if not text and reason is None and not (shows_tokens and piece.token_ids):
        return None
    choice = _plain(place * call.num_answers + piece.sequence_index, text, reason)
    if call.texts is not None and call.log_probs is not None:
        prompt = call.prompts[place].text if begins else None
        choice["logprobs"], offsets[piece.sequence_index] = _log_probs(call.texts, piece, offset, prompt)
    if call.values.get("return_token_ids"):
        choice["token_ids"] = list(piece.token_ids)
    return {**choice, **routing_of(piece)}


def _plain(index: int, text: str, reason: str | None = None) -> dict[str, Any]:
    """A choice of a streamed event that shows no tokens."""
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _without_tokens(part: _Part) -> _Part:
    """A part that shows the prompt alone."""
    return replace(
        part, text="", token_ids=(), log_probs=(), top_log_probs=(), routing=(),
        num_output_tokens=None if part.num_output_tokens is None else 0,
    )  # fmt: skip


def _log_probs(
    texts: ModelTexts, part: Piece | Generation, offset: int, prompt: str | None
) -> tuple[dict[str, Any], int]:
    """The log-probabilities of a part's tokens, behind those of the prompt where it begins with that, and the
    characters of the choice's text before the next part's. `offset`: before this part's."""
    ids, values, tops = part.token_ids, tuple[float | None, ...](part.log_probs), part.top_log_probs
    tops = tops or ((),) * len(ids)
    before: list[int] = []
    if prompt is not None:
        before, offset = prompt_offsets(texts, part.prompt_token_ids, prompt)
    offsets, offset = answer_offsets(texts, ids, offset)
    if prompt is not None:
        prompt_ids = part.prompt_token_ids
        values = (*(None, *part.prompt_log_probs)[: len(prompt_ids)], *values)
        prompt_tops = part.prompt_top_log_probs or ((),) * (len(prompt_ids) - 1)
        ids, tops = (*prompt_ids, *ids), ((), *prompt_tops, *tops)
    return completion_log_probs(texts, ids, values, tops, [*before, *offsets]), offset
