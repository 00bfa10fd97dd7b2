"""Writes a TensorRT-LLM checkpoint of a model: config.json, rank{R}.safetensors, the tokenizer, and a manifest.

    model = read_model(open_checkpoint("mlabonne/phixtral-4x2_8"))
    write_checkpoint(model, CheckpointOptions(precision="int4"), Path("trtllm-checkpoint"))

Worker processes read each row of the tensor table once, in chunks, and write every rank's share of a chunk to its place
in that rank's file. An interrupted run is resumed by the same call. The folder appears by rename when it is complete.
Format: tensorrt_llm/models/modeling_utils.py, docs/source/legacy/architecture/checkpoint.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.checkpoint.digests import Run, source_digests
from export.checkpoint.folder import read_json
from export.checkpoint.shard_writer import header_of
from export.checkpoint.tensor_table import Weights
from export.conversion.sources import check_resumed, check_unchanged, source_files
from export.conversion.writer import Progress, conversion_bytes, write_parts
from export.errors import ConfigError, ExportError, listing
from export.families import Model
from export.files.resume import Fingerprint, SourceFile, partial_folder, refuse_made
from export.quantize.solved import SolvedCodes
from export.tokenizer.surplus import model_settings
from export.trtllm.carry import kept_grid
from export.trtllm.config import checkpoint_config
from export.trtllm.converter import RankConverter, rank_file
from export.trtllm.layout import (
    DENSE,
    QKV,
    SHARED_FC,
    SHARED_PROJ,
    Form,
    Layout,
    LayoutOptions,
    TensorJob,
    matrix_shapes,
    plan_layout,
)
from export.trtllm.packing import TILE, interleaves_columns
from export.trtllm.parallel import Parallelism
from export.trtllm.precision import (
    GROUP_SIZES,
    TrtllmPrecision,
    architecture_problems,
    float_type,
    trtllm_precision,
)

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
MANIFEST_FILE = "checkpoint.json"
FORMAT_VERSION = 1
DEFAULT_SM = 80  # compute capability; its packed layout is the one of every supported GPU except SM 90
_UNLIKE_SM = 90


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Options of a TensorRT-LLM checkpoint.

    `dtype` is the dtype of tensors that are not quantised (None: float16). `group_size` is for the group-wise
    precisions (None: the first of GROUP_SIZES that fits). `sm` is the compute capability of the GPU whose layout packed
    matrices have. With `plain` the checkpoint holds floats, and TensorRT-LLM quantises them when it builds the engine.
    Token ids from `mask_from` on stand for no text. `left_out` lists experts that no layer can choose
    (export/routing.py); they are not written. `calibration` says over which text codes are solved, as plain JSON values
    (None: they are not).
    """

    precision: str = "int4"
    dtype: str | None = None
    parallel: Parallelism = field(default_factory=Parallelism)
    group_size: int | None = None
    sm: int = DEFAULT_SM
    plain: bool = False
    mask_from: int | None = None
    left_out: tuple[int, ...] = ()
    calibration: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """A TensorRT-LLM checkpoint that is planned: the place of every byte in every rank file is known."""

    options: CheckpointOptions
    model: Model
    layout: Layout
    config: Mapping[str, Any]
    headers: Mapping[int, bytes]

    @property
    def rank_bytes(self) -> dict[int, int]:
        """The size of each rank's file in bytes."""
        return {
            rank: len(header) + sum(tensor.num_bytes for tensor in self.layout.tensors(rank))
            for rank, header in self.headers.items()
        }

    @property
    def groupwise(self) -> tuple[TensorJob, ...]:
        """The jobs whose codes can be solved: those of matrices with a scale for each group that do not keep the
        checkpoint's own codes."""
        return tuple(
            job
            for job in self.layout.jobs
            if job.form in (Form.GROUPS, Form.PAIRS) and kept_grid(self.model.weights, job) is None
        )

    def converter(self, folder: Path, solved: SolvedCodes | None = None) -> RankConverter:
        """The converter that fills rank files under `folder`, with the codes that were solved."""
        offsets: dict[int, dict[str, int]] = {}
        for rank, header in self.headers.items():
            position = len(header)
            offsets[rank] = {}
            for tensor in self.layout.tensors(rank):
                offsets[rank][tensor.name] = position
                position += tensor.num_bytes
        return RankConverter(
            weights=self.model.weights, folder=folder, offsets=offsets, sizes=self.rank_bytes, solved=solved
        )

    def conversion_bytes(self) -> int:
        """Peak resident memory of writing the checkpoint in bytes, the sum over all processes."""
        return conversion_bytes(self.converter(Path()), self.layout.jobs)


def plan_checkpoint(model: Model, options: CheckpointOptions) -> CheckpointPlan:
    """Plan a TensorRT-LLM checkpoint; reads no weights. Raises ExportError that lists all problems, and
    QuantizationError for an unknown precision or dtype."""
    precision = trtllm_precision(options.precision)
    dtype = float_type(precision, options.dtype)
    what = f"laying out a TensorRT-LLM checkpoint of {model.weights.checkpoint.identity}"
    experts = tuple(e for e in range(model.architecture.num_experts) if e not in options.left_out)
    facts = dataclasses.replace(model.architecture, num_experts=len(experts))
    network = model.family.trtllm_network()
    problems = network.problems(facts) + options.parallel.problems(facts, pipeline=network.pipeline)
    problems += architecture_problems(precision, options.sm, dtype)
    if precision.grouped and facts.shared_ffn_size is not None:
        problems.append(
            f"{precision.name}: when TensorRT-LLM quantises in groups it makes a mixture without the expert beside the "
            "others of one that has it (tensorrt_llm/quantization/quantize.py); build int4, int8 or fp16"
        )
    if options.plain and (precision.grouped or not precision.bits):
        problems.append(f"plain weights are for int8 and int4, which the library quantises; found {precision.name}")
    if options.group_size is not None and not precision.grouped:
        problems.append(f"a group size is for int4_gptq and int4_awq; found {precision.name}")
    if problems:
        raise ExportError(f"{what}:{listing(problems)}")
    layout_options = LayoutOptions(
        precision=precision,
        dtype=dtype,
        parallel=options.parallel,
        group_size=options.group_size or GROUP_SIZES[0],
        sm=options.sm,
        plain=options.plain,
        mask_from=options.mask_from,
        experts=experts,
    )
    layout = plan_layout(model, layout_options)
    if precision.bits:
        group_size, problems = _fit(layout, options, grouped=precision.grouped)
        problems += _lost_biases(layout, precision, options.parallel)
        if problems:
            raise ExportError(f"{what} in {precision.name}:{listing(problems)}")
        if group_size != layout_options.group_size:
            layout_options = dataclasses.replace(layout_options, group_size=group_size)
            layout = plan_layout(model, layout_options)
    return CheckpointPlan(
        options=options,
        model=model,
        layout=layout,
        config=checkpoint_config(model, layout_options),
        headers={rank: header_of(layout.tensors(rank)) for rank in range(options.parallel.world_size)},
    )


@dataclass(frozen=True)
class _Side:
    """The inputs or the outputs of a rank's share of a quantised matrix. `number` is how many features there are.

    TensorRT-LLM needs a multiple of a unit: TILE, and also the group size if `grouped` is set. `times` multiplies the
    unit: a matrix outside the experts is cut along one side only, and the library rounds the other side up to a
    multiple of tp_size times the unit, as if it were cut too (quantization/layers.py).
    """

    module: str
    side: str
    number: int
    times: int
    grouped: bool


def _sides(layout: Layout, tp_size: int) -> Iterator[_Side]:
    for module, rows, width in matrix_shapes(layout):
        of_rows, of_columns = module in (DENSE, SHARED_PROJ), module in (QKV, SHARED_FC)
        yield _Side(module, "outputs", rows, tp_size if of_rows else 1, of_rows or of_columns)
        yield _Side(module, "inputs", width, tp_size if of_columns else 1, True)


def _fit(layout: Layout, options: CheckpointOptions, *, grouped: bool) -> tuple[int, list[str]]:
    """Choose the group size of all matrices; returns it with the problems: the matrices that the packed layout or the
    group size does not fit."""
    sides, asked = list(_sides(layout, options.parallel.tp_size)), options.group_size
    problems = [
        f"{side.module} of a rank has {side.number} {side.side}, expected a multiple of {TILE * side.times}, which the "
        "library's packed layout needs; share the model among fewer ranks, or build fp16"
        for side in sides
        if side.number % (TILE * side.times)
    ]
    if not grouped or problems:
        return GROUP_SIZES[0], problems
    if asked is not None and asked not in GROUP_SIZES:
        return asked, [f"the group size is {asked}, expected {' or '.join(map(str, GROUP_SIZES))}, the library's own"]
    features = math.gcd(*(side.number // side.times for side in sides if side.grouped))
    allowed = GROUP_SIZES if asked is None else (asked,)
    for size in allowed:
        if features % size == 0:
            return size, []
    size = allowed[-1]
    narrow = ", ".join(
        f"{side.module} {side.number} {side.side}"
        for side in sides
        if side.grouped and side.number % (size * side.times)
    )
    return size, [f"groups of {size} do not divide the features of a rank ({narrow}); use fewer ranks"]


def _lost_biases(layout: Layout, precision: TrtllmPrecision, parallel: Parallelism) -> list[str]:
    """The problem that TensorRT-LLM loses biases of experts, if this checkpoint has it.

    When the library loads W4A16_AWQ, it clears the biases of the experts' second matrices on every rank except the
    first (tensorrt_llm/models/modeling_utils.py). With expert parallelism the other ranks hold other experts, whose
    biases would be lost.
    """
    biased = any(tensor.name.endswith("mlp.proj.bias") for tensor in layout.tensors(0))
    if precision.quant_algo != "W4A16_AWQ" or parallel.moe_ep == 1 or not biased:
        return []
    return [
        f"moe_ep_size is {parallel.moe_ep}: when TensorRT-LLM loads {precision.quant_algo} it clears the biases of the "
        "experts that are not on the first rank; use moe_ep_size 1, or int4_gptq"
    ]


def write_checkpoint(
    model: Model,
    options: CheckpointOptions,
    output: Path,
    progress: Callable[[Progress], None] | None = None,
    solved: SolvedCodes | None = None,
    record: Mapping[str, Any] | None = None,
) -> CheckpointPlan:
    """Write a TensorRT-LLM checkpoint to the folder `output`; returns its plan. `progress` is called a few times a
    second. Codes that were solved are carried over; its manifest keeps the `record` of them.

    Raises ExportError and QuantizationError before anything is written, OutputError if the output exists or the disk
    fails, and CheckpointError if the source is damaged or changes while it is read.
    """
    what = "the TensorRT-LLM checkpoint"
    refuse_made(output, what)
    plan = plan_checkpoint(model, options)
    checkpoint = model.weights.checkpoint
    settings = model_settings(model)
    settings_of_run = {**checkpoint_settings(plan), "solved codes": None if solved is None else solved.digest}
    fingerprint = Fingerprint(settings=settings_of_run, sources=source_files(checkpoint))
    keep = tuple(rank_file(rank) for rank in plan.headers)
    with partial_folder(output, what, fingerprint, keep, sum(plan.rank_bytes.values())) as folder:
        check_resumed(folder, checkpoint, f"{what} {output}")
        records = write_parts(
            plan.converter(folder.content, solved), plan.layout.jobs, folder, progress or (lambda _: None)
        )
        for rank, header in plan.headers.items():
            with (folder.content / rank_file(rank)).open("r+b") as file:
                file.write(header)
        (folder.content / CONFIG_FILE).write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
        settings.write(folder.content)
        runs = {name: found for record in records for name, found in record.sources.items()}
        manifest = {
            "format_version": FORMAT_VERSION,
            "checkpoint": checkpoint.identity,
            "revision": checkpoint.revision,
            "settings": checkpoint_settings(plan),
            **({} if record is None else {"calibration": dict(record)}),
            "sources": source_digests(checkpoint, runs, read=False),
            "read_from": _states(fingerprint.sources),
            "files": {rank_file(rank): num_bytes for rank, num_bytes in plan.rank_bytes.items()},
        }
        check_unchanged(checkpoint, fingerprint.sources, records)
        (folder.content / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    logger.debug("%s: %d ranks, %d bytes", output, len(plan.headers), sum(plan.rank_bytes.values()))
    return plan


def checkpoint_settings(plan: CheckpointPlan) -> dict[str, Any]:
    """Everything but the source files that decides the bytes of the checkpoint, as plain JSON values."""
    options = {**dataclasses.asdict(plan.options), "parallel": plan.options.parallel.mapping()}
    sm = options.pop("sm")
    packed_for = f"every GPU but SM {_UNLIKE_SM}" if interleaves_columns(sm, experts=False) else f"SM {_UNLIKE_SM}"
    layout = {
        "packed for": packed_for if plan.layout.is_packed else None,
        "layout": hashlib.sha256(repr(plan.layout).encode()).hexdigest(),
    }
    return {**options, "format version": FORMAT_VERSION, **layout, "config": dict(plan.config)}


def options_of(settings: Mapping[str, Any]) -> CheckpointOptions:
    """The options of a checkpoint with these `checkpoint_settings`. Raises ExportError for values that are none."""
    try:
        mapping = {
            name: int(settings["parallel"][name]) for name in ("tp_size", "pp_size", "moe_tp_size", "moe_ep_size")
        }
        if mapping["moe_ep_size"] == 1:  # the default, which a dense model must have
            mapping = {name: mapping[name] for name in ("tp_size", "pp_size")}
        return CheckpointOptions(
            precision=str(settings["precision"]),
            dtype=settings["dtype"],
            parallel=Parallelism(**mapping),
            group_size=settings["group_size"],
            sm=_UNLIKE_SM if settings["packed for"] == f"SM {_UNLIKE_SM}" else DEFAULT_SM,
            plain=bool(settings["plain"]),
            mask_from=settings["mask_from"],
            left_out=tuple(settings["left_out"]),
            calibration=settings.get("calibration"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(f"reading the settings of a TensorRT-LLM checkpoint: {error!r}; write it again") from error


def _states(sources: Mapping[str, SourceFile]) -> dict[str, Any]:
    """Size and SHA-256 of each source file (of a shard: of its header), which do not depend on the folder."""
    return {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in sorted(sources.items())}


def calibration_of(folder: Path) -> Mapping[str, Any] | None:
    """What the manifest of a checkpoint says of solved codes; None if none were. Raises ConfigError for a manifest that
    cannot be read."""
    found = read_json(folder / MANIFEST_FILE, "the checkpoint's manifest").get("calibration")
    return found if isinstance(found, dict) else None


def require_written(plan: CheckpointPlan, folder: Path) -> Mapping[str, str]:
    """Check that `folder` is the checkpoint that the plan would write; returns the digests of its source files.

    Raises ExportError that says what differs and what to do.
    """
    where = f"reusing the TensorRT-LLM checkpoint {folder}"
    remedy = "name another with --trtllm-checkpoint, or remove it to have it written again"
    try:
        manifest = read_json(folder / MANIFEST_FILE, "the checkpoint's manifest")
    except ConfigError as error:
        raise ExportError(f"{where}: {error}; {remedy}") from error
    read_from = _states(source_files(plan.model.weights.checkpoint))
    problems = [
        *(f"its setting {problem}" for problem in differing_settings(manifest.get("settings"), plan)),
        *(f"its source file {problem}" for problem in _differences(manifest.get("read_from"), read_from)),
    ]
    for rank, num_bytes in plan.rank_bytes.items():
        path = folder / rank_file(rank)
        size = path.stat().st_size if path.is_file() else None
        if size != num_bytes:
            problems.append(f"{path.name} has {size} bytes, expected {num_bytes}")
    sources: Mapping[str, str] = manifest.get("sources") or {}
    if not problems:
        problems += [f"its source file {problem}" for problem in changed_sources(plan.model.weights, sources)]
    if problems:
        raise ExportError(f"{where}: it was made from something else; {remedy}:{listing(problems)}")
    return sources


def differing_settings(found: object, plan: CheckpointPlan) -> list[str]:
    """One line for each setting in which a written checkpoint, with the settings `found`, differs from the plan."""
    problems = _differences(found, checkpoint_settings(plan))
    # The config and the digest of the layout follow from the other settings, and tell a user little.
    told = [text for text in problems if not text.startswith(("config is", "layout is"))]
    return told or problems


def changed_sources(weights: Weights, digests: Mapping[str, str]) -> list[str]:
    """Names of the source files whose digests are not `digests`. All of them are read: neither their sizes nor their
    dates tell two checkpoints of one shape apart."""
    checkpoint = weights.checkpoint
    runs: dict[str, tuple[Run, ...]] = {}
    for row in weights.table:
        for name, starts in weights.run_starts(row).items():
            ends = [*starts[1:], checkpoint.stored[name].num_bytes]
            runs[name] = tuple(Run(bytes=end - start, sha256="") for start, end in zip(starts, ends, strict=True))
    return _differences(digests, source_digests(checkpoint, runs))


def _differences(found: object, expected: Mapping[str, Any]) -> list[str]:
    """One line for each key whose value differs between two JSON objects."""
    kept: dict[str, Any] = found if isinstance(found, dict) else {}
    wanted = json.loads(json.dumps(expected))
    return [
        f"{key} is {_short(kept.get(key))}, expected {_short(wanted.get(key))}"
        for key in sorted({*kept, *wanted})
        if kept.get(key) != wanted.get(key)
    ]


def _short(value: object) -> str:
    return "absent" if value is None else f"{value}"[:120]
