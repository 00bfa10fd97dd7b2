"""A checkpoint folder as lazily read tensors: config.json and safetensors shards in, numpy arrays out.

Nothing from a checkpoint is executed: pickled weights (.bin, .pt) and remote code are refused. Headers are read when
the checkpoint is opened and checked against the files' sizes and the index; a tensor's bytes are read when it is
asked for, into memory of its own rather than a mapping, so resident memory is what the caller holds.

    checkpoint = open_checkpoint("mlabonne/phixtral-4x2_8")      # a folder or a hub id
    checkpoint.tensors["lm_head.linear.bias"].shape               # (51200,)
    checkpoint.read_float32("lm_head.linear.bias")                # numpy float32 [V], every value finite

The file format: an unsigned 64-bit little-endian header length, a JSON header, then the tensors' bytes, row-major
and little-endian (https://github.com/huggingface/safetensors, README, section "Format").
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from export.errors import CheckpointError, ConfigError, listing
from export.floats import all_finite, widen

INDEX_FILE = "model.safetensors.index.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.txt", "tokenizer.model"]
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "generation_config.json",
)  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOAT_DTYPES = ("F16", "BF16", "F32")


def numpy_dtype(dtype: str) -> npt.DTypeLike:
    """The numpy dtype of a safetensors dtype label; bfloat16 has its own row and never passes through float16."""
    if dtype == "BF16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
            "U8": "u1", "BOOL": "?"}[dtype]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies: `offset` and `num_bytes` are bytes in `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Path
    offset: int
    num_bytes: int

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: its raw config and the place of every tensor."""

    folder: Path
    identity: str
    revision: str | None  # the commit of a hub id
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    shards: tuple[Path, ...]

    def read(self, name: str, rows: slice | None = None, row_shape: tuple[int, ...] | None = None) -> npt.NDArray[Any]:
        """The tensor, or `rows` of its first axis, in the stored dtype. Raises CheckpointError when the file ends.

        `row_shape` sees the tensor as [rows, *row_shape]: with [H] the E experts of [E, F, H] are E*F rows.
        """
        stored = self.tensors[name]
        inner = stored.shape[1:] if row_shape is None else row_shape
        num_rows = math.prod(stored.shape[: len(stored.shape) - len(inner)])
        first, last, _ = (rows or slice(None)).indices(num_rows)
        shape = (last - first, *inner) if stored.shape else ()
        array = np.empty(shape, dtype=numpy_dtype(stored.dtype))
        view = memoryview(array.reshape(-1).view(np.uint8).data)
        self.read_into(stored, first * (math.prod(inner) * array.itemsize), view)
        return array

    def read_into(self, stored: StoredTensor, start: int, view: memoryview) -> None:
        """Fill `view` with a tensor's bytes from its byte `start` on. Raises CheckpointError when the file ends."""
        done = 0
        with stored.shard.open("rb", buffering=0) as file:
            file.seek(stored.offset + start)
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise CheckpointError(
                        f"reading {stored.name} from {stored.shard}: the file ended {len(view) - done} bytes early; "
                        "it changed while it was read or is damaged: download it again"
                    )
                done += got

    def read_finite(
        self, name: str, rows: slice | None = None, row_shape: tuple[int, ...] | None = None
    ) -> npt.NDArray[Any]:
        """What `read` gives. Raises CheckpointError when a value is not finite."""
        stored = self.read(name, rows, row_shape)
        if not all_finite(stored):
            bad = int(stored.size - np.isfinite(stored.astype(np.float32)).sum())
            raise CheckpointError(
                f"reading {name} from {self.tensors[name].shard}: {bad} of {stored.size} values are NaN or infinite; "
                "the checkpoint is damaged or its training diverged, and no engine can be built from it"
            )
        return stored

    def read_float32(
        self, name: str, rows: slice | None = None, row_shape: tuple[int, ...] | None = None
    ) -> npt.NDArray[np.float32]:
        """What `read_finite` gives, as float32."""
        return widen(self.read_finite(name, rows, row_shape))

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer and generation files that travel with the model."""
        return [self.folder / name for name in TOKENIZER_FILES if (self.folder / name).is_file()]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_checkpoint(location: str | Path) -> Checkpoint:
    """Open a checkpoint folder, or download a hub id into the hub's cache first.

    Raises ConfigError for an unreadable config.json and CheckpointError for missing or damaged shards.
    """
    folder, revision = Path(location), None
    if folder.is_file():
        raise CheckpointError(f"opening the checkpoint {location}: it is a file; pass the folder that holds it")
    if not folder.is_dir():
        folder = _download(str(location))
        revision = folder.name  # the hub's cache keeps each commit in a folder of its own
    config = read_json(folder / "config.json", "config.json of the checkpoint")
    shards, weight_map = _shards(folder)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for stored in _read_header(shard):
            if stored.name in tensors:
                raise CheckpointError(
                    f"opening {folder}: {stored.name} stands in {tensors[stored.name].shard.name} and again in "
                    f"{shard.name}; remove the shard that does not belong to this checkpoint"
                )
            tensors[stored.name] = stored
    if weight_map is not None:
        _check_index(folder, weight_map, tensors)
    return Checkpoint(
        folder=folder,
        identity=str(location),
        revision=revision,
        config=MappingProxyType(config),
        tensors=MappingProxyType(tensors),
        shards=tuple(shards),
    )


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file. Raises ConfigError when the file is absent, not JSON, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"reading {what}: {path} does not exist; is {path.parent} the right folder?") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"reading {what}: {path} is not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"reading {what}: {path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _download(location: str) -> Path:
    """Fetch a hub repository's configuration, safetensors and tokenizer; never its code or pickles."""
    if not HUB_ID.fullmatch(location):
        raise CheckpointError(
            f"opening the checkpoint {location}: no such folder, and not a hub id like owner/name; check the path"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(location, allow_patterns=HUB_FILES))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"opening the checkpoint {location}: no such folder here, and the hub did not give it ({reason}); "
            "check the name and the network, or download it and pass its folder"
        ) from error


def _shards(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The shard files, and the index's weight map where there is an index."""
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = read_json(index, "the index of the checkpoint").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"opening {folder}: {INDEX_FILE} has no weight_map from tensor name to shard name")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
        absent = [name for name in names if name not in outside and not (folder / name).is_file()]
        if outside or absent:
            problem = f"names files outside the folder: {outside}" if outside else f"names absent shards: {absent}"
            raise CheckpointError(f"opening {folder}: {INDEX_FILE} {problem}; download the checkpoint again, whole")
        return [folder / name for name in names], weight_map
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise CheckpointError(
            f"opening {folder}: {len(found)} safetensors files but no {INDEX_FILE}; download the index too"
        )
    if not found:
        pickles = [path.name for path in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))]
        remedy = (
            f"only pickled weights ({', '.join(pickles[:3])}), which can execute code and are never opened; "
            "convert them to safetensors first"
            if pickles
            else "is it a checkpoint?"
        )
        raise CheckpointError(f"opening {folder}: no safetensors file; {remedy}")
    return found, None


def _read_header(shard: Path) -> list[StoredTensor]:
    """Every tensor of one shard, checked to lie inside the file. Raises CheckpointError for a damaged header."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"opening {shard}: its header should take {length} bytes, the file has {size}; "
                "it is truncated or not safetensors: download it again"
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"opening {shard}: its header is not JSON ({error}); download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"opening {shard}: its header holds a {type(header).__name__}; download it again")
    tensors, problems = [], []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        stored = _read_entry(shard, name, entry, 8 + length)
        tensors.append(stored)
        expected = math.prod(stored.shape) * _ITEM_BYTES[stored.dtype]
        if stored.num_bytes != expected:
            problems.append(
                f"{name} {list(stored.shape)} {stored.dtype} should take {expected} bytes, its offsets span "
                f"{stored.num_bytes}"
            )
        elif stored.offset + stored.num_bytes > size:
            problems.append(f"{name} ends at byte {stored.offset + stored.num_bytes}, the file at {size}: truncated")
    ordered = sorted(tensors, key=lambda stored: (stored.offset, stored.num_bytes))
    for left, right in itertools.pairwise(ordered):
        if left.offset + left.num_bytes > right.offset:
            problems.append(f"{left.name} and {right.name} overlap")
    if problems:
        raise CheckpointError(f"opening {shard}: download it again, it is damaged:{listing(problems)}")
    return tensors


def _read_entry(shard: Path, name: str, entry: Any, data_offset: int) -> StoredTensor:  # noqa: ANN401 - JSON value
    """One tensor's entry of the header, every value of the type that the format asks for."""

    def counts(value: Any) -> bool:  # noqa: ANN401 - JSON value
        return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)

    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape", ""), fields.get("data_offsets", "")
    if not (isinstance(dtype, str) and counts(shape) and counts(offsets) and len(offsets) == 2):
        raise CheckpointError(f"opening {shard}: the header entry of {name} is malformed: {entry!r:.120}")
    if dtype not in _ITEM_BYTES:
        raise CheckpointError(
            f"opening {shard}: {name} has dtype {dtype}; moeship reads {', '.join(_ITEM_BYTES)}: convert the checkpoint"
        )
    return StoredTensor(
        name=name, dtype=dtype, shape=tuple(shape), shard=shard, offset=data_offset + offsets[0],
        num_bytes=offsets[1] - offsets[0],
    )  # fmt: skip


def _check_index(folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    problems = [
        f"the index puts {name} in {shard}, "
        + (f"it is in {tensors[name].shard.name}" if name in tensors else "absent")
        for name, shard in sorted(weight_map.items())
        if name not in tensors or tensors[name].shard.name != shard
    ]
    problems += [
        f"{name} is in {tensors[name].shard.name} but not in the index"
        for name in sorted(set(tensors) - set(weight_map))
    ]
    if problems:
        raise CheckpointError(f"opening {folder}: {INDEX_FILE} and the shards disagree:{listing(problems)}")
