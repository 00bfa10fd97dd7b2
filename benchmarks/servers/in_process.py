"""The engine without a server: `python -m servers.in_process ENGINE PARAMETERS`. It answers the orders of scenarios.py
by what Triton's model runs, in this process."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from clients.bench.load import Work
from clients.bench.records import Arrival
from clients.bench.targets.triton import request_of
from clients.errors import ServerFailed
from clients.wire import input_values
from decode.orders import answers, orders, refusals
from servers.scenarios import SCENARIOS
from triton_repo.contracts.model_parameters import EngineInstance, ModelParameters
from triton_repo.contracts.piece import Piece
from triton_repo.contracts.wire import NUMPY_DTYPES
from triton_repo.runtime.single.service import Request, Service


class InProcessTarget:
    """A loaded engine as a target of the load generator."""

    counting = "the token ids of each piece"

    def __init__(self, service: Service) -> None:
        self._service = service

    async def answer(self, work: Work) -> AsyncGenerator[Arrival, None]:
        """Answer one request. Raises ServerFailed."""
        loop = asyncio.get_running_loop()
        came: asyncio.Queue[tuple[Piece, bool] | Exception] = asyncio.Queue()
        left = threading.Event()

        def put(item: tuple[Piece, bool] | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody reads the answer any more
                loop.call_soon_threadsafe(came.put_nowait, item)

        self._service.submit(
            Request(
                tensors=tensors_of(work),
                request_id="",
                send=lambda piece, is_last: put((piece, is_last)),
                fail=put,
                is_cancelled=left.is_set,
            )
        )
        try:
            while True:
                item = await came.get()
                if isinstance(item, Exception):
                    raise ServerFailed(f"answering in process: {item}") from item
                piece, is_last = item
                yield Arrival(
                    tokens=len(piece.token_ids),
                    finish_reason=piece.finish_reason,
                    num_input_tokens=piece.num_input_tokens,
                    num_output_tokens=piece.num_output_tokens,
                )
                if is_last:
                    return
        finally:
            left.set()


def tensors_of(work: Work) -> dict[str, Any]:
    """The wire tensors [1, n] of a request, as Triton's model gets them."""
    return {
        tensor.name: np.array(
            [[value.encode() if isinstance(value, str) else value for value in values]],
            dtype=NUMPY_DTYPES[tensor.dtype],
        )
        for tensor, values in input_values(request_of(work, "in-process"), stream=True)
    }


def main() -> None:
    with answers() as answer, refusals(answer):
        parameters = ModelParameters(**json.loads(sys.argv[2]))
        service = Service.open(EngineInstance(folder=Path(sys.argv[1]), parameters=parameters))
        target = InProcessTarget(service)
        answer({})
        for order in orders():
            found = asyncio.run(SCENARIOS[order["scenario"]](target, order))
            if "generator" in found:
                found["generator"]["cores"] = None  # the process is the engine too
            answer(found)
        service.runner.close()


if __name__ == "__main__":
    main()
