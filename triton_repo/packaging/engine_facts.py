"""What packaging needs to know of an engine, whichever backend runs it: an engine's folder in, its facts out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from export.checkpoint_files import is_text_file
from trt_build.engine import FileRecord, open_engine
from trt_build.manifest import MANIFEST_FILE
from trt_build.trtllm.engine import TRTLLM_BACKEND, engine_backend, open_trtllm_engine


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """`num_ids`: how many ids it
    chooses from, those past the tokenizer's size included where it does not mask them itself. `max_num_tokens`: of all
    requests in a step, None where prompts are read in parts anyway; `world_size`: ranks that run it;
    `paged_context_fmha`: it can read a prompt's cache in parts; `kv_cache_fraction`: the share of the GPU memory left
    beside the weights that it was planned with, None where the backend does not ask.
    """

    folder: Path
    backend: str  # engine.json's word
    provider: str  # "cpu" or "cuda"
    max_sequence: int  # tokens, prompt and output together
    max_batch: int
    end_token_ids: tuple[int, ...]
    num_ids: int
    records: Mapping[str, FileRecord]  # of its files, the manifest aside
    num_bytes: int
    max_num_tokens: int | None = None
    world_size: int = 1
    paged_context_fmha: bool = False
    kv_cache_fraction: float | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """All of the folder's that belong to the engine, its manifest among them."""
        return (*self.records, MANIFEST_FILE)

    @property
    def runs_on_tensorrt_llm(self) -> bool:
        return self.backend == TRTLLM_BACKEND

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """The tokenizer, and the settings and chat templates that travel with it."""
        return tuple(name for name in self.files if is_text_file(name))


def read_engine_facts(folder: Path, check_digests: bool = True) -> EngineFacts:
    """Open an engine of either backend and check every digest, unless told otherwise. Raises EngineError."""
    read = _of_tensorrt_llm if engine_backend(folder) == TRTLLM_BACKEND else _of_onnxruntime
    return read(folder, check_digests)


def _of_onnxruntime(folder: Path, check_digests: bool) -> EngineFacts:
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
    )


def _of_tensorrt_llm(folder: Path, check_digests: bool) -> EngineFacts:
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
    )
