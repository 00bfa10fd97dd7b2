"""Reads the options of the TensorRT-LLM script from the command line, and estimates the disk and memory that they need.

This runs before anything is installed, so it uses only the standard library.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from gpu_machine import Needs

ROOT = Path(__file__).resolve().parents[2]
# Bytes of the float16 checkpoints of the merged example and of phixtral-4x2_8.
SMALL_BYTES, FULL_BYTES = 12_240_000, 15_620_000_000
# Bytes of an engine's weights divided by those of the float16 checkpoint; embedding and head are not quantised.
SHARES = {"fp32": 2.0, "fp16": 1.0, "bf16": 1.0, "int8": 0.55, "int4": 0.3, "int4_gptq": 0.35, "int4_awq": 0.35}
# Estimates, not measured, of what is needed besides weights: packages and logs on disk; activations, workspaces and a
# cache on the GPU; programs in memory.
BESIDE_DISK, BESIDE_GPU, BESIDE_MEMORY = 4_000_000_000, 4_000_000_000, 8_000_000_000


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint to try: its name, its approximate bytes in float16, its folder, and the command that makes the
    folder, None if the folder exists."""

    name: str
    num_bytes: int
    folder: Path
    command: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options. `output` is the absolute path of the folder for all files; `checkpoint` replaces the small model."""

    output: Path
    checkpoint: Path | None = None
    full: bool = False
    precisions: tuple[str, ...] = ("fp16", "int4")
    tp_size: int = 1
    verify_tokens: int = 2048
    text_tokens: int = 48
    prompt_tokens: int = 128
    output_tokens: int = 128
    concurrency: tuple[int, ...] = (1, 4, 16, 32)
    rounds: int = 3

    @property
    def models(self) -> list[Model]:
        """The models, in the order in which they are tried."""
        models = [self._first_model()]
        if self.full:
            folder = self.output / "checkpoints" / "full"
            words = ("--like", "phixtral-4x2_8", "--output", str(folder))
            command = (sys.executable, str(ROOT / "benchmarks/synthetic_checkpoint.py"), *words)
            models.append(Model(name="full", num_bytes=FULL_BYTES, folder=folder, command=command))
        return models

    def _first_model(self) -> Model:
        if self.checkpoint is not None:
            size = sum(path.stat().st_size for path in self.checkpoint.glob("*.safetensors"))
            return Model(name=self.checkpoint.name, num_bytes=size, folder=self.checkpoint)
        folder = self.output / "checkpoints" / "small"
        words = ("-m", "cli.main", "merge", str(ROOT / "examples/tiny-phixtral/merge.yml"), str(folder))
        return Model(name="small", num_bytes=SMALL_BYTES, folder=folder, command=(sys.executable, *words))

    def needs(self) -> Needs:
        """The most disk space and memory that the run needs. On disk these are the checkpoints, their TensorRT-LLM
        checkpoints and the engines, minus the files that exist already."""
        shares = [SHARES[precision] for precision in self.precisions]
        largest = max(model.num_bytes for model in self.models)
        disk = sum(model.num_bytes * (1 + 2 * sum(shares)) for model in self.models) + BESIDE_DISK
        files = (path.stat() for path in self.output.rglob("*") if path.is_file())
        there = sum({file.st_ino: file.st_size for file in files}.values())  # repositories link to engines
        return Needs(
            output=self.output,
            tp_size=self.tp_size,
            disk=max(0, int(disk) - there),
            # The reference holds the checkpoint in float32; the build holds the weights and the engine of one rank.
            memory=int(2.5 * largest) + BESIDE_MEMORY,
            gpu=int(max(shares) * largest / self.tp_size) + BESIDE_GPU,
        )

    def problems(self) -> Iterator[str]:
        """Messages about options that no machine can satisfy."""
        for precision in self.precisions:
            if precision not in SHARES:
                yield f"--precisions has {precision!r}, there are {', '.join(SHARES)}"
        for name, *_ in _NUMBERS:
            if getattr(self, name) < 1:
                yield f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 1 or more"
        if not self.precisions:
            yield "--precisions is empty, name one or more"
        if not self.concurrency or min(self.concurrency) < 1:
            yield "--concurrency is empty or has a number below 1"
        if self.checkpoint is not None and not (self.checkpoint / "config.json").is_file():
            yield f"--checkpoint is {self.checkpoint}, where no config.json is; name a checkpoint's folder"


# Name, metavar and help of the flags that take one number.
_NUMBERS = (
    ("tp_size", "N", "GPUs that share each engine"),
    ("verify_tokens", "N", "positions to compare with the reference"),
    ("text_tokens", "N", "tokens of each greedy text"),
    ("prompt_tokens", "N", "tokens of each prompt under load"),
    ("output_tokens", "N", "tokens of each answer under load"),
    ("rounds", "N", "rounds of each level of the load"),
)


def read_arguments(description: str | None, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line: the fields of Options, and `check`."""
    default = {field.name: field.default for field in fields(Options)}
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("gpu-results"), metavar="DIR",
        help="folder for all files (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--full", action="store_true", help="also try a model of the size of phixtral-4x2_8")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="checkpoint to try instead of the small model")
    parser.add_argument(
        "--precisions", type=_words, default=default["precisions"], metavar="P,P",
        help=f"of {', '.join(SHARES)}; the group-wise int4_gptq and int4_awq are experimental (default: fp16,int4)",
    )  # fmt: skip
    parser.add_argument(
        "--concurrency", type=_whole_numbers, default=default["concurrency"], metavar="N,N",
        help="streams at a time, one level each (default: 1,4,16,32)",
    )  # fmt: skip
    for name, metavar, text in _NUMBERS:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(
            flag, type=int, default=default[name], metavar=metavar, help=f"{text} (default: %(default)s)"
        )
    parser.add_argument("--check", action="store_true", help="only check whether the script can run here")
    return parser.parse_args(words)


def read_options(arguments: argparse.Namespace) -> Options:
    """The options with absolute paths."""
    values = {name: value for name, value in vars(arguments).items() if name != "check"}
    paths = {name: values[name].absolute() for name in ("output", "checkpoint") if values[name] is not None}
    return Options(**{**values, **paths})


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _whole_numbers(text: str) -> tuple[int, ...]:
    """Raises ArgumentTypeError."""
    try:
        return tuple(int(part) for part in _words(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected whole numbers between commas, found {text!r}") from error
