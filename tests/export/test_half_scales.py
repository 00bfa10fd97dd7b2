"""What is counted of scales that float16 rounds, against numbers worked out by hand."""

import numpy as np
import pytest

from export.quantize.grid import quantize_blocks
from export.quantize.half_scales import SMALLEST_NORMAL, SmallScales

STEP = 2.0**-24  # between float16's subnormal numbers


def counted(*scales, bits=8, block=32):
    """Of blocks in which one value stands alone, so that the scale is known: value / -2^(bits - 1)."""
    values = np.zeros((1, block * len(scales)), np.float32)
    values[0, ::block] = np.float32(-(1 << (bits - 1))) * np.array(scales, np.float32)
    small = SmallScales()
    small.add(values, quantize_blocks(values, bits, block, half_scales=True)[1], bits, block)
    return small


def test_float16s_smallest_normal_number():
    assert np.finfo(np.float16).smallest_normal == SMALLEST_NORMAL
    assert np.finfo(np.float16).smallest_subnormal == STEP


@pytest.mark.parametrize(
    ("scales", "blocks", "worst"),
    [
        ((1.0, -SMALLEST_NORMAL, SMALLEST_NORMAL), 0, 0),
        ((0.0, -0.0), 0, 0),
        ((1000 * STEP, 1.0), 1, 0),  # below the normal numbers, and met exactly
        ((1000.25 * STEP, 1.0), 1, 0.25 / 1000.25),
        ((-1.5 * STEP, 10.25 * STEP, 2.0), 2, 0.5 / 1.5),
        ((0.4 * STEP, 0.0), 1, 1),  # vanishes
    ],
)
def test_blocks_and_the_worst_error_of_a_scale(scales, blocks, worst):
    small = counted(*scales)
    assert (small.blocks, small.num_blocks) == (blocks, len(scales))
    assert small.worst_error == pytest.approx(worst, rel=1e-6)
    assert (small.warning("h.0.fc1") is None) == (blocks == 0)


def test_several_pieces_are_summed_up_and_told_in_one_sentence():
    small, values = SmallScales(), np.zeros((2, 64), np.float32)
    values[0, 0], values[1, 40] = -128 * 1.25 * STEP, 1
    for _ in range(3):
        small.add(values, quantize_blocks(values, 8, 32, half_scales=True)[1], 8, 32)
    text = small.warning("h.0.fc1")
    assert text.startswith(
        "quantising h.0.fc1: 3 of 12 blocks have scales below float16's smallest normal number 6.1e-05"
    )
    assert "rounds a scale by up to 20.0%" in text
    assert "--kernels onnxruntime, whose scales are float32" in text
