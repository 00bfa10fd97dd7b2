"""The flags that describe an engine: one set for `moeship plan`, `moeship build` and build_engine.py.

A command line of `moeship build` is also one of `moeship plan`: with the same flags it plans the engine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from export.provider import KERNELS, PROVIDERS
from export.quantize.recipe import PLANS
from trt_build.errors import EngineError
from trt_build.prepare import BACKENDS, EngineOptions
from trt_build.trtllm_flags import add_trtllm_arguments

DEFAULT_PROVIDER = "cpu"


def add_engine_arguments(parser: argparse.ArgumentParser, *, output_help: str, output_required: bool) -> None:
    """Add every flag of both backends. `read_checkpoint` and `read_engine_options` read them."""
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="checkpoint folder, or a hub id owner/name")
    parser.add_argument("--checkpoint", dest="checkpoint_flag", metavar="DIR", help="the same, as a flag")
    parser.add_argument("--output", required=output_required, type=Path, metavar="ENGINE", help=output_help)
    engine = parser.add_argument_group("engine")
    engine.add_argument("--backend", default=BACKENDS[0], help=f"{' or '.join(BACKENDS)} (default: %(default)s)")
    engine.add_argument("--precision", default="int4", metavar="P", help=f"{', '.join(PLANS)} (default: %(default)s)")
    engine.add_argument("--experts-per-token", type=int, metavar="K", help="override the config's num_experts_per_tok")
    engine.add_argument(
        "--keep-all-experts", action="store_true", help="write the experts that can never be chosen too"
    )
    engine.add_argument(
        "--max-seq-len", "--max-sequence", dest="max_sequence", type=int, metavar="TOKENS",
        help="context limit, prompt and answer together (default: the model's own)",
    )  # fmt: skip
    onnxruntime = parser.add_argument_group("onnxruntime", "for --backend onnxruntime")
    onnxruntime.add_argument("--provider", help=f"{' or '.join(PROVIDERS)} (default: {DEFAULT_PROVIDER})")
    onnxruntime.add_argument(
        "--kernels",
        metavar="K",
        help=f"{' or '.join(KERNELS)}: whose kernels multiply quantised matrices on the CPU (default: moeship's, "
        "where they can be used)",
    )
    add_trtllm_arguments(parser)


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
    return str(given.pop())


def read_engine_options(arguments: argparse.Namespace) -> EngineOptions:
    """The options of an engine for ONNX Runtime, from the command line. Raises EngineError like `read_checkpoint`."""
    return EngineOptions(
        checkpoint=read_checkpoint(arguments),
        precision=arguments.precision,
        backend=arguments.backend,
        provider=arguments.provider or DEFAULT_PROVIDER,
        experts_per_token=arguments.experts_per_token,
        max_sequence=arguments.max_sequence,
        kernels=arguments.kernels,
        keep_all_experts=arguments.keep_all_experts,
    )
