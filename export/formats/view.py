"""What a format of packed weights gives: tensors under ordinary names, in float32, a few rows at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from export.errors import CheckpointError, named

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


class Header(Protocol):
    """A tensor of a file, as the file's header describes it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...  # label of the safetensors format
    @property
    def shape(self) -> tuple[int, ...]: ...


class Source(Protocol):
    """Where packed tensors are read from: an opened checkpoint."""

    def kept(self, name: str) -> npt.NDArray[Any]:
        """A whole tensor of the files, in the stored dtype. It is kept for the next reads."""

    def stored_rows(
        self, name: str, first: int, last: int, row_shape: tuple[int, ...] | None = None
    ) -> npt.NDArray[Any]:
        """Rows of the first axis of a tensor of the files, in the stored dtype; with `row_shape` of the tensor reshaped
        to [rows, *row_shape]. The last that were asked for are kept, so that asking for them again reads nothing."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A uniform grid: value = (code - zero point) * scale, 0 <= code < 2^bits, with one scale and one zero point for
    `group_size` neighbouring input features of an output row. Without `has_zeros` every zero point is 2^(bits-1)."""

    bits: int
    group_size: int
    has_zeros: bool


@dataclass(frozen=True, kw_only=True)
class PackedTensor(ABC):
    """A weight that a checkpoint stores packed. `shape` is the shape that the family expects, input features last;
    `sources` names the tensors of the files that it is made of."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    unread: tuple[str, ...] = ()  # tensors of the files beside it that change no weight
    label: str  # such as "gptq int4 in groups of 128"

    @property
    def features(self) -> int:
        """The number of input features, which is the length of a row."""
        return self.shape[-1]

    @property
    def num_rows(self) -> int:
        """The number of rows, of all matrices of a stack together."""
        return math.prod(self.shape[:-1])

    @property
    def reads_whole(self) -> bool:
        """Whether the tensors of the files are read whole and kept, rather than a few rows at a time."""
        return True

    @abstractmethod
    def read(self, source: Source, first: int, last: int) -> FloatArray:
        """Dequantise rows `first` to `last`: float32 [last - first, features]. Raises CheckpointError for values that
        the format does not allow."""

    def grid(self, source: Source) -> Grid | None:  # noqa: ARG002 - some grids depend on values
        """The grid of the values; None if they are on no uniform grid, or if a group's features are not neighbours."""
        return None

    def steps(self, source: Source, first: int, last: int) -> tuple[FloatArray, ByteArray]:  # noqa: ARG002
        """The scales, float32 [rows, groups], and the zero points, uint8 [rows, groups], of some rows. For tensors that
        have a grid."""
        raise AssertionError(f"{self.name} is on no grid")

    def run_start(self, first_row: int) -> dict[str, int]:  # noqa: ARG002 - most formats read whole tensors
        """Tensor of the files -> byte at which reading begins if the first row that is read is `first_row`."""
        return dict.fromkeys(self.sources, 0)


def refuse(name: str, problem: str) -> CheckpointError:
    """The error about a packed tensor: what is wrong, in words that end with what to do."""
    return CheckpointError(f"reading the packed weight {named(name)}: {problem}")


def check_scales(name: str, scales: FloatArray) -> None:
    """Raise CheckpointError unless every scale is positive and finite."""
    good = (scales > 0) & np.isfinite(scales)
    if not good.all():
        bad = float(scales[~good][0])
        raise refuse(
            name,
            f"{int((~good).sum())} of its scales are zero, negative or not finite, such as {bad:g}; the file is "
            "damaged or the model was quantised wrongly: take another copy, or quantise the model again",
        )
