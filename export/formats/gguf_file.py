"""Reads the header of a GGUF file: metadata, and where each tensor lies. The file is not trusted.

The format: magic GGUF, version 2 or 3, the numbers of tensors and of metadata entries, the entries, the tensors'
descriptions, and from the next multiple of `general.alignment` on the tensors' bytes. Everything is little-endian. The
first of a tensor's dimensions is the one whose values are neighbours.
Source: https://github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from export.errors import CheckpointError, named, shown
from export.files.reading import open_regular
from export.optional import optional_package

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 16  # most metadata entries; files on the hub have some dozens
MAX_TENSORS = 1 << 20
MAX_DIMENSIONS = 4
MAX_TEXT = 1 << 24  # most bytes of one text: chat templates take some thousands
MAX_VALUES = 1 << 21  # most values of an array that are read: a vocabulary has some 260,000 tokens and 500,000 merges
_MAX_SIZE = 1 << 48
_TEXT, _ARRAY = 8, 9
# Types of metadata values: number -> format of `struct`.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, kw_only=True)
class Array:
    """An array of the metadata of which only the length was read."""

    length: int


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """A tensor: `shape` with the values that are neighbours last, the number of its type in ggml, and its place."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int  # from the start of the file
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """The header of a GGUF file, which takes the first `data_offset` bytes."""

    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]
    data_offset: int


def is_gguf(path: Path) -> bool:
    """Whether a regular file has the name of a GGUF file."""
    return path.suffix.lower() == ".gguf"


def gguf_header_bytes(path: Path) -> bytes:
    """The header of a GGUF file, up to the first tensor's bytes. Raises CheckpointError."""
    length = read_gguf(path).data_offset
    with open_regular(path, f"opening {named(path)}", CheckpointError) as file, io.BufferedReader(file) as buffered:
        return buffered.read(length)


def read_gguf(path: Path, arrays: Collection[str] = ()) -> GgufFile:
    """Read the header; of the metadata's arrays those of `arrays` are read as lists. Raises CheckpointError for a file
    that is no GGUF, is cut off or contradicts itself, and MissingPackageError without the package gguf."""
    doing = f"opening {named(path)}"
    with open_regular(path, doing, CheckpointError) as file, io.BufferedReader(file) as buffered:
        return _read(_Reader(buffered, os.fstat(file.fileno()).st_size, doing), arrays)


class _Reader:
    """Reads values of a file and raises CheckpointError where it ends or where a number cannot be true."""

    def __init__(self, file: io.BufferedReader[io.FileIO], size: int, doing: str) -> None:
        self._file, self.size, self.doing = file, size, doing
        self.position = 0

    def refuse(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.doing}: {problem}; download it again")

    def take(self, length: int) -> bytes:
        if length > self.size - self.position:
            raise self.refuse(
                f"its header needs {length} bytes at byte {self.position}, the file has {self.size}: it is cut off or "
                "damaged"
            )
        data = self._file.read(length)
        if len(data) != length:
            raise self.refuse("it changed while it was read")
        self.position += length
        return data

    def number(self, form: str) -> Any:  # noqa: ANN401 - int, float or bool
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def count(self, what: str, most: int, least_bytes: int) -> int:
        """The number of things that follow and take at least `least_bytes` each."""
        found = int(self.number("Q"))
        if found > most or found * least_bytes > self.size - self.position:
            raise self.refuse(f"its header says that it has {found} {what}, more than a file of {self.size} bytes can")
        return found

    def text(self) -> str:
        length = int(self.number("Q"))
        if length > MAX_TEXT:
            raise self.refuse(f"its header has a text of {length} bytes at byte {self.position}, expected {MAX_TEXT}")
        data = self.take(length)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refuse(f"a text of its header is not UTF-8 ({error})") from error

    def value(self, whole: bool) -> Any:  # noqa: ANN401 - whatever the metadata hold
        """A value; an array as a list if the `whole` of it is wanted, else as an Array."""
        kind = int(self.number("I"))
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise self.refuse(f"its metadata have a value of type {kind}, which the format does not have")
        kind = int(self.number("I"))
        if kind in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[kind]}")
            length = self.count("values in an array", MAX_VALUES if whole else _MAX_SIZE, size)
            data = self.take(length * size)
            if whole:
                return list(struct.unpack(f"<{length}{_SCALARS[kind]}", data))
        elif kind == _TEXT:
            length = self.count("texts in an array", MAX_VALUES if whole else _MAX_SIZE, 8)
            if whole:
                return [self.text() for _ in range(length)]
            for _ in range(length):
                self.take(int(self.number("Q")))
        else:
            raise self.refuse(f"its metadata have an array of type {kind}, which moeship does not read")
        return Array(length=length)


def _read(reader: _Reader, arrays: Collection[str]) -> GgufFile:
    if reader.size < len(MAGIC) + 4 or reader.take(len(MAGIC)) != MAGIC:
        raise reader.refuse("it does not begin with GGUF, so it is no GGUF file")
    version = reader.number("I")
    if version not in VERSIONS:
        raise CheckpointError(
            f"{reader.doing}: it has version {version} of GGUF, moeship reads {' and '.join(map(str, VERSIONS))} in "
            "little-endian order; convert the model again with a recent llama.cpp"
        )
    num_tensors = reader.count("tensors", MAX_TENSORS, 24)
    num_entries = reader.count("metadata entries", MAX_ENTRIES, 12)
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = reader.text()
        if key in metadata:
            raise reader.refuse(f"its metadata have {named(key)} twice")
        metadata[key] = reader.value(key in arrays)
    described = [_described(reader) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment not in (1 << power for power in range(17)):
        raise reader.refuse(f"its general.alignment is {shown(alignment)}, expected a power of two up to 65536")
    start = -(-reader.position // alignment) * alignment
    tensors = tuple(_placed(reader, *entry, start) for entry in described)
    _check_places(reader, tensors, alignment)
    return GgufFile(metadata=metadata, tensors=tensors, data_offset=min(start, reader.size))


def _described(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of the next tensor."""
    name, rank = reader.text(), reader.number("I")
    if not 1 <= rank <= MAX_DIMENSIONS:
        raise reader.refuse(f"{named(name)} has {rank} dimensions, expected 1 to {MAX_DIMENSIONS}")
    shape = tuple(reversed([int(reader.number("Q")) for _ in range(rank)]))
    if not 1 <= math.prod(shape) < _MAX_SIZE or max(shape) >= _MAX_SIZE:
        raise reader.refuse(f"{named(name)} has the shape {shown(list(shape))}, which no tensor has")
    return name, shape, int(reader.number("I")), int(reader.number("Q"))


def _placed(reader: _Reader, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int) -> GgufTensor:
    size, num_bytes = block_of(reader, name, kind)
    if shape[-1] % size:
        raise reader.refuse(f"{named(name)} has rows of {shape[-1]} values, its type has blocks of {size}")
    return GgufTensor(
        name=name, shape=shape, kind=kind, offset=start + offset, num_bytes=math.prod(shape) // size * num_bytes
    )


def block_of(reader: _Reader, name: str, kind: int) -> tuple[int, int]:
    """The values and the bytes of a block of a type of ggml."""
    with optional_package("gguf", "reading a GGUF file", "gguf"):
        import gguf
    try:
        values, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise reader.refuse(f"{named(name)} has the type {kind}, which the package gguf does not know") from error
    if not _is_dequantised(kind, int(num_bytes)):
        raise CheckpointError(
            f"{reader.doing}: {named(name)} has the type {gguf.GGMLQuantizationType(kind).name}, which the package "
            "gguf does not dequantise; convert the model again to another type"
        )
    return int(values), int(num_bytes)


@cache
def _is_dequantised(kind: int, num_bytes: int) -> bool:
    """Whether the package gguf dequantises a type, whose blocks have `num_bytes` bytes. Integers, float64 and types of
    activations it does not."""
    import gguf
    import gguf.quants

    try:
        gguf.quants.dequantize(np.zeros((1, num_bytes), dtype=np.uint8), gguf.GGMLQuantizationType(kind))
    except NotImplementedError:
        return False
    return True


def _check_places(reader: _Reader, tensors: tuple[GgufTensor, ...], alignment: int) -> None:
    end, before = 0, "the header"
    names: set[str] = set()
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.name in names:
            raise reader.refuse(f"{named(tensor.name)} is there twice")
        names.add(tensor.name)
        if tensor.offset % alignment:
            raise reader.refuse(f"{named(tensor.name)} is at byte {tensor.offset}, no multiple of {alignment}")
        if tensor.offset < end:
            raise reader.refuse(f"{before} and {named(tensor.name)} overlap")
        end, before = tensor.offset + tensor.num_bytes, named(tensor.name)
        if end > reader.size:
            raise reader.refuse(
                f"{named(tensor.name)} ends at byte {end}, the file at {reader.size}: it is cut off, or its sizes are "
                "wrong"
            )
