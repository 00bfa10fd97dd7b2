"""Build an engine directory from a checkpoint: the one entry that CI and `moeship build` call.

    python trt_build/build_engine.py --checkpoint DIR --backend onnxruntime --precision int4 --output ENGINE

The checkpoint's tensors are checked against its config, quantised and written one chunk at a time; the engine appears
under its name only when it is whole. A build that was interrupted, however it was, is resumed by the same command.
Exit status 0 done, 2 wrong input.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import logging
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.checkpoint import INDEX_FILE, Checkpoint
from export.command import run_command
from export.digests import header_bytes, source_digests
from export.errors import CheckpointError
from export.onnx_graph.exporter import DATA_FILE, write_export
from export.onnx_graph.parts import PartRecord
from export.onnx_graph.writer import Progress, disk_bytes
from export.output import forget_pages
from export.provider import PROVIDERS
from export.quantize.recipe import PLANS
from export.resume import Fingerprint, SourceFile, partial_folder, refuse_made
from trt_build.engine import FORMAT_VERSION, Engine, Source, open_engine, record_files, write_manifest
from trt_build.ort.genai_config import GENAI_FILE
from trt_build.prepare import BACKENDS, EngineOptions, PreparedBuild, check_options, libraries, prepare_build
from trt_build.progress_line import ProgressLine

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuildOptions(EngineOptions):
    """What to build, and the folder to make."""

    output: Path


def build_engine(options: BuildOptions, progress: Callable[[Progress], None] | None = None) -> Engine:
    """Build, and open what was built. `progress` is called a few times a second.

    Raises MoeshipError of the stage that found fault. Nothing appears at the output then; the parts that were finished
    lie beside it, and the same options take them up.
    """
    check_options(options)
    refuse_made(options.output, "the engine")
    build = prepare_build(options)
    checkpoint = build.checkpoint
    space = disk_bytes(build.export.jobs, build.export.placement)
    fingerprint = Fingerprint(settings=_settings(build), sources=_source_files(checkpoint))
    with partial_folder(options.output, "the engine", fingerprint, keep=(DATA_FILE,), num_bytes=space) as folder:
        records = write_export(build.export, build.model, folder, progress or (lambda _: None))
        for path in checkpoint.tokenizer_files():
            shutil.copyfile(path, folder.content / path.name)
        (folder.content / GENAI_FILE).write_text(build.genai_text(), encoding="utf-8")
        manifest = build.manifest(_source(checkpoint, records), record_files(folder.content))
        _check_unchanged(checkpoint, fingerprint.sources)
        write_manifest(folder.content, manifest)
    engine = open_engine(options.output, check_digests=False)
    if engine.manifest.kernel_layout:
        forget_pages(engine.folder / DATA_FILE)  # written in small pages; a session reads it into huge ones
    return engine


def _settings(build: PreparedBuild) -> dict[str, Any]:
    """What decides an engine's bytes beside the checkpoint's, as plain JSON values."""
    plan = build.export
    layout = hashlib.sha256(plan.serving.SerializeToString() + plan.scoring.SerializeToString())
    layout.update(repr(plan.jobs).encode())
    asked = {name: value for name, value in dataclasses.asdict(build.options).items() if name != "output"}
    return {**asked, **libraries(), "format version": FORMAT_VERSION, "layout": layout.hexdigest()}


def _source_files(checkpoint: Checkpoint) -> dict[str, SourceFile]:
    """The state of every file that a build reads; of a shard the header stands for the whole."""
    found = {}
    small = [checkpoint.folder / "config.json", checkpoint.folder / INDEX_FILE, *checkpoint.tokenizer_files()]
    for path in [*checkpoint.shards, *(path for path in small if path.is_file())]:
        data = header_bytes(path) if path in checkpoint.shards else path.read_bytes()
        facts = path.stat()
        found[path.name] = SourceFile(
            bytes=facts.st_size, modified_ns=facts.st_mtime_ns, sha256=hashlib.sha256(data).hexdigest()
        )
    return found


def _check_unchanged(checkpoint: Checkpoint, before: Mapping[str, SourceFile]) -> None:
    """Raise CheckpointError where a file is not what it was when the build began."""
    after = _source_files(checkpoint)
    changed = [name for name in before if after.get(name) != before[name]]
    if changed:
        raise CheckpointError(
            f"building from {checkpoint.folder}: {', '.join(changed)} changed while it was read, and the engine would "
            "be of two checkpoints; build again when nothing writes to the folder"
        )


def _source(checkpoint: Checkpoint, records: Sequence[PartRecord]) -> Source:
    runs = {name: found for record in records for name, found in record.sources.items()}
    digests = source_digests(checkpoint, runs, read=False)
    return Source(checkpoint=checkpoint.identity, revision=checkpoint.revision, digests=digests)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint folder, or a hub id owner/name")
    parser.add_argument("--output", required=True, type=Path, metavar="ENGINE", help="engine directory to make")
    parser.add_argument("--backend", default="onnxruntime", help=f"{' or '.join(BACKENDS)} (default: %(default)s)")
    parser.add_argument("--provider", default="cpu", help=f"{' or '.join(PROVIDERS)} (default: %(default)s)")
    parser.add_argument("--precision", default="int4", help=f"{', '.join(PLANS)} (default: %(default)s)")
    parser.add_argument("--experts-per-token", type=int, metavar="K", help="override the config's num_experts_per_tok")
    parser.add_argument("--max-sequence", type=int, metavar="TOKENS", help="context limit (default: the model's own)")
    parser.add_argument(
        "--portable", action="store_true", help="an engine for any CPU: slower to start, its weights not shared"
    )
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Build as the command line asks, and print what was built."""
    options = BuildOptions(
        checkpoint=arguments.checkpoint,
        output=arguments.output,
        precision=arguments.precision,
        backend=arguments.backend,
        provider=arguments.provider,
        experts_per_token=arguments.experts_per_token,
        max_sequence=arguments.max_sequence,
        portable=arguments.portable,
    )
    engine = build_engine(options, ProgressLine(sys.stderr) if sys.stderr.isatty() else None)
    if arguments.json:
        sys.stdout.write((engine.folder / "engine.json").read_text(encoding="utf-8"))
    else:
        sys.stdout.write(f"{summary(engine)}\n")
    return 0


def summary(engine: Engine) -> str:
    """One line on what was built."""
    manifest = engine.manifest
    return (
        f"{engine.folder}: {manifest.family} {manifest.precision.name} for {manifest.provider}, "
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
