"""Solves the codes of a model over a text into a folder, layer by layer, so that an interrupted run goes on.

    codes = solve_codes(Path("engine.codes"), model, wanted, text)     # export/quantize/solved.py reads them back

The folder appears when all layers are solved. Until then each layer's file, the states that left it, and a line of the
journal are kept (export/files/resume.py), and the same call goes on behind the last whole layer to the same bytes. A
folder that is there already is opened, if it was solved with the same settings from the same checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.calibration.layers import FEWEST_TOKENS, REPAIR, SolvedRow, Solver, Wanted
from export.calibration.overlay import Overlay
from export.checkpoint.digests import Run, shards_read_otherwise
from export.checkpoint.folder import file_digest
from export.checkpoint.shard_writer import PlannedTensor, write_safetensors
from export.conversion.parts import PartRecord
from export.conversion.sources import check_unchanged, source_files
from export.errors import CheckpointError, ConfigError, listing, named, names
from export.families import Model
from export.files.output import flush_to_disk
from export.files.reading import is_there
from export.files.resume import Fingerprint, PartialFolder, partial_folder
from export.files.typed_json import read_typed
from export.quantize.gptq import LEAST_DAMPING
from export.quantize.solved import (
    FORMAT_VERSION,
    Origin,
    SolvedCodes,
    SolvedMatrix,
    checksum_text,
    open_solved,
    packed,
    row_checksums,
    write_listing,
)
from export.reference.model import Windows
from export.reference.operations import FloatArray

logger = logging.getLogger(__name__)

_WHAT = "the solved codes"


@dataclass(frozen=True, kw_only=True)
class CalibrationText:
    """A text as windows of token ids, and the record of it that is kept: names, bytes and digest."""

    windows: Windows
    record: Mapping[str, Any]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.windows))


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """A line of the journal: a layer or the head that is solved, with the digests of its files."""

    unit: str
    files: Mapping[str, str]
    matrices: Mapping[str, SolvedMatrix]


def settings_of(text: CalibrationText, wanted: Mapping[str, Wanted], experts_per_token: int) -> dict[str, Any]:
    """All that decides the codes beside the checkpoint, as plain JSON values."""
    return {
        "format version": FORMAT_VERSION,
        "text": dict(text.record),
        "windows": [len(window) for window in text.windows],
        "least damping": LEAST_DAMPING,
        "fewest tokens": FEWEST_TOKENS,
        "repair": REPAIR,
        "experts per token": experts_per_token,
        "matrices": {name: _settings_of(one) for name, one in wanted.items()},
    }


def _settings_of(one: Wanted) -> dict[str, Any]:
    """How a matrix is solved. Scales in float16 are not named, so that codes keep their settings which were solved by a
    release that had no others."""
    found = asdict(one)
    if one.scale_type == "float16":
        del found["scale_type"]
    return found


def solve_codes(folder: Path, model: Model, wanted: Mapping[str, Wanted], text: CalibrationText) -> SolvedCodes:
    """Solve the rows `wanted` of a model over a text into `folder`, or open it. Raises ConfigError for a folder with
    other settings, CheckpointError for a checkpoint that cannot be read, and the errors of `Solver` and of the disk."""
    settings = settings_of(text, wanted, model.architecture.experts_per_token)
    checkpoint = model.weights.checkpoint
    fingerprint = Fingerprint(settings=settings, sources=source_files(checkpoint))
    if is_there(folder):
        found = open_solved(folder)
        _check_same(found, fingerprint)
        logger.info("the codes of %s are those of %s", named(checkpoint.identity), folder)
        return found
    units = [f"layer-{index:04d}" for index in range(model.architecture.num_layers)] + ["head"]
    kept = tuple(f"{unit}.safetensors" for unit in units) + tuple(f"{unit}.npy" for unit in units)
    with partial_folder(folder, _WHAT, fingerprint, keep=kept, num_bytes=_bytes_of(model, wanted)) as partial:
        matrices: dict[str, SolvedMatrix] = {}
        for unit in _solved(partial, model, wanted, text, units):
            matrices |= unit.matrices
        for path in partial.content.glob("*.npy"):
            path.unlink()
        records = [PartRecord(part=name, sources=one.sources, regions=()) for name, one in matrices.items()]
        check_unchanged(checkpoint, fingerprint.sources, records)
        sources = {name: asdict(one) for name, one in fingerprint.sources.items()}
        write_listing(partial.content, Origin(settings=settings, sources=sources), matrices)
    return open_solved(folder)


def _check_same(found: SolvedCodes, fingerprint: Fingerprint) -> None:
    """Raise ConfigError unless codes were solved with these settings from these files."""
    expected = fingerprint.settings
    different = [
        f"{key}: found {_short(found.origin.settings.get(key))}, expected {_short(expected[key])}"
        for key in sorted(expected)
        if found.origin.settings.get(key) != _plain(expected[key])
    ]
    lasting = ("bytes", "modified_ns", "sha256")
    for name, source in fingerprint.sources.items():
        before = found.origin.sources.get(name, {})
        if any(before.get(key) != getattr(source, key) for key in lasting):
            different.append(f"{named(name)} is not the file that they were solved from")
    if different:
        raise ConfigError(
            f"opening the solved codes {named(found.folder)}: they were solved otherwise; name another folder with "
            f"--codes, or remove this one:{listing(different[:8])}"
        )


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON value
    """A value as it comes back from JSON."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _short(value: Any) -> str:  # noqa: ANN401 - JSON value
    return "nothing" if value is None else str(value)[:100]


def _bytes_of(model: Model, wanted: Mapping[str, Wanted]) -> int:
    """The bytes of all codes, scales and zero points."""
    total = 0
    for name, one in wanted.items():
        number = model.weights.table[name].num_elements
        total += number * one.bits // 8 + number // one.block_size * (2 if one.symmetric else 3)
    return total


def _solved(
    partial: PartialFolder, model: Model, wanted: Mapping[str, Wanted], text: CalibrationText, units: list[str]
) -> Iterator[_Unit]:
    """Yield each layer and the head, those first that an earlier run solved."""
    done = _finished(partial, model, units)
    yield from done
    solver = Solver(model=model, wanted=wanted)
    state = solver.begin(text.windows) if not done else np.load(partial.content / f"{done[-1].unit}.npy")
    for index, unit in enumerate(units[len(done) :], len(done)):
        started = time.monotonic()
        if index < solver.num_layers:
            state, rows = solver.layer(index, state, text.windows)
        else:
            rows = solver.head(state)
        found = _write(partial, unit, units[index - 1] if index else None, state, rows, model, wanted)
        logger.info("solved the codes of %s (%d of %d) over %s tokens in %.1f s", unit.replace("-", " "), index + 1,
                    len(units), f"{text.num_tokens:,}", time.monotonic() - started)  # fmt: skip
        yield found


def _finished(partial: PartialFolder, model: Model, units: list[str]) -> list[_Unit]:
    """What an earlier run solved and is whole. Raises CheckpointError if it was solved from other bytes than the shards
    hold."""
    found: list[_Unit] = []
    for line, unit in zip(partial.records, units, strict=False):
        try:
            record = read_typed(_Unit, line)
        except ValueError:
            break
        here = partial.content / f"{unit}.safetensors"
        if record.unit != unit or not here.is_file() or file_digest(here) != record.files.get(here.name):
            break
        found.append(record)
    while found and found[-1].unit != "head":
        state = partial.content / f"{found[-1].unit}.npy"
        if state.is_file() and file_digest(state) == found[-1].files.get(state.name):
            break
        found.pop()  # the states that leave this layer are gone, so it is solved again
    checkpoint = model.weights.checkpoint
    moved = [shard.name for shard in checkpoint.shards if shard.name in partial.moved]
    runs: dict[str, tuple[Run, ...]] = {}
    for record in found:
        for matrix in record.matrices.values():
            runs |= matrix.sources
    changed = shards_read_otherwise(checkpoint, runs, moved) if moved else []
    if changed:
        raise CheckpointError(
            f"resuming {_WHAT}: {names(changed)} of {checkpoint.folder} changed since the run was interrupted, though "
            "size and time are the same; the layers that were solved from it are discarded: build again"
        )
    return found


def _write(
    partial: PartialFolder, unit: str, before: str | None, state: FloatArray, rows: Mapping[str, SolvedRow],
    model: Model, wanted: Mapping[str, Wanted],
) -> _Unit:  # fmt: skip
    """Write a layer's codes and the states that left it, and its line of the journal; then the states before it are not
    needed."""
    path, states = partial.content / f"{unit}.safetensors", partial.content / f"{unit}.npy"
    arrays: dict[str, npt.NDArray[Any]] = {}
    matrices = {}
    for name, row in rows.items():
        spec, own = model.weights.table[name], wanted[name]
        shape = spec.shape if spec.stacks_experts else (1, *spec.shape)
        matrices[name] = SolvedMatrix(
            file=path.name, shape=shape, bits=own.bits, block_size=own.block_size, symmetric=own.symmetric,
            tokens=tuple(row.tokens.get(place, 0) for place in range(shape[0])), fallen_back=row.fallen_back,
            sources=row.sources, checksums=_checksums(name, row, model),
        )  # fmt: skip
        arrays |= _arrays(name, row, matrices[name])
    planned = [
        PlannedTensor(name=name, dtype="F16" if array.dtype == np.float16 else "U8", shape=array.shape)
        for name, array in arrays.items()
    ]
    write_safetensors(path, planned, lambda tensor: [arrays[tensor.name]])
    files = [path]
    if unit != "head":
        np.save(states, state)
        files.append(states)
    flush_to_disk(partial.content)
    record = _Unit(unit=unit, files={file.name: file_digest(file) for file in files}, matrices=matrices)
    partial.append(asdict(record))
    if before is not None:
        (partial.content / f"{before}.npy").unlink(missing_ok=True)
    return record


def _checksums(name: str, row: SolvedRow, model: Model) -> dict[str, str]:
    own = model.weights
    values = Overlay(checkpoint=own.checkpoint, table=own.table, solved={name: row.codes})
    places = sorted(row.codes) if own.table[name].stacks_experts else None
    sums: dict[str, int] = {}
    for group, first, parts in values.placed_chunks(name, places):
        for turn, part in enumerate(parts):
            key = f"{group}.{turn}"
            sums[key] = sums.get(key, 0) + row_checksums(part, first)
    return {key: checksum_text(total) for key, total in sums.items()}


def _arrays(name: str, row: SolvedRow, matrix: SolvedMatrix) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a row; experts that were not wanted are zeros."""
    stack, rows, features = matrix.shape
    codes = np.zeros((stack, rows, features * matrix.bits // 8), dtype=np.uint8)
    scales = np.zeros((stack, rows, features // matrix.block_size), dtype=np.float16)
    zeros = np.zeros(scales.shape, dtype=np.uint8)
    for place, one in row.codes.items():
        codes[place], scales[place], zeros[place] = packed(one.codes, matrix.bits), one.scales, one.zeros
    found: dict[str, npt.NDArray[Any]] = {f"{name}.codes": codes, f"{name}.scales": scales}
    return found if matrix.symmetric else {**found, f"{name}.zeros": zeros}
