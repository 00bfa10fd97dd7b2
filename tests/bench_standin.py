"""A server with known delays, and a loop whose time is simulated: it jumps to the next timer, so that times in tests
are exact and take no time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncGenerator, Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from clients.bench.load import Lengths, Work
from clients.bench.prompts import Works
from clients.bench.records import Arrival


class SimulatedSelector(selectors.DefaultSelector):
    """Adds to `now` the seconds that the loop would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout=None):
        self.now += max(0.0, timeout or 0.0)
        return super().select(0)


class SimulatedLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.simulated = SimulatedSelector()
        super().__init__(self.simulated)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self.simulated.now


@dataclass
class StandIn:
    """A server that needs `prefill_s` for the first message of an answer and `step_s` for each further one, of
    `per_message` tokens. Requests that `script` names do what it says instead. With `one_at_a_time` the others wait."""

    prefill_s: float = 0.5
    step_s: float = 0.1
    per_message: int = 1
    one_at_a_time: bool = False
    script: dict[str, Callable[[Work], AsyncGenerator[Arrival, None]]] = field(default_factory=dict)
    counting: str = "the stand-in"
    works: list[Work] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)  # tokens that an answer had when the client left

    def __post_init__(self) -> None:
        self._turn = asyncio.Lock() if self.one_at_a_time else nullcontext()

    async def answer(self, work: Work) -> AsyncGenerator[Arrival, None]:
        self.works.append(work)
        if work.prompt in self.script:
            async for arrival in self.script[work.prompt](work):
                yield arrival
            return
        sent = 0
        try:
            async with self._turn if self.one_at_a_time else nullcontext():
                while sent < work.max_tokens:
                    await asyncio.sleep(self.step_s if sent else self.prefill_s)
                    tokens = min(self.per_message, work.max_tokens - sent)
                    sent += tokens
                    is_last = sent == work.max_tokens
                    yield Arrival(
                        tokens=tokens, finish_reason="length" if is_last else None, num_input_tokens=3,
                        num_output_tokens=sent,
                    )  # fmt: skip
        except (GeneratorExit, asyncio.CancelledError):
            self.closed.append(sent)
            raise


def simulate(main: Callable[[], Any]) -> Any:
    """Run a coroutine function in simulated time."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(main())


def works(**fields) -> Works:
    """Requests of 4 tokens; keywords add or replace fields."""
    four = Lengths(low=4, high=4)
    return Works(**{"max_tokens": four, "prompt_tokens": four, **fields})
