"""The flags that describe an engine: one set for `moeship plan`, `moeship build` and build_engine.py.

A command line of `moeship build` is also one of `moeship plan`: with the same flags it plans the engine.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path

from export.calibration.text import DEFAULT_TOKENS
from export.provider import KERNELS, KV_CACHES, PROVIDERS
from export.quantize.presets import PRESETS
from export.quantize.recipe import METHODS
from trt_build.calibration import Calibration
from trt_build.errors import EngineError
from trt_build.manifest import BACKENDS, ORT_BACKEND, TRTLLM_BACKEND
from trt_build.trtllm_flags import NAMES, add_trtllm_arguments

DEFAULT_PROVIDER = "cpu"
DEFAULT_PRECISION = "int4"
# Flags that one backend alone has. If such a flag is not given, its value is None.
_OWN_FLAGS: Mapping[str, Collection[str]] = {
    ORT_BACKEND: ("provider", "kernels", "recipe", "drop_below", "text", "drop_tokens", "kv"),
    TRTLLM_BACKEND: NAMES,
}


def add_engine_arguments(parser: argparse.ArgumentParser, *, output_help: str, output_required: bool) -> None:
    """Add every flag of both backends. Each backend reads its own (`command.py`)."""
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT", help="checkpoint folder, a hub id owner/name, or a GGUF file"
    )
    parser.add_argument("--checkpoint", dest="checkpoint_flag", metavar="DIR", help="the checkpoint, as a flag")
    parser.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a hub id (default: its main branch)"
    )
    parser.add_argument("--output", required=output_required, type=Path, metavar="ENGINE", help=output_help)
    engine = parser.add_argument_group("engine")
    engine.add_argument("--backend", default=BACKENDS[0], help=f"{' or '.join(BACKENDS)} (default: %(default)s)")
    stored = engine.add_mutually_exclusive_group()
    stored.add_argument(
        "--precision", default=DEFAULT_PRECISION, metavar="P", help=f"{', '.join(PRESETS)} (default: %(default)s)"
    )
    stored.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="how each matrix is stored, a YAML or JSON file (docs/recipes.md), in place of --precision",
    )
    engine.add_argument(
        "--method",
        metavar="M",
        help=f"how codes are found: {', '.join(METHODS)} (default: the recipe's; gptq with --calibrate, and for models "
        "for which it takes some minutes at most)",
    )
    engine.add_argument(
        "--calibrate",
        nargs="+",
        type=Path,
        default=None,
        metavar="TEXT",
        help="text files over which gptq solves codes (default: moeship's own calibration text)",
    )
    engine.add_argument(
        "--calibrate-tokens", type=int, metavar="N", help=f"tokens of that text (default: {DEFAULT_TOKENS:,})"
    )
    engine.add_argument(
        "--codes", type=Path, metavar="DIR", help="keep the solved codes here, and take them from here if they fit"
    )
    engine.add_argument("--experts-per-token", type=int, metavar="K", help="override the config's num_experts_per_tok")
    engine.add_argument(
        "--keep-all-experts", action="store_true", help="also write the experts that can never be chosen"
    )
    engine.add_argument(
        "--unchecked",
        action="store_true",
        help="leave out the comparison of the written weights with the checkpoint's",
    )
    engine.add_argument(
        "--max-seq-len", "--max-sequence", dest="max_sequence", type=int, metavar="TOKENS",
        help="longest context, prompt and answer together (default: the model's own)",
    )  # fmt: skip
    onnxruntime = parser.add_argument_group(ORT_BACKEND, f"for --backend {ORT_BACKEND}")
    onnxruntime.add_argument("--provider", help=f"{' or '.join(PROVIDERS)} (default: {DEFAULT_PROVIDER})")
    onnxruntime.add_argument(
        "--kernels",
        metavar="K",
        help=f"{' or '.join(KERNELS)}: whose kernels multiply quantised matrices on the CPU (default: moeship's, "
        "where they can be used)",
    )
    onnxruntime.add_argument(
        "--drop-below", type=float, metavar="P",
        help="leave out experts whose load over --text is below P, a share of their layer's places such as 0.01",
    )  # fmt: skip
    onnxruntime.add_argument(
        "--text", type=Path, action="append", metavar="FILE", help="text for --drop-below; repeatable"
    )
    onnxruntime.add_argument("--drop-tokens", type=int, metavar="N", help="tokens of that text (default: 4096)")
    onnxruntime.add_argument(
        "--kv", "--kv-cache-dtype", dest="kv", metavar="DTYPE",
        help=f"{' or '.join(KV_CACHES)}: int8 also writes what serving needs to keep keys and values in int8 (`moeship "
        "package --kv int8`); for ONNX Runtime's kernels this runs the engine over a text (default: float)",
    )  # fmt: skip
    add_trtllm_arguments(parser)


def read_calibration(arguments: argparse.Namespace) -> Calibration:
    """What the flags say of the method and of the calibration text."""
    return Calibration(
        method=arguments.method, texts=tuple(arguments.calibrate or ()), num_tokens=arguments.calibrate_tokens,
        codes=arguments.codes, automatic=True,
    )  # fmt: skip


def read_checkpoint(arguments: argparse.Namespace) -> str:
    """The checkpoint, from the positional argument or from --checkpoint. Raises EngineError if neither is given or the
    two differ."""
    given = {name for name in (arguments.checkpoint, arguments.checkpoint_flag) if name is not None}
    if not given:
        raise EngineError(
            "reading the flags: found no checkpoint, expected a folder or a hub id owner/name; give it as --checkpoint"
        )
    if len(given) > 1:
        raise EngineError(
            f"reading the flags: found two checkpoints, {arguments.checkpoint} and --checkpoint "
            f"{arguments.checkpoint_flag}; give one"
        )
    found = str(given.pop())
    return found if arguments.revision is None else f"{found}@{arguments.revision}"


def refuse_flags_of_others(arguments: argparse.Namespace, shared: Collection[str] = ()) -> None:
    """Raise EngineError if a flag was given that only another backend than the chosen one has. A plan uses the flags in
    `shared` for every backend."""
    for backend, names in _OWN_FLAGS.items():
        given = [name for name in names if name not in shared and getattr(arguments, name) is not None]
        if given and backend != arguments.backend:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise EngineError(
                f"reading the flags: {flags}: for --backend {backend} only; leave them out, or name that backend"
            )
