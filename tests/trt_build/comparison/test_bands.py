"""The figures of a band: no distance for a sound engine, whatever its weights; ten times a limit for small faults."""

from __future__ import annotations

import numpy as np
import pytest

from export.quantize.grid import dequantize_blocks, quantize_blocks
from trt_build.comparison.bands import distances, measure
from trt_build.comparison.limits import limits_of

RECIPES = [(4, 32), (4, 64), (8, 32), (8, 64)]
DRAWN = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "heavy-tailed": lambda rng, shape: rng.standard_t(2, shape),
    "few": lambda rng, _shape: rng.standard_normal((3, 64)),
    "rows of unequal size": lambda rng, shape: rng.standard_normal(shape) * np.exp(rng.standard_normal((shape[0], 1))),
}


def judged(found, wanted, bits, block):
    """The distances of a band over their limits: factor, offset and excess."""
    blocks = wanted.reshape(len(wanted), -1, block)
    ends = np.where(-blocks.min(axis=2) >= blocks.max(axis=2), blocks.min(axis=2), blocks.max(axis=2))
    steps = (ends / -(2.0 ** (bits - 1))).astype(np.float32)

    def again():
        return measure(dequantize_blocks(*quantize_blocks(wanted, bits, block), bits), wanted, steps)

    limits = limits_of(bits, block)
    off = distances(measure(found, wanted, steps), limits, again)
    return off.factor / limits.factor, off.offset / limits.offset, off.excess.max() / limits.excess


@pytest.mark.parametrize(("bits", "block"), RECIPES)
@pytest.mark.parametrize("kind", DRAWN)
def test_a_sound_band_is_well_within_every_limit(bits, block, kind):
    wanted = DRAWN[kind](np.random.default_rng(0), (64, 1024)).astype(np.float32)
    found = dequantize_blocks(*quantize_blocks(wanted, bits, block), bits)
    assert max(judged(found, wanted, bits, block)) <= 0.5


@pytest.mark.parametrize(("bits", "block"), RECIPES)
@pytest.mark.parametrize("kind", DRAWN)
def test_small_faults_are_ten_times_a_limit(bits, block, kind):
    wanted = DRAWN[kind](np.random.default_rng(0), (64, 1024)).astype(np.float32)
    codes, scales = quantize_blocks(wanted, bits, block)
    scaled = judged(dequantize_blocks(codes, scales * np.float32(1.03), bits), wanted, bits, block)
    assert scaled[0] >= 10
    # Scales have both signs, so that the values themselves are not shifted.
    moved = np.minimum(codes, 2**bits - 2) + np.uint8(1)
    assert judged(dequantize_blocks(moved, scales, bits), wanted, bits, block)[1] >= 10
    found = dequantize_blocks(codes, scales, bits)
    found[1] = 0
    assert judged(found, wanted, bits, block)[2] >= 10


def test_nan_is_no_distance_within_a_limit():
    wanted = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    found = wanted.copy()
    found[3, 5] = np.nan
    assert not max(judged(found, wanted, 4, 32)) <= 1
