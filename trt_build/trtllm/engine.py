"""The directory of a TensorRT-LLM engine: the library's config.json and rank{R}.engine, the tokenizer, our engine.json.

engine.json says what the library's config does not: for which GPU and with which library the engine was built, from
which checkpoint, what the files' digests are, and what a comparison with the reference found. It is written last, and
the folder appears by rename, as any engine's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.architecture import Architecture
from export.checkpoint import read_json
from export.checkpoint_files import TOKENIZER_FILE
from export.errors import ConfigError, listing
from export.output import replace_file
from export.settings import TokenizerFacts
from export.typed_json import read_typed
from trt_build.engine import MANIFEST_FILE, FileRecord, Source, check_end_tokens, file_problem, lies_inside
from trt_build.errors import EngineError

TRTLLM_BACKEND = "tensorrt-llm"
FORMAT_VERSION = 2
CONFIG_FILE = "config.json"


@dataclass(frozen=True, kw_only=True)
class TrtllmPrecisionRecord:
    """What the matrices are held in, and what all ranks' weights come to."""

    name: str
    quant_algo: str | None
    dtype: str
    group_size: int | None
    average_bits_per_weight: float


@dataclass(frozen=True, kw_only=True)
class ParallelRecord:
    """How the engine is shared out among ranks."""

    tp_size: int
    pp_size: int
    moe_tp_size: int
    moe_ep_size: int

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size


@dataclass(frozen=True, kw_only=True)
class GpuRecord:
    """The GPU that the engine was built on: its name, and 90 for compute capability 9.0."""

    name: str | None
    sm: int | None


@dataclass(frozen=True, kw_only=True)
class TrtllmManifest:
    """engine.json. `max_sequence` and `max_num_tokens` count tokens, of one sequence and of all in a step;
    `kv_cache_fraction` is the share of the GPU's free memory that serving gives to keys and values; `flags` are those
    that trtllm-build was called with; `verification` is the last comparison with the reference, if any."""

    format_version: int
    model: str
    family: str
    backend: str
    precision: TrtllmPrecisionRecord
    architecture: Architecture
    parallel: ParallelRecord
    gpu: GpuRecord
    max_sequence: int
    max_batch: int
    max_num_tokens: int
    kv_cache_fraction: float
    use_paged_context_fmha: bool
    tokenizer_size: int
    head_masks_unused_ids: bool  # those from tokenizer_size on, which stand for no text; else serving must
    eos_token_ids: tuple[int, ...]
    tokenizer: TokenizerFacts
    source: Source
    routing: Mapping[str, Any] | None
    left_out_experts: tuple[int, ...]  # that no layer can choose; the others are numbered without them
    libraries: Mapping[str, str]
    flags: tuple[str, ...]
    settings: Mapping[str, Any]  # what decides the engine beside its source
    files: Mapping[str, FileRecord]
    verification: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class TrtllmEngine:
    """An opened engine directory."""

    folder: Path
    manifest: TrtllmManifest

    @property
    def num_bytes(self) -> int:
        return sum(record.bytes for record in self.manifest.files.values())


def engine_backend(folder: Path) -> str | None:
    """The backend that an engine directory says it is for; None where there is no readable engine.json."""
    try:
        backend = read_json(folder / MANIFEST_FILE, "the engine's manifest").get("backend")
    except ConfigError:
        return None
    return backend if isinstance(backend, str) else None


def rank_engine(rank: int) -> str:
    """The file of a rank's engine."""
    return f"rank{rank}.engine"


def write_trtllm_manifest(folder: Path, manifest: TrtllmManifest) -> None:
    """Write or replace engine.json by rename."""
    replace_file(folder / MANIFEST_FILE, json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")


def open_trtllm_engine(folder: Path | str, check_digests: bool = True) -> TrtllmEngine:
    """Read the manifest and check the files against it. Raises EngineError listing every problem."""
    folder = Path(folder)
    where = f"opening the engine {folder}"
    if not (folder / MANIFEST_FILE).is_file():
        remedy = "a build did not finish, build it again" if folder.is_dir() else "no such folder, check the path"
        raise EngineError(f"{where}: no {MANIFEST_FILE} there; {remedy}")
    try:
        raw = read_json(folder / MANIFEST_FILE, "the engine's manifest")
        if raw.get("backend") != TRTLLM_BACKEND or raw.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"backend {raw.get('backend')!r} of format {raw.get('format_version')!r}, expected {TRTLLM_BACKEND!r} "
                f"of format {FORMAT_VERSION}"
            )
        manifest = read_typed(TrtllmManifest, raw)
        _check_facts(manifest)
    except (ConfigError, ValueError) as error:
        raise EngineError(
            f"{where}: {MANIFEST_FILE} is not one that this moeship reads ({error}); build it again"
        ) from error
    found = {name: file_problem(folder / name, record, check_digests) for name, record in manifest.files.items()}
    problems = [f"{name}: {problem}" for name, problem in found.items() if problem]
    if problems:
        raise EngineError(f"{where}: its files are not those of the build; build it again:{listing(problems)}")
    return TrtllmEngine(folder=folder, manifest=manifest)


def _check_facts(manifest: TrtllmManifest) -> None:
    """What types cannot say. Raises ValueError."""
    ranks = [rank_engine(rank) for rank in range(manifest.parallel.world_size)]
    strangers = [name for name in manifest.files if not lies_inside(name)]
    absent = [name for name in (CONFIG_FILE, TOKENIZER_FILE, *ranks) if name not in manifest.files]
    if strangers or absent:
        raise ValueError(f"files outside the folder: {strangers}, files not listed: {absent}")
    if not 1 <= manifest.max_sequence <= manifest.architecture.max_positions or manifest.max_batch < 1:
        raise ValueError(f"max_sequence {manifest.max_sequence} or max_batch {manifest.max_batch} is out of range")
    if not 1 <= manifest.tokenizer_size <= manifest.architecture.vocab_size:
        raise ValueError(
            f"tokenizer_size is {manifest.tokenizer_size}, expected 1 to {manifest.architecture.vocab_size}"
        )
    check_end_tokens(manifest.eos_token_ids, manifest.tokenizer_size)
