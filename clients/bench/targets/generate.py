"""Triton's generate extension over HTTP (`/v2/models/MODEL/generate_stream`), as the load generator uses it. Each event
is a JSON object with the outputs of one response (triton-inference-server/server, docs/protocol/
extension_generate.md)."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clients.bench.load import Work
from clients.bench.records import Arrival
from clients.bench.targets.http import (
    MOST_DETAILS,
    UNREADABLE,
    asked_for_models,
    count_of,
    events,
    library_errors,
    read_json,
    refusal,
)
from clients.bench.targets.triton import request_of
from clients.errors import ServerFailed, StreamBroken
from clients.wire import input_values
from triton_repo.contracts.model_state import ModelState

if TYPE_CHECKING:
    from aiohttp import ClientSession


@dataclass(kw_only=True)
class GenerateTarget:
    """A model of the Triton whose HTTP endpoint is at `url` (http://HOST:PORT)."""

    session: ClientSession
    url: str
    model: str
    counting: str = "the token ids of each response"

    async def answer(self, work: Work) -> AsyncGenerator[Arrival, None]:
        """Send one request and yield what arrives. Raises ClientError."""
        doing = f"generating with {self.model} at {self.url}"
        path = f"{self.url}/v2/models/{self.model}/generate_stream"
        ended = False
        async with (
            library_errors(doing),
            self.session.post(path, json=body_of(work, self.model), allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise await refusal(doing, response)
            async for data in events(response):
                arrival = _read(doing, data)
                ended = ended or bool(arrival.finish_reason)
                yield arrival
        if not ended:
            raise StreamBroken(f"{doing}: the stream ended without a finish reason")


def body_of(work: Work, model: str) -> dict[str, Any]:
    """The JSON of one request: each tensor by its name."""
    values = input_values(request_of(work, model), stream=True)
    return {tensor.name: list(found) if tensor.dims == (-1,) else found[0] for tensor, found in values}


def _read(doing: str, data: str) -> Arrival:
    """What one event brought. Raises StreamBroken and ServerFailed."""
    try:
        event = json.loads(data)
        if event.get("error"):
            raise ServerFailed(f"{doing}: {str(event['error'])[:MOST_DETAILS]}")
        ids = event.get("token_ids", [])  # a tensor of one value is written as that value
        return Arrival(
            tokens=len(ids) if isinstance(ids, list) else 1,
            finish_reason=event.get("finish_reason") or None,
            num_input_tokens=count_of(event.get("num_input_tokens")),
            num_output_tokens=count_of(event.get("num_output_tokens")),
        )
    except UNREADABLE as error:
        raise StreamBroken(f"{doing}: an event cannot be read ({error!r}): {data[:MOST_DETAILS]}") from error


async def ready_models(session: ClientSession, url: str) -> Sequence[str]:
    """The names of the models that are ready. Raises ClientError."""
    doing = f"listing the models of {url}"
    index = f"{url}/v2/repository/index"
    async with asked_for_models(session, "POST", index, doing, json={"ready": True}) as response:
        if response.status != 200:
            raise await refusal(doing, response)
        found = await read_json(doing, response)
        try:
            states = [ModelState(name=model["name"], version="", state=model.get("state", "READY")) for model in found]
        except (KeyError, TypeError, AttributeError) as error:
            raise StreamBroken(f"{doing}: the answer cannot be read: {error!r}") from error
    return [state.name for state in states if state.ready]
