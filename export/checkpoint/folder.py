"""Opens a checkpoint folder (config.json and safetensors shards) and reads its tensors as numpy arrays on demand.

Nothing from a checkpoint is executed: pickled weights (.bin, .pt) and remote code are refused. Opening a checkpoint
reads the headers and checks them against the files' sizes and the index. A tensor's bytes are read when the caller asks
for them, into an array rather than a mapping, so that resident memory is what the caller holds.

    checkpoint = open_checkpoint("mlabonne/phixtral-4x2_8")      # a folder or a hub id
    checkpoint.tensors["lm_head.linear.bias"].shape               # (51200,)
    checkpoint.read_float32("lm_head.linear.bias")                # numpy float32 [V], every value finite
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from export.checkpoint.file_table import INDEX_FILE, text_files
from export.checkpoint.hub import download
from export.checkpoint.packed import ordinary_tensors, read_gguf_tensors
from export.checkpoint.safetensors_header import StoredTensor, numpy_dtype, read_header
from export.checkpoint.safetensors_header import header_bytes as safetensors_header_bytes
from export.errors import CheckpointError, listing, named, names, shown
from export.files.reading import check_name, is_folder, is_regular, is_there, open_regular, read_json
from export.files.recognised import FILE_SUFFIXES, recognised
from export.floats import all_finite, widen
from export.formats import SETTINGS_KEYS, settings_of, views_of
from export.formats.gguf_file import gguf_header_bytes, is_gguf
from export.formats.view import PackedTensor

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
_SHARD_NAME = re.compile(r"model-\d+-of-\d+\.safetensors")
PACKED_SETTINGS_FILE = "quantize_config.json"  # says how weights are packed, where config.json does not
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_COMPARED_BYTES = 1 << 20  # of two tensors of one name, read at a time
KEPT_TENSORS = 16  # most packed tensors that stay in memory: those of a pair of matrices, for two threads
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]*")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: the values of config.json, and where each tensor is stored.

    If weights are packed, `packed` has them by the names that they have in an ordinary checkpoint. `tensors` then lists
    them as float32 under these names, and `in_files` has the tensors that the files hold (None: those of `tensors`).
    The values of config.json are those of an ordinary checkpoint.
    """

    folder: Path
    identity: str
    revision: str | None  # commit, for a checkpoint that was given as a hub id
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    shards: tuple[Path, ...]
    packed: Mapping[str, PackedTensor] = field(default_factory=dict)
    in_files: Mapping[str, StoredTensor] | None = None
    _kept: dict[str, npt.NDArray[Any]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _rows: dict[str, tuple[int, int, npt.NDArray[Any]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """The tensors of the files, packed or not, by their names there."""
        return self.tensors if self.in_files is None else self.in_files

    def kept(self, name: str) -> npt.NDArray[Any]:
        """A whole tensor of the files, in the stored dtype. The last KEPT_TENSORS that were asked for are kept."""
        found = self._kept.pop(name, None)
        array = self._read_stored(self.stored[name], None, None) if found is None else found
        self._kept[name] = array
        for oldest in list(self._kept)[:-KEPT_TENSORS]:
            self._kept.pop(oldest, None)
        return array

    def stored_rows(
        self, name: str, first: int, last: int, row_shape: tuple[int, ...] | None = None
    ) -> npt.NDArray[Any]:
        """Rows of the first axis of a tensor of the files, in the stored dtype; with `row_shape` of the tensor reshaped
        to [rows, *row_shape]. The last that were asked for are kept."""
        return self._kept_rows(self.stored[name], first, last, row_shape)

    def _kept_rows(
        self, stored: StoredTensor, first: int, last: int, row_shape: tuple[int, ...] | None = None
    ) -> npt.NDArray[Any]:
        found = self._rows.get(stored.name)
        if found is None or found[:2] != (first, last):
            self._rows.clear() if len(self._rows) >= KEPT_TENSORS else None
            self._rows.pop(stored.name, None)  # freed before as much again is taken
            found = first, last, self._read_stored(stored, slice(first, last), row_shape)
            self._rows[stored.name] = found
        return found[2]

    def read_transposed(self, name: str, index: int, rows: slice) -> npt.NDArray[Any]:
        """Rows of the transpose of the matrix `index` of a stack [n, in, out]: [rows, in], in the stored dtype. The
        matrix is read whole and kept until another stack's or another matrix is asked for. Raises CheckpointError like
        `read_finite`."""
        stored = self.tensors[name]
        if stored.name not in self._rows:
            self._rows.clear()
        [matrix] = self._kept_rows(stored, index, index + 1)
        return self._finite(name, np.ascontiguousarray(matrix[:, rows].T))

    def read(self, name: str, rows: slice | None = None, row_shape: tuple[int, ...] | None = None) -> npt.NDArray[Any]:
        """Read a tensor, or `rows` of its first axis, in the stored dtype. Raises CheckpointError if the file ends
        early.

        With `row_shape` the tensor is reshaped to [rows, *row_shape] first: with (H,), [E, F, H] has E*F rows.
        A packed tensor is dequantised to float32.
        """
        if name not in self.packed:
            return self._read_stored(self.tensors[name], rows, row_shape)
        packed = self.packed[name]
        inner = packed.shape[1:] if row_shape is None else row_shape
        first, last, _ = (rows or slice(None)).indices(math.prod(packed.shape) // math.prod(inner))
        per_row = math.prod(inner) // packed.features
        return packed.read(self, first * per_row, last * per_row).reshape(last - first, *inner)

    def _read_stored(
        self, stored: StoredTensor, rows: slice | None, row_shape: tuple[int, ...] | None
    ) -> npt.NDArray[Any]:
        inner = stored.shape[1:] if row_shape is None else row_shape
        num_rows = math.prod(stored.shape[: len(stored.shape) - len(inner)])
        first, last, _ = (rows or slice(None)).indices(num_rows)
        shape = (last - first, *inner) if stored.shape else ()
        array = np.empty(shape, dtype=numpy_dtype(stored.dtype))
        view = memoryview(array.reshape(-1).view(np.uint8).data)
        self.read_into(stored, first * (math.prod(inner) * array.itemsize), view)
        return array

    def read_into(self, stored: StoredTensor, start: int, view: memoryview) -> None:
        """Fill `view` with a tensor's bytes from its byte `start` on. Raises CheckpointError if the file ends early."""
        done = 0
        doing = f"reading {named(stored.name)} from {named(stored.shard)}"
        with open_regular(stored.shard, doing, CheckpointError) as file:
            file.seek(stored.offset + start)
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    raise CheckpointError(
                        f"{doing}: the file ended {len(view) - done} bytes early; it changed while it was read or is "
                        "damaged: download it again"
                    )
                done += got

    def read_finite(
        self, name: str, rows: slice | None = None, row_shape: tuple[int, ...] | None = None
    ) -> npt.NDArray[Any]:
        """Like `read`, and raises CheckpointError if a value is NaN or infinite. float64 is rounded to float32."""
        return self._finite(name, self.read(name, rows, row_shape))

    def _finite(self, name: str, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if stored.dtype == np.float64:
            with np.errstate(over="ignore"):
                stored = stored.astype(np.float32)
        if not all_finite(stored):
            bad = int(stored.size - np.isfinite(stored.astype(np.float32)).sum())
            raise CheckpointError(
                f"reading {named(name)} from {named(self.tensors[name].shard)}: {bad} of {stored.size} values are "
                "NaN or infinite; the checkpoint is damaged or its training diverged, no engine can be built from it"
            )
        return stored

    def read_float32(
        self, name: str, rows: slice | None = None, row_shape: tuple[int, ...] | None = None
    ) -> npt.NDArray[np.float32]:
        """Like `read_finite`, converted to float32."""
        return widen(self.read_finite(name, rows, row_shape))

    def settings_files(self) -> list[Path]:
        """The files that say what the tensors mean; none for a GGUF file, which says it itself."""
        if self.is_gguf:
            return []
        beside = self.folder / PACKED_SETTINGS_FILE
        return [self.folder / "config.json", *([beside] if self.packed and is_regular(beside) else [])]

    @property
    def is_gguf(self) -> bool:
        """Whether the checkpoint is a GGUF file."""
        return all(map(is_gguf, self.shards))

    @property
    def gguf_file(self) -> Path | None:
        """The GGUF file, if the checkpoint is one."""
        return self.shards[0] if self.is_gguf else None

    def tokenizer_files(self) -> list[Path]:
        """Paths of the tokenizer and settings files that are copied with the model."""
        return [self.folder / name for name in text_files(self.folder)]


def file_digest(path: Path) -> str:
    """SHA-256 of a regular file's bytes, in hexadecimal. Raises CheckpointError if the file is not regular: another one
    may have replaced it since it was checked, and reading a pipe would block for ever."""
    with open_regular(path, f"reading {named(path)}", CheckpointError) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_folder(location: str | Path, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a model or an adapter, and its commit on the hub. A location that is no folder here is a hub id,
    which is downloaded into the hub's cache, at `revision` or at what stands behind an @ (None: its main branch).
    Raises CheckpointError."""
    folder, doing = Path(location), f"opening the checkpoint {named(location)}"
    check_name(folder, doing, CheckpointError)
    if is_regular(folder):
        found = recognised(folder) or "it is a file; pass the folder that holds it, or a GGUF file"
        raise CheckpointError(f"{doing}: {found}")
    name, at, behind = str(location).partition("@")
    revision = revision or behind or None
    if is_folder(folder) or (at and is_folder(Path(name))):
        if revision is not None and not (at and is_folder(folder)):
            raise CheckpointError(
                f"{doing}: it is a folder of this machine, which has no revision {named(revision)}; leave the revision "
                "out, or give a hub id"
            )
        return folder, None
    # A file that is not there, unless the path could be a hub id.
    if folder.suffix.lower() in FILE_SUFFIXES and (is_folder(folder.parent) or not HUB_ID.fullmatch(name)):
        raise CheckpointError(f"{doing}: there is no such file; check the path")
    if not HUB_ID.fullmatch(name) or (at and not behind) or not _REVISION.fullmatch(revision or "main"):
        raise CheckpointError(
            f"{doing}: no such folder, and not a hub id like owner/name or owner/name@revision; check the path"
        )
    folder = download(name, revision)
    return folder, folder.name  # the hub's cache keeps each commit in a folder of its own


def open_checkpoint(location: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a checkpoint folder or a GGUF file, or download a hub id (`revision` of it) into the hub's cache first.

    Raises ConfigError for an unreadable config.json and CheckpointError for missing or damaged shards.
    """
    if is_gguf(Path(location)) and is_regular(Path(location)):
        return _open_gguf(Path(location))
    folder, revision = model_folder(location, revision)
    _refuse_adapter(folder)
    if not is_there(folder / "config.json") and (found := recognised(folder)) is not None:
        raise CheckpointError(f"opening the checkpoint {named(folder)}: {found}")
    config = read_json(folder / "config.json", "config.json of the checkpoint")
    shards, weight_map = _shards(folder)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        check_name(shard, f"opening {named(folder)}", CheckpointError)
        for stored in read_header(shard):
            if stored.name in tensors:
                _check_same(folder, tensors[stored.name], stored)
                if weight_map is None or weight_map.get(stored.name) != shard.name:
                    continue
            tensors[stored.name] = stored
    if weight_map is not None:
        _check_index(folder, weight_map, tensors)
    checkpoint = Checkpoint(
        folder=folder,
        identity=str(location),
        revision=revision,
        config=MappingProxyType(config),
        tensors=MappingProxyType(tensors),
        shards=tuple(shards),
    )
    return _unpacked(checkpoint)


def _check_same(folder: Path, one: StoredTensor, other: StoredTensor) -> None:
    """Raise CheckpointError unless two shards hold the same bytes under one name. transformers reads the later one."""
    same = (one.dtype, one.shape) == (other.dtype, other.shape)
    if same:
        doing = f"reading {named(one.name)}"
        with (
            open_regular(one.shard, doing, CheckpointError) as first,
            open_regular(other.shard, doing, CheckpointError) as second,
        ):
            first.seek(one.offset)
            second.seek(other.offset)
            for start in range(0, one.num_bytes, _COMPARED_BYTES):
                count = min(_COMPARED_BYTES, one.num_bytes - start)
                if first.read(count) != second.read(count):
                    same = False
                    break
    if not same:
        raise CheckpointError(
            f"opening {named(folder)}: {named(one.name)} is in {named(one.shard.name)} and, with other values, also in "
            f"{named(other.shard.name)}; remove the shard that does not belong to this checkpoint"
        )


def header_bytes(shard: Path) -> bytes:
    """The header of a file of weights, safetensors or GGUF. Raises CheckpointError."""
    return gguf_header_bytes(shard) if is_gguf(shard) else safetensors_header_bytes(shard)


def _open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file; the tokenizer and settings are those of the files beside it. Raises ConfigError and
    CheckpointError."""
    content = read_gguf_tensors(path)
    return Checkpoint(
        folder=path.parent,
        identity=str(path),
        revision=None,
        config=MappingProxyType(dict(content.config)),
        tensors=MappingProxyType(content.tensors),
        shards=(path,),
        packed=content.packed,
        in_files=MappingProxyType(content.stored),
    )


def _unpacked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its packed weights under their ordinary names; itself if none are packed, or by a method that
    moeship does not read. Raises ConfigError and CheckpointError."""
    config, stored = checkpoint.config, checkpoint.tensors
    settings = settings_of(config)
    beside = checkpoint.folder / PACKED_SETTINGS_FILE
    if settings is None and is_there(beside) and any(name.endswith(".qweight") for name in stored):
        settings = {"quant_method": "gptq", **read_json(beside, "how the weights are packed")}
    packed = views_of(settings, stored, checkpoint) if settings is not None else None
    if settings is None or packed is None:
        return checkpoint
    tensors = ordinary_tensors(stored, packed)
    return replace(
        checkpoint,
        config=MappingProxyType({key: value for key, value in config.items() if key not in SETTINGS_KEYS}),
        tensors=MappingProxyType(tensors),
        packed=packed,
        in_files=stored,
    )


def _shards(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The shards that transformers would read, and the index's weight map if the shards come from the index.

    The shards are model.safetensors, else the files that the index names (transformers/modeling_utils.py,
    `from_pretrained`), else the only safetensors file. Other safetensors files are not part of the model; a warning
    names them. Every shard that an index names must exist, even if the index is not used.
    """
    index, whole = folder / INDEX_FILE, folder / WEIGHTS_FILE
    found = sorted(folder.glob("*.safetensors"))
    weight_map = _weight_map(folder, index) if is_there(index) else None
    indexed = [] if weight_map is None else _indexed_shards(folder, weight_map)
    if indexed and (whole in indexed or not is_regular(whole)):
        shards = indexed
    elif is_regular(whole):
        shards, weight_map = [whole], None
    elif len(found) == 1 and not _is_other_format(found[0]):
        shards = found
    else:
        raise CheckpointError(f"opening {named(folder)}: {_no_weights(folder, found)}")
    strays = [path.name for path in found if path not in shards]
    if strays:
        logger.warning(
            "%s is read from %s as transformers reads it; %s beside it is not part of the model",
            named(folder), names(path.name for path in shards), names(strays),
        )  # fmt: skip
    return shards, weight_map


def _weight_map(folder: Path, index: Path) -> dict[str, str]:
    weight_map = read_json(index, "the index of the checkpoint").get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointError(f"opening {named(folder)}: {INDEX_FILE} has no weight_map from tensor name to shard name")
    return dict(weight_map)


def _indexed_shards(folder: Path, weight_map: Mapping[str, str]) -> list[Path]:
    files = sorted(set(weight_map.values()))
    outside = [name for name in files if "/" in name or name in ("", ".", "..")]
    absent = [name for name in files if name not in outside and not os.path.exists(folder / name)]  # noqa: PTH110
    if outside or absent:
        problem = (
            f"names files outside the folder: {shown(outside)}"
            if outside
            else f"names shards that do not exist: {shown(absent)}"
        )
        raise CheckpointError(f"opening {named(folder)}: {INDEX_FILE} {problem}; download the whole checkpoint again")
    return [folder / name for name in files]


def _is_other_format(path: Path) -> bool:
    """Whether a safetensors file holds an adapter, or a model whose tensors do not have transformers' names."""
    return path.name.startswith(("adapter_", "consolidated"))


def _no_weights(folder: Path, found: list[Path]) -> str:
    """The end of the error for a folder without safetensors weights that transformers would find: what to do."""
    if any(_SHARD_NAME.fullmatch(path.name) for path in found):
        return f"{len(found)} safetensors files but no {INDEX_FILE}; download the index too"
    if found:
        return (
            f"neither {WEIGHTS_FILE} nor {INDEX_FILE}, only {names(path.name for path in found)}; download the "
            "checkpoint in transformers' format"
        )
    models = sorted(path.name for path in folder.iterdir() if is_gguf(path))
    if models:
        return f"no safetensors file; pass a GGUF file itself as the checkpoint: {names(models)}"
    pickles = [path.name for path in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))]
    if pickles:
        return (
            f"no safetensors file; only pickled weights ({names(pickles, 3)}), which can execute code and are never "
            "opened; convert them to safetensors first"
        )
    return "no safetensors file; check that this is the folder of a checkpoint"


def _refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError if a folder holds an adapter and no model, or both: transformers then takes the base model
    that the adapter names, where PEFT is installed, and else the model of the folder. Settings that PEFT left beside a
    model without the adapter's weights are named in a warning."""
    settings = folder / "adapter_config.json"
    if not is_there(settings):
        return
    adapter = read_json(settings, "the adapter's settings")
    if any(is_there(folder / name) for name in (WEIGHTS_FILE, INDEX_FILE)):
        weights = [name for name in _ADAPTER_WEIGHTS if is_there(folder / name)]
        if weights:
            raise CheckpointError(
                f"opening {named(folder)}: it holds a whole model and an adapter ({weights[0]}), and which of them is "
                "meant is not said; if the adapter is merged into the model, move adapter_config.json and the "
                "adapter's weights to another folder; if it is not, merge it: as model+adapter in the YAML of "
                "`moeship merge`, or with peft's merge_and_unload"
            )
        logger.warning(
            "%s: adapter_config.json beside the model is left aside, since the weights of that adapter are not there; "
            "the model is read as it stands", named(folder),
        )  # fmt: skip
        return
    raise CheckpointError(
        f"opening {named(folder)}: it is not a model but an adapter of type {shown(adapter.get('peft_type'))} for the "
        f"base model {shown(adapter.get('base_model_name_or_path'))}; merge it into that model: as "
        "model+adapter in the YAML of `moeship merge`, or with peft's merge_and_unload"
    )


def _check_index(folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    problems = [
        f"the index puts {named(name)} in {named(shard)}, "
        + (f"it is in {named(tensors[name].shard.name)}" if name in tensors else "absent")
        for name, shard in sorted(weight_map.items())
        if name not in tensors or tensors[name].shard.name != shard
    ]
    if problems:
        raise CheckpointError(f"opening {named(folder)}: {INDEX_FILE} and the shards disagree:{listing(problems)}")
    unnamed = sorted(set(tensors) - set(weight_map))
    if unnamed:
        logger.warning(
            "%s: %s does not name %s, which its shards hold; they are read, as transformers reads them",
            named(folder), INDEX_FILE, names(unnamed),
        )  # fmt: skip
