"""The seat of a worker: a session and a key/value cache that only this worker uses. Sessions share mapped weights."""

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
    """A session and one cache of it, which is reused by every request."""

    session: Session
    cache: Cache


def seat(session: Session) -> Seat:
    """A seat with a fresh cache."""
    return Seat(session=session, cache=session.new_cache())


def open_sessions(folder: Path, threads: int | None, workers: int, device_index: int = 0) -> list[Session]:
    """Load the engine once for each worker. An engine for GPUs is loaded on the GPU `device_index`. Every digest is
    checked first, unless the files are as they were when the engine was packaged.

    Raises EngineError, MissingPackageError.
    """
    engine = open_engine(folder, check_digests=not is_sealed(folder))
    return [Session(engine, threads, device_index) for _ in range(workers)]
