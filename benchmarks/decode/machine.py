"""Describes the machine of a benchmark: processor, caches, memory, kernel, versions, and memory read bandwidth."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from trt_build.machine.bandwidth import NUM_BYTES, NUM_TURNS, measure_read_bandwidth

PACKAGES = (
    "moeship", "numpy", "onnxruntime", "llama-cpp-python", "ik-llama-cpp-python", "gguf", "torch", "transformers",
)  # fmt: skip
_PIECE_WEIGHTS = 1 << 20
_BENCHMARKS = Path(__file__).resolve().parent.parent
_CPU = Path("/sys/devices/system/cpu/cpu0/cache")


def describe() -> dict[str, Any]:
    """What Linux reports about the machine, as JSON values."""
    return {
        "processor": _first(Path("/proc/cpuinfo").read_text(), "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "vector_extensions": vector_extensions(),
        "caches": _caches(),
        "memory_bytes": memory("MemTotal"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def vector_extensions() -> list[str]:
    """The processor's vector extensions that decide which kernels run, by their names in /proc/cpuinfo."""
    flags = set(_first(Path("/proc/cpuinfo").read_text(), "flags").split())
    known = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return [flag for flag in known if flag in flags]


def slug(machine: dict[str, Any]) -> str:
    """A part of a file name that identifies the machine: the name and cores of its processor."""
    name = re.sub(r"\((r|tm)\)|cpu|@.*", "", machine["processor"].lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {machine['cores']} cores").strip("-")


def memory(key: str) -> int:
    """The value of a line of /proc/meminfo, in bytes."""
    return int(_first(Path("/proc/meminfo").read_text(), key).split()[0]) * 1024


def busy_seconds() -> float:
    """Seconds that all cores together have been busy since boot, including time stolen by the hypervisor (proc(5))."""
    words = _first_line(Path("/proc/stat")).split()
    user, nice, system, _idle, _waiting, interrupt, soft, steal = map(int, words[1:9])
    return (user + nice + system + interrupt + soft + steal) / os.sysconf("SC_CLK_TCK")


def read_bandwidth(threads: int, num_bytes: int = NUM_BYTES) -> dict[str, float]:
    """Memory read bandwidth in bytes per second by method, measured in a separate process.

    There are two methods, as neither is the fastest on every machine: the sum of integers, as in
    trt_build/machine/bandwidth.py, and BLAS's dot product of each thread's floats with themselves.
    """
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    code = f"import json; from decode.machine import methods; print(json.dumps(methods({threads}, {num_bytes})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=_BENCHMARKS, env=environment, capture_output=True, text=True, check=True
    )
    rates: dict[str, float] = json.loads(done.stdout)
    return rates


def methods(threads: int, num_bytes: int) -> dict[str, float]:
    """Memory read bandwidth in bytes per second by method. The caller has to limit BLAS to one thread."""
    return {
        "integer sum": measure_read_bandwidth(num_bytes, threads),
        "dot product": _dot_bandwidth(threads, num_bytes),
    }


def _dot_bandwidth(threads: int, num_bytes: int) -> float:
    buffer = np.ones(num_bytes // 4, dtype=np.float32)
    shares = [share.reshape(-1) for share in np.array_split(buffer, threads)]

    def read(share: np.ndarray[Any, np.dtype[np.float32]]) -> float:
        pieces = (share[start : start + _PIECE_WEIGHTS] for start in range(0, len(share), _PIECE_WEIGHTS))
        return sum(float(np.dot(piece, piece)) for piece in pieces)

    fastest = float("inf")
    with ThreadPoolExecutor(max_workers=threads) as pool:
        for _ in range(NUM_TURNS):
            started = time.perf_counter()
            total = sum(pool.map(read, shares))
            fastest = min(fastest, time.perf_counter() - started)
            if total != len(buffer):
                raise AssertionError(f"a turn summed {total} ones, expected {len(buffer)}")
    return buffer.nbytes / fastest


def _first(text: str, key: str) -> str:
    found = re.search(rf"^{re.escape(key)}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _first_line(path: Path) -> str:
    with path.open(encoding="ascii") as file:
        return file.readline()


def _caches() -> dict[str, str]:
    """Sizes of the caches of the first core, by level and kind."""
    caches = {}
    for index in sorted(_CPU.glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        caches[f"L{level} {kind.lower()}"] = size
    return caches


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
