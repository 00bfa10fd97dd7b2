"""Widening and the look for what is not finite, against numpy and ml_dtypes on every value there is."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from export.floats import all_finite, widen

EVERY_16_BITS = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_finite_value_of_16_bits_widens_exactly(dtype):
    values = EVERY_16_BITS.view(dtype)
    values = values[np.isfinite(values.astype(np.float32))]
    assert len(values) > 63_000
    assert (widen(values).view(np.uint32) == values.astype(np.float32).view(np.uint32)).all()


def test_float32_is_not_copied():
    values = np.ones(3, np.float32)
    assert widen(values) is values


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_value_of_16_bits_is_judged_as_numpy_judges_it(dtype):
    values = EVERY_16_BITS.view(dtype)
    assert [all_finite(values[i : i + 1]) for i in range(len(values))] == np.isfinite(
        values.astype(np.float32)
    ).tolist()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan, -np.nan])
def test_one_odd_value_among_many_is_seen(dtype, odd):
    values = np.random.default_rng(0).standard_normal((30, 40)).astype(dtype)
    assert all_finite(values)
    assert all_finite(np.array([np.finfo(np.float32).max, -np.finfo(np.float32).max], np.float32))
    assert all_finite(values[:0])
    values[17, 3] = odd
    assert not all_finite(values)
