"""The operations of the reference by hand and against torch: routing, activations, norms, and attention."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from export.architecture import Router
from export.errors import ExportError
from export.families.shared.network import Activation, Attention
from export.reference.attention import attend, rotary_tables
from export.reference.mixture import route
from export.reference.operations import activate, layer_norm, rms_norm

LOGITS = np.array([[0.0, 2.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0], [-1.0, 0.0, 3.0, -2.0]], dtype=np.float32)


def test_of_equal_logits_the_lowest_experts_are_chosen():
    chosen, shares = route(LOGITS, Router(), 3)
    assert chosen.tolist() == [[1, 3, 2], [0, 1, 2], [2, 1, 0]]
    np.testing.assert_allclose(shares[1], 1 / 3, rtol=1e-6)
    e = math.exp(-1)
    np.testing.assert_allclose(shares[0], np.array([1, 1, e]) / (2 + e), rtol=1e-6)


def test_a_router_may_not_normalise_and_may_scale():
    chosen, shares = route(LOGITS, Router(normalise=False, scale=2.5), 2)
    assert chosen[0].tolist() == [1, 3]
    whole = np.exp(LOGITS.astype(np.float64))
    whole /= whole.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(shares, 2.5 * np.take_along_axis(whole, chosen, axis=-1), rtol=1e-6)


@pytest.mark.parametrize("normalise", [True, False])
def test_a_router_may_score_by_a_sigmoid(normalise):
    chosen, shares = route(LOGITS, Router(score="sigmoid", normalise=normalise), 2)
    assert chosen[2].tolist() == [2, 1]
    expected = np.array([1 / (1 + math.exp(-3)), 0.5])
    np.testing.assert_allclose(shares[2], expected / expected.sum() if normalise else expected, rtol=1e-6)


@pytest.mark.parametrize("router", [Router(groups=2), Router(bias=True)])
def test_a_router_that_is_not_computed_is_refused(router):
    with pytest.raises(ExportError, match="computing the reference: it has no routers with groups"):
        route(LOGITS, router, 2)


def test_activations_are_those_of_torch_far_out_too():
    x = np.concatenate([np.linspace(-6, 6, 4001), [-1e30, -300, -100, 100, 1e30]]).astype(np.float32)[None]
    for activation, theirs in (
        (Activation.GELU_TANH, lambda values: torch.nn.functional.gelu(values.double(), approximate="tanh")),
        (Activation.SILU, lambda values: torch.nn.functional.silu(values.double())),
    ):
        found = np.repeat(x, 40, axis=0)  # more than a slice
        activate(found, activation)
        expected = theirs(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(found, np.repeat(expected, 40, axis=0), rtol=2e-6, atol=1e-6)


def test_norms_are_those_of_torch():
    rng = np.random.default_rng(0)
    x = (3 + 2 * rng.standard_normal((7, 33))).astype(np.float32)
    weight, bias = (rng.standard_normal(33).astype(np.float32) for _ in range(2))
    theirs = torch.nn.functional.layer_norm(
        *map(torch.from_numpy, (x,)), (33,), *map(torch.from_numpy, (weight, bias)), 0.1
    )
    np.testing.assert_allclose(layer_norm(x, weight, bias, 0.1), theirs.numpy(), rtol=1e-5, atol=1e-6)
    theirs = torch.nn.functional.rms_norm(torch.from_numpy(x), (33,), torch.from_numpy(weight), 0.1)
    np.testing.assert_allclose(rms_norm(x, weight, 0.1), theirs.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("window", "factor"), [(None, None), (1, None), (5, 0.3), (100, None)])
def test_attention_is_a_softmax_over_the_positions_that_each_one_sees(window, factor):
    """Position by position and head by head in float64; rotary_dim 0 turns nothing."""
    size, length = 6, 23
    facts = Attention(
        inputs=("qkv",), output="o", num_heads=4, num_kv_heads=2, rotary_dim=0, rotary_base=1e4, factor=factor,
        window=window,
    )  # fmt: skip
    products = np.random.default_rng(0).standard_normal((length, 8 * size)).astype(np.float32)
    found = attend(products, facts, size, rotary_tables(length, facts))
    heads = products.astype(np.float64).reshape(length, 8, size)
    for position in range(length):
        seen = slice(max(0, position - (window or length) + 1), position + 1)
        for head in range(4):
            scores = heads[seen, 4 + head // 2] @ heads[position, head] * (factor or size**-0.5)
            shares = np.exp(scores) / np.exp(scores).sum()
            expected = shares @ heads[seen, 6 + head // 2]
            np.testing.assert_allclose(found[position, head * size : (head + 1) * size], expected, rtol=1e-5, atol=1e-6)
