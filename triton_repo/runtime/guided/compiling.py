"""Compiles guides beside everything else: in a few threads with deep stacks, which nobody waits for.

    compilers = Compilers(most=2)
    future = compilers.submit(lambda: CompiledGuide(...))

The library compiles what lies within each other by recursion, and a stack that is too small ends the whole process:
8 MB are used up by some 2,000 rules that name each other. It lets go of Python's lock while it works.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from triton_repo.runtime.guided.trial import STACK_BYTES

Made = TypeVar("Made")
_STACK_SIZE = threading.Lock()  # held while new threads have that size


class Compilers(Generic[Made]):
    """Runs actions in at most so many threads, in the order in which they come. Threads end where nothing waits, and
    give the memory of their stacks back. They are daemons: an action that does not end holds up no end of the
    process. Any thread may call it."""

    def __init__(self, most: int) -> None:
        self._most, self._num_running = most, 0
        self._waiting: deque[tuple[Future[Made], Callable[[], Made]]] = deque()
        self._lock = threading.Lock()

    def submit(self, action: Callable[[], Made]) -> Future[Made]:
        """What an action gives or raises, once it has run."""
        future: Future[Made] = Future()
        with self._lock:
            self._waiting.append((future, action))
            starts = self._num_running < self._most
            self._num_running += starts
        if starts:
            self._start()
        return future

    def _start(self) -> None:
        with _STACK_SIZE:
            before = threading.stack_size(STACK_BYTES)
            try:
                threading.Thread(target=self._run, name="guide-compile", daemon=True).start()
            finally:
                threading.stack_size(before)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._num_running -= 1
                    return
                future, action = self._waiting.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                made = action()
            except BaseException as error:  # whatever it is, the one who asked is told
                future.set_exception(error)
            else:
                future.set_result(made)
