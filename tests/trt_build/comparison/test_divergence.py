"""KL divergences from slices of logits are those of the whole rows."""

from __future__ import annotations

import numpy as np
import pytest

from trt_build.comparison.divergence import StreamedDivergence


@pytest.mark.parametrize("step", [1, 7, 64])
@pytest.mark.parametrize(("scale", "error"), [(1.0, 1.0), (3.0, 1e-3), (60.0, 0.1)])
def test_slices_give_what_the_whole_rows_give(step, scale, error):
    rng = np.random.default_rng(5)
    expected = (rng.standard_normal((1, 4, 64)) * scale).astype(np.float32)
    found = (expected + rng.standard_normal((3, 4, 64)) * error + [[[0.0]], [[5.0]], [[-80.0]]]).astype(np.float32)
    sums = StreamedDivergence(3, 4)
    for start in range(0, 64, step):
        sums.add(np.concatenate([expected, found])[..., start : start + step])
    p, q = (np.exp(logits.astype(np.longdouble)) for logits in (expected, found))
    p, q = p / p.sum(axis=-1, keepdims=True), q / q.sum(axis=-1, keepdims=True)
    assert sums.result() == pytest.approx((p * np.log(p / q)).sum(axis=-1).astype(float), rel=1e-6, abs=1e-13)


def test_two_tokens_worked_by_hand():
    sums = StreamedDivergence(1, 1)
    sums.add(np.log([[[0.5]], [[0.25]]]).astype(np.float32))
    sums.add(np.log([[[0.5]], [[0.75]]]).astype(np.float32))
    assert sums.result()[0, 0] == pytest.approx(0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75), rel=1e-6)
