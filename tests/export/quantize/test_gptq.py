"""GPTQ against GPTQModel's own, against the form with the inverse of H, and against numbers worked out by hand."""

from pathlib import Path

import numpy as np
import pytest

from export.errors import QuantizationError
from export.quantize.gptq import Codes, Hessian, asymmetric, objective, solve, symmetric

GOLDEN = np.load(Path(__file__).parent / "gptqmodel.npz")  # made by ci/packers/solver.py


def inputs_of(features, tokens=600, seed=3):
    """Inputs [tokens, features] whose features depend on each other."""
    generator = np.random.default_rng(seed)
    mixed = generator.standard_normal((tokens, features // 4)) @ generator.standard_normal((features // 4, features))
    return (mixed + 0.3 * generator.standard_normal((tokens, features))).astype(np.float32)


def weights_of(rows, features, seed=4):
    return np.random.default_rng(seed).standard_normal((rows, features)).astype(np.float32)


def factor_of(inputs, damping=0.01):
    hessian = Hessian(inputs.shape[1])
    for part in np.array_split(inputs, 3):
        hessian.add(part)
    return hessian.factor("matrix", damping)


def rounded(weights, block, bits, grids):
    """What rounding to the nearest gives on the same grids, without feedback."""
    blocks = weights.reshape(len(weights), -1, block)
    zeros = grids.zeros[..., None].astype(np.float32)
    scales = np.where(grids.scales == 0, 1, grids.scales)[..., None]
    codes = np.clip(np.rint(blocks / scales + zeros), 0, 2**bits - 1)
    return ((codes - zeros) * grids.scales[..., None]).reshape(weights.shape).astype(np.float32)


def given(scales, zeros):
    """The grids of all blocks, one after the other."""
    places = iter(range(scales.shape[1]))

    def choose(current, pivots):
        place = next(places)
        return scales[:, place], zeros[:, place].astype(np.float32)

    return choose


def test_two_columns_by_hand():
    """H = [[2, 1], [1, 2]] = U D U^T with U_12 = 1/2. 0.4 becomes 0, and the second column 0.4 + 0.4 / 2 becomes 1."""
    inputs = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
    factor = factor_of(inputs, damping=0.0)
    assert factor.unit[0, 1] == pytest.approx(0.5)
    assert factor.pivots == pytest.approx([1.5, 2])
    weights = np.array([[0.4, 0.4]], np.float32)
    found = solve("matrix", weights, factor, 2, 4, given(np.ones((1, 1), np.float32), np.full((1, 1), 8)))
    assert found.codes.tolist() == [[8, 9]]
    assert found.values().tolist() == [[0, 1]]
    assert objective(weights, found.values(), inputs) == pytest.approx(0.56)
    both_nearest = np.zeros((1, 2), np.float32)
    assert objective(weights, both_nearest, inputs) == pytest.approx(0.96)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_codes_are_gptqmodels(bits):
    inputs, weights = GOLDEN["inputs"].astype(np.float32), GOLDEN["weights"].astype(np.float32)
    scales, zeros, values = (GOLDEN[f"{name}{bits}"] for name in ("scales", "zeros", "values"))
    found = solve("matrix", weights, factor_of(inputs), 32, bits, given(scales, zeros))
    assert np.abs(found.values() - values).max() < 1e-6
    if bits < 8:  # where scales are searched
        own = solve("matrix", weights, factor_of(inputs), 32, bits, symmetric(bits))
        assert objective(weights, own.values(), inputs) < 0.9 * objective(weights, values, inputs)


def test_grids_and_codes_are_those_of_the_form_with_the_inverse():
    """Frantar et al., algorithm 1: errors over the diagonal of the Cholesky factor of the inverse of H."""
    inputs, weights, choose = inputs_of(192), weights_of(40, 192), symmetric(4)
    hessian = inputs.T.astype(np.float64) @ inputs
    hessian += np.eye(192) * 0.01 * np.diag(hessian).mean()
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    pivots = (1 / np.diag(upper) ** 2).astype(np.float32)
    left, values = weights.astype(np.float64), np.zeros(weights.shape)
    for column in range(192):
        if column % 64 == 0:
            block = slice(column, column + 64)
            scales, zeros = choose(left[:, block].T.astype(np.float32), pivots[block])
        codes = np.clip(np.rint(left[:, column] / scales + zeros), 0, 15)
        values[:, column] = (codes - zeros) * scales
        error = (left[:, column] - values[:, column]) / upper[column, column]
        left[:, column:] -= np.outer(error, upper[column, column:])
    found = solve("matrix", weights, factor_of(inputs), 64, 4, choose).values()
    assert (np.abs(found - values) < 1e-5).mean() > 0.999  # a tie may fall the other way


@pytest.mark.parametrize("choose", [symmetric, asymmetric])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_products_lose_less_than_by_rounding(bits, choose):
    inputs, weights = inputs_of(256), weights_of(48, 256)
    found = solve("matrix", weights, factor_of(inputs), 128, bits, choose(bits))
    assert found.codes.max() < 2**bits
    assert (found.scales == found.scales.astype(np.float16)).all()
    nearest = rounded(weights, 128, bits, found)
    assert objective(weights, found.values(), inputs) < 0.4 * objective(weights, nearest, inputs)
    # Rounding to the nearest is best where it is judged value by value; so the two are not the same codes.
    assert np.square(found.values() - weights).sum() > np.square(nearest - weights).sum()


def test_without_correlation_gptq_rounds_to_the_nearest():
    inputs, weights = np.diag(np.linspace(1, 2, 64)).astype(np.float32), weights_of(8, 64)
    found = solve("matrix", weights, factor_of(inputs), 32, 4, symmetric(4))
    assert (found.values() == rounded(weights, 32, 4, found)).all()


def test_columns_without_input_are_rounded_to_the_nearest():
    inputs, weights = inputs_of(64), weights_of(8, 64)
    inputs[:, [3, 40]] = 0
    found = solve("matrix", weights, factor_of(inputs), 32, 8, symmetric(8))
    nearest = rounded(weights, 32, 8, found)
    assert (found.values()[:, [3, 40]] == nearest[:, [3, 40]]).all()
    assert (found.values() != nearest).any()


def test_rows_are_independent_and_blocks_of_zeros_stay_zeros():
    inputs, weights = inputs_of(64), weights_of(5000, 64)
    weights[7, 32:] = 0
    weights[9] = 0
    found = solve("matrix", weights, factor_of(inputs), 32, 4, symmetric(4))
    alone = solve("matrix", weights[2040:2060], factor_of(inputs), 32, 4, symmetric(4))
    assert (found.codes[2040:2060] == alone.codes).mean() > 0.999
    assert not found.values()[9].any()
    assert np.isfinite(found.values()).all()


def test_a_singular_product_of_inputs_is_damped():
    """Fewer tokens than features; and so little damping that float32 may need more."""
    inputs, weights = inputs_of(512, tokens=20), weights_of(16, 512)
    found = solve("matrix", weights, factor_of(inputs, damping=1e-9), 64, 4, symmetric(4))
    assert objective(weights, found.values(), inputs) < 0.2 * objective(weights, rounded(weights, 64, 4, found), inputs)


def test_few_tokens_are_damped_more():
    """An expert that saw a quarter as many tokens as it has features: on other inputs of the same kind it is better
    than rounding, and it is worse with the damping of a long text."""
    inputs, weights = np.random.default_rng(6).standard_normal((2000, 256)).astype(np.float32), weights_of(48, 256)
    for feature in range(1, 256):
        inputs[:, feature] += 0.6 * inputs[:, feature - 1]
    few, others = inputs[:64], inputs[64:]
    hessian = Hessian(256)
    hessian.add(few)
    own = solve("matrix", weights, hessian.factor("matrix"), 64, 4, symmetric(4)).values()
    long = solve("matrix", weights, factor_of(few, damping=0.01), 64, 4, symmetric(4)).values()
    nearest = solve("matrix", weights, None, 64, 4, symmetric(4)).values()
    assert objective(weights, own, others) < objective(weights, nearest, others)
    assert objective(weights, own, others) < objective(weights, long, others)


def test_refused_inputs_are_named():
    hessian = Hessian(32)
    with pytest.raises(QuantizationError, match="quantising layer 3 by GPTQ: its inputs .* all zero"):
        hessian.factor("layer 3")
    for value in (np.nan, np.inf, 1e30):
        bad = inputs_of(32, tokens=40)
        bad[5, 6] = value
        hessian = Hessian(32)
        with np.errstate(over="ignore", invalid="ignore"):
            hessian.add(bad)
            with pytest.raises(QuantizationError, match="quantising layer 3 by GPTQ: its inputs .* beyond float32"):
                hessian.factor("layer 3")
    with pytest.raises(QuantizationError, match="a scale is beyond float16's 65504"):
        solve("layer 3", weights_of(4, 32) * 1e7, factor_of(inputs_of(32)), 32, 4, symmetric(4))


def test_values_are_code_less_zero_point_times_scale():
    codes = Codes(
        codes=np.array([[3, 0, 1, 2]], np.uint8), scales=np.array([[0.5, 2]], np.float32),
        zeros=np.array([[1, 2]], np.uint8),
    )  # fmt: skip
    assert codes.values().tolist() == [[1.0, -0.5, -2.0, 0.0]]


@pytest.mark.parametrize("grids", [symmetric, asymmetric])
@pytest.mark.parametrize(
    ("scale", "half", "brain"),
    [
        # Beside 1 float16 has 1 + 2^-10, bfloat16 1 + 2^-7. The number is above the middle of bfloat16's neighbours.
        # float16 rounds it to that middle, from which bfloat16 would go to the even neighbour, 1.
        (1 + 2**-8 + 2**-12, 1 + 2**-8, 1 + 2**-7),
        (3 * 2**-9, 3 * 2**-9, 3 * 2**-9),
        ((1 + 2**-8 + 2**-12) * 2**-17, (1 + 2**-7) * 2**-17, (1 + 2**-7) * 2**-17),  # float16's last digit is 2^-24
    ],
)
def test_scales_are_rounded_once_to_the_type_that_stores_them(grids, scale, half, brain):
    most = -128 if grids is symmetric else 255  # the code of the block's largest value, zero point left out
    weights = np.array([[most * scale] * 32], np.float32)
    for name, expected in (("float16", half), ("bfloat16", brain)):
        found = solve("matrix", weights, None, 32, 8, grids(8, scale_type=name))
        assert found.scales.tolist() == [[expected]], name
        assert np.abs(found.codes.astype(int) - found.zeros.astype(int) - np.rint(weights / expected)).max() <= 1
