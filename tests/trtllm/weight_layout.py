"""Where the library's kernels look for a code: the closed form of contract.json, and what stands in rank files.

    codes = unpacked(packed, rows, columns, bits, interleaved)      # signed, [K, N]
    whole = read_ranks(folder)[0]["transformer.layers.0.attention.qkv.weight"]

Nothing of moeship is used, and no safetensors library: files are read as the format's README has it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
CONTRACT = json.loads((Path(__file__).parent / "contract.json").read_text(encoding="utf-8"))
PACKING = CONTRACT["weight_only_packing"]
BITS_OF = {"F32": "<u4", "F16": "<u2", "BF16": "<u2", "I8": "u1"}  # values as what their bits say, NaN and -0 included


class Stored(NamedTuple):
    """A tensor of a file: its label, and the bits of its values."""

    dtype: str
    values: Array


def places(rows: int, columns: int, bits: int, interleaved: bool) -> tuple[Array, Array]:
    """Of every code [K, N] the 32-bit word that it lies in, and its place there."""
    k, n = np.indices((rows, columns))
    if bits == 8 and not interleaved:
        form = PACKING["closed_form_derived"]["int8"] | {"word32": "n*(K//4) + (k//16)*4 + (k%8)//2"}  # not in the file
    else:
        form = PACKING["closed_form_derived"][f"int{bits}" if interleaved else "int4_sm90_dense"]
    names = {"k": k, "n": n, "K": rows}
    return eval(form["word32"], names), eval(form["nibble" if bits == 4 else "byte"], names)


def packed_by_form(codes: Array, bits: int, interleaved: bool) -> bytes:
    """The bytes of signed codes [K, N]."""
    words = np.zeros(codes.size * bits // 32, dtype="<u4")
    word, place = places(*codes.shape, bits, interleaved)
    unsigned = (codes.astype(np.int64) + 2 ** (bits - 1)).astype(np.uint32)
    np.bitwise_or.at(words, word.reshape(-1), (unsigned << (bits * place).astype(np.uint32)).reshape(-1))
    return words.tobytes()


def unpacked(packed: bytes, rows: int, columns: int, bits: int, interleaved: bool) -> Array:
    """The signed codes [K, N] of bytes."""
    word, place = places(rows, columns, bits, interleaved)
    values = np.frombuffer(packed, dtype="<u4")[word] >> (bits * place).astype(np.uint32) & np.uint32(2**bits - 1)
    return values.astype(np.int64) - 2 ** (bits - 1)


def read_file(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = (start + offset for offset in entry["data_offsets"])
            values = np.frombuffer(data[first:last], dtype=BITS_OF[entry["dtype"]]).reshape(entry["shape"])
            found[name] = Stored(entry["dtype"], values)
    return found


def read_ranks(folder: Path) -> list[dict[str, Stored]]:
    """The tensors of every rank, in the order of the ranks."""
    paths = sorted(folder.glob("rank*.safetensors"), key=lambda path: int(path.stem.removeprefix("rank")))
    return [read_file(path) for path in paths]
