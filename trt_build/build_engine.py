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
import importlib.metadata
import json
import logging
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.architecture import is_token_id
from export.checkpoint import INDEX_FILE, Checkpoint, open_checkpoint, read_json
from export.command import run_command
from export.digests import header_bytes, source_digests
from export.errors import CheckpointError, ConfigError
from export.families import Model, read_model
from export.onnx_graph.exporter import DATA_FILE, ExportPlan, plan_export, write_export
from export.onnx_graph.writer import PartRecord, Progress
from export.output import require_space
from export.provider import PROVIDERS, provider_of
from export.quantize.recipe import PLANS, QuantPlan, plan_for
from export.resume import Fingerprint, SourceFile, held_bytes, partial_folder, refuse_made
from export.routing import diagnose
from export.tensor_table import Weights
from export.tokenizer import Tokenizer, load_tokenizer
from trt_build.engine import (
    FORMAT_VERSION,
    Engine,
    Manifest,
    Precision,
    Source,
    open_engine,
    record_files,
    write_manifest,
)
from trt_build.errors import EngineError
from trt_build.ort.genai_config import genai_config
from trt_build.progress_line import ProgressLine

logger = logging.getLogger(__name__)

BACKENDS = ("onnxruntime",)
_LIBRARIES = ("moeship", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """`experts_per_token` and `max_sequence` (tokens) None take the checkpoint's own."""

    checkpoint: str
    output: Path
    precision: str = "int4"
    backend: str = "onnxruntime"
    provider: str = "cpu"
    experts_per_token: int | None = None
    max_sequence: int | None = None


def build_engine(options: BuildOptions, progress: Callable[[Progress], None] | None = None) -> Engine:
    """Build, and open what was built. `progress` is called a few times a second.

    Raises MoeshipError of the stage that found fault. Nothing appears at the output then; the parts that were finished
    lie beside it, and the same options take them up.
    """
    if options.backend not in BACKENDS:
        raise EngineError(f"choosing the backend: {options.backend!r} is unknown. There are: {', '.join(BACKENDS)}")
    provider = provider_of(options.provider)
    quantization = plan_for(options.precision, provider)
    refuse_made(options.output, "the engine")
    checkpoint = open_checkpoint(options.checkpoint)
    model = read_model(checkpoint, options.experts_per_token)
    tokenizer = load_tokenizer(checkpoint.folder)
    max_sequence = _max_sequence(options.max_sequence, model)
    end_ids = end_token_ids(checkpoint, model, tokenizer)
    if tokenizer.size > model.architecture.vocab_size:
        raise ConfigError(
            f"reading the tokenizer of {checkpoint.folder}: it has {tokenizer.size} ids, the model's vocabulary "
            f"{model.architecture.vocab_size}; they are not of the same model"
        )
    plan = plan_export(model, quantization, provider)
    require_space(options.output, plan.num_weights_bytes - held_bytes(options.output), "the engine")
    fingerprint = Fingerprint(settings=_settings(options, plan), sources=_source_files(checkpoint))
    with partial_folder(options.output, "the engine", fingerprint, keep=(DATA_FILE,)) as folder:
        records = write_export(plan, model, folder, progress or (lambda _: None))
        for path in checkpoint.tokenizer_files():
            shutil.copyfile(path, folder.content / path.name)
        config = genai_config(model.architecture, max_sequence, end_ids, provider)
        (folder.content / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            model=Path(options.checkpoint).resolve().name,
            family=model.family.name,
            backend=options.backend,
            provider=provider.name,
            precision=_precision(quantization, plan, model.weights),
            architecture=model.architecture,
            expert_order=provider.expert_order(model.architecture.num_experts),
            max_sequence=max_sequence,
            max_batch=1,
            tokenizer_size=tokenizer.size,
            eos_token_ids=end_ids,
            source=_source(checkpoint, records),
            routing=_routing(model),
            libraries=_libraries(),
            files=record_files(folder.content),
        )
        _check_unchanged(checkpoint, fingerprint.sources)
        write_manifest(folder.content, manifest)
    return open_engine(options.output, check_digests=False)


def _settings(options: BuildOptions, plan: ExportPlan) -> dict[str, Any]:
    """What decides an engine's bytes beside the checkpoint's, as plain JSON values."""
    layout = hashlib.sha256(plan.serving.SerializeToString() + plan.scoring.SerializeToString())
    layout.update(repr(plan.jobs).encode())
    asked = {name: value for name, value in dataclasses.asdict(options).items() if name != "output"}
    return {**asked, **_libraries(), "format version": FORMAT_VERSION, "layout": layout.hexdigest()}


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


def end_token_ids(checkpoint: Checkpoint, model: Model, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end a text: of config.json, else generation_config.json, else the tokenizer's own end token.

    Raises ConfigError when none names one, or one is not a row of the vocabulary.
    """
    found: Any = list(model.architecture.eos_token_ids)
    generation = checkpoint.folder / "generation_config.json"
    if not found and generation.is_file():
        found = read_json(generation, "generation_config.json").get("eos_token_id")
    if found in (None, []) and tokenizer.eos_token_id is not None:
        found = tokenizer.eos_token_id
    ids = found if isinstance(found, list) else [] if found is None else [found]
    vocab = model.architecture.vocab_size
    wrong = [item for item in ids if not (is_token_id(item) and item < vocab)]
    if wrong:
        raise ConfigError(
            f"looking for the end token of {checkpoint.folder}: eos_token_id holds {wrong[0]!r}, expected token ids "
            f"below {vocab}; correct it in config.json or generation_config.json"
        )
    if not ids:
        raise ConfigError(
            f"looking for the end token of {checkpoint.folder}: neither config.json, generation_config.json nor "
            "tokenizer_config.json names one; add eos_token_id to config.json"
        )
    return tuple(ids)


def _max_sequence(asked: int | None, model: Model) -> int:
    limit = model.architecture.max_positions
    if asked is None:
        return limit
    if not 1 <= asked <= limit:
        raise ConfigError(f"setting the longest sequence: found {asked} tokens, expected 1 to {limit}, the model's own")
    return asked


def _precision(plan: QuantPlan, export: ExportPlan, weights: Weights) -> Precision:
    num_weights = sum(spec.num_elements for spec in weights.table.values())
    return Precision(
        name=plan.name,
        bits={str(role): bits for role, bits in plan.bits.items()},
        block_size=plan.block_size,
        accuracy_level=plan.accuracy_level,
        average_bits_per_weight=round(8 * export.num_weights_bytes / num_weights, 3),
    )


def _routing(model: Model) -> dict[str, object] | None:
    if not model.architecture.is_moe:
        return None
    return diagnose(model.gates(), model.architecture.experts_per_token).to_json()


def _libraries() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="checkpoint folder, or a hub id owner/name")
    parser.add_argument("--output", required=True, type=Path, metavar="ENGINE", help="engine directory to make")
    parser.add_argument("--backend", default="onnxruntime", help=f"{' or '.join(BACKENDS)} (default: %(default)s)")
    parser.add_argument("--provider", default="cpu", help=f"{' or '.join(PROVIDERS)} (default: %(default)s)")
    parser.add_argument("--precision", default="int4", help=f"{', '.join(PLANS)} (default: %(default)s)")
    parser.add_argument("--experts-per-token", type=int, metavar="K", help="override the config's num_experts_per_tok")
    parser.add_argument("--max-sequence", type=int, metavar="TOKENS", help="context limit (default: the model's own)")
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
