"""The facts of an engine that packaging needs, the same for both backends: reads them from the engine's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from export.checkpoint.file_table import is_text_file
from export.conversion.parts import Region
from trt_build.engine_files import FileRecord
from trt_build.manifest import MANIFEST_FILE, TRTLLM_BACKEND, engine_backend, failed_verification


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """The facts of one engine."""

    folder: Path
    backend: str  # as engine.json names it
    provider: str  # "cpu" or "cuda"
    max_sequence: int  # tokens of prompt and output together
    max_batch: int
    end_token_ids: tuple[int, ...]
    num_ids: int  # ids that the engine chooses from; more than the tokenizer has where the engine does not mask them
    records: Mapping[str, FileRecord]  # of its files except the manifest
    num_bytes: int
    max_num_tokens: int | None = None  # of all requests in one step; None where prompts are always read in parts
    world_size: int = 1  # ranks that run the engine
    paged_context_fmha: bool = False  # whether the engine can read the cache of a prompt in parts
    has_own_kernels: bool = False  # whether moeship's CPU kernels multiply its matrices
    has_int8_cache: bool = False  # whether it can be served with keys and values in int8
    # planned share of the GPU memory that the weights leave; None on ONNX Runtime
    kv_cache_fraction: float | None = None
    failed_verification: str | None = None  # what the last verification found wrong
    # Files whose digests are in another file of the engine: name -> reader of the file's regions in an engine's folder
    read_regions: Mapping[str, Callable[[Path], Sequence[Region]]] = field(default_factory=dict)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all files of the engine, including its manifest."""
        return (*self.records, MANIFEST_FILE)

    @property
    def runs_on_tensorrt_llm(self) -> bool:
        return self.backend == TRTLLM_BACKEND

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """The names of the tokenizer's files, including settings and chat templates."""
        return tuple(name for name in self.files if is_text_file(name))


def read_engine_facts(folder: Path, check_digests: bool = True) -> EngineFacts:
    """Open an engine of either backend and, if `check_digests`, check every digest. Raises EngineError."""
    read = _of_tensorrt_llm if engine_backend(folder) == TRTLLM_BACKEND else _of_onnxruntime
    return read(folder, check_digests)


def _of_onnxruntime(folder: Path, check_digests: bool) -> EngineFacts:
    from trt_build.ort.engine import UNDIGESTED_FILES, open_engine, weight_regions

    engine = open_engine(folder, check_digests)
    manifest = engine.manifest
    return EngineFacts(
        folder=engine.folder,
        backend=manifest.backend,
        provider=manifest.provider,
        max_sequence=manifest.max_sequence,
        max_batch=manifest.max_batch,
        end_token_ids=manifest.eos_token_ids,
        num_ids=manifest.tokenizer_size,
        records=manifest.files,
        num_bytes=engine.num_bytes,
        has_own_kernels=engine.has_own_kernels,
        has_int8_cache=manifest.kv_cache is not None,
        failed_verification=failed_verification(manifest.verification),
        read_regions={name: partial(weight_regions, num_bytes=manifest.files[name].bytes) for name in UNDIGESTED_FILES},
    )


def _of_tensorrt_llm(folder: Path, check_digests: bool) -> EngineFacts:
    from trt_build.trtllm.engine import open_trtllm_engine

    engine = open_trtllm_engine(folder, check_digests)
    manifest = engine.manifest
    return EngineFacts(
        folder=engine.folder,
        backend=manifest.backend,
        provider="cuda",
        max_sequence=manifest.max_sequence,
        max_batch=manifest.max_batch,
        end_token_ids=manifest.eos_token_ids,
        num_ids=manifest.tokenizer_size if manifest.head_masks_unused_ids else manifest.architecture.vocab_size,
        records=manifest.files,
        num_bytes=engine.num_bytes,
        max_num_tokens=manifest.max_num_tokens,
        world_size=manifest.parallel.world_size,
        paged_context_fmha=manifest.use_paged_context_fmha,
        kv_cache_fraction=manifest.kv_cache_fraction,
        failed_verification=failed_verification(manifest.verification),
    )
