"""The integer grid against values worked by hand and against ONNX Runtime's own dequantisation."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from export.errors import QuantizationError
from export.quantize.grid import check_blocks, dequantize_blocks, pack, quantize_blocks, unpack


def test_a_block_worked_by_hand_at_four_bits():
    # The extreme is +16, so scale = 16 / -8 = -2 and q = x / -2 + 8, halves to even.
    block = np.array([[16, -14, 2, 1, 0, 3, -2, 8, 4, -4, 6, -6, 10, -10, 12, -12]], dtype=np.float32)
    codes, scales = quantize_blocks(block, bits=4, block_size=16)
    assert scales.tolist() == [[-2.0]]
    assert codes.tolist() == [[0, 15, 7, 8, 8, 6, 9, 4, 6, 10, 5, 11, 3, 13, 2, 14]]


def test_low_nibble_holds_the_lower_index():
    assert pack(np.array([[1, 2, 15, 0]], dtype=np.uint8), 4).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking_returns_the_codes_and_the_extreme_of_each_block_is_exact(bits):
    values = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    codes, scales = quantize_blocks(values, bits, 32)
    assert (unpack(pack(codes, bits), bits) == codes).all()
    restored = dequantize_blocks(codes, scales, bits)
    blocks, found = values.reshape(-1, 32), restored.reshape(-1, 32)
    extreme = np.abs(blocks).argmax(axis=1)
    rows = np.arange(len(blocks))
    np.testing.assert_allclose(found[rows, extreme], blocks[rows, extreme], rtol=1e-6)
    # One value, opposite the extreme, may clip by a whole step; all others round to half a step.
    step = np.abs(scales).reshape(-1, 1)
    assert (np.abs(found - blocks) <= step * 1.001).all()
    assert np.mean(np.abs(found - blocks) <= step * 0.5001) > 0.95


def test_a_block_of_zeros_stays_zero():
    codes, scales = quantize_blocks(np.zeros((1, 32), np.float32), 4, 32)
    assert dequantize_blocks(codes, scales, 4).tolist() == [[0.0] * 32]


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


def test_features_that_do_not_fill_their_blocks_are_refused():
    with pytest.raises(QuantizationError, match=r"quantising w: its 72 input features .* block size 32; build fp32"):
        check_blocks("w", 72, 4, 32)
