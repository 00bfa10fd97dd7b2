"""Codes that were solved beforehand, in a folder of their own: how they are packed, and reading a few rows of them.

    codes.json           what they were solved from, and each matrix: bits, block, tokens, experts that fell back; and
                         `digest`, the SHA-256 of the rest of it
    layer-0007.safetensors   of each row of the tensor table: NAME.codes uint8 [E, N, K * bits / 8], NAME.scales float16
                         [E, N, K / block] and, unless zero points are 2^(bits-1), NAME.zeros uint8 of that shape

A row of codes is a stream of bits from the lowest bit of the first byte on. E is 1 for a row that stacks no experts.
`export/calibration` solves and writes them; a build carries them into an engine as they are.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.checkpoint.digests import Run
from export.checkpoint.folder import file_digest
from export.checkpoint.safetensors_header import StoredTensor, numpy_dtype, read_header
from export.checkpoint.tensor_table import CHUNK_ELEMENTS, TensorSpec
from export.errors import CheckpointError, ConfigError, named, shown
from export.files.reading import open_regular, read_json
from export.files.typed_json import read_typed
from export.quantize.gptq import Codes
from export.quantize.grid import ByteArray, FloatArray

CODES_FILE = "codes.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SolvedMatrix:
    """The codes of one row of the tensor table, in `file`. `shape` is [E, N, K]. `tokens` has the calibration tokens of
    each of the E; `fallen_back` the experts whose codes were rounded without them, because there were too few.
    `sources` has the digests of what was read of the checkpoint. `checksums`: "group.part" of the row, as the tensor
    table has them, -> the checksum of the dequantised values, which an engine must still have."""

    file: str
    shape: tuple[int, ...]
    bits: int
    block_size: int
    symmetric: bool
    tokens: tuple[int, ...]
    fallen_back: tuple[int, ...] = ()
    sources: Mapping[str, tuple[Run, ...]]
    checksums: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What codes were solved from: the settings of the solver with the text, and the state of the checkpoint's files
    (export/files/resume.py)."""

    settings: Mapping[str, Any]
    sources: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Listing:
    format_version: int
    origin: Origin
    matrices: Mapping[str, SolvedMatrix]
    files: Mapping[str, str]  # name -> SHA-256


@dataclass(frozen=True, kw_only=True)
class SolvedCodes:
    """An opened folder of solved codes; plain data, which can be sent to another process."""

    folder: Path
    origin: Origin
    matrices: Mapping[str, SolvedMatrix]
    digest: str  # SHA-256 of codes.json
    stored: Mapping[str, StoredTensor]

    def rows(self, name: str, place: int, first: int, last: int) -> Codes:
        """The codes of rows `first` to `last` of the matrix at `place` of a row of the table. Raises CheckpointError if
        the file ends early."""
        matrix = self.matrices[name]
        scales = self._read(f"{name}.scales", place, first, last).astype(np.float32)
        if matrix.symmetric:
            zeros = np.full(scales.shape, 1 << (matrix.bits - 1), dtype=np.uint8)
        else:
            zeros = self._read(f"{name}.zeros", place, first, last)
        codes = unpacked(self._read(f"{name}.codes", place, first, last), matrix.bits)
        return Codes(codes=codes, scales=scales, zeros=zeros)

    def part_rows(self, spec: TensorSpec, group: int, turn: int, first: int, last: int) -> Codes:
        """The codes of rows `first` to `last` of a part of a row of the table, as `TensorSpec.groups` has them."""
        turns = len(spec.groups[group])
        place, before = group, 0
        if not spec.stacks_experts:
            place, before = 0, sum(parts[0].shape[0] for parts in spec.groups[:group])
        found = self.rows(spec.name, place, before + turns * first, before + turns * last)
        return Codes(codes=found.codes[turn::turns], scales=found.scales[turn::turns], zeros=found.zeros[turn::turns])

    def check_read(self, name: str, runs: Mapping[str, tuple[Run, ...]]) -> None:
        """Raise CheckpointError if a row was read from other bytes than its codes were solved from."""
        matrix = self.matrices.get(name)
        if matrix is not None and matrix.sources != runs:
            raise CheckpointError(
                f"carrying over the solved codes of {named(name)}: the checkpoint's bytes are not those that they were "
                f"solved from; remove {self.folder}, and build again"
            )

    def chunks(self, spec: TensorSpec, expert_order: Sequence[int] | None, multiple: int) -> Iterator[Codes]:
        """The codes of a row of the table in chunks, in the order of its rows; stacked experts in `expert_order`. The
        number of a chunk's rows is a multiple of `multiple`, except in the last of a matrix."""
        stack, num_rows, features = self.matrices[spec.name].shape
        step = max(multiple, CHUNK_ELEMENTS // features // multiple * multiple)
        for place in expert_order if spec.stacks_experts and expert_order is not None else range(stack):
            for row in range(0, num_rows, step):
                yield self.rows(spec.name, place, row, min(row + step, num_rows))

    def _read(self, name: str, place: int, first: int, last: int) -> npt.NDArray[Any]:
        stored = self.stored[name]
        _, num_rows, width = stored.shape
        array = np.empty((last - first, width), dtype=numpy_dtype(stored.dtype))
        view = memoryview(array.reshape(-1).view(np.uint8).data)
        doing = f"reading {named(name)} from {named(stored.shard)}"
        with open_regular(stored.shard, doing, CheckpointError) as file:
            file.seek(stored.offset + (place * num_rows + first) * width * array.itemsize)
            while len(view):
                got = file.readinto(view)
                if not got:
                    raise CheckpointError(f"{doing}: the file ended {len(view)} bytes early; solve the codes again")
                view = view[got:]
        return array


def row_checksums(values: FloatArray, first: int) -> int:
    """The sum of a checksum of each row of values [n, K], which are rows `first` on of a matrix: CRC-32 times an odd
    number that depends on the row's place. Sums of several parts of a matrix are those of the whole, modulo 2^64."""
    positive = values + np.float32(0)  # -0 becomes 0
    return sum((zlib.crc32(row.data) + 1) * (2 * place + 1) for place, row in enumerate(positive, first))


def checksum_text(total: int) -> str:
    """The sum of `row_checksums` as it is written."""
    return f"{total % (1 << 64):016x}"


def packed(codes: ByteArray, bits: int) -> ByteArray:
    """Codes uint8 [..., K] as a stream of bits, uint8 [..., K * bits / 8]; K is a multiple of 8."""
    if bits == 8:
        return codes
    singles = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(singles.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpacked(stream: ByteArray, bits: int) -> ByteArray:
    """The inverse of `packed`."""
    if bits == 8:
        return stream
    singles = np.unpackbits(stream, axis=-1, bitorder="little").reshape(*stream.shape[:-1], -1, bits)
    codes: ByteArray = np.packbits(singles, axis=-1, bitorder="little")[..., 0]
    return codes


def write_listing(folder: Path, origin: Origin, matrices: Mapping[str, SolvedMatrix]) -> None:
    """Write codes.json, last of all."""
    files = {name: file_digest(folder / name) for name in sorted({matrix.file for matrix in matrices.values()})}
    values = asdict(_Listing(format_version=FORMAT_VERSION, origin=origin, matrices=matrices, files=files))
    whole = {**values, "digest": _digest_of(values)}
    (folder / CODES_FILE).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _digest_of(values: Any) -> str:  # noqa: ANN401 - JSON value
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def open_solved(folder: Path) -> SolvedCodes:
    """Open a folder of solved codes and check every digest. Raises ConfigError for anything that is no such folder, and
    for a file that is not as it was written."""
    doing, path = f"opening the solved codes {named(folder)}", folder / CODES_FILE
    raw = read_json(path, "what codes were solved")
    version, digest = raw.get("format_version"), raw.pop("digest", None)
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{doing}: they have format {shown(version, 60)}, expected {FORMAT_VERSION}; remove the folder, and build "
            "again"
        )
    if digest != _digest_of(raw):
        raise ConfigError(f"{doing}: {CODES_FILE} is not as it was written; remove the folder, and build again")
    try:
        listing = read_typed(_Listing, raw)
    except ValueError as error:
        raise ConfigError(f"{doing}: {CODES_FILE} is damaged ({error}); remove the folder, and build again") from error
    stored: dict[str, StoredTensor] = {}
    for name, digest in listing.files.items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise ConfigError(f"{doing}: {name} is not as it was written; remove the folder, and build again")
        stored |= {tensor.name: tensor for tensor in read_header(folder / name)}
    for name, matrix in listing.matrices.items():
        _check_shapes(doing, name, matrix, stored)
    return SolvedCodes(
        folder=folder, origin=listing.origin, matrices=listing.matrices, digest=file_digest(path), stored=stored
    )


def _check_shapes(doing: str, name: str, matrix: SolvedMatrix, stored: Mapping[str, StoredTensor]) -> None:
    stack, rows, features = matrix.shape
    blocks = (stack, rows, features // matrix.block_size)
    expected = {"codes": ("U8", (stack, rows, features * matrix.bits // 8)), "scales": ("F16", blocks)}
    expected |= {} if matrix.symmetric else {"zeros": ("U8", blocks)}
    for ending, (dtype, shape) in expected.items():
        found = stored.get(f"{name}.{ending}")
        if found is None or (found.dtype, found.shape) != (dtype, shape):
            raise ConfigError(
                f"{doing}: {named(name)} has no {ending} of {dtype} {list(shape)}; remove the folder, and build again"
            )
