"""The integer grid against values worked by hand and against ONNX Runtime's own dequantisation."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from export.quantize.grid import (
    SEARCH_VERSION,
    SLICE_VALUES,
    STRETCHES,
    block_scales,
    dequantize_blocks,
    pack,
    quantize_blocks,
    unpack,
)

BITS = sorted(STRETCHES)


def test_a_block_that_lies_on_the_grid_is_met_exactly():
    # The extreme is +16, so the unit is 16 / -8 = -2 and q = x / -2 + 8: nothing is left to be better than.
    block = np.array([[16, -14, 2, 0, 4, -4, 6, -6, 10, -10, 12, -12, 8, -8, -2, 14]], dtype=np.float32)
    codes, scales = quantize_blocks(block, bits=4, block_size=16)
    assert scales.tolist() == [[-2.0]]
    assert codes.tolist() == [[0, 15, 7, 8, 6, 10, 5, 11, 3, 13, 2, 14, 4, 12, 9, 1]]


def test_of_two_extremes_of_the_same_size_the_negative_one_is_the_grid_s_longer_side():
    # The unit is -128 / -128 = 1, so the codes are 127, -128, 1 and 0; with the scale
    # (128^2 + 128^2 + 1) / (127 * 128 + 128 * 128 + 1) = 32769 / 32641 they are as large as the values.
    codes, scales = quantize_blocks(np.array([[128, -128, 1, 0]], dtype=np.float32), bits=8, block_size=4)
    assert scales.tolist() == [[float(np.float32(32769 / 32641))]]
    assert (codes.astype(int) - 128).tolist() == [[127, -128, 1, 0]]


def test_halves_round_to_even_and_values_past_the_end_clip():
    # 8 bits know one stretch: the unit is -128 / -128 = 1, and it stays, since 0.5^2 + 2 * 1.5^2 + 2.5^2 is
    # 2 * (2 * 1.5) + 2 * 2.5.
    block = np.array([[-128, 0.5, 1.5, -1.5, 2.5, 0, 0, 0]], dtype=np.float32)
    codes, scales = quantize_blocks(block, bits=8, block_size=8)
    assert scales.tolist() == [[1.0]]
    assert (codes.astype(int) - 128).tolist() == [[-128, 0, 2, -2, 2, 0, 0, 0]]
    clipped, _ = quantize_blocks(np.array([[-128, 127.9, 127.8, 0]], dtype=np.float32), bits=8, block_size=4)
    assert clipped[0, 1] == 255


def test_a_block_may_be_longer_than_what_is_quantised_at_a_time():
    block = np.zeros((1, 2 * SLICE_VALUES), dtype=np.float32)
    block[0, 5] = -2.0
    codes, scales = quantize_blocks(block, bits=4, block_size=2 * SLICE_VALUES)
    assert scales.tolist() == [[0.25]]  # -2 / -8
    assert np.flatnonzero(codes != 8).tolist() == [5]
    assert codes[0, 5] == 0


@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_that_of_the_best_scale_among_many_or_nearly(bits):
    """The least squared error over 281 scales of either sign, found by trying them in float64."""
    half = 1 << (bits - 1)
    values = np.random.default_rng(2).standard_normal((200, 64))
    codes, scales = quantize_blocks(values.astype(np.float32), bits, 64)
    found = ((dequantize_blocks(codes, scales, bits) - values) ** 2).sum()
    least = np.full(len(values), np.inf)
    for size in np.linspace(-1.2, 1.2, 281):
        scale = np.abs(values).max(axis=1, keepdims=True) / half * (size or 1)
        grid = np.clip(np.rint(values / scale), -half, half - 1)
        least = np.minimum(least, ((grid * scale - values) ** 2).sum(axis=1))
    assert found <= least.sum() * {2: 1.18, 3: 1.1, 8: 1.1}.get(bits, 1.02)


def plainly(values, bits, block_size):
    """The grid as its description reads, value by value in float32; sums in the order that it states."""
    half, one = 1 << (bits - 1), np.float32(1)

    def summed(products):
        lanes = np.zeros(4, np.float32)
        rows = products.reshape(-1, 4)
        for four in range(0, len(rows), 4):
            for row in rows[four : four + 4][::-1]:
                lanes += row
        return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])

    codes, scales = [], []
    for block in values.reshape(-1, block_size):
        extreme = block.min() if -block.min() >= block.max() else block.max()
        unit = extreme / np.float32(-half)
        steps, best, most = block / unit, np.float32(0), np.float32(0)
        own = summed(steps * steps)
        for stretch in STRETCHES[bits]:
            grid = np.clip(np.rint(steps * np.float32(1 / stretch)), -half, half - 1)
            products = summed(grid * steps)
            explained = products * products / summed(grid * grid)
            if explained > most:
                best, most = own / products, explained
        scales.append(unit * best)
        codes.append(np.clip(np.rint(block * (one / scales[-1])), -half, half - 1) + half)
    return np.array(codes).reshape(values.shape), np.array(scales).reshape(*values.shape[:-1], -1)


@pytest.mark.parametrize("bits", BITS)
def test_values_keep_their_size_along_the_weights(bits):
    """The scale with the least squared error loses as much as that error is: 3 % at 3 bits."""
    values = np.random.default_rng(7).standard_normal((256, 256)).astype(np.float32)
    found = dequantize_blocks(*quantize_blocks(values, bits, 64), bits)
    lost = 1 - (found * values).sum() / (values * values).sum()
    error = np.square(found - values).sum() / np.square(values).sum()
    assert abs(lost) <= 0.65 * error


def test_without_a_search_the_scale_is_that_of_the_largest_value():
    values = np.random.default_rng(8).standard_normal((8, 64)).astype(np.float32)
    codes, scales = quantize_blocks(values, 4, 32, half_scales=True, nearest=True)
    blocks = values.reshape(-1, 32)
    extremes = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)[:, 0]
    expected = (extremes / -8).astype(np.float16).astype(np.float32)
    assert scales.reshape(-1).tolist() == expected.tolist()
    signed = np.clip(np.rint(blocks / expected[:, None]), -8, 7)
    assert (codes.reshape(-1, 32).astype(int) - 8 == signed).mean() > 0.999


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("size", [1, 1e-30])
def test_whole_slices_give_what_block_by_block_gives_bit_for_bit(monkeypatch, bits, block_size, size):
    monkeypatch.setattr("export.quantize.grid.SLICE_VALUES", 7 * block_size)  # several slices, the last one short
    values = (np.random.default_rng(4).standard_t(3, (5, 6, 384)) * size).astype(np.float32)
    codes, scales = quantize_blocks(values, bits, block_size)
    expected_codes, expected_scales = plainly(values, bits, block_size)
    assert (codes == expected_codes).all()
    assert scales.tolist() == expected_scales.tolist()


def test_low_nibble_holds_the_lower_index():
    assert pack(np.array([[1, 2, 15, 0]], dtype=np.uint8), 4).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize(("bits", "relative_error"), [(4, 0.09), (8, 0.006)])
def test_unpacking_returns_the_codes_and_the_error_is_that_of_the_grid(bits, relative_error):
    values = np.random.default_rng(0).standard_normal((70, 96)).astype(np.float32)
    codes, scales = quantize_blocks(values, bits, 32)
    assert (unpack(pack(codes, bits), bits) == codes).all()
    assert np.sqrt(np.mean((dequantize_blocks(codes, scales, bits) - values) ** 2)) <= relative_error


def test_a_block_of_zeros_stays_zero():
    codes, scales = quantize_blocks(np.zeros((1, 32), np.float32), 4, 32)
    assert dequantize_blocks(codes, scales, 4).tolist() == [[0.0] * 32]


def test_zeros_of_either_sign_have_one_scale():
    signs = np.random.default_rng(0).choice([0.0, -0.0], (9, 32)).astype(np.float32)
    _, scales = quantize_blocks(signs, 4, 32)
    assert not scales.view(np.uint32).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_matmulnbits_reads_our_packing_as_we_do(bits):
    weights = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    codes, scales = quantize_blocks(weights, bits, 32)
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=64, N=5, bits=bits, block_size=32
    )
    graph = helper.make_graph(
        [node], "one",
        [helper.make_tensor_value_info(*row) for row in (
            ("x", TensorProto.FLOAT, [64, 64]), ("codes", TensorProto.UINT8, [5, 2, 4 * bits]),
            ("scales", TensorProto.FLOAT, [5, 2]))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 5])],
    )  # fmt: skip
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"x": np.eye(64, dtype=np.float32), "codes": pack(codes, bits).reshape(5, 2, -1), "scales": scales}
    (found,) = session.run(None, feeds)
    np.testing.assert_allclose(found.T, dequantize_blocks(codes, scales, bits), atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1e-30, 1e20])
def test_weights_whose_squares_leave_float32_keep_their_values(bits, size):
    values = (np.random.default_rng(0).standard_normal((3, 32)) * size).astype(np.float32)
    restored = dequantize_blocks(*quantize_blocks(values, bits, 32), bits)
    assert np.abs(restored / size - values / size).max() <= np.abs(values / size).max() * {2: 0.6}.get(
        bits, 2.0 ** (1 - bits)
    )


@pytest.mark.parametrize(("bits", "half_scales"), [(4, False), (4, True), (8, False)])
def test_refitted_scales_have_the_least_squared_error_for_their_codes(bits, half_scales):
    # Values on an uneven grid of sixteen steps, as nf4 has: rounding alone makes them 1.4 % too large together.
    rng = np.random.default_rng(5)
    levels = np.sort(rng.standard_normal(16)).astype(np.float32)
    values = (levels[rng.integers(0, 16, (64, 128))] * rng.uniform(0.5, 2, (64, 1))).astype(np.float32)
    values[3, :32] = 0
    plain = dequantize_blocks(*quantize_blocks(values, bits, 32, half_scales=half_scales), bits)
    codes, scales = quantize_blocks(values, bits, 32, half_scales=half_scales, refit=True)
    found = dequantize_blocks(codes, scales, bits)
    signed = codes.astype(np.float64).reshape(-1, 32) - (1 << (bits - 1))
    best = (signed * values.reshape(-1, 32)).sum(axis=1) / np.maximum((signed**2).sum(axis=1), 1)
    np.testing.assert_allclose(scales.reshape(-1), best, rtol=2.0**-11 if half_scales else 1e-5)
    assert np.square(found - values).sum() < np.square(plain - values).sum()
    if half_scales:
        assert (scales == scales.astype(np.float16)).all()


@pytest.mark.parametrize("bits", sorted(STRETCHES))
@pytest.mark.parametrize(("half_scales", "nearest"), [(False, False), (True, False), (True, True)])
def test_scales_without_codes_are_those_of_the_codes(bits, half_scales, nearest):
    values = np.random.default_rng(2).standard_t(4, (700, 384)).astype(np.float32)  # more than a slice, the last short
    values[3, :64] = 0
    _, scales = quantize_blocks(values, bits, 64, half_scales=half_scales, nearest=nearest)
    assert np.array_equal(block_scales(values, bits, 64, half_scales=half_scales, nearest=nearest), scales)


def test_another_search_has_another_version():
    """The scales of a block by each version of the search, in units of its largest value. Who changes what the search
    gives raises SEARCH_VERSION and adds a row: verify would find older engines wrong otherwise."""
    block = np.random.default_rng(7).permutation(np.arange(1, 65, dtype=np.float32)) * np.float32([1, -1] * 32)
    known = {1: {2: 35.590927, 3: 16.351006, 4: 8.061289, 5: 3.934196, 6: 1.977361, 8: 0.5}}
    found = {bits: float(quantize_blocks(block[None], bits, 64)[1][0, 0]) for bits in STRETCHES}
    assert found == pytest.approx(known[SEARCH_VERSION], rel=1e-5)
