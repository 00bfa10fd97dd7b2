"""Writes tensors to safetensors files in chunks, so that memory holds one chunk at a time.

Shapes and dtypes must be known before the values: the header is written first, then the bytes in the header's order.

    tensors = [PlannedTensor(name="a", dtype="F16", shape=(4, 8)), ...]
    write_sharded(folder, tensors, lambda tensor: chunks_of(tensor.name), max_shard_bytes=5_000_000_000)

writes model.safetensors, or model-00001-of-0000n.safetensors and so on with model.safetensors.index.json, in the order
of `tensors`. The format: https://github.com/huggingface/safetensors, README, section "Format".
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.checkpoint.file_table import INDEX_FILE
from export.checkpoint.safetensors_header import numpy_dtype
from export.errors import OutputError

Chunks = Callable[["PlannedTensor"], Iterable[npt.NDArray[Any]]]
_HEADER_ALIGNMENT = 8  # bytes; the safetensors library pads its headers to this with spaces


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A tensor to be written; `dtype` is the safetensors label, e.g. F16."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * np.dtype(numpy_dtype(self.dtype)).itemsize


def plan_shards(tensors: Sequence[PlannedTensor], max_shard_bytes: int) -> list[list[PlannedTensor]]:
    """Distribute tensors over shards of at most `max_shard_bytes` of values; a larger tensor gets a shard of its
    own."""
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards


def write_sharded(
    folder: Path, tensors: Sequence[PlannedTensor], chunks: Chunks, *, max_shard_bytes: int
) -> list[Path]:
    """Write tensors as shards into `folder`, with an index if there are several; returns the shards' paths. Raises the
    errors of `write_safetensors`."""
    shards = plan_shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        paths = [folder / "model.safetensors"]
    else:
        paths = [folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for path, shard in zip(paths, shards, strict=True):
        write_safetensors(path, shard, chunks)
    if len(paths) > 1:
        weight_map = {tensor.name: path.name for path, shard in zip(paths, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return paths


def write_safetensors(path: Path, tensors: Sequence[PlannedTensor], chunks: Chunks) -> None:
    """Write one safetensors file. `chunks(tensor)` yields the tensor's values, row-major, as any number of arrays of
    the planned dtype.

    Raises OutputError if the chunks have another dtype or do not add up to the planned size, and for errors of the
    disk.
    """
    try:
        with path.open("wb", buffering=0) as file:
            _write_all(file, header_of(tensors))
            for tensor in tensors:
                _write_tensor(file, tensor, chunks(tensor))
    except OSError as error:
        raise OutputError(f"writing {path}: {error.strerror or error}; the unfinished file was removed") from error


def header_of(tensors: Sequence[PlannedTensor]) -> bytes:
    """The header of a file that holds these tensors one after the other: its length field and its JSON.

    transformers requires `format: pt` in the metadata.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: io.FileIO, tensor: PlannedTensor, chunks: Iterable[npt.NDArray[Any]]) -> None:
    expected, written = np.dtype(numpy_dtype(tensor.dtype)), 0
    for chunk in chunks:
        if chunk.dtype != expected:
            raise OutputError(f"writing {tensor.name}: a chunk has dtype {chunk.dtype}, the header says {tensor.dtype}")
        _write_all(file, np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
        written += chunk.nbytes
    if written != tensor.num_bytes:
        raise OutputError(
            f"writing {tensor.name}: {written} bytes were given, {list(tensor.shape)} takes {tensor.num_bytes}"
        )


def _write_all(file: io.FileIO, data: bytes | memoryview) -> None:
    """Write all of `data`; a single write to an unbuffered file may write less."""
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]
