"""Runs a contender in a separate process, which sleeps until it gets an order: lines of JSON in and out."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from decode.orders import Answer, Worker, answers, orders, refusals, worker_process
from export.errors import ConfigError
from layer.ggml_layer import GgmlLayer
from layer.onnx_layer import moeship_layer, qmoe_layer
from layer.shape import HIDDEN, PAIRS, Layer

_SETTLE_S = 0.02  # OpenMP's threads spin some milliseconds after their last call (libgomp's GOMP_SPINCOUNT)
WARM_UP_S = 0.04  # threads that just woke can share a core until the scheduler moves one of them

MOESHIP, QMOE = "moeship", "onnxruntime QMoE"
GGML = ("llama.cpp Q4_0", "llama.cpp Q4_K", "ik_llama.cpp Q4_0", "ik_llama.cpp IQ4_KS")
NAMES = (MOESHIP, QMOE, *GGML)


class Contender(Worker):
    """A contender's process, as its parent uses it."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        super().__init__(name, process)
        self.num_bytes: int = self.opened["num_bytes"]
        self.facts: str = self.opened["facts"]

    def seconds(self, rows: int, calls: int) -> list[float]:
        """The seconds of each of `calls` calls, after calls of WARM_UP_S in all that do not count. Calls alternate
        between the pairs of experts."""
        measured: list[float] = self.ask({"rows": rows, "calls": calls})["seconds"]
        time.sleep(_SETTLE_S)
        return measured


@contextmanager
def started(name: str, threads: int) -> Iterator[Contender]:
    """Start a contender of NAMES, or one of `moeship_layer`. Raises ConfigError if it cannot run."""
    runtime = name.partition(" ")[0]
    if name not in NAMES and runtime != MOESHIP:
        raise ConfigError(f"measuring kernels: {name!r} is unknown. There are: {', '.join(NAMES)}")
    with worker_process("layer.process", [name, str(threads)], threads) as process:
        yield Contender(name, process)


def _open(name: str, threads: int, folder: Path) -> Layer:
    runtime, _, kind = name.partition(" ")
    if runtime == MOESHIP:
        return moeship_layer(kind, folder, threads)
    if name == QMOE:
        return qmoe_layer(folder, threads)
    return GgmlLayer(runtime, kind, threads)


def _serve(layer: Layer, answer: Answer) -> None:
    draw = np.random.default_rng(1)
    for order in orders():
        rows = draw.normal(size=(order["rows"], HIDDEN)).astype(np.float32)
        pairs = itertools.cycle(PAIRS)
        warm_from = time.perf_counter()
        layer.run(rows, next(pairs))
        while time.perf_counter() - warm_from < WARM_UP_S:
            layer.run(rows, next(pairs))
        seconds = []
        for _ in range(order["calls"]):
            begun = time.perf_counter()
            layer.run(rows, next(pairs))
            seconds.append(time.perf_counter() - begun)
        answer({"seconds": seconds})


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, answers() as answer, refusals(answer):
        layer = _open(sys.argv[1], int(sys.argv[2]), Path(folder))
        answer({"num_bytes": layer.num_bytes, "facts": layer.facts()})
        _serve(layer, answer)


if __name__ == "__main__":
    main()
