"""Chooses the instructions by which numpy multiplies matrices.

numpy's wheels contain OpenBLAS, which chooses its kernels by the processor's model number when it is loaded. OpenBLAS
does not know a model that is younger than itself: for an Emerald Rapids (family 6, model 207) OpenBLAS 0.3.23, of numpy
1.26, takes the kernels of SSE3, which multiply at a fifth of the speed. What kernels need is instructions, and the
system lists these for every model. OPENBLAS_CORETYPE names the kernels (OpenBLAS, README.md, "Support for multiple
targets in a single library").
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

VARIABLE = "OPENBLAS_CORETYPE"
_chosen: set[str] = set()  # the kernels that were set in this process's environment
_CPUINFO = Path("/proc/cpuinfo")
_FIRST_PROCESSOR = 1 << 14  # bytes of /proc/cpuinfo in which the first processor's flags are
# OpenBLAS's names of kernels, the best first, and the flags of /proc/cpuinfo that they need. Their float32 products use
# no instructions that came later.
_KERNELS = (
    ("SkylakeX", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma"}),
    ("Haswell", {"avx2", "fma"}),
)


def choose_blas_kernels(environment: MutableMapping[str, str] = os.environ, cpuinfo: Path = _CPUINFO) -> None:
    """Set OPENBLAS_CORETYPE to the best kernels that this processor has the instructions for, for this process and
    those that it starts. Must be called before numpy is imported. Does nothing where the variable is set already, and
    on processors without AVX2."""
    if VARIABLE in environment:
        return
    try:
        with cpuinfo.open("rb") as stream:
            lines = stream.read(_FIRST_PROCESSOR).decode("ascii", "replace").splitlines()
    except OSError:  # not Linux
        return
    flags = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set[str]())
    kernels = next((name for name, needed in _KERNELS if needed <= flags), None)
    if kernels is not None:
        environment[VARIABLE] = kernels
        if environment is os.environ:
            _chosen.add(kernels)


def is_chosen_here() -> bool:
    """Whether OPENBLAS_CORETYPE has the value that `choose_blas_kernels` gave it in this process, and not one that the
    process was started with."""
    return os.environ.get(VARIABLE) in _chosen
