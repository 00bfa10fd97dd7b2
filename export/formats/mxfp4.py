"""MXFP4, as OpenAI stores the experts of gpt-oss. For a stack of matrices X [E, N, K], K a multiple of 32:

  X_blocks   bytes [E, N, K/32, 16]: 32 codes of 4 bits, the first of two in the low bits. A code is a sign and one of
             the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 (E2M1)
  X_scales   bytes [E, N, K/32] of powers of two (E8M0): the scale is 2^(byte - 127), and the byte 255 is no number

Every value is a whole number of half scales, from -12 to 12. So the weights are on a uniform grid of 5 bits with the
scale 2^(byte - 128) and zero points of 16: in 5 bits or more the codes are kept exactly, in 4 bits they are not.

A packed weight has the name X_blocks, since X itself names a tensor of the other order, [E, K, N], in files that are
not packed. Source: Open Compute Project, Microscaling Formats v1.0; transformers, integrations/mxfp4.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.errors import shown
from export.formats.grouped import GroupedMatrix
from export.formats.registry import Format
from export.formats.view import ByteArray, FloatArray, Header, PackedTensor, Source, refuse

_BLOCK = 32
_BITS = 5
_BLOCKS, _SCALES = "_blocks", "_scales"
_NO_NUMBER = 255
_HALVES = np.array([0, 1, 2, 3, 4, 6, 8, 12])  # magnitudes in halves
# Code of 4 bits -> code of the grid: the halves it stands for, plus the zero point.
_TO_GRID = (np.concatenate([_HALVES, -_HALVES]) + (1 << (_BITS - 1))).astype(np.uint8)
# Byte -> the codes of its two nibbles, the lower one first.
_PAIRS = np.stack([_TO_GRID[np.arange(256) & 15], _TO_GRID[np.arange(256) >> 4]], axis=1)


@dataclass(frozen=True, kw_only=True)
class Mxfp4Stack(GroupedMatrix):
    """A stack [E, N, K] of matrices; its rows are those of all of them."""

    @property
    def reads_whole(self) -> bool:
        return False

    def codes(self, source: Source, first: int, last: int) -> ByteArray:
        packed = source.stored_rows(self.sources[0], first, last, (self.features // 2,))
        return _PAIRS[packed].reshape(last - first, self.features)

    def zero_points(self, source: Source, first: int, last: int) -> None:  # noqa: ARG002 - all are 16
        return None

    def scales(self, source: Source, first: int, last: int) -> FloatArray:
        """Half of the stored scales, which are the grid's."""
        stored = source.stored_rows(self.sources[1], first, last, (self.num_groups,))
        if (stored == _NO_NUMBER).any():
            raise refuse(self.name, f"a byte of {self.sources[1]} is 255, which is no number; take another copy")
        return np.ldexp(np.float32(1), stored.astype(np.int32) - 128).astype(np.float32)

    def run_start(self, first_row: int) -> dict[str, int]:
        return {self.sources[0]: first_row * self.features // 2, self.sources[1]: first_row * self.num_groups}


def views(settings: Mapping[str, Any], headers: Mapping[str, Header], source: Source) -> dict[str, PackedTensor]:  # noqa: ARG001 - the tensors say all
    """The packed stacks of a checkpoint. Raises CheckpointError for tensors that do not fit each other."""
    stems = {
        name.removesuffix(ending): None for name in headers for ending in (_BLOCKS, _SCALES) if name.endswith(ending)
    }
    return {f"{stem}{_BLOCKS}": _stack(stem, headers) for stem in stems}


def _stack(stem: str, headers: Mapping[str, Header]) -> Mxfp4Stack:
    names = f"{stem}{_BLOCKS}", f"{stem}{_SCALES}"
    missing = [name for name in names if name not in headers]
    if missing:
        raise refuse(stem, f"{missing[0]} is missing beside {stem}{_BLOCKS if missing[0] == names[1] else _SCALES}; "
                     "download the file again")  # fmt: skip
    blocks, scales = (headers[name] for name in names)
    good = len(blocks.shape) == 4 and blocks.shape[3] == _BLOCK // 2 and blocks.shape[:3] == scales.shape
    if not good or {blocks.dtype, scales.dtype} != {"U8"} or not all(blocks.shape):
        raise refuse(
            stem,
            f"found {_BLOCKS[1:]} {blocks.dtype} {shown(list(blocks.shape))} and {_SCALES[1:]} {scales.dtype} "
            f"{shown(list(scales.shape))}, expected bytes [E, N, K/32, 16] and [E, N, K/32]; take another copy",
        )
    shape = (*blocks.shape[:2], blocks.shape[2] * _BLOCK)
    return Mxfp4Stack(
        name=names[0], shape=shape, sources=names, label="mxfp4 in blocks of 32", bits=_BITS, group_size=_BLOCK
    )


FORMAT = Format(methods=("mxfp4",), views=views)
