"""The tensors of a checkpoint whose weights are packed, under the names and shapes of an ordinary one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export.checkpoint.safetensors_header import StoredTensor
from export.formats.gguf_file import read_gguf
from export.formats.gguf_model import FLOATS, read_model
from export.formats.view import PackedTensor


@dataclass(frozen=True, kw_only=True)
class GgufContent:
    """A GGUF file: the values of a config.json, the tensors as they are `stored` in the file, and all `tensors` under
    ordinary names, those that are `packed` as float32."""

    config: Mapping[str, Any]
    tensors: dict[str, StoredTensor]
    packed: dict[str, PackedTensor]
    stored: dict[str, StoredTensor]


def ordinary_tensors(stored: Mapping[str, StoredTensor], packed: Mapping[str, PackedTensor]) -> dict[str, StoredTensor]:
    """The tensors of the files, without those that packed weights are made of, and the packed weights as float32. The
    bytes of a packed weight are those of its tensors in the files."""
    used = {name for tensor in packed.values() for name in (*tensor.sources, *tensor.unread)}
    tensors = {name: tensor for name, tensor in stored.items() if name not in used}
    for name, tensor in packed.items():
        parts = [stored[source] for source in tensor.sources]
        num_bytes = sum(part.num_bytes for part in parts)
        tensors[name] = replace(parts[0], name=name, dtype="F32", shape=tensor.shape, num_bytes=num_bytes)
    return tensors


def read_gguf_tensors(path: Path) -> GgufContent:
    """Read the header of a GGUF file. A packed tensor is stored as bytes, one row after the other. Raises ConfigError
    and CheckpointError."""
    file = read_gguf(path)
    model = read_model(file, path)
    stored: dict[str, StoredTensor] = {}
    for tensor in file.tensors:
        rows = math.prod(tensor.shape[:-1])
        plain = tensor.name in model.plain
        name = model.plain.get(tensor.name, tensor.name)
        stored[name] = StoredTensor(
            name=name, dtype=FLOATS[tensor.kind] if plain else "U8",
            shape=tensor.shape if plain else (rows, tensor.num_bytes // rows),
            shard=path, offset=tensor.offset, num_bytes=tensor.num_bytes,
        )  # fmt: skip
    tensors = {name: stored[name] for name in model.plain.values()}
    for name, packed in model.packed.items():
        whole = stored[packed.sources[0]]
        num_bytes = whole.shape[1] * packed.num_rows
        tensors[name] = replace(whole, name=name, dtype="F32", shape=packed.shape, num_bytes=num_bytes)
    return GgufContent(config=model.config, tensors=tensors, packed=dict(model.packed), stored=stored)
