"""BlockLinear against numpy, torch and ONNX Runtime's MatMulNBits; every instruction set gives the same bits."""

import ctypes
import ctypes.util

import numpy as np
import onnxruntime
import pytest
from kernel_nodes import block_linear, product_float, product_int8, random_matrices, rounded
from onnx import TensorProto, helper, numpy_helper

from export.quantize.grid import pack
from export.quantize.layout import BITS, BLOCK_SIZES

pytestmark = pytest.mark.needs_kernels
# Rows below, at and above a tile; widths that are not whole groups and blocks.
SHAPES = [
    (1, 16, 64), (2, 17, 96), (3, 40, 200), (4, 18, 160), (5, 1, 33), (8, 33, 70), (9, 100, 384), (13, 20, 300),
    (16, 48, 129), (40, 31, 257),
]  # fmt: skip


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("zeros", [False, True])
def test_both_paths_over_odd_shapes(bits, block_size, zeros):
    draw = np.random.default_rng(bits * block_size + zeros)
    for number, (tokens, rows, features) in enumerate(SHAPES):
        x = draw.normal(size=(tokens, features)).astype(np.float32)
        matrices = random_matrices(
            draw, 1, rows, features, bits, block_size, zeros=zeros, bias=number % 3 > 0, half=number % 2 == 0
        )
        for activations, product in (("int8", product_int8), ("float32", product_float)):
            expected = product(x, matrices)
            found = block_linear(matrices, activations).run_everywhere({"x": x})
            worst = np.abs(found - expected).max() / np.abs(expected).max()
            assert worst <= 1e-6, (activations, tokens, rows, features)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_sum_has_the_bits_of_its_stated_order(bits, block_size):
    # products.h: with float32 activations s = fma(code - zero, x, s) over the features of a block, y = fma(s, scale, y)
    # over the blocks; with int8 ones y = fma(float(sum of code products), weight scale * activation scale, y). The
    # codes are those that the layout unpacks, the fused products those of the C library.
    draw = np.random.default_rng(bits + block_size)
    for tokens, rows, features, zeros in [(1, 17, block_size + 5, True), (3, 3, 2 * block_size, False)]:
        x = draw.normal(size=(tokens, features)).astype(np.float32)
        matrices = random_matrices(draw, 1, rows, features, bits, block_size, zeros=zeros)
        layout, num_blocks = matrices.layout, -(-features // block_size)
        codes = layout.unpack_codes(layout.pack_codes(matrices.codes, matrices.zeros))[0].astype(np.int64)
        points = np.full(matrices.scales.shape, 1 << (bits - 1)) if matrices.zeros is None else matrices.zeros
        scales = matrices.scales[0].astype(np.float32)
        inner, inner_scales = rounded(x, block_size)
        expected = {kind: np.zeros((tokens, rows), np.float32) for kind in ("float32", "int8")}
        for t, n in np.ndindex(tokens, rows):
            y_float = y_int8 = 0.0
            for p in range(num_blocks):
                own = slice(p * block_size, min(features, (p + 1) * block_size))
                weights, s = codes[n, own] - int(points[0, n, p]), 0.0
                for weight, value in zip(weights, x[t, own], strict=True):
                    s = _fmaf(float(weight), float(value), s)
                y_float = _fmaf(s, float(scales[n, p]), y_float)
                total = float(np.float32((weights * inner[t, p, : len(weights)]).sum()))
                y_int8 = _fmaf(total, float(scales[n, p] * inner_scales[t, p]), y_int8)
            bias = matrices.bias[0, n]
            expected["float32"][t, n], expected["int8"][t, n] = np.float32(y_float) + bias, np.float32(y_int8) + bias
        for activations, values in expected.items():
            found = block_linear(matrices, activations).run_everywhere({"x": x})
            np.testing.assert_array_equal(found.view(np.uint32), values.view(np.uint32), err_msg=activations)


_fmaf = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6").fmaf
_fmaf.restype, _fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3


def test_against_dequantised_torch_at_full_width():
    import torch

    draw = np.random.default_rng(1)
    matrices = random_matrices(draw, 1, 80, 10240, 4, 64)
    x = draw.normal(size=(5, 10240)).astype(np.float32)
    weight, bias = torch.from_numpy(matrices.values()[0]), torch.from_numpy(matrices.bias[0]).double()
    expected = torch.nn.functional.linear(torch.from_numpy(x).double(), weight, bias).numpy()
    found = block_linear(matrices, "float32").run_everywhere({"x": x})
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_within_the_rounding_of_onnx_runtimes_kernel(bits, zeros):
    draw = np.random.default_rng(bits)
    tokens, rows, features, block = 6, 96, 512, 32
    matrices = random_matrices(draw, 1, rows, features, bits, block, zeros=zeros, bias=False, half=False)
    x = draw.normal(size=(tokens, features)).astype(np.float32)
    theirs = _mat_mul_nbits(matrices, x)
    ours = block_linear(matrices).run({"x": x})
    exact = product_float(x, matrices)
    error = np.sqrt(np.mean((theirs - exact) ** 2))
    assert error > 0
    assert np.sqrt(np.mean((ours - exact) ** 2)) <= 1.05 * error
    assert np.sqrt(np.mean((ours - theirs) ** 2)) <= 1.5 * error


def _mat_mul_nbits(matrices, x):
    rows, features = matrices.codes.shape[1:]
    blocks = features // matrices.block_size
    arrays = {"codes": pack(matrices.codes[0], matrices.bits).reshape(rows, blocks, -1), "scales": matrices.scales[0]}
    if matrices.zeros is not None:
        arrays["zeros"] = pack(matrices.zeros[0], matrices.bits)
    node = helper.make_node(
        "MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft", K=features, N=rows, bits=matrices.bits,
        block_size=matrices.block_size, accuracy_level=4,
    )  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "theirs", [value("x", TensorProto.FLOAT, None)], [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def test_extreme_codes_and_activations_do_not_saturate():
    # Every product at its largest: 255 * 127 four at a time, 15 * 127 over whole units.
    for bits in BITS:
        for code in (0, (1 << bits) - 1):
            matrices = random_matrices(np.random.default_rng(0), 1, 16, 256, bits, 128, bias=False, half=False)
            matrices.codes[:] = code
            for sign in (1, -1):
                x = np.full((8, 256), 3.0 * sign, np.float32)
                found = block_linear(matrices).run_everywhere({"x": x})
                np.testing.assert_allclose(found, product_int8(x, matrices), rtol=1e-6)


def test_leading_axes_are_kept_and_no_rows_give_none():
    matrices = random_matrices(np.random.default_rng(2), 1, 20, 64, 4, 32)
    x = np.random.default_rng(3).normal(size=(2, 3, 64)).astype(np.float32)
    node = block_linear(matrices)
    found = node.run({"x": x})
    assert found.shape == (2, 3, 20)
    np.testing.assert_array_equal(found.reshape(6, 20), node.run({"x": x.reshape(6, 64)}))
    assert node.run({"x": x[:, :0]}).shape == (2, 0, 20)


def test_a_row_gives_the_same_alone_and_among_others():
    matrices = random_matrices(np.random.default_rng(4), 1, 300, 512, 4, 64)
    x = np.random.default_rng(5).normal(size=(37, 512)).astype(np.float32)
    for activations in ("int8", "float32"):
        session = block_linear(matrices, activations).session()
        together = session.run(None, {"x": x})[0]
        alone = np.concatenate([session.run(None, {"x": x[i : i + 1]})[0] for i in range(len(x))])
        np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_what_is_not_finite_is_passed_on(value, activations):
    matrices = random_matrices(np.random.default_rng(6), 1, 24, 192, 4, 64)
    x = np.ones((3, 192), np.float32)
    x[1, 100] = value
    found = block_linear(matrices, activations).run_everywhere({"x": x})
    assert np.isfinite(found[[0, 2]]).all()
    if activations == "int8":
        assert not np.isfinite(found[1]).any()
    else:
        weights = matrices.values()[0]
        assert (np.isfinite(found[1]) == False)[weights[:, 100] != 0].all()  # noqa: E712


def test_a_scale_that_is_not_a_number_is_passed_on():
    matrices = random_matrices(np.random.default_rng(7), 1, 24, 128, 4, 64)
    matrices.scales[0, 5, 1] = np.nan
    for activations in ("int8", "float32"):
        found = block_linear(matrices, activations).run_everywhere({"x": np.ones((2, 128), np.float32)})
        assert np.isnan(found[:, 5]).all()
        assert np.isfinite(np.delete(found, 5, axis=1)).all()


@pytest.mark.parametrize("magnitude", [1e-45, 1e-42, 1e-39, 1e-38, 1e30])
def test_denormals_and_huge_values(magnitude):
    matrices = random_matrices(np.random.default_rng(8), 1, 16, 64, 8, 32, bias=False, half=False)
    matrices.scales[:] = 1.0
    matrices.codes[:] = 129  # a weight of 1
    x = np.full((2, 64), magnitude, np.float32)
    for activations in ("int8", "float32"):
        found = block_linear(matrices, activations).run_everywhere({"x": x})
        # Of int8 activations the scale is denormal, too: half of the smallest number off.
        smallest = 64 * 1.5e-45 * (127 / 2 if activations == "int8" else 1)
        np.testing.assert_allclose(found, 64 * x[:, :16].astype(np.float64), rtol=2e-6, atol=smallest)


def test_half_scales_of_every_kind():
    values = np.array([6e-8, 5.9e-5, 6.1e-5, 1.0, 65504.0, -2.5, 0.0, -0.0], np.float16)
    matrices = random_matrices(np.random.default_rng(9), 1, 16, 64, 4, 64, bias=False)
    matrices.scales[0, :, 0] = np.tile(values, 2)
    x = np.random.default_rng(10).normal(size=(2, 64)).astype(np.float32)
    np.testing.assert_allclose(
        block_linear(matrices).run_everywhere({"x": x}), product_int8(x, matrices), rtol=1e-6, atol=1e-9
    )
