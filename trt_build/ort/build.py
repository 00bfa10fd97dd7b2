"""Builds an engine for ONNX Runtime from a checkpoint.

    build_engine(BuildOptions(checkpoint="mlabonne/phixtral-2x2_8", output=Path("engine"), precision="int4"))

The checkpoint's tensors are quantised and written one chunk at a time; the engine appears under its name only when it
is whole. An interrupted build is resumed by the same call.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.checkpoint.digests import source_digests
from export.checkpoint.folder import Checkpoint
from export.conversion.parts import PartRecord
from export.conversion.sources import check_resumed, check_unchanged
from export.conversion.writer import Progress
from export.errors import ConfigError, QuantizationError
from export.exporter import DATA_FILE, write_export
from export.files.output import forget_pages
from export.files.resume import Fingerprint, partial_folder, refuse_made
from export.onnx_graph.kv_scales import write_scales
from export.provider import OWN_KERNELS
from export.quantize.recipe import SEARCH
from export.quantize.solved import SolvedCodes
from trt_build.calibration import calibration_record, solved
from trt_build.engine_files import record_files
from trt_build.manifest import Source, libraries
from trt_build.ort.engine import FORMAT_VERSION, UNDIGESTED_FILES, Engine, open_engine, write_manifest
from trt_build.ort.int8_cache.calibrating import calibrate
from trt_build.ort.kernels import warn_if_unusable
from trt_build.ort.planning.genai_config import GENAI_FILE
from trt_build.ort.planning.prepare import EngineOptions, PreparedBuild, check_options, prepare_build
from trt_build.source import source_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuildOptions(EngineOptions):
    """What to build, and the folder to make."""

    output: Path


def build_engine(options: BuildOptions, progress: Callable[[Progress], None] | None = None) -> Engine:
    """Build an engine, open it and return it. `progress` is called a few times a second.

    Raises the MoeshipError of the stage that failed. The output folder does not appear then. The finished parts stay in
    a folder beside it, and a build with the same options continues from them.
    """
    provider, _ = check_options(options)
    if provider.kernels == OWN_KERNELS:
        warn_if_unusable("the engine is written", "verify and serve")
    refuse_made(options.output, "the engine")
    build = prepare_build(options)
    for note in build.notes:
        logger.info("%s", note)
    calibration, told = options.calibration, progress or (lambda _: None)
    try:
        with solved(calibration, options.output, build.model, build.wanted_codes(), build.calibration_text()) as codes:
            _write(build, options, codes, told)
    except (QuantizationError, ConfigError) as error:
        if not calibration.is_nobodys_wish or not build.wanted_codes():
            raise
        logger.warning("the codes are searched without a calibration text, because GPTQ cannot solve them (%s)", error)
        searched = dataclasses.replace(calibration, method=SEARCH)
        return build_engine(dataclasses.replace(options, calibration=searched), progress)
    engine = open_engine(options.output, check_digests=False)
    if engine.has_own_kernels:
        forget_pages(engine.folder / DATA_FILE)  # the write cached it in small pages; loading caches it in huge ones
    return engine


def _write(
    build: PreparedBuild, options: BuildOptions, codes: SolvedCodes | None, progress: Callable[[Progress], None]
) -> None:
    """Write the engine's folder, with the codes that were solved."""
    checkpoint = build.checkpoint
    space = build.export.placement.total_bytes
    fingerprint = Fingerprint(settings=_settings(build, codes), sources=build.sources)
    with partial_folder(options.output, "the engine", fingerprint, keep=(DATA_FILE,), num_bytes=space) as folder:
        check_resumed(folder, checkpoint, f"the engine {options.output}")
        records = write_export(build.export, build.model, folder, progress, codes)
        build.settings.write(folder.content)
        (folder.content / GENAI_FILE).write_text(build.genai_text(), encoding="utf-8")
        for note in build.packed_notes(records):
            if note not in build.notes:  # the errors are known after the write, and are nothing where codes are kept
                logger.info("%s", note)
        _write_cache_scales(build, folder.content, _source(checkpoint, records))
        files = record_files(folder.content, UNDIGESTED_FILES)
        manifest = build.manifest(
            _source(checkpoint, records), files, records, None if codes is None else calibration_record(codes)
        )
        check_unchanged(checkpoint, fingerprint.sources, records)
        write_manifest(folder.content, manifest)


def _write_cache_scales(build: PreparedBuild, folder: Path, source: Source) -> None:
    """Run the engine whose files are in `folder` over a text, and write the scales of its int8 caches. Does nothing for
    a build without int8 caches, or whose caches have a scale for each position."""
    text = build.cache_text()
    if text is None:
        return
    logger.info("calibrating int8 caches: running the engine over %d tokens", text.num_tokens)
    engine = Engine(folder=folder, manifest=build.manifest(source, record_files(folder, UNDIGESTED_FILES)))
    write_scales(folder, build.model.architecture, calibrate(engine, text.windows))


def _settings(build: PreparedBuild, codes: SolvedCodes | None) -> dict[str, Any]:
    """Everything except the checkpoint that decides the bytes of an engine, as plain JSON values."""
    plan = build.export
    layout = hashlib.sha256(b"".join(graph.SerializeToString() for graph in plan.graphs.values()))
    layout.update(repr(plan.jobs).encode())
    own = ("output", "recipe", "calibration", "dropping")
    asked = {name: value for name, value in dataclasses.asdict(build.options).items() if name not in own}
    asked |= {"recipe": build.recipe.to_json(), "solved codes": None if codes is None else codes.digest}
    return {**asked, **libraries(), "format version": FORMAT_VERSION, "layout": layout.hexdigest()}


def _source(checkpoint: Checkpoint, records: Sequence[PartRecord]) -> Source:
    runs = {name: found for record in records for name, found in record.sources.items()}
    return source_record(checkpoint, source_digests(checkpoint, runs, read=False))
