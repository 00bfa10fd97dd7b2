"""Merge dense models into a mixture, as a mergekit-moe YAML file describes it: Phi-2s into a phixtral, Mistrals or
Llamas into a Mixtral, Qwen2s into a qwen2_moe, Qwen3s into a qwen3_moe. An expert may be a model with a LoRA adapter:
model+adapter.

Paths in the YAML file are relative to its folder.
"""

from __future__ import annotations

import argparse
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from cli.progress import PROGRESS_S, every
from export.errors import ConfigError, named, printable
from export.files.reading import whole_number

if TYPE_CHECKING:
    from export.merge.gate_training import GateTraining

logger = logging.getLogger(__name__)

DEFAULT_TRAINING_TOKENS = 8192
_MAX_TOKENS = 1 << 24

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


def tokens(text: str) -> int:
    """A whole number of 1 or more."""
    number = whole_number(text, 1, _MAX_TOKENS)
    if number is None:
        raise argparse.ArgumentTypeError(f"{named(text, 60)} is not a number of tokens; give 1 to {_MAX_TOKENS}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yml", help="mergekit-moe configuration")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to create; it must not exist")
    parser.add_argument(
        "--max-shard-size", type=byte_count, default=byte_count("5GB"), metavar="SIZE",
        help="largest size of a safetensors file's tensors, e.g. 500MB or 2GiB (default 5GB)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=seed, default=0,
        help="seed of random gates, of noise_scale and of what --train-gates holds out (default 0)",
    )  # fmt: skip
    parser.add_argument(
        "--train-gates", type=Path, nargs="+", default=[], metavar="TEXT",
        help="fit the routers to these texts, at best one of each expert's kind, and print held-out perplexities",
    )  # fmt: skip
    parser.add_argument(
        "--train-tokens", type=tokens, metavar="N",
        help=f"tokens taken of each text (default {DEFAULT_TRAINING_TOKENS})",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    from export.merge.config import read_merge_config
    from export.merge.merge import merge

    config = read_merge_config(arguments.config)
    result = merge(
        config,
        arguments.output,
        seed=arguments.seed,
        max_shard_bytes=arguments.max_shard_size,
        training=_read_training(arguments),
    )
    facts = result.architecture
    print(
        f"{result.folder}: {facts.family} of {facts.num_experts} experts, {facts.experts_per_token} per token, "
        f"{facts.num_layers} layers, {result.num_parameters / 1e6:.1f} M parameters, {result.dtype}, "
        f"{result.num_bytes / 1e6:.1f} MB in {len(result.shards)} file(s)"
    )
    if result.trained is not None:
        print("\n".join(map(printable, result.trained.lines())))
    return 0


def _read_training(arguments: argparse.Namespace) -> GateTraining | None:
    """The texts that the gates are fitted to; None if none is named. Raises ConfigError for a file without text."""
    from export.merge.gate_training import GateTraining, TrainingText
    from trt_build.comparison.evaluation_text import read_texts

    if not arguments.train_gates:
        if arguments.train_tokens is not None:
            raise ConfigError("reading the flags: --train-tokens belongs to --train-gates; name texts, or leave it out")
        return None
    texts = [read_texts([path]) for path in arguments.train_gates]
    return GateTraining(
        texts=tuple(TrainingText(name=text.names[0], content=text.content) for text in texts),
        tokens=arguments.train_tokens or DEFAULT_TRAINING_TOKENS,
        progress=every(PROGRESS_S, logger.info),
    )
