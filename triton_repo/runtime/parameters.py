"""What a packaged model needs to know of itself, to and from the parameters of its config.pbtxt.

Triton's parameters are texts; this dataclass is the one place where they become values and back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triton_repo.errors import RepositoryError

ENGINE_KEY = "moeship_engine"
THREADS_KEY = "moeship_threads"
MAX_THREADS = 4096  # of one instance
_AUTOMATIC = "auto"


@dataclass(frozen=True, kw_only=True)
class ModelParameters:
    """`engine`: the engine's folder within the version's. `threads`: of one instance; None shares the cores out."""

    engine: str = "engine"
    threads: int | None = None

    def to_texts(self) -> dict[str, str]:
        """Parameter key to text."""
        return {ENGINE_KEY: self.engine, THREADS_KEY: _AUTOMATIC if self.threads is None else str(self.threads)}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], model: str) -> ModelParameters:
        """Raises RepositoryError for an absent key or a text that is no value of it."""
        absent = [key for key in (ENGINE_KEY, THREADS_KEY) if key not in texts]
        threads = texts.get(THREADS_KEY, "")
        if absent or not (threads == _AUTOMATIC or (threads.isdecimal() and 0 < int(threads) <= MAX_THREADS)):
            problem = f"absent: {', '.join(absent)}" if absent else f"{THREADS_KEY} is {threads!r}"
            raise RepositoryError(
                f"reading the parameters of the model {model}: {problem}; expected {ENGINE_KEY} with a folder's name "
                f"and {THREADS_KEY} with a number of 1 to {MAX_THREADS} or {_AUTOMATIC!r}: package the engine again"
            )
        return cls(engine=texts[ENGINE_KEY], threads=None if threads == _AUTOMATIC else int(threads))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelParameters:
        """From the JSON form of a model configuration that Triton hands to a model."""
        return cls.from_texts(
            {key: value["string_value"] for key, value in config["parameters"].items()}, config["name"]
        )

    def threads_of_instance(self, config: Mapping[str, Any]) -> int | None:
        """Threads for one instance: as packaged, else the usable cores shared out; None leaves it to the runtime."""
        instances = sum(group["count"] for group in config["instance_group"])
        if self.threads is not None or instances == 1:
            return self.threads
        return max(1, len(os.sched_getaffinity(0)) // instances)
