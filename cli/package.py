"""Make a Triton model repository from an engine, or add its models to one that exists.

An engine for ONNX Runtime becomes one model, or with --layout ensemble the four models that an engine for TensorRT-LLM
becomes: preprocessing, tensorrt_llm, postprocessing, and the ensemble under the deployment's name. With --backend
llmapi a Mixtral's checkpoint becomes one model on TensorRT-LLM's LLM API, without an engine. Clients cannot tell them
apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path

from cli import llmapi_package
from export.provider import FLOAT, KV_CACHES
from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.contracts.trtllm_parameters import TensorrtLlmParameters, value_types
from triton_repo.packaging.package import LAYOUTS, Package, PackageOptions, package_engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "engine", type=Path, help=f"engine directory; with --backend {llmapi_package.BACKEND} a checkpoint or hub id"
    )
    parser.add_argument(
        "--backend", choices=[llmapi_package.BACKEND],
        help="package a checkpoint for TensorRT-LLM's LLM API instead of an engine for the engine's own backend",
    )  # fmt: skip
    parser.add_argument("--name", required=True, help="the model's name on the server")
    parser.add_argument("--output", type=Path, required=True, help="model repository to create, or to add to")
    parser.add_argument(
        "--layout", choices=LAYOUTS, help="one model or an ensemble of four (default: what the engine's backend needs)"
    )
    parser.add_argument(
        "--copy", action="store_true",
        help="copy the engine's files instead of linking to them; the onnx package refuses to read linked ones",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--unary", action="store_true",
        help="one response a request, for clients of Triton's plain infer (ModelInfer, /v2/models/NAME/infer), which "
        "have no streams",
    )  # fmt: skip
    _add_onnxruntime_arguments(parser.add_argument_group("ONNX Runtime"))
    _add_tensorrt_llm_arguments(
        parser.add_argument_group("TensorRT-LLM", "options that are not given take the backend's defaults")
    )
    llmapi_package.add_arguments(parser)


_ONNX_RUNTIME = (
    "threads", "slots", "memory_budget", "max_waiting", "max_wait_s", "pause_target_ms", "prefix_cache", "drafts",
    "kv_cache",
)  # fmt: skip


def _add_onnxruntime_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--threads",
        type=int,
        help="threads of the engine (default: one for each usable core)",
    )
    group.add_argument("--slots", type=int, default=8, help="sequences that are computed together (default 8)")
    group.add_argument(
        "--memory-budget", type=byte_count, metavar="BYTES",
        help="memory for keys and values, such as 4GB; requests wait for room in it (default: what the machine has "
        "free when the model is loaded)",
    )  # fmt: skip
    group.add_argument(
        "--max-waiting", type=int, default=64, metavar="N",
        help="requests that may wait for a slot; more are refused at once (default 64)",
    )  # fmt: skip
    group.add_argument(
        "--max-wait-s", type=int, default=60, metavar="S",
        help="seconds that a request may wait for a slot before it is refused (default 60)",
    )  # fmt: skip
    group.add_argument(
        "--pause-target-ms", type=int, default=250, metavar="MS",
        help="how long running answers should pause at most beside a long prompt (default 250)",
    )  # fmt: skip
    group.add_argument(
        "--kv", "--kv-cache-dtype", dest="kv_cache", choices=KV_CACHES, default=FLOAT,
        help="how keys and values are stored: int8 takes a quarter of the memory, of an engine that was built with "
        "--kv int8 (default float)",
    )  # fmt: skip
    group.add_argument(
        "--no-prefix-cache", dest="prefix_cache", action="store_false",
        help="compute every prompt from its first token; by default a prompt goes on from what another request left of "
        "its beginning, which the time to its first token shows",
    )  # fmt: skip
    group.add_argument(
        "--no-drafts", dest="drafts", action="store_false",
        help="compute one token of an answer in a step; by default several are computed where an answer repeats what "
        "its text has already, which changes its speed and not its tokens",
    )  # fmt: skip


def _add_tensorrt_llm_arguments(group: argparse._ArgumentGroup) -> None:
    """A flag for each field of TensorrtLlmParameters."""
    group.add_argument(
        "--served-from", type=Path, metavar="DIR",
        help="path of the repository when it is served, as the server sees it (default: the output)",
    )  # fmt: skip
    kinds = value_types()
    for option in dataclasses.fields(TensorrtLlmParameters):
        flag, kind, text = f"--{option.name.replace('_', '-')}", kinds[option.name], option.metadata["help"]
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=option.default, help=text)
        elif option.metadata["choices"]:
            group.add_argument(flag, choices=option.metadata["choices"], default=option.default, help=text)
        else:
            read = whole_numbers if kind is tuple else kind
            group.add_argument(
                flag, type=read, metavar="N,N" if kind is tuple else kind.__name__.upper(), default=option.default,
                help=text,
            )  # fmt: skip


def byte_count(text: str) -> int:
    """A number of bytes, with kB, MB or GB behind it or without. Raises ArgumentTypeError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(k|M|G)?B?", text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a number of bytes such as 4GB or 800MB, found {text!r}")
    return int(float(found[1]) * {None: 1, "k": 1e3, "M": 1e6, "G": 1e9}[found[2]])


def whole_numbers(text: str) -> tuple[int, ...]:
    """Numbers between commas. Raises ArgumentTypeError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected whole numbers between commas, found {text!r}") from error


def read_options(arguments: argparse.Namespace) -> PackageOptions:
    parameters = TensorrtLlmParameters(
        **{option.name: getattr(arguments, option.name) for option in dataclasses.fields(TensorrtLlmParameters)}
    )
    return PackageOptions(
        engine=arguments.engine,
        name=arguments.name,
        output=arguments.output,
        layout=arguments.layout,
        onnxruntime=ModelParameters(**{name: getattr(arguments, name) for name in _ONNX_RUNTIME}),
        copy=arguments.copy,
        unary=arguments.unary,
        served_from=arguments.served_from,
        tensorrt_llm=parameters,
    )


def run(arguments: argparse.Namespace) -> int:
    package = _package(arguments)
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(package), "folder": str(package.folder)}))
        return 0
    how = f"{package.copied_bytes / 1e6:.1f} MB of it copied" if package.copied_bytes else "linked, not copied"
    steps = f", an ensemble of {', '.join(package.steps)}" if package.steps else ""
    what = "checkpoint" if arguments.backend == llmapi_package.BACKEND else "engine"
    print(f"{package.folder}: {package.engine_bytes / 1e6:.1f} MB of {what}, {how}{steps}")
    return 0


def _package(arguments: argparse.Namespace) -> Package:
    options = read_options(arguments)
    if arguments.backend == llmapi_package.BACKEND:
        from triton_repo.packaging.llmapi_package import package_llmapi

        return package_llmapi(llmapi_package.read_options(arguments, options))
    llmapi_package.refuse_flags(arguments)
    return package_engine(options)
