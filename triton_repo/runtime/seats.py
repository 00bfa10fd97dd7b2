"""What one worker of a served engine uses alone: a session, whose weights are mapped and shared, and its cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from triton_repo.contracts.seal import is_sealed
from trt_build.engine import open_engine
from trt_build.ort.session import Session

if TYPE_CHECKING:
    from trt_build.ort.session import Cache


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A session and one cache of it, which every request uses again."""

    session: Session
    cache: Cache


def seat(session: Session) -> Seat:
    """A session with a cache of its own."""
    return Seat(session=session, cache=session.new_cache())


def open_sessions(folder: Path, threads: int | None, workers: int, device_index: int = 0) -> list[Session]:
    """Load the engine once for each worker, on the GPU of that index where it is for GPUs. Every digest is checked
    first, unless the files are as they were when the engine was packaged.

    Raises EngineError, MissingPackageError.
    """
    engine = open_engine(folder, check_digests=not is_sealed(folder))
    return [Session(engine, threads, device_index) for _ in range(workers)]
