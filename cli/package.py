"""Make a Triton model repository from an engine, or add a model to one that exists."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from triton_repo.package import PackageOptions, package_engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine", type=Path, help="engine directory")
    parser.add_argument("--name", required=True, help="the model's name on the server")
    parser.add_argument("--output", type=Path, required=True, help="model repository: made, or added to")
    parser.add_argument(
        "--instances", type=int, default=1,
        help="requests that run at the same time, each with the engine's memory again (default 1)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="threads of each instance (default: the cores shared out)")
    parser.add_argument(
        "--copy", action="store_true",
        help="copy the engine rather than link to its files; the onnx package refuses to read linked ones",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    fields = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(PackageOptions)}
    package = package_engine(PackageOptions(**fields))
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(package), "folder": str(package.folder)}))
    else:
        how = f"{package.copied_bytes / 1e6:.1f} MB of it copied" if package.copied_bytes else "linked, not copied"
        print(f"{package.folder}: {package.engine_bytes / 1e6:.1f} MB of engine, {how}")
    return 0
