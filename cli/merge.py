"""Merge dense models into a mixture, as a mergekit-moe YAML file describes it: Phi-2s into a phixtral, Mistrals or
Llamas into a Mixtral. An expert may be a model with a LoRA adapter: model+adapter.

Paths in the YAML file are relative to its folder.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from export.errors import named
from export.files.reading import whole_number

_MAX_SEED = 2**63 - 1
_MAX_SIZE = 2**63  # bytes
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_count(text: str) -> int:
    """A size such as 5GB, 500MB, 2GiB or 1000000, in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    size = float(match[1]) * unit if match and unit else 0.0
    if not 1 <= size < _MAX_SIZE:
        raise argparse.ArgumentTypeError(f"{named(text, 60)} is not a size; write for example 5GB, 500MB or 2GiB")
    return int(size)


def seed(text: str) -> int:
    """A whole number of 0 or more."""
    number = whole_number(text, 0, _MAX_SEED)
    if number is None:
        raise argparse.ArgumentTypeError(f"{named(text, 60)} is not a seed; give a whole number of 0 to {_MAX_SEED}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yml", help="mergekit-moe configuration")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to create; it must not exist")
    parser.add_argument(
        "--max-shard-size", type=byte_count, default=byte_count("5GB"), metavar="SIZE",
        help="largest size of a safetensors file's tensors, e.g. 500MB or 2GiB (default 5GB)",
    )  # fmt: skip
    parser.add_argument("--seed", type=seed, default=0, help="seed of random gates and of noise_scale (default 0)")


def run(arguments: argparse.Namespace) -> int:
    from export.merge.config import read_merge_config
    from export.merge.merge import merge

    config = read_merge_config(arguments.config)
    result = merge(config, arguments.output, seed=arguments.seed, max_shard_bytes=arguments.max_shard_size)
    facts = result.architecture
    print(
        f"{result.folder}: {facts.family} of {facts.num_experts} experts, {facts.experts_per_token} per token, "
        f"{facts.num_layers} layers, {result.num_parameters / 1e6:.1f} M parameters, {result.dtype}, "
        f"{result.num_bytes / 1e6:.1f} MB in {len(result.shards)} file(s)"
    )
    return 0
