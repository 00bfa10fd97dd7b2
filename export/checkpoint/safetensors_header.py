"""Reads the header of a safetensors file, at least as strictly as the safetensors library does.

The format: an unsigned 64-bit little-endian length, a JSON header of that many bytes in UTF-8, then the tensors' bytes,
row-major and little-endian, one after the other without a gap, to the end of the file
(https://github.com/huggingface/safetensors, README, section "Format"; what is refused: safetensors/src/tensor.rs).
Three things are refused that the library accepts: the same name twice, an entry with unknown keys, and dimensions that
no array can have.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.errors import CheckpointError, kind_of, listing, named, shown
from export.files.reading import MAX_JSON_BYTES, decode_text, open_regular, parse_json

# Bits of one value, for every dtype of the format.
_ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
# The dtypes that weights may be stored in: name in numpy and config.json -> label of the format.
FLOAT_LABELS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
FLOAT_DTYPES = (*FLOAT_LABELS.values(), "F64")  # F64 is read and rounded to float32, never written
MAX_RANK = 32  # most dimensions of a tensor: numpy's limit before 2.0
_MAX_SIZE = 1 << 48  # limit on one dimension or offset: far above any file's
_METADATA = "__metadata__"


def itemsize(dtype: str) -> int:
    """Bytes of one value, for a dtype whose values take whole bytes."""
    return _ITEM_BITS[dtype] // 8


def numpy_dtype(dtype: str) -> npt.DTypeLike:
    """The numpy dtype of a label of the format. bfloat16 is ml_dtypes' type. Raises KeyError for other labels."""
    if dtype == "BF16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    if dtype == "F8_E4M3":
        import ml_dtypes

        return np.dtype(ml_dtypes.float8_e4m3fn)
    return {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
            "U8": "u1", "BOOL": "?"}[dtype]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor's dtype, shape and place: `num_bytes` bytes from byte `offset` of the file `shard` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Path
    offset: int
    num_bytes: int

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return itemsize(self.dtype)


def header_bytes(shard: Path) -> bytes:
    """The header at the start of a safetensors file: its length field and its JSON. Raises CheckpointError."""
    with open_regular(shard, f"opening {named(shard)}", CheckpointError) as file:
        return _header_bytes(shard, file)


def read_header(shard: Path) -> list[StoredTensor]:
    """Read the header of a shard; returns its tensors, whose bytes fill the rest of the file. Raises CheckpointError
    for a damaged header."""
    doing = f"opening {named(shard)}"
    with open_regular(shard, doing, CheckpointError) as file:
        data = _header_bytes(shard, file)
        size = os.fstat(file.fileno()).st_size
    text = decode_text(data[8:], f"{doing}, its header", shard, CheckpointError)
    try:
        header = parse_json(text, standard=True)
    except ValueError as error:
        raise CheckpointError(f"{doing}: its header is not JSON ({error}); download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{doing}: its header holds {kind_of(header)}, expected an object; download it again")
    _check_metadata(doing, header)
    tensors = [_read_entry(shard, name, entry, len(data)) for name, entry in header.items() if name != _METADATA]
    problems = _layout_problems(tensors, len(data), size)
    if problems:
        raise CheckpointError(f"{doing}: download it again, it is damaged:{listing(problems)}")
    return tensors


def _header_bytes(shard: Path, file: io.FileIO) -> bytes:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise CheckpointError(
            f"opening {named(shard)}: its header should take {length} bytes, the file has {size}; "
            "it is truncated or not safetensors: download it again"
        )
    if length > MAX_JSON_BYTES:
        raise CheckpointError(
            f"opening {named(shard)}: its header takes {length} bytes, moeship reads at most {MAX_JSON_BYTES}; "
            "save the checkpoint in several shards"
        )
    pieces = [prefix]
    while length and (piece := file.read(length)):
        pieces.append(piece)
        length -= len(piece)
    if length:
        raise CheckpointError(
            f"opening {named(shard)}: it changed while it was read; try again when nothing writes to it"
        )
    return b"".join(pieces)


def _check_metadata(doing: str, header: dict[str, Any]) -> None:
    metadata = header.get(_METADATA, {})
    if not isinstance(metadata, dict):
        raise CheckpointError(
            f"{doing}: its {_METADATA} is {shown(metadata)}, expected an object of texts; save it again"
        )
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise CheckpointError(
                f"{doing}: its {_METADATA} has {shown(value)} under {named(key)}, expected a text; save it again"
            )


def _read_entry(shard: Path, name: str, entry: Any, data_offset: int) -> StoredTensor:  # noqa: ANN401 - JSON value
    """Read one tensor's entry of the header and check the type of every value. Raises CheckpointError."""

    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape", ""), fields.get("data_offsets", "")
    well_formed = (
        len(fields) == 3
        and isinstance(dtype, str)
        and _are_counts(shape)
        and _are_counts(offsets)
        and len(offsets) == 2
    )
    if not well_formed:
        raise CheckpointError(
            f"opening {named(shard)}: the header entry of {named(name)} is malformed: {shown(entry, 300)}; expected "
            f"dtype, shape with at most {MAX_RANK} dimensions and data_offsets: download it again"
        )
    if dtype not in _ITEM_BITS:
        raise CheckpointError(
            f"opening {named(shard)}: {named(name)} has dtype {shown(dtype)}, which the format does not have; expected "
            "one of "
            f"{', '.join(_ITEM_BITS)}: download it again"
        )
    return StoredTensor(
        name=name, dtype=dtype, shape=tuple(shape), shard=shard, offset=data_offset + offsets[0],
        num_bytes=offsets[1] - offsets[0],
    )  # fmt: skip


def _are_counts(value: Any) -> bool:  # noqa: ANN401 - JSON value
    """Whether a JSON value is a list of at most MAX_RANK whole numbers that can be dimensions or offsets in a file."""
    few = isinstance(value, list) and len(value) <= MAX_RANK
    return few and all(type(item) is int and 0 <= item < _MAX_SIZE for item in value)


def _layout_problems(tensors: list[StoredTensor], begin: int, size: int) -> list[str]:
    """One problem for each tensor that has too many or too few bytes for its shape, or is not where the one before it
    ends. The first tensor begins at byte `begin` of a file of `size` bytes, and the last ends at the file's end."""
    problems: list[str] = []
    end, before = begin, "the header"
    for stored in sorted(tensors, key=lambda stored: (stored.offset, stored.num_bytes)):
        bits, last = math.prod(stored.shape) * _ITEM_BITS[stored.dtype], stored.offset + stored.num_bytes
        if 8 * stored.num_bytes != bits or last > size or stored.offset != end:
            problems += _misplaced(stored, bits, end, named(before), size)
        end, before = max(end, last), stored.name
    if end < size:
        problems.append(f"{size - end} bytes after {named(before)}, the last tensor, belong to no tensor")
    return problems


def _misplaced(stored: StoredTensor, bits: int, end: int, before: str, size: int) -> Iterator[str]:
    """Problems with the place of a tensor that should take `bits` bits, in a file of `size` bytes. The tensor before
    it, `before`, ends at byte `end`."""
    name, last = named(stored.name), stored.offset + stored.num_bytes
    if 8 * stored.num_bytes != bits:
        expected = f"{shown(bits)} bits" if bits % 8 else f"{shown(bits // 8)} bytes"
        yield (
            f"{name} {shown(list(stored.shape))} {stored.dtype} should take {expected}, its offsets span "
            f"{stored.num_bytes}"
        )
    elif last > size:
        yield f"{name} ends at byte {last}, the file at {size}: truncated"
    if stored.offset < end:
        yield f"{before} and {name} overlap"
    elif stored.offset > end:
        yield f"{stored.offset - end} bytes between {before} and {name} belong to no tensor"
