"""Measures the processor's peak rate of int8 products with a loop that is compiled for it at run time (int8_peak.c)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from export.errors import ConfigError

SOURCE = Path(__file__).with_name("int8_peak.c")
_STEPS = 1 << 21  # of the loop: some 10 ms
_TURNS = 8
_COMPILERS = ("cc", "gcc", "clang")


class Peak:
    """The loop, compiled into `folder`. Raises ConfigError if there is no compiler, or no loop for this CPU."""

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(str(_compile(folder)))
        self._library.name.restype = ctypes.c_char_p
        self._library.products.restype = ctypes.c_int64
        self._library.products.argtypes = [ctypes.c_int64]
        self.instructions: str = self._library.name().decode()
        if self._library.products(1) <= 0:
            raise ConfigError(
                f"measuring the peak of int8 products: {SOURCE.name} has no loop that runs on this processor "
                f"({self.instructions}); leave it out with --no-peak"
            )

    def measure(self, threads: int) -> float:
        """Int8 products per second of `threads` threads together: the fastest of several turns, because threads that
        just woke can share a core."""
        with ThreadPoolExecutor(max_workers=threads) as pool:
            list(pool.map(self._library.products, [1] * threads))
            return max(self._turn(pool, threads) for _ in range(_TURNS))

    def _turn(self, pool: ThreadPoolExecutor, threads: int) -> float:
        begun = time.perf_counter()
        done: int = sum(pool.map(self._library.products, [_STEPS] * threads))
        return done / (time.perf_counter() - begun)


def _compile(folder: Path) -> Path:
    compiler = os.environ.get("CC") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise ConfigError(
            f"measuring the peak of int8 products: no C compiler ({', '.join(_COMPILERS)}) is on PATH to compile "
            f"{SOURCE.name}; install one, or leave the peak out with --no-peak"
        )
    path = folder / "int8_peak.so"
    command = [compiler, "-O2", "-march=native", "-shared", "-fPIC", str(SOURCE), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(
            f"measuring the peak of int8 products: {compiler} does not compile {SOURCE.name}: "
            f"{done.stderr.strip()[-300:]}; leave the peak out with --no-peak"
        )
    return path
