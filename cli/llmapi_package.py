"""Reads the flags of `moeship package --backend llmapi`, which packages a checkpoint for TensorRT-LLM's LLM API."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from export.errors import listing
from triton_repo.errors import RepositoryError
from triton_repo.packaging.package import PackageOptions

if TYPE_CHECKING:
    from triton_repo.packaging.llmapi_package import LlmApiOptions

BACKEND = "llmapi"
_PARALLEL = {
    "tp_size": "GPUs that share every layer",
    "pp_size": "groups of layers, each on its own GPUs",
    "moe_tp_size": "of the --tp-size GPUs, those that share each expert's width",
    "moe_ep_size": "of the --tp-size GPUs, those that have different experts",
}
# Flags with the same meaning for an engine and for the LLM API: field of TensorrtLlmParameters -> of LlmApiOptions.
_SHARED = {
    "kv_cache_free_gpu_mem_fraction": "kv_cache_fraction",
    "cancellation_check_period_ms": "cancellation_check_period_ms",
    "guided_decoding_backend": "guided_decoding_backend",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the LLM API. Their default is None, which shows that a flag was not given."""
    group = parser.add_argument_group(
        f"TensorRT-LLM's LLM API (--backend {BACKEND})",
        "--kv-cache-free-gpu-mem-fraction, --cancellation-check-period-ms and --guided-decoding-backend apply too",
    )
    for name, text in _PARALLEL.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)
    group.add_argument(
        "--max-seq-len", type=int, metavar="N", help="tokens of prompt and output together (default: the model's own)"
    )
    group.add_argument(
        "--max-batch-size", type=int, metavar="N",
        help="Triton's max_batch_size: 1 (default) serves moeship's wire contract and the LLM API's tensors; 0 serves "
        "the LLM API's tensors only, in the shapes of NVIDIA's own model",
    )  # fmt: skip


def read_options(arguments: argparse.Namespace, engine_options: PackageOptions) -> LlmApiOptions:
    """The options for the LLM API. `engine_options` are the same flags, read for an engine. Raises RepositoryError for
    flags that only engines support."""
    from export.trtllm.parallel import Parallelism
    from triton_repo.packaging.llmapi_package import LlmApiOptions

    parameters = engine_options.tensorrt_llm
    plain = PackageOptions(
        engine=engine_options.engine, name=engine_options.name, output=engine_options.output, copy=engine_options.copy,
        tensorrt_llm=dataclasses.replace(type(parameters)(), **{name: getattr(parameters, name) for name in _SHARED}),
    )  # fmt: skip
    wrong = [
        f"--{name.replace('_', '-')} is for engines; leave it out"
        for found, meant in (
            (engine_options, plain),
            (engine_options.onnxruntime, plain.onnxruntime),
            (parameters, plain.tensorrt_llm),
        )
        for name, value in vars(found).items()
        if name not in ("onnxruntime", "tensorrt_llm") and value != getattr(meant, name)
    ]
    if wrong:
        raise RepositoryError(f"packaging {arguments.engine} for TensorRT-LLM's LLM API:{listing(wrong)}")
    given = {ours: getattr(parameters, theirs) for theirs, ours in _SHARED.items()}
    given |= {name: getattr(arguments, name) for name in ("max_seq_len", "max_batch_size")}
    sizes = {name: getattr(arguments, name) for name in _PARALLEL if getattr(arguments, name) is not None}
    return LlmApiOptions(
        checkpoint=str(arguments.engine),
        name=arguments.name,
        output=arguments.output,
        parallel=Parallelism(**sizes),
        copy=arguments.copy,
        **{name: value for name, value in given.items() if value is not None},
    )


def refuse_flags(arguments: argparse.Namespace) -> None:
    """Raise RepositoryError if an engine is packaged with flags of the LLM API."""
    given = [name for name in (*_PARALLEL, "max_seq_len", "max_batch_size") if getattr(arguments, name) is not None]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise RepositoryError(
            f"packaging {arguments.engine}: {flags} is for --backend {BACKEND}; an engine was built for its sizes: "
            "leave it out"
        )
