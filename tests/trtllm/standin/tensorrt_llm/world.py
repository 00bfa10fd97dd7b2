"""Stands for the GPUs and what lies between them: the ranks of a model as threads of one process.

    results = World(4).run(lambda rank: model_of(rank)(tokens))

Sums are taken in the order of the ranks, so that they are the same in every run. Only what the functions of
`tensorrt_llm.functional` need is here. A rank that fails ends the meeting for all.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

PATIENCE_S = 120.0  # a rank that waits longer waits for one that will not come
_here = threading.local()


class LeftAloneError(RuntimeError):
    """A rank waited for one that failed."""


class World:
    def __init__(self, size: int) -> None:
        self.size = size
        self._meetings: dict[tuple[int, ...], threading.Barrier] = {}
        self._brought: dict[tuple[int, ...], dict[int, Any]] = {}
        self._sent: dict[tuple[int, int], queue.Queue[Any]] = {}
        self._lock = threading.Lock()
        self._failed = threading.Event()

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """What `function(rank)` returns on every rank, each in a thread of its own. Raises what the first rank that
        failed raised."""
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            _here.world, _here.rank = self, rank
            try:
                with torch.inference_mode():
                    results[rank] = function(rank)
            except BaseException as error:
                errors.append(error)
                self._failed.set()
                with self._lock:
                    for meeting in self._meetings.values():
                        meeting.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((error for error in errors if not isinstance(error, LeftAloneError)), errors[0])
        return results

    def exchange(self, value: Any, group: Sequence[int], rank: int) -> list[Any]:
        """What every rank of the group brought, in the order of the group. Each must come."""
        key = tuple(group)
        with self._lock:
            if self._failed.is_set():
                raise LeftAloneError(f"rank {rank} came to meet {list(key)} after another rank had failed")
            meeting = self._meetings.setdefault(key, threading.Barrier(len(key)))
            brought = self._brought.setdefault(key, {})
        brought[rank] = value
        try:
            meeting.wait(PATIENCE_S)
            found = [brought[member] for member in key]
            meeting.wait(PATIENCE_S)  # no one may bring the next value before all have taken this one
        except threading.BrokenBarrierError:
            raise LeftAloneError(f"rank {rank} waited for the others of {list(key)} in vain") from None
        return found

    def send(self, value: Any, source: int, target: int) -> None:
        self._mailbox(source, target).put(value)

    def receive(self, source: int, target: int) -> Any:
        """The next value that `source` sent to `target`, waited for."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and not self._failed.is_set():
            with contextlib.suppress(queue.Empty):
                return self._mailbox(source, target).get(timeout=0.1)
        raise LeftAloneError(f"rank {target} waited for rank {source} in vain")

    def _mailbox(self, source: int, target: int) -> queue.Queue[Any]:
        with self._lock:
            return self._sent.setdefault((source, target), queue.Queue())


def this_rank() -> tuple[World, int]:
    """The world and rank of the calling thread. Raises RuntimeError where there is none."""
    if not hasattr(_here, "world"):
        raise RuntimeError("a collective operation outside World.run: there are no other ranks to meet")
    return _here.world, _here.rank


def exchange(value: Any, group: Sequence[int]) -> list[Any]:
    world, rank = this_rank()
    return world.exchange(value, group, rank)
