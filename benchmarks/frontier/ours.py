"""Our side: engines of one model by recipe and method, and their logits as they are served, with int8 activations."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from decode.engine_bytes import count_bytes
from export.errors import ConfigError
from export.exporter import SERVING_GRAPH
from trt_build.ort.engine import Engine, open_engine
from trt_build.ort.session import ScoringSession

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Ours:
    """An engine, its bits for each weight (codes, scales, sums, router and norms), and the bytes of its weights that
    decoding a token reads."""

    engine: Engine
    bits_per_weight: float
    bytes_per_token: int


def build(checkpoint: Path, recipe: str, method: str, texts: Sequence[Path], tokens: int, output: Path) -> Ours:
    """Build an engine where there is none. `recipe` is a preset or a recipe file; `texts` calibrate, or moeship's own
    text where there are none. Raises ConfigError if the build fails."""
    if not (output / "engine.json").is_file():
        words = ["--recipe" if Path(recipe).suffix else "--precision", recipe, "--method", method]
        if method == "gptq":
            words += ["--calibrate-tokens", str(tokens)]
            words += ["--calibrate", *map(str, texts)] if texts else []
        command = [sys.executable, "-m", "cli.main", "build", "--checkpoint", str(checkpoint), "--output", str(output)]
        done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"building {recipe} by {method}: {done.stderr.strip()[-600:]}")
    engine = open_engine(output, check_digests=False)
    facts = engine.manifest.architecture
    counted = count_bytes(output / SERVING_GRAPH, facts.num_experts, facts.experts_per_token)
    bits = engine.manifest.precision.average_bits_per_weight
    return Ours(engine=engine, bits_per_weight=bits, bytes_per_token=counted.read_per_token)


def logits_of(ours: Ours, windows: Sequence[Sequence[int]]) -> FloatArray:
    """The logits [T, V] of all windows, one after the other."""
    session = ScoringSession(ours.engine, 1)
    return np.concatenate([session.run(window)[0] for window in windows])
