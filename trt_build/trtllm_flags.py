"""The flags of `--backend tensorrt-llm`, which every build and plan declares.

They are not in `trt_build/trtllm`, so that a build for ONNX Runtime imports nothing of TensorRT-LLM's backend. The help
texts repeat the stages, precisions and defaults of that backend; a test compares the two.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trt_build.manifest import TRTLLM_BACKEND

STAGES = ("plan", "checkpoint", "engine", "verify")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "int4_gptq", "int4_awq")
# Name, type, metavar, help and default of the flags that only this backend has.
FLAGS: tuple[tuple[str, type, str, str, str], ...] = (
    ("until", str, "STAGE", f"last stage to run: {', '.join(STAGES)}", STAGES[-1]),
    ("dtype", str, "TYPE", "float16 or bfloat16, for weights that are not quantised", "float16"),
    ("group_size", int, "G", "group size of int4_gptq and int4_awq: 128 or 64", "the larger that fits"),
    ("tp_size", int, "N", "tensor parallelism", "1"),
    ("pp_size", int, "N", "pipeline parallelism, for Mixtrals only", "1"),
    ("moe_tp_size", int, "N", "slices of each expert's width", "--tp-size divided by --moe-ep-size"),
    (
        "moe_ep_size",
        int,
        "N",
        "blocks of experts; the product with --moe-tp-size is --tp-size",
        "--tp-size divided by --moe-tp-size",
    ),
    ("gpu_sm", int, "SM", "compute capability of the GPU to build for, 90 for 9.0", "this machine's"),
    (
        "max_batch_size",
        int,
        "B",
        "sequences in a step; moeship plan, for either backend: whether that many fit",
        "32",
    ),
    ("max_num_tokens", int, "T", "tokens in a step, of all sequences together", "8192"),
    ("kv_cache_fraction", float, "F", "share of the GPU's free memory that serving gives to keys and values", "0.9"),
    ("workers", int, "N", "ranks that trtllm-build builds at the same time", "1"),
    ("trtllm_checkpoint", Path, "DIR", "folder of the TensorRT-LLM checkpoint", "OUTPUT.checkpoint"),
    ("verify_tokens", int, "N", "positions to compare with the reference", "2048"),
)
NAMES = (*(name for name, *_ in FLAGS), "plain_weights")


def add_trtllm_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this backend. A flag that is not given is None."""
    group = parser.add_argument_group(
        TRTLLM_BACKEND, f"for --backend {TRTLLM_BACKEND}; its precisions are {', '.join(PRECISIONS)}"
    )
    for name, kind, metavar, text, default in FLAGS:
        group.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=f"{text} (default: {default})"
        )
    group.add_argument(
        "--plain-weights", action="store_true", default=None,
        help="write int8 and int4 weights as floats; the machine that builds the engine quantises them",
    )  # fmt: skip
