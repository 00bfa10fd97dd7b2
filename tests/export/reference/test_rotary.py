"""The rotary tables beside exact arithmetic, and beside PyTorch at each level of vector instructions that it has here.

PyTorch's values hang on the processor: its float32 power and its cosine are off the exact value by up to one unit in
the last place, and by another one with AVX2 than without. So the tables hold what exact arithmetic rounds to at each
step at which PyTorch rounds, and PyTorch's are held to the distance that its own levels have from each other.
"""

import os
import subprocess
import sys
from decimal import Decimal, getcontext
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from export.families.shared.network import Attention
from export.reference.attention import rotary_tables

WIDTHS, BASES = (32, 64, 80, 96, 112, 128), (1e4, 5e5, 1e6, 1e7)
LEVELS = ("default", "avx2", "avx512")  # of ATEN_CPU_CAPABILITY, each of which has those before it
# As transformers' LlamaRotaryEmbedding, MixtralRotaryEmbedding and PhiRotaryEmbedding compute them, and as phi-msft's
# RotaryEmbedding does, which counts in float32.
PROGRAM = """
import sys, numpy as np, torch
torch.set_num_threads(1)
found = {"level": torch.backends.cpu.get_cpu_capability()}
for width in WIDTHS:
    for base in BASES:
        inverse = 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width))
        positions = torch.arange(4096)[None, None, :].float()
        angles = (inverse[None, :, None].float() @ positions).transpose(1, 2)[0]
        msft = 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
        assert torch.equal(torch.outer(torch.arange(4096, dtype=torch.float32), msft), angles)
        name = f"{width} {base:g}"
        found |= {f"f {name}": inverse.numpy(), f"c {name}": angles.cos().numpy(), f"s {name}": angles.sin().numpy()}
np.savez(sys.argv[1], **found)
"""


def facts(width: int, base: float) -> Attention:
    return Attention(inputs=("qkv",), output="o", num_heads=1, num_kv_heads=1, rotary_dim=width, rotary_base=base)


def frequencies(width: int, base: float) -> np.ndarray:
    """The float32 frequencies of exact powers: each power rounded to float32, then its inverse."""
    getcontext().prec = 60
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    powers = [Fraction(Decimal(base) ** Decimal(float(exponent))) for exponent in exponents]
    return np.array([rounded(1 / Fraction(rounded(power))) for power in powers], dtype=np.float32)


def rounded(value: Fraction) -> float:
    """The float32 nearest to a fraction."""
    near = np.float32(float(value))
    around = (np.nextafter(near, np.float32(0)), near, np.nextafter(near, np.float32(np.inf)))
    return float(min(around, key=lambda one: abs(Fraction(float(one)) - value)))


def steps_apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How many float32 numbers lie between two arrays' values."""
    first, second = (
        np.where((bits := array.view(np.int32).astype(np.int64)) < 0, -(bits & 0x7FFFFFFF), bits)
        for array in (one, other)
    )
    return np.abs(first - second)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("base", BASES)
def test_the_tables_are_exact_arithmetic_rounded_where_pytorch_rounds(width, base):
    cosines, sines = rotary_tables(2048, facts(width, base))
    angles = np.outer(np.arange(2048, dtype=np.float32), frequencies(width, base)).astype(np.longdouble)
    np.testing.assert_array_equal(cosines, np.cos(angles).astype(np.float32))
    np.testing.assert_array_equal(sines, np.sin(angles).astype(np.float32))


def test_pytorch_is_as_far_from_the_tables_as_its_levels_are_from_each_other(tmp_path):
    best = LEVELS.index(torch.backends.cpu.get_cpu_capability().lower())
    program = PROGRAM.replace("WIDTHS", repr(WIDTHS)).replace("BASES", repr(BASES))
    for level in LEVELS[: best + 1]:
        file = Path(tmp_path / f"{level}.npz")
        subprocess.run(
            [sys.executable, "-c", program, file], check=True, env={**os.environ, "ATEN_CPU_CAPABILITY": level}
        )
        theirs = np.load(file)
        assert str(theirs["level"]).lower() == level
        off = 0
        for width in WIDTHS:
            for base in BASES:
                name = f"{width} {base:g}"
                exact = frequencies(width, base)
                apart = steps_apart(theirs[f"f {name}"], exact)
                assert apart.max() <= 2
                off += int((apart > 0).sum())
                same = apart == 0
                for ours, kind in zip(rotary_tables(4096, facts(width, base)), "cs", strict=True):
                    assert steps_apart(ours[:, same], theirs[f"{kind} {name}"][:, same]).max() <= 1
        assert off <= 12, level  # of 1,024 frequencies; measured: 1 by default, 10 with AVX2, 9 with AVX-512
