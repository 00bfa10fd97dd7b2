"""Builds a TensorRT-LLM engine directory from a checkpoint in four stages: plan, checkpoint, engine, verify.

    build_trtllm(TrtllmOptions(checkpoint="mlabonne/phixtral-4x2_8", output=Path("engine"), precision="int4"))

The plan stage refuses what cannot be built and writes nothing. The checkpoint stage writes its folder beside the
output, the engine stage the engine directory, and the verify stage its result into engine.json. A later run skips the
stages whose output is there. Without the library or a GPU the checkpoint is written, and LibraryMissing says how to
finish the build.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from export.calibration.store import CalibrationText
from export.conversion.writer import Progress
from export.errors import OutputError, listing
from export.files.output import refuse_existing, staged_directory
from export.quantize.recipe import GPTQ
from export.routing import RoutingReport, left_out_of_every_layer
from export.trtllm.checkpoint import (
    CheckpointPlan,
    changed_sources,
    checkpoint_settings,
    differing_settings,
    plan_checkpoint,
    require_written,
    write_checkpoint,
)
from trt_build.calibration import calibration_record, solved, text_record
from trt_build.comparison.answers import Answer
from trt_build.comparison.evaluation_text import own_text
from trt_build.comparison.parity import Verification
from trt_build.engine_files import record_files
from trt_build.errors import EngineError, VerificationFailed
from trt_build.machine.readings import LIBRARY, Machine, read_machine, release
from trt_build.manifest import TRTLLM_BACKEND, libraries
from trt_build.source import SourceModel, open_source, source_record
from trt_build.trtllm.engine import (
    CONFIG_FILE,
    FORMAT_VERSION,
    GpuRecord,
    ParallelRecord,
    TrtllmEngine,
    TrtllmManifest,
    TrtllmPrecisionRecord,
    open_trtllm_engine,
    rank_engine,
    write_trtllm_manifest,
)
from trt_build.trtllm.library import Library, find_library, library_missing, run_build
from trt_build.trtllm.options import TrtllmOptions, check_options, has_biased_head
from trt_build.trtllm.plan import TrtllmPlan, plan_trtllm, solvable
from trt_build.trtllm.questions.weights import RankFolder, ask_about_weights
from trt_build.trtllm.verify import record_trtllm, verify_trtllm
from trt_build.trtllm_flags import STAGES

logger = logging.getLogger(__name__)

_TIMING_CACHE = "model.cache"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of the stages of a run; None for a stage that was not run."""

    plan: TrtllmPlan
    checkpoint: Path | None = None
    engine: TrtllmEngine | None = None
    verification: Verification | None = None


@dataclass(frozen=True, kw_only=True)
class _Build:
    """A build whose options are checked and whose checkpoint and engine are planned."""

    options: TrtllmOptions
    source: SourceModel
    machine: Machine
    checkpoint: CheckpointPlan
    routing: RoutingReport | None
    plan: TrtllmPlan
    text: CalibrationText | None  # over which codes are solved

    @property
    def ranks(self) -> RankFolder:
        folder = self.options.checkpoint_folder
        return RankFolder(plan=self.checkpoint, folder=folder, max_sequence=self.source.max_sequence)

    def reaches(self, stage: str) -> bool:
        return STAGES.index(self.options.until) >= STAGES.index(stage)

    def flags(self) -> list[str]:
        """The flags of trtllm-build, except those that name folders."""
        options, network = self.options, self.source.model.family.trtllm_network()
        own_class = list[str]()
        if network.module is not None:
            own_class += _words("model_cls_file", Path(__file__).with_name(f"{network.module}.py"))
            own_class += _words("model_cls_name", network.architecture)
        return [
            *own_class,
            *_words("max_batch_size", options.max_batch_size),
            *_words("max_num_tokens", options.max_num_tokens),
            *_words("max_seq_len", self.source.max_sequence),
            *_words("max_input_len", self.source.max_sequence - 1),  # the library's default is 1024
            *_words("max_beam_width", 1),
            *_words("kv_cache_type", "paged"),
            *_words("gpt_attention_plugin", "auto"),
            *_words("gemm_plugin", "auto"),
            *_words("moe_plugin", "auto"),
            *_words("nccl_plugin", "auto"),
            *_words("remove_input_padding", "enable"),
            *_words("context_fmha", "enable"),
            *_words("use_paged_context_fmha", "enable"),  # required for chunked context and cache reuse
            *_words("workers", options.workers),
        ]

    def settings(self) -> dict[str, Any]:
        """Everything except the source and the library that decides the engine, as plain JSON values."""
        flags = [word for word in self.flags() if not word.endswith(".py")]
        return {
            "checkpoint": checkpoint_settings(self.checkpoint),
            "flags": flags,
            "sm": self.options.sm(self.machine),
            "kv_cache_fraction": self.options.kv_cache_fraction,
        }


def build_trtllm(options: TrtllmOptions, progress: Callable[[Progress], None] | None = None) -> Outcome:
    """Run the stages up to `options.until`; stages whose output an earlier run left are skipped.

    Raises EngineError and ExportError for options that are refused before any work, OutputError if an output path is
    taken, and, after the checkpoint is written, VerificationFailed if it is not the source's, and LibraryMissing if the
    engine cannot be built here. A failed comparison of the engine raises nothing: the outcome holds its result.
    """
    build = _prepare(options)
    if not build.reaches("checkpoint"):
        return Outcome(plan=build.plan)
    engine = _existing_engine(build) if build.reaches("engine") else None
    if engine is None:
        digests = _checkpoint(build, progress)
        questions = () if options.unchecked else (_ask_about_weights(build),)
        engine = _build_engine(build, digests, questions) if build.reaches("engine") else None
    verification = None
    if engine is not None and build.reaches("verify"):
        python, text = _library(build).python, own_text()
        verification = verify_trtllm(
            engine,
            build.source,
            build.ranks,
            python,
            text,
            options.verify_tokens,
            logger.info,
            again=False,
        )
        record_trtllm(engine, verification)
    folder = options.checkpoint_folder  # the user may have removed it after the engine was built
    return Outcome(
        plan=build.plan,
        checkpoint=folder if folder.is_dir() else None,
        engine=engine,
        verification=verification,
    )


def _prepare(options: TrtllmOptions) -> _Build:
    """Check the options and plan checkpoint and engine, before a weight is read. Raises for what cannot be built."""
    source, machine = open_source(options.checkpoint, options.experts_per_token, options.max_seq_len), read_machine()
    check_options(options, source.model, machine)
    routing = source.model.routing_report()
    left_out = () if options.keep_all_experts else left_out_of_every_layer(routing, source.model.architecture.router)
    text = None
    if options.calibration.chosen() == GPTQ:
        text = options.calibration.text(source.tokenizer, source.model.architecture.max_positions)
    said = None if text is None else text_record(text)
    wanted = options.checkpoint_options(machine, source.tokenizer.size, left_out, said)
    checkpoint = plan_checkpoint(source.model, wanted)
    plan = plan_trtllm(checkpoint, options, source.max_sequence, routing)
    for note in plan.notes:
        logger.warning("%s", note)
    return _Build(
        options=options, source=source, machine=machine, checkpoint=checkpoint, routing=routing, plan=plan, text=text
    )


def _existing_engine(build: _Build) -> TrtllmEngine | None:
    """The engine that an earlier run of the same build left, None if the output does not exist. Raises OutputError if
    the output is anything else."""
    output = build.options.output
    if not output.exists():
        refuse_existing(output, "the engine")  # raises if the folder above the output does not exist
        return None
    try:
        engine = open_trtllm_engine(output, check_digests=False)
    except EngineError as error:
        raise OutputError(
            f"writing the engine: {output} exists already and is not an engine of this build ({error})"
        ) from error
    different = [*_other_settings(build, engine.manifest.settings), *_other_library(build, engine.manifest)]
    if not different:
        digests = engine.manifest.source.digests
        different = [f"its source's {text}" for text in changed_sources(build.source.model.weights, digests)]
    if different:
        raise OutputError(
            f"writing the engine: {output} exists already and was built with other settings; name another output or "
            "remove it "
            f"first:{listing(different)}"
        )
    logger.info("%s exists already: the engine stage is done", output)
    return engine


def _other_settings(build: _Build, found: Mapping[str, Any]) -> Iterator[str]:
    """Differences between the settings that an engine was built with and the settings of this build."""
    expected = build.settings()
    yield from differing_settings(found.get("checkpoint"), build.checkpoint)
    kept, flags = found.get("flags") or [], expected["flags"]
    if len(kept) != len(flags):
        yield f"the flags are {shlex.join(kept)}, expected {shlex.join(flags)}"
    else:
        names = ["", *flags]
        yield from (f"{names[i]} is {kept[i]}, expected {word}" for i, word in enumerate(flags) if kept[i] != word)
    for key in ("sm", "kv_cache_fraction"):
        if found.get(key) != expected[key]:
            yield f"{key} is {found.get(key)}, expected {expected[key]}"


def _other_library(build: _Build, manifest: TrtllmManifest) -> Iterator[str]:
    """A message if another release of TensorRT-LLM built the engine, as an engine runs only on the same release."""
    built_by, installed = manifest.libraries.get(LIBRARY, ""), build.machine.tensorrt_llm
    if installed is not None and release(built_by) != release(installed):
        yield f"it was built by TensorRT-LLM {built_by or 'unknown'}, and {installed} is installed here"


def _checkpoint(build: _Build, progress: Callable[[Progress], None] | None) -> Mapping[str, str]:
    """Write the TensorRT-LLM checkpoint unless it exists; returns the digests of the source files."""
    folder = build.options.checkpoint_folder
    if folder.exists():
        logger.info("%s exists already: the checkpoint stage is done", folder)
    else:
        if build.checkpoint.layout.is_packed and build.options.gpu_sm is None and not build.machine.gpus:
            logger.warning(
                "no GPU here: packing for every GPU but SM 90 (H100, H200); pass --gpu-sm 90 to build for one"
            )
        model, calibration = build.source.model, build.options.calibration
        with solved(calibration, folder, model, solvable(build.checkpoint), build.text) as codes:
            record = None if codes is None else calibration_record(codes)
            write_checkpoint(model, build.checkpoint.options, folder, progress, codes, record)
    return require_written(build.checkpoint, folder)


def _ask_about_weights(build: _Build) -> Answer:
    """Ask whether the rank files hold the source's weights. Raises VerificationFailed if they do not."""
    start = time.monotonic()
    answer = ask_about_weights(build.ranks)
    logger.info("compared the %s weights of the rank files with the checkpoint's in %.1f s",
                f"{answer.figures['num_weights']:,}", time.monotonic() - start)  # fmt: skip
    if not answer.passed:
        raise VerificationFailed(
            f"building {build.options.output}: the rank files in {build.ranks.folder} are not the weights of "
            f"{build.options.checkpoint}: {'; '.join(answer.failures)}; remove the folder to have them written again"
        )
    return answer


def _library(build: _Build) -> Library:
    """The installed TensorRT-LLM. Raises LibraryMissing if the library or a GPU is missing."""
    options = build.options
    found = find_library(build.machine)
    if isinstance(found, Library):
        return found
    source = build.source.checkpoint
    mounts = [
        source.folder,
        *(path.resolve().parent for path in source.shards),  # shards can be links into the hub's cache
        options.output.resolve().parent,
        options.checkpoint_folder.resolve().parent,
    ]
    raise library_missing(found, options.checkpoint_folder, command_of(options), mounts)


def _build_engine(build: _Build, digests: Mapping[str, str], questions: Sequence[Answer]) -> TrtllmEngine:
    """Run trtllm-build for all ranks and write the engine directory. Raises LibraryMissing and EngineError."""
    library, options = _library(build), build.options
    logger.info("building %d rank(s) with TensorRT-LLM %s", options.parallel.world_size, library.version)
    with staged_directory(options.output, "the engine") as folder:
        flags = build.flags()
        run_build(
            library,
            [
                *_words("checkpoint_dir", options.checkpoint_folder.resolve()),
                *_words("output_dir", folder),
                *_words("output_timing_cache", _TIMING_CACHE),  # a name without a folder, as config.json records it
                *flags,
            ],
            folder,
        )
        (folder / _TIMING_CACHE).unlink(missing_ok=True)
        wanted = [CONFIG_FILE, *(rank_engine(rank) for rank in range(options.parallel.world_size))]
        absent = [name for name in wanted if not (folder / name).is_file()]
        if absent:
            raise EngineError(
                f"building the engine: trtllm-build ended with status 0 and did not write {', '.join(absent)}"
            )
        build.source.settings.write(folder)
        manifest = _manifest(build, library, digests, folder)
        asked = tuple(answer.to_json() for answer in questions)
        write_trtllm_manifest(folder, replace(manifest, questions=asked))
    return open_trtllm_engine(options.output, check_digests=False)


def _manifest(build: _Build, library: Library, digests: Mapping[str, str], folder: Path) -> TrtllmManifest:
    options, source, plan = build.options, build.source, build.plan
    gpus = build.machine.gpus or ()
    gpu = next((gpu for gpu in gpus if gpu.sm == options.sm(build.machine)), None)
    return TrtllmManifest(
        format_version=FORMAT_VERSION,
        model=Path(options.checkpoint).resolve().name,
        family=source.model.family.name,
        backend=TRTLLM_BACKEND,
        precision=TrtllmPrecisionRecord(
            name=plan.precision,
            quant_algo=plan.quant_algo,
            dtype=plan.dtype,
            group_size=plan.group_size,
            average_bits_per_weight=round(plan.average_bits_per_weight, 3),
        ),
        architecture=source.model.architecture,
        parallel=ParallelRecord(
            tp_size=options.tp_size,
            pp_size=options.pp_size,
            moe_tp_size=options.parallel.moe_tp,
            moe_ep_size=options.parallel.moe_ep,
        ),
        gpu=GpuRecord(name=gpu.name if gpu else None, sm=gpu.sm if gpu else None),
        max_sequence=source.max_sequence,
        max_batch=options.max_batch_size,
        max_num_tokens=options.max_num_tokens,
        kv_cache_fraction=options.kv_cache_fraction,
        use_paged_context_fmha=True,
        tokenizer_size=source.tokenizer.size,
        head_masks_unused_ids=has_biased_head(source.model),
        eos_token_ids=source.end_ids,
        tokenizer=source.settings.facts,
        source=source_record(source.checkpoint, digests),
        routing=build.routing.to_json() if build.routing else None,
        left_out_experts=build.checkpoint.options.left_out,
        libraries={**libraries(), "tensorrt_llm": library.version},
        flags=tuple(build.settings()["flags"]),
        settings=build.settings(),
        files=record_files(folder),
    )


def _words(name: str, value: object) -> list[str]:
    return [f"--{name}", str(value)]


def command_of(options: TrtllmOptions) -> list[str]:
    """The command line, without `python`, that runs this build again."""
    words = [str(Path(__file__).resolve().parents[1] / "build_engine.py"), "--backend", TRTLLM_BACKEND]
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name == "calibration":
            words += options.calibration.flags()
            continue
        if value == field.default and field.name not in ("checkpoint", "output"):
            continue
        flag = f"--{field.name.replace('_', '-')}"
        local = field.name in ("output", "trtllm_checkpoint") or (field.name == "checkpoint" and Path(value).is_dir())
        words += [flag] if value is True else [flag, str(Path(value).resolve() if local else value)]
    return words
