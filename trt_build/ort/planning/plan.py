"""Computes the plan of an engine from a prepared build: the bytes of its files, and the memory to make and run it.

    report = plan_engine(prepare_build(EngineOptions(checkpoint="DIR", precision="int4")))
    report.engine_bytes          # exact, every file counted
    report.roles["expert"].total_bytes

Nothing is written. Of the weights only the gates are read, because the manifest holds their diagnosis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from export.calibration.work import PRODUCTS_PER_S, Work
from export.checkpoint.digests import Run
from export.checkpoint.tensor_table import Role, Weights
from export.conversion.parts import PartRecord, Region, records_text
from export.conversion.workers import peak_memory
from export.conversion.writer import conversion_bytes
from export.exporter import DATA_FILE, RECORDS_FILE
from export.onnx_graph.converter import OnnxConverter
from export.onnx_graph.kv_scales import SCALES_FILE, scales_bytes
from export.onnx_graph.weights import WeightJob
from export.provider import FLOAT, ONNX_RUNTIME, OWN_KERNELS
from trt_build.engine_files import FileRecord
from trt_build.manifest import MANIFEST_FILE
from trt_build.ort.engine import UNDIGESTED_FILES, DroppedExperts, StoredRole, manifest_text
from trt_build.ort.memory import kv_bytes_per_token
from trt_build.ort.planning.genai_config import GENAI_FILE
from trt_build.ort.planning.prepare import PreparedBuild, stored_roles
from trt_build.source import source_record

_DIGEST = "0" * 64  # as long as any SHA-256
# Multiply-adds that one core does while an engine reads a prompt: with moeship's kernels, which multiply int8, and with
# ONNX Runtime's. Measured on phixtral-4x2_8 at int4 (61 s for 2,048 tokens), and as of export/calibration/work.py.
_PROMPT_PRODUCTS_PER_S = {OWN_KERNELS: 1.5e11, ONNX_RUNTIME: PRODUCTS_PER_S}


@dataclass(frozen=True, kw_only=True)
class RolePlan:
    """The weights of one role: their number, the bytes of their codes, scales and plain values, and the bytes of them
    that decoding one token reads."""

    num_weights: int = 0
    codes_bytes: int = 0
    scales_bytes: int = 0
    plain_bytes: int = 0
    bytes_per_token: int = 0

    @property
    def total_bytes(self) -> int:
        return self.codes_bytes + self.scales_bytes + self.plain_bytes

    def __add__(self, other: RolePlan) -> RolePlan:
        return RolePlan(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """The figures that `moeship plan` prints. `kv_bytes_per_token` is the size of the cache of one position;
    `stored` says how the weights of each role are stored; `conversion_bytes` is the peak resident memory of the build's
    process; `files` has the bytes of each file of the engine by name; `notes` are sentences about the engine. `gptq` is
    what GPTQ takes for all codes that it can solve, and `is_calibrated` whether this build solves codes; engine.json
    then also has the record of them, some kilobytes that are not in `files`. `dropped_experts` are those of
    `--drop-below`. `kv_cache` is the dtype that keys and values are counted in; `cache_seconds` is what finding the
    scales of int8 caches takes of one core, 0 without them."""

    family: str
    precision: str
    provider: str
    kernels: str
    max_sequence: int
    roles: Mapping[str, RolePlan]
    stored: Mapping[str, StoredRole]
    average_bits_per_weight: float
    files: Mapping[str, int]
    source_bytes: int
    conversion_bytes: int
    kv_bytes_per_token: int
    notes: tuple[str, ...]
    gptq: Work
    is_calibrated: bool
    dropped_experts: DroppedExperts | None = None
    kv_cache: str = FLOAT
    cache_seconds: float = 0.0

    @property
    def engine_bytes(self) -> int:
        return sum(self.files.values())

    @property
    def resident_bytes(self) -> int:
        """Bytes of the weights file, gaps for alignment included, which serving keeps in memory."""
        return self.files[DATA_FILE]

    @property
    def weights_bytes(self) -> int:
        return sum(role.total_bytes for role in self.roles.values())

    @property
    def weights_bytes_per_token(self) -> int:
        """Bytes of weights that decoding one token of one sequence reads."""
        return sum(role.bytes_per_token for role in self.roles.values())

    @property
    def sequence_bytes(self) -> int:
        """Bytes of the keys and values of one sequence of max_sequence tokens."""
        return self.kv_bytes_per_token * self.max_sequence

    def bytes_per_token(self, context: int) -> int:
        """Bytes that decoding one token reads after `context` other tokens: weights, keys and values."""
        return self.weights_bytes_per_token + self.kv_bytes_per_token * context

    def sequences_in(self, memory_bytes: int) -> int:
        """Number of sequences of max_sequence tokens that fit beside the weights; negative if the weights do not."""
        return (memory_bytes - self.resident_bytes) // self.sequence_bytes

    def tokens_in(self, memory_bytes: int) -> int:
        """Number of tokens of one sequence that fit beside the weights; 0 or negative if the weights do not fit."""
        return (memory_bytes - self.resident_bytes) // self.kv_bytes_per_token

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        roles = {
            name: {**dataclasses.asdict(role), "total_bytes": role.total_bytes} for name, role in self.roles.items()
        }
        return {
            **dataclasses.asdict(self),
            "roles": roles,
            "engine_bytes": self.engine_bytes,
            "resident_bytes": self.resident_bytes,
            "weights_bytes": self.weights_bytes,
            "weights_bytes_per_token": self.weights_bytes_per_token,
            "bytes_per_token_at_end": self.bytes_per_token(self.max_sequence - 1),
        }


def plan_engine(build: PreparedBuild) -> EnginePlan:
    """Compute the plan of a prepared build. Raises CheckpointError if the gates cannot be read."""
    export, weights = build.export, build.model.weights
    roles: dict[str, RolePlan] = {}
    for job in export.jobs:
        share = _share_per_token(job, weights, build.model.architecture.experts_per_token)
        roles[str(job.role)] = roles.get(str(job.role), RolePlan()) + _role_plan(job, weights, share)
    total = sum((role for role in roles.values()), RolePlan())
    files = _files(build)
    converter = OnnxConverter(weights=weights, data=Path(), placement=export.placement)
    return EnginePlan(
        family=build.model.family.name,
        precision=build.recipe.name,
        provider=build.provider.name,
        kernels=build.provider.kernels,
        max_sequence=build.max_sequence,
        roles=roles,
        stored=stored_roles(export.jobs, weights),
        average_bits_per_weight=8 * total.total_bytes / total.num_weights,
        files=files,
        source_bytes=sum(stored.num_bytes for stored in build.checkpoint.tensors.values()),
        conversion_bytes=max(
            conversion_bytes(converter, export.jobs), peak_memory() + build.work().memory if build.wanted_codes() else 0
        ),
        kv_bytes_per_token=kv_bytes_per_token(
            build.model.architecture, build.provider, build.options.kv_cache, build.provider.cache_scales
        ),
        notes=build.notes,
        gptq=build.work(),
        is_calibrated=bool(build.wanted_codes()),
        dropped_experts=build.dropped,
        kv_cache=build.options.kv_cache,
        cache_seconds=_cache_seconds(build),
    )


def _cache_seconds(build: PreparedBuild) -> float:
    text, weights, facts = build.cache_text(), build.model.weights, build.model.architecture
    if text is None:
        return 0.0
    products = sum(
        job.num_weights(weights.table[job.source]) * _share_per_token(job, weights, facts.experts_per_token)
        for job in build.export.jobs
        if job.role is not Role.EMBEDDING
    )
    return text.num_tokens * products / _PROMPT_PRODUCTS_PER_S[build.provider.kernels]


def _share_per_token(job: WeightJob, weights: Weights, experts_per_token: int) -> float:
    """The fraction of a job's bytes that decoding one token reads: one row of the embedding, K of the experts that are
    stored, all of anything else."""
    spec = weights.table[job.source]
    if job.role is Role.EMBEDDING:
        return 1 / spec.shape[0]
    if spec.stacks_experts:
        return experts_per_token / job.num_groups(spec)
    return 1.0


def _role_plan(job: WeightJob, weights: Weights, share: float) -> RolePlan:
    def bytes_of(ending: str) -> int:
        return sum(output.num_bytes for output in job.outputs if output.name.endswith(ending))

    total = sum(output.num_bytes for output in job.outputs)
    codes, scales = bytes_of(".codes"), bytes_of(".scales")
    return RolePlan(
        num_weights=job.num_weights(weights.table[job.source]),
        codes_bytes=codes,
        scales_bytes=scales,
        plain_bytes=total - codes - scales,
        bytes_per_token=round(total * share),
    )


def _files(build: PreparedBuild) -> dict[str, int]:
    """The bytes of every file of the engine by name. Texts are composed with placeholder digests of the right
    length."""
    export, checkpoint = build.export, build.checkpoint
    sizes = {
        **{name: graph.ByteSize() for name, graph in export.graphs.items()},
        DATA_FILE: export.placement.total_bytes,
        RECORDS_FILE: len(records_text(_records(build)).encode()),
        GENAI_FILE: len(build.genai_text().encode()),
        **({} if build.cache_text() is None else {SCALES_FILE: scales_bytes(build.model.architecture)}),
        **build.settings.sizes(),
    }
    records = {
        name: FileRecord(bytes=size, sha256=None if name in UNDIGESTED_FILES else _DIGEST)
        for name, size in sorted(sizes.items())
    }
    files = [*checkpoint.settings_files(), *checkpoint.shards]
    digests = dict.fromkeys((path.name for path in files), _DIGEST)
    manifest = build.manifest(source_record(checkpoint, digests), records, calibration=build.planned_calibration())
    return {**sizes, MANIFEST_FILE: len(manifest_text(manifest).encode())}


def _records(build: PreparedBuild) -> list[PartRecord]:
    """The records of weights.jsonl, with placeholders for the digests."""
    stored, weights = build.checkpoint.stored, build.model.weights
    return [
        PartRecord(
            part=job.source,
            sources={name: tuple(Run(bytes=end - start, sha256=_DIGEST)
                                 for start, end in pairwise([*starts, stored[name].num_bytes]))
                     for name, starts in weights.run_starts(job.source).items()},
            regions=tuple(Region(name=name, offset=offset, bytes=size, sha256=_DIGEST)
                          for name, offset, size in build.export.placement.regions(job)),
        )
        for job in build.export.jobs
    ]  # fmt: skip
