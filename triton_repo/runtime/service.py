"""An engine ready to answer wire requests, one at a time: tensors in, pieces out.

service = Service.open(engine_folder, threads=None)
for piece in service.respond({"text_input": ..., "max_tokens": ...}, is_cancelled):
    wire_outputs(piece)["text_output"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from export.tokenizer import Tokenizer, load_tokenizer
from triton_repo.runtime.answer import Piece, join
from triton_repo.runtime.generation import generate
from triton_repo.runtime.options import read_options
from triton_repo.seal import is_sealed
from trt_build.engine import open_engine
from trt_build.ort.session import Session


class Service:
    """A loaded engine, its tokenizer and one cache that every request uses again."""

    def __init__(self, session: Session, tokenizer: Tokenizer) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._cache = session.new_cache()

    @classmethod
    def open(cls, folder: Path, threads: int | None, device_index: int = 0) -> Service:
        """Load the engine, on the GPU of that index where it is for GPUs. Every digest is checked first, unless the
        files are as they were when the engine was packaged.

        Raises EngineError, CheckpointError, MissingPackageError.
        """
        engine = open_engine(folder, check_digests=not is_sealed(folder))
        return cls(Session(engine, threads, device_index), load_tokenizer(folder))

    def respond(self, tensors: Mapping[str, npt.NDArray[Any]], is_cancelled: Callable[[], bool]) -> Iterator[Piece]:
        """The pieces of one answer, or the whole answer as one piece unless the request streams.

        Raises RequestError for a request that cannot be answered.
        """
        options = read_options(tensors)
        pieces = generate(self._session, self._tokenizer, options, is_cancelled, self._cache)
        return pieces if options.stream else iter([join(pieces)])
