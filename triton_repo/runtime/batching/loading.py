"""Loads an engine to serve: a session, the slots of its cache, and the runner that computes requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from triton_repo.contracts.model_parameters import EngineInstance, ModelParameters
from triton_repo.contracts.seal import is_sealed
from triton_repo.errors import RepositoryError
from triton_repo.runtime.batching.engine import SequenceEngine
from triton_repo.runtime.batching.memory.slots import Slots
from triton_repo.runtime.batching.runner import Pulse, Runner
from triton_repo.runtime.batching.scheduler import Limits
from trt_build.machine.memory import available_memory
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session

if TYPE_CHECKING:
    from trt_build.ort.cache import Cache

_SHARE_OF_FREE_MEMORY = 0.8  # that keys and values may take where no budget is given


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A loaded engine. `most_tokens` is the limit for the tokens of prompt and output together: that of the engine, or
    less where the memory budget has no room for it."""

    session: Session
    runner: Runner
    most_tokens: int


def load(instance: EngineInstance, pulse: Pulse | None = None) -> Loaded:
    """Load an engine. Every digest is checked first, unless the files are as they were when the engine was packaged.

    Raises EngineError, MissingPackageError, and RepositoryError for a memory budget without room for one sequence.
    """
    engine = open_engine(instance.folder, check_digests=not is_sealed(instance.folder))
    parameters = instance.parameters
    session = Session(engine, parameters.threads, instance.device_index, kv_cache=parameters.kv_cache)
    return start(session, parameters, pulse)


def start(session: Session, parameters: ModelParameters, pulse: Pulse | None = None) -> Loaded:
    """Reserve the cache of a loaded session, and start its runner. Raises RepositoryError as `load` does."""
    limits = Limits(
        slots=parameters.slots,
        max_waiting=parameters.max_waiting,
        max_wait_s=parameters.max_wait_s,
        pause_target_s=parameters.pause_target_ms / 1000,
    )
    cache = session.new_cache(limits.slots)
    budget = _budget(session, cache, parameters.memory_budget)
    slots = Slots(cache, budget, keeps=parameters.prefix_cache)

    def make(post: Callable[[Callable[[], object]], object]) -> SequenceEngine:
        num_tokens = session.engine.manifest.tokenizer_size
        return SequenceEngine(
            session, cache, slots, num_tokens=num_tokens, routing=session.routing, limits=limits, post=post,
            drafts=parameters.drafts and session.mixes_lengths,
        )  # fmt: skip

    most_tokens = min(session.max_sequence, slots.most_positions(1) + 1)
    return Loaded(session=session, runner=Runner(make, pulse), most_tokens=most_tokens)


def _budget(session: Session, cache: Cache, asked: int | None) -> int:
    """Bytes that keys and values may take."""
    whole = cache.bytes_of(session.max_sequence)
    if asked is None:
        free = available_memory() - session.engine.resident_bytes
        return max(whole, min(cache.num_slots * whole, int(_SHARE_OF_FREE_MEMORY * free)))
    if asked < whole:
        raise RepositoryError(
            f"loading the engine {session.engine.folder}: found a memory budget of {asked / 1e6:.0f} MB, expected at "
            f"least {whole / 1e6:.0f} MB, the keys and values of one sequence of {session.max_sequence} tokens; "
            "package the engine with a larger --memory-budget, or build it with a smaller --max-sequence"
        )
    return asked
