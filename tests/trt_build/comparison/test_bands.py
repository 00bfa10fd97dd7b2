"""The figures of a band: no distance for a sound engine, whatever its weights; ten times a limit for small faults."""

from __future__ import annotations

import numpy as np
import pytest

from export.quantize.grid import dequantize_blocks, quantize_blocks
from trt_build.comparison.limits import limits_of
from trt_build.comparison.weights.bands import distances, measure

RECIPES = [(bits, block) for bits in (2, 3, 4, 5, 6, 8) for block in (32, 64, 128)]
DRAWN = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "heavy-tailed": lambda rng, shape: rng.standard_t(2, shape),
    "few": lambda rng, _shape: rng.standard_normal((3, 128)),
    "rows of unequal size": lambda rng, shape: rng.standard_normal(shape) * np.exp(rng.standard_normal((shape[0], 1))),
}


def judged(found, wanted, bits, block, scales):
    """The distances of a band over their limits: factor, offset and excess. Steps have the signs of `scales`."""
    blocks = wanted.reshape(len(wanted), -1, block)
    ends = np.where(-blocks.min(axis=2) >= blocks.max(axis=2), blocks.min(axis=2), blocks.max(axis=2))
    steps = np.copysign(ends / 2.0 ** (bits - 1), scales).astype(np.float32)

    def again():
        return measure(dequantize_blocks(*quantize_blocks(wanted, bits, block), bits), wanted, steps)

    limits = limits_of(bits, block)
    off = distances(measure(found, wanted, steps), limits, again)
    return off.factor / limits.factor, off.offset / limits.offset, off.excess.max() / limits.excess


@pytest.mark.parametrize(("bits", "block"), RECIPES)
@pytest.mark.parametrize("kind", DRAWN)
def test_a_sound_band_is_well_within_every_limit(bits, block, kind):
    wanted = DRAWN[kind](np.random.default_rng(0), (64, 1024)).astype(np.float32)
    codes, scales = quantize_blocks(wanted, bits, block)
    assert max(judged(dequantize_blocks(codes, scales, bits), wanted, bits, block, scales)) <= 0.5


@pytest.mark.parametrize(("bits", "block"), RECIPES)
@pytest.mark.parametrize("kind", DRAWN)
def test_small_faults_are_ten_times_a_limit(bits, block, kind):
    wanted = DRAWN[kind](np.random.default_rng(0), (64, 1024)).astype(np.float32)
    codes, scales = quantize_blocks(wanted, bits, block)
    scaled = judged(
        dequantize_blocks(codes, scales * np.float32(1.03 if bits > 3 else 1.06), bits), wanted, bits, block, scales
    )
    assert scaled[0] >= 10
    # Scales have both signs, so that the values themselves are not shifted. Codes at the grid's end stay.
    moved = np.minimum(codes, 2**bits - 2) + np.uint8(1)
    assert judged(dequantize_blocks(moved, scales, bits), wanted, bits, block, scales)[1] >= 10
    found = dequantize_blocks(codes, scales, bits)
    found[1] = 0
    assert judged(found, wanted, bits, block, scales)[2] >= 10


def test_nan_is_no_distance_within_a_limit():
    wanted = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    found = wanted.copy()
    found[3, 5] = np.nan
    assert not max(judged(found, wanted, 4, 32, np.ones((16, 2), np.float32))) <= 1
