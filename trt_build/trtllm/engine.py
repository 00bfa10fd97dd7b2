"""The directory of a TensorRT-LLM engine: the library's config.json and rank{R}.engine, the tokenizer, our engine.json.

engine.json records what the library's config.json does not: the GPU and the release of the library that the engine was
built with, the source checkpoint, the digests of the files, and the result of the comparison with the reference. As
with every engine, it is written last and the folder appears by rename.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.architecture import MAX_DIMENSION, Architecture
from export.checkpoint.file_table import TOKENIZER_FILE
from export.errors import listing, named, shown
from export.files.output import replace_file
from export.files.typed_json import read_typed
from export.tokenizer.settings import TokenizerFacts
from trt_build.engine_files import FileRecord, check_file_records, differing_files
from trt_build.errors import EngineError
from trt_build.manifest import (
    MANIFEST_FILE,
    TRTLLM_BACKEND,
    Source,
    check_architecture,
    check_digest,
    check_end_tokens,
    check_family,
    check_range,
    check_tokenizer,
    digested_text,
    manifest_values,
    read_manifest,
)

FORMAT_VERSION = 2
MAX_RANKS = 4096
CONFIG_FILE = "config.json"


@dataclass(frozen=True, kw_only=True)
class TrtllmPrecisionRecord:
    """The formats in which matrices are stored, and the average bits per weight over all ranks."""

    name: str
    quant_algo: str | None
    dtype: str
    group_size: int | None
    average_bits_per_weight: float


@dataclass(frozen=True, kw_only=True)
class ParallelRecord:
    """How the engine is divided among ranks."""

    tp_size: int
    pp_size: int
    moe_tp_size: int
    moe_ep_size: int

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size


@dataclass(frozen=True, kw_only=True)
class GpuRecord:
    """The GPU that the engine was built on: its name and its compute capability, 90 for 9.0."""

    name: str | None
    sm: int | None


@dataclass(frozen=True, kw_only=True)
class TrtllmManifest:
    """The contents of engine.json. `max_sequence` is the limit on the tokens of one sequence, `max_num_tokens` on those
    of all sequences in a step; `kv_cache_fraction` is the share of the GPU's free memory that serving gives to keys and
    values; `flags` are the flags of trtllm-build; `verification` is the last comparison with the reference, if any."""

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
    # Whether the head's bias keeps the ids from tokenizer_size on, which stand for no text, from being sampled. If not,
    # serving has to mask them.
    head_masks_unused_ids: bool
    eos_token_ids: tuple[int, ...]
    tokenizer: TokenizerFacts
    source: Source
    routing: Mapping[str, Any] | None
    left_out_experts: tuple[int, ...]  # experts that no layer can choose; the others are renumbered without gaps
    libraries: Mapping[str, str]
    flags: tuple[str, ...]
    settings: Mapping[str, Any]  # everything except source and library that decides the engine
    files: Mapping[str, FileRecord]
    questions: tuple[Mapping[str, Any], ...] = ()  # what was asked of the rank files before the engine was built
    verification: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class TrtllmEngine:
    """A TensorRT-LLM engine directory whose manifest has been read and checked."""

    folder: Path
    manifest: TrtllmManifest

    @property
    def num_bytes(self) -> int:
        return sum(record.bytes for record in self.manifest.files.values())


def rank_engine(rank: int) -> str:
    """The name of the file that holds a rank's engine."""
    return f"rank{rank}.engine"


def write_trtllm_manifest(folder: Path, manifest: TrtllmManifest) -> None:
    """Write or replace engine.json by rename."""
    replace_file(folder / MANIFEST_FILE, digested_text(manifest_values(manifest)))


def open_trtllm_engine(folder: Path | str, check_digests: bool = True) -> TrtllmEngine:
    """Read the manifest and check the files against it. Raises EngineError listing every problem."""
    folder = Path(folder)
    where = f"opening the engine {folder}"
    raw = read_manifest(folder, where)
    backend, version = raw.get("backend"), raw.get("format_version")
    try:
        if backend != TRTLLM_BACKEND or type(version) is not int or version != FORMAT_VERSION:
            raise ValueError(
                f"backend {shown(backend, 40)} of format {shown(version, 40)}, expected {TRTLLM_BACKEND!r} of format "
                f"{FORMAT_VERSION}"
            )
        manifest = read_typed(TrtllmManifest, raw)
        _check_facts(manifest)
    except ValueError as error:
        raise EngineError(
            f"{where}: {MANIFEST_FILE} is not one that this moeship reads ({error}); build it again"
        ) from error
    problems = [f"{name}: {text}" for name, text in differing_files(folder, manifest.files, check_digests).items()]
    if problems:
        raise EngineError(f"{where}: its files are not those of the build; build it again:{listing(problems)}")
    return TrtllmEngine(folder=folder, manifest=manifest)


def _check_facts(manifest: TrtllmManifest) -> None:
    """Check the ranges and relations of values that types do not express. Raises ValueError."""
    facts = manifest.architecture
    check_architecture(facts)
    check_family(manifest.family, facts)
    check_tokenizer(manifest.tokenizer)
    left_out = manifest.left_out_experts
    if len(set(left_out)) != len(left_out) or not all(expert >= 0 for expert in left_out):
        raise ValueError(f"left_out_experts are {shown(left_out)}, expected the numbers of experts, each once")
    for name, value in dataclasses.asdict(manifest.parallel).items():
        check_range(f"parallel.{name}", value, 1, MAX_RANKS)
    check_range("ranks", manifest.parallel.world_size, 1, MAX_RANKS)
    parallel = manifest.parallel
    if parallel.moe_tp_size * parallel.moe_ep_size != parallel.tp_size:
        raise ValueError(f"parallel.moe_tp_size times moe_ep_size is not tp_size, {parallel.tp_size}")
    ranks = [rank_engine(rank) for rank in range(manifest.parallel.world_size)]
    check_file_records(manifest.files, (CONFIG_FILE, TOKENIZER_FILE, *ranks))
    if manifest.gpu.sm is not None:
        check_range("gpu.sm", manifest.gpu.sm, 1, 1000)
    if not 1 <= manifest.max_sequence <= facts.max_positions or not 1 <= manifest.max_batch <= MAX_DIMENSION:
        raise ValueError(
            f"max_sequence {shown(manifest.max_sequence)} or max_batch {shown(manifest.max_batch)} is out of range"
        )
    check_range("max_num_tokens", manifest.max_num_tokens, 1, MAX_DIMENSION)
    check_range("kv_cache_fraction", manifest.kv_cache_fraction, 0, 1)
    check_range("precision.average_bits_per_weight", manifest.precision.average_bits_per_weight, 0, 64)
    check_range("tokenizer_size", manifest.tokenizer_size, 1, facts.vocab_size)
    check_end_tokens(manifest.eos_token_ids, manifest.tokenizer_size)
    for name, digest in manifest.source.digests.items():
        check_digest(f"source.digests.{named(name, 80)}", digest)
