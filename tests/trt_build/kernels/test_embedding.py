"""Embedding: rows of the kernels' layout against numpy, and ids that it has no row for."""

import numpy as np
import pytest
from kernel_nodes import embedding, random_matrices

from export.quantize.layout import BITS, BLOCK_SIZES

pytestmark = pytest.mark.needs_kernels


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("zeros", [False, True])
def test_every_row_is_its_codes_times_its_scales(bits, block_size, zeros):
    draw = np.random.default_rng(bits * block_size + zeros)
    for rows, features, half in [(37, 200, True), (1, 33, False), (16, 128, True)]:
        matrices = random_matrices(draw, 1, rows, features, bits, block_size, zeros=zeros, bias=False, half=half)
        scales = np.repeat(matrices.scales[0].astype(np.float32), block_size, axis=1)
        expected = (matrices.signed()[0].astype(np.float32) * scales)[:, :features]
        ids = draw.permutation(rows).reshape(1, -1)
        np.testing.assert_array_equal(embedding(matrices).run({"ids": ids}), expected[ids])


def test_ids_of_any_shape():
    matrices = random_matrices(np.random.default_rng(0), 1, 20, 64, 5, 32, bias=False)
    node = embedding(matrices)
    flat = node.run({"ids": np.arange(6)})
    assert flat.shape == (6, 64)
    np.testing.assert_array_equal(node.run({"ids": np.arange(6).reshape(2, 3)}), flat.reshape(2, 3, 64))
    assert node.run({"ids": np.zeros((2, 0), np.int64)}).shape == (2, 0, 64)
    np.testing.assert_array_equal(node.run({"ids": np.array([3, 3, 0])}), flat[[3, 3, 0]])


@pytest.mark.parametrize("wrong", [-1, 20, 1 << 40])
def test_an_id_without_a_row_is_refused(wrong):
    matrices = random_matrices(np.random.default_rng(1), 1, 20, 64, 4, 64, bias=False)
    with pytest.raises(Exception, match=f"token id {wrong}, expected 0 to 19"):
        embedding(matrices).run({"ids": np.array([[0, wrong]])})
