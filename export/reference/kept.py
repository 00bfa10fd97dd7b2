"""Keeps what the reference computes of a text, for several engines of one checkpoint.

    with KeptLogits() as kept:
        for engine in engines:
            for logits, router_logits in kept.reference(model).run(windows):      # computed once, then read again
                ...

The logits of 2,048 tokens of a vocabulary of 51,200 are 0.4 GB. They lie in a file without a name, and one window of
them is in memory at a time, as the reference gives them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import IO, Self

import numpy as np

from export.families import Model
from export.reference.model import Reference, Windows
from export.reference.operations import FloatArray

_Key = tuple[int, tuple[tuple[int, ...], ...]]
_Shape = tuple[int, ...]


class KeptLogits:
    """The logits of one checkpoint's reference, kept until the end of the `with` block. The models that ask for them
    must be read from the same files."""

    def __init__(self) -> None:
        self._files = ExitStack()
        # The windows and the experts per token that they were computed with -> the file, and the shapes in it.
        self._kept: dict[_Key, tuple[IO[bytes], list[tuple[_Shape, _Shape | None]]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def reference(self, model: Model) -> _KeptReference:
        """The reference of a model; what was computed of the same windows before is read again."""
        return _KeptReference(self, model)

    def run(
        self, model: Model, windows: Windows, progress: Callable[[str], None]
    ) -> Iterator[tuple[FloatArray, FloatArray | None]]:
        """As `Reference.run`."""
        key = model.architecture.experts_per_token, tuple(map(tuple, windows))
        if key in self._kept:
            progress("reading the reference's logits again")
            yield from _read(*self._kept[key])
            return
        file = self._files.enter_context(tempfile.TemporaryFile(prefix="moeship-reference-"))  # noqa: SIM115
        shapes: list[tuple[_Shape, _Shape | None]] = []
        has_room = True
        for logits, routers in Reference(model).run(windows, progress):
            try:
                for array in (logits, routers):
                    if array is not None and has_room:
                        file.write(np.ascontiguousarray(array).data)
            except OSError:  # without room on the disk the next engine's reference is computed again
                has_room = False
            shapes.append((logits.shape, None if routers is None else routers.shape))
            yield logits, routers
        if has_room:
            self._kept[key] = file, shapes


class _KeptReference:
    def __init__(self, kept: KeptLogits, model: Model) -> None:
        self._kept, self._model = kept, model

    def run(
        self, windows: Windows, progress: Callable[[str], None] = lambda _: None
    ) -> Iterator[tuple[FloatArray, FloatArray | None]]:
        """As `Reference.run`."""
        return self._kept.run(self._model, windows, progress)


def _read(
    file: IO[bytes], shapes: list[tuple[_Shape, _Shape | None]]
) -> Iterator[tuple[FloatArray, FloatArray | None]]:
    file.seek(0)
    for logits, routers in shapes:
        yield _next(file, logits), None if routers is None else _next(file, routers)


def _next(file: IO[bytes], shape: _Shape) -> FloatArray:
    array = np.empty(shape, dtype=np.float32)
    file.readinto(array.data.cast("B"))  # type: ignore[attr-defined]
    return array
