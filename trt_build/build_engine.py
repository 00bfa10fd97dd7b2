"""Build an engine directory from a checkpoint: the one entry that CI and `moeship build` call.

    python trt_build/build_engine.py --checkpoint DIR --backend onnxruntime --precision int4 --output ENGINE
    python trt_build/build_engine.py --checkpoint DIR --backend tensorrt-llm --precision int4 --output ENGINE

The checkpoint's tensors are checked against its config, quantised and written one chunk at a time; the engine appears
under its name only when it is whole. A build that was interrupted, however it was, is resumed by the same command.
For TensorRT-LLM the stages are plan, checkpoint, engine and verify.
Exit status 0 done, 1 a TensorRT-LLM engine differs from the reference, 2 wrong input, 3 TensorRT-LLM or a GPU is
missing and all before that is done.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.checkpoint.digests import source_digests
from export.checkpoint.folder import Checkpoint
from export.command import run_command
from export.conversion.parts import PartRecord
from export.conversion.sources import check_resumed, check_unchanged
from export.conversion.writer import Progress
from export.exporter import DATA_FILE, write_export
from export.files.output import forget_pages
from export.files.resume import Fingerprint, partial_folder, refuse_made
from export.provider import OWN_KERNELS, named_with_kernels
from trt_build.engine import FORMAT_VERSION, Engine, Source, open_engine, record_files, write_manifest
from trt_build.engine_flags import add_engine_arguments, read_checkpoint, read_engine_options
from trt_build.manifest import TRTLLM_BACKEND
from trt_build.ort.genai_config import GENAI_FILE
from trt_build.ort.kernels import warn_if_unusable
from trt_build.prepare import EngineOptions, PreparedBuild, check_options, libraries, prepare_build
from trt_build.progress_line import ProgressLine
from trt_build.trtllm_flags import refuse_trtllm_flags

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
    checkpoint = build.checkpoint
    space = build.export.placement.total_bytes
    fingerprint = Fingerprint(settings=_settings(build), sources=build.sources)
    with partial_folder(options.output, "the engine", fingerprint, keep=(DATA_FILE,), num_bytes=space) as folder:
        check_resumed(folder, checkpoint, f"the engine {options.output}")
        records = write_export(build.export, build.model, folder, progress or (lambda _: None))
        build.settings.write(folder.content)
        (folder.content / GENAI_FILE).write_text(build.genai_text(), encoding="utf-8")
        manifest = build.manifest(_source(checkpoint, records), record_files(folder.content))
        check_unchanged(checkpoint, fingerprint.sources, records)
        write_manifest(folder.content, manifest)
    engine = open_engine(options.output, check_digests=False)
    if engine.has_own_kernels:
        forget_pages(engine.folder / DATA_FILE)  # the write cached it in small pages; loading caches it in huge ones
    return engine


def _settings(build: PreparedBuild) -> dict[str, Any]:
    """Everything except the checkpoint that decides the bytes of an engine, as plain JSON values."""
    plan = build.export
    layout = hashlib.sha256(b"".join(graph.SerializeToString() for graph in plan.graphs.values()))
    layout.update(repr(plan.jobs).encode())
    asked = {name: value for name, value in dataclasses.asdict(build.options).items() if name != "output"}
    return {**asked, **libraries(), "format version": FORMAT_VERSION, "layout": layout.hexdigest()}


def _source(checkpoint: Checkpoint, records: Sequence[PartRecord]) -> Source:
    runs = {name: found for record in records for name, found in record.sources.items()}
    digests = source_digests(checkpoint, runs, read=False)
    return Source(checkpoint=checkpoint.identity, revision=checkpoint.revision, digests=digests)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_arguments(parser, output_help="engine directory to make", output_required=True)
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Build as the command line asks, and print what was built."""
    if arguments.backend == TRTLLM_BACKEND:
        from trt_build.trtllm.command import run_trtllm

        return run_trtllm(arguments, read_checkpoint(arguments))
    refuse_trtllm_flags(arguments)
    options = BuildOptions(output=arguments.output, **vars(read_engine_options(arguments)))
    engine = build_engine(options, ProgressLine(sys.stderr) if sys.stderr.isatty() else None)
    if arguments.json:
        sys.stdout.write((engine.folder / "engine.json").read_text(encoding="utf-8"))
    else:
        sys.stdout.write(f"{summary(engine)}\n")
    return 0


def summary(engine: Engine) -> str:
    """One line that describes the engine that was built."""
    manifest = engine.manifest
    return (
        f"{engine.folder}: {manifest.family} {manifest.precision.name} for "
        f"{named_with_kernels(manifest.provider, manifest.kernels)}, "
        f"{engine.num_bytes / 1e6:.1f} MB, {manifest.precision.average_bits_per_weight:.2f} bits per weight, "
        f"context {manifest.max_sequence} tokens"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    arguments = parser.parse_args()
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
