"""The kernels of numpy's products of matrices. The names and what they need are OpenBLAS's: it builds SkylakeX with
-march=skylake-avx512, and Haswell with -mavx2 and -mfma."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from export.blas import VARIABLE, choose_blas_kernels

HASWELL = "fpu sse sse2 ssse3 sse4_1 sse4_2 avx f16c fma avx2"
EMERALD_RAPIDS = f"{HASWELL} avx512f avx512dq avx512cd avx512bw avx512vl avx512_vnni amx_tile"


def chosen(folder: Path, flags: str, environment: dict[str, str] | None = None) -> str | None:
    cpuinfo = folder / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel\t\t: 207\nflags\t\t: {flags}\nbugs\t\t:\n" * 2)
    environment = {} if environment is None else environment
    choose_blas_kernels(environment, cpuinfo)
    return environment.get(VARIABLE)


@pytest.mark.parametrize(
    ("flags", "kernels"),
    [
        (EMERALD_RAPIDS, "SkylakeX"),
        (HASWELL, "Haswell"),
        (f"{HASWELL} avx512f avx512cd avx512er avx512pf", "Haswell"),  # Knights Landing has no AVX-512 BW, DQ and VL
        ("fpu sse sse2 ssse3 sse4_1 sse4_2 avx", None),
    ],
)
def test_kernels_are_those_that_the_processor_has_the_instructions_for(
    tmp_path: Path, flags: str, kernels: str | None
) -> None:
    assert chosen(tmp_path, flags) == kernels


def test_kernels_that_the_user_names_stay(tmp_path: Path) -> None:
    assert chosen(tmp_path, EMERALD_RAPIDS, {VARIABLE: "Zen"}) == "Zen"


def test_other_systems_and_processors_choose_by_themselves(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    choose_blas_kernels(environment, tmp_path / "none")
    arm = tmp_path / "arm"
    arm.write_text("processor\t: 0\nFeatures\t: fp asimd evtstrm aes\n")
    choose_blas_kernels(environment, arm)
    assert not environment


# OpenBLAS says by which kernels it multiplies; its function's name differs between the builds in numpy's wheels.
CORE = """
import ctypes, pathlib, sys
from export.command import run_command

def core():
    import numpy
    folder = pathlib.Path(numpy.__file__).parent.parent / "numpy.libs"
    for file in folder.glob("lib*openblas*"):
        library = ctypes.CDLL(str(file))
        for name in ("openblas_get_corename64_", "scipy_openblas_get_corename64_"):
            if hasattr(library, name):
                getattr(library, name).restype = ctypes.c_char_p
                print(getattr(library, name)().decode())
    return 0

sys.exit(run_command(core))
"""


def test_a_command_multiplies_by_them(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    expected = dict(environment)
    choose_blas_kernels(expected)
    if VARIABLE not in expected:
        pytest.skip("this processor has no AVX2")
    result = subprocess.run([sys.executable, "-c", CORE], env=environment, capture_output=True, text=True, check=True)
    if not result.stdout:
        pytest.skip("this numpy is not built with OpenBLAS")
    assert result.stdout.strip().lower() == expected[VARIABLE].lower()
