"""The CPU kernels' layout: by hand, there and back, and what it does not have."""

import numpy as np
import pytest

from export.errors import QuantizationError
from export.provider import OWN
from export.quantize.layout import BITS, BLOCK_SIZES, MatrixLayout


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_code_lies_where_the_formula_says(bits, block_size):
    rows, features = 19, block_size + 5
    layout = MatrixLayout(rows=rows, features=features, bits=bits, block_size=block_size)
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (rows, features), dtype=np.uint8)
    packed = layout.pack_codes(codes)
    assert packed.shape == (2, 2, 2 * block_size * bits)
    low = {2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 8: 8}[bits]
    planes = [(low, 0, 0)] + ([(bits - low, low, low)] if bits > low else [])  # width, first line, lowest bit
    for row in range(32):
        for feature in range(2 * block_size):
            block, inside = divmod(feature, block_size)
            unit, inside = divmod(inside, 32)
            quad, last = divmod(inside, 4)
            found = 0
            for width, first_line, lowest in planes:
                line, place = divmod(quad, 8 // width)
                byte = packed[row // 16, block, 64 * (bits * unit + first_line + line) + 4 * (row % 16) + last]
                found |= (int(byte) >> (width * place) & ((1 << width) - 1)) << lowest
            expected = codes[row, feature] if row < rows and feature < features else 1 << (bits - 1)
            assert found == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("stack", [(), (3,)])
def test_there_and_back(bits, stack):
    layout = MatrixLayout(rows=40, features=200, bits=bits, block_size=64)
    draw = np.random.default_rng(1)
    codes = draw.integers(0, 1 << bits, (*stack, 40, 200), dtype=np.uint8)
    zeros = draw.integers(0, 1 << bits, (*stack, 40, 4), dtype=np.uint8)
    scales = draw.random((*stack, 40, 4), dtype=np.float32)
    packed = layout.pack_codes(codes, zeros)
    assert packed.shape == (*stack, *layout.codes_shape)
    np.testing.assert_array_equal(layout.unpack_codes(packed), codes)
    for values in (scales, scales.astype(np.float16), zeros):
        ours = layout.pack_scales(values)
        assert (ours.shape, ours.dtype) == ((*stack, *layout.scales_shape), values.dtype)
        np.testing.assert_array_equal(layout.unpack_scales(ours), values)


def test_a_line_by_hand():
    # Row 0 holds 0, 1, 2, ... 15 twice; its first line has features 0 to 3 in the low and 4 to 7 in the high halves.
    codes = np.zeros((16, 32), np.uint8)
    codes[0] = np.arange(32) % 16
    line = MatrixLayout(rows=16, features=32, bits=4, block_size=32).pack_codes(codes)[0, 0, :64]
    assert line[:4].tolist() == [0x40, 0x51, 0x62, 0x73]
    assert not line[4:].any()


def test_a_unit_of_three_bits_by_hand():
    # Row 0 holds 0, 1, ... 7 four times: an even quad is 0, 1, 2, 3, an odd one 4, 5, 6, 7. Their two low bits are the
    # same 0, 1, 2, 3 in all four places of a byte: 0, 1 * 0x55, 2 * 0x55, 3 * 0x55. The third bit is set in odd quads.
    codes = np.zeros((16, 32), np.uint8)
    codes[0] = np.arange(32) % 8
    packed = MatrixLayout(rows=16, features=32, bits=3, block_size=32).pack_codes(codes)[0, 0].reshape(3, 64)
    assert packed[:, :4].tolist() == [[0, 0x55, 0xAA, 0xFF], [0, 0x55, 0xAA, 0xFF], [0xAA] * 4]
    assert not packed[:, 4:].any()


def test_a_unit_of_six_bits_by_hand():
    # Row 1 holds 0, 2, 4, ... 62: quad i is 8 * i + (0, 2, 4, 6). Line t has the low halves of quads 2 * t and
    # 2 * t + 1, which are 0, 2, 4, 6 and 8, 10, 12, 14. The two high bits are i // 2: 0, 0, 1, 1 in the fifth line and
    # 2, 2, 3, 3 in the sixth, lowest place first.
    codes = np.zeros((16, 32), np.uint8)
    codes[1] = 2 * np.arange(32)
    packed = MatrixLayout(rows=16, features=32, bits=6, block_size=32).pack_codes(codes)[0, 0].reshape(6, 64)
    low = [0x80, 0xA2, 0xC4, 0xE6]
    assert packed[:, 4:8].tolist() == [low, low, low, low, [0b01010000] * 4, [0b11111010] * 4]
    assert not packed[:, :4].any()
    assert not packed[:, 8:].any()


@pytest.mark.parametrize("bits", BITS)
def test_bytes_a_weight(bits):
    layout = MatrixLayout(rows=10240, features=2560, bits=bits, block_size=64)
    num_bytes = np.prod(layout.codes_shape) + 2 * np.prod(layout.scales_shape)
    assert num_bytes * 8 / (10240 * 2560) == bits + 0.25


@pytest.mark.parametrize(
    ("bits", "block_size", "rows"), [(7, 32, 16), (1, 32, 16), (4, 16, 16), (4, 256, 16), (4, 32, 0)]
)
def test_what_it_does_not_have(bits, block_size, rows):
    with pytest.raises(QuantizationError, match="laying out a matrix"):
        MatrixLayout(rows=rows, features=64, bits=bits, block_size=block_size)


def test_the_provider_offers_what_the_layout_has():
    assert (OWN.bits, OWN.block_sizes) == (BITS, BLOCK_SIZES)
