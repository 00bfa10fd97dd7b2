"""Runs a contender in a separate process, which sleeps until it gets an order: lines of JSON in and out."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from export.errors import ConfigError, MoeshipError
from layer.ggml_layer import GgmlLayer
from layer.onnx_layer import OnnxLayer, experts_node, moeship_arrays, qmoe_arrays, qmoe_node
from layer.shape import HIDDEN, PAIRS, Layer

_BENCHMARKS = Path(__file__).resolve().parent.parent
_SETTLE_S = 0.02  # OpenMP's threads spin some milliseconds after their last call (libgomp's GOMP_SPINCOUNT)
WARM_UP_S = 0.04  # threads that just woke can share a core until the scheduler moves one of them

MOESHIP, QMOE = "moeship", "onnxruntime QMoE"
GGML = ("llama.cpp Q4_0", "llama.cpp Q4_K", "ik_llama.cpp Q4_0", "ik_llama.cpp IQ4_KS")
NAMES = (MOESHIP, QMOE, *GGML)


class Contender:
    """A contender's process, as its parent uses it."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name, self._process = name, process
        opened = self._answer()
        self.num_bytes: int = opened["num_bytes"]
        self.facts: str = opened["facts"]

    def seconds(self, rows: int, calls: int) -> list[float]:
        """The seconds of each of `calls` calls, after calls of WARM_UP_S in all that do not count. Calls alternate
        between the pairs of experts."""
        assert self._process.stdin is not None
        print(json.dumps({"rows": rows, "calls": calls}), file=self._process.stdin, flush=True)
        measured: list[float] = self._answer()["seconds"]
        time.sleep(_SETTLE_S)
        return measured

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"the process of {self.name} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise ConfigError(answer["refused"])
        return answer


@contextmanager
def started(name: str, threads: int) -> Iterator[Contender]:
    """Start a contender of NAMES, or `moeship LEVEL`. Raises ConfigError if it cannot run."""
    runtime = name.partition(" ")[0]
    if name not in NAMES and runtime != MOESHIP:
        raise ConfigError(f"measuring kernels: {name!r} is unknown. There are: {', '.join(NAMES)}")
    command = [sys.executable, "-m", "layer.process", name, str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "GGML_NO_BACKTRACE": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=_BENCHMARKS, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Contender(name, process)
        finally:
            assert process.stdin is not None
            process.stdin.close()


def _open(name: str, threads: int, folder: Path) -> Layer:
    runtime, _, kind = name.partition(" ")
    if runtime == MOESHIP:
        return OnnxLayer(moeship_arrays(), experts_node, folder, threads, level=kind)
    if name == QMOE:
        return OnnxLayer(qmoe_arrays(), qmoe_node, folder, threads)
    return GgmlLayer(runtime, kind, threads)


def _serve(layer: Layer, answer: Callable[[dict[str, Any]], None]) -> None:
    draw = np.random.default_rng(1)
    for line in sys.stdin:
        order = json.loads(line)
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
    # Libraries also write to the standard output: send their output to stderr.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as out, tempfile.TemporaryDirectory() as folder:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def answer(what: dict[str, Any]) -> None:
            print(json.dumps(what), file=out, flush=True)

        try:
            layer = _open(sys.argv[1], int(sys.argv[2]), Path(folder))
        except MoeshipError as error:
            answer({"refused": str(error)})
            return
        answer({"num_bytes": layer.num_bytes, "facts": layer.facts()})
        _serve(layer, answer)


if __name__ == "__main__":
    main()
