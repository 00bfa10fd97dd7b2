"""The use of experts: counts against plain loops over transformers' own router logits, and figures by hand."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_phi_checkpoint, write_phixtral_checkpoint
from granitemoe_checkpoints import write_granitemoe_checkpoint
from torch_reference import load_reference, run_model

from export.architecture import Router
from export.checkpoint.folder import open_checkpoint
from export.errors import ConfigError
from export.families import read_model
from export.reference.usage import NEAR_TIE, independent_pairs, layer_usage, measure_usage
from export.reference.windows import text_windows

MIXTRAL = Path(__file__).parents[3] / "examples/tiny-mixtral/checkpoint"
WINDOWS = [np.random.default_rng(3).integers(0, 200, 160).tolist(), list(range(40))]


def phixtral(folder):
    return write_phixtral_checkpoint(folder, seed=1, num_experts=5, experts_per_token=3)


def granitemoe(folder):
    return write_granitemoe_checkpoint(folder, seed=1)


def trained(_folder):
    return MIXTRAL


@pytest.mark.parametrize("write", [trained, phixtral, granitemoe])
def test_counts_are_those_of_a_loop_over_the_router_logits_of_transformers(tmp_path, write):
    model = read_model(open_checkpoint(write(tmp_path / "checkpoint")))
    experts, k = model.architecture.num_experts, model.architecture.experts_per_token
    usage = measure_usage(model, WINDOWS)
    torch_model = load_reference(model)
    routed = np.concatenate([run_model(torch_model, window)[1] for window in WINDOWS], axis=1)  # [M, T, E]
    assert [layer.layer for layer in usage.layers] == list(model.architecture.mixture_layers)
    assert (usage.num_tokens, usage.num_windows) == (200, 2)
    for layer, logits in zip(usage.layers, routed.astype(np.float64), strict=True):
        chosen, pairs, mass, entropy, near = Counter(), Counter(), Counter(), 0.0, 0
        for token in logits:
            order = sorted(range(experts), key=lambda expert, token=token: -token[expert])
            chosen.update(order[:k])
            pairs.update(combinations(sorted(order[:k]), 2))
            total = sum(math.exp(token[expert]) for expert in order[:k])
            for expert in order[:k]:
                mass[expert] += math.exp(token[expert]) / total
            whole = sum(math.exp(value) for value in token)
            entropy -= sum(math.exp(value) / whole * math.log(math.exp(value) / whole) for value in token)
            near += token[order[k - 1]] - token[order[k]] <= NEAR_TIE
        assert layer.chosen.tolist() == [chosen[expert] for expert in range(experts)]
        assert layer.load == pytest.approx([chosen[expert] / (200 * k) for expert in range(experts)])
        assert layer.weight_shares == pytest.approx([mass[expert] / 200 for expert in range(experts)], abs=1e-5)
        assert layer.entropy == pytest.approx(entropy / 200, abs=1e-4)
        assert layer.relative_entropy == pytest.approx(entropy / 200 / math.log(experts), abs=1e-4)
        assert layer.near_ties == near
        for pair in combinations(range(experts), 2):
            assert layer.together[pair] == layer.together[pair[::-1]] == pairs[pair]
        assert not layer.together.diagonal().any()


def test_equal_logits_are_ties_and_the_lowest_experts_are_chosen():
    logits = np.zeros((6, 4), dtype=np.float32)
    logits[4:, 3] = 1.0
    usage = layer_usage(0, logits, Router(), 2)
    assert usage.chosen.tolist() == [6, 4, 0, 2]
    assert (usage.equal, usage.near_ties) == (6, 6)
    assert layer_usage(0, logits[:4], Router(), 2).relative_entropy == pytest.approx(1.0)
    assert layer_usage(0, logits, Router(), 4).near_ties == 0  # no expert is left that could be chosen instead


def test_the_weights_of_a_router_that_does_not_normalise_count_by_its_own_rule():
    logits = np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]], dtype=np.float32))
    assert layer_usage(0, logits, Router(normalise=False), 1).weight_shares == pytest.approx([5 / 13, 8 / 13, 0])
    assert layer_usage(0, logits, Router(), 1).weight_shares == pytest.approx([0.5, 0.5, 0])


def test_the_entropy_of_a_sigmoid_router_is_that_of_its_scores():
    scores = np.array([[0.2, 0.6]])
    logits = np.log(scores / (1 - scores)).astype(np.float32)
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert layer_usage(0, logits, Router(score="sigmoid"), 1).entropy == pytest.approx(expected, abs=1e-6)


def test_pairs_by_chance_have_the_loads_that_were_counted():
    equal = independent_pairs(np.array([30, 30, 30, 30]), 2, 60)
    assert equal[0] == pytest.approx([0, 10, 10, 10])
    chosen = np.array([70, 50, 40, 20, 0])
    pairs = independent_pairs(chosen, 3, 60)
    assert pairs.sum(axis=1) == pytest.approx(2 * chosen, rel=1e-4)
    assert pairs[0, 1] / pairs[0, 2] == pytest.approx(pairs[3, 1] / pairs[3, 2])  # quasi-independence
    assert not pairs[4].any()
    assert not independent_pairs(np.array([3, 5]), 1, 8).any()


def test_the_pair_that_is_furthest_from_chance_is_told():
    logits = np.zeros((400, 4), dtype=np.float32)
    for token in range(400):  # experts 0 and 1 always together, and so 2 and 3
        logits[token, [0, 1] if token % 2 else [2, 3]] = 5.0
    first, second, times = layer_usage(0, logits, Router(), 2).strongest_pair()
    assert (first, second) in ((0, 1), (2, 3))
    assert times == pytest.approx(3.0, rel=1e-3)  # by chance each of six pairs has a sixth


def test_a_dense_model_is_refused(tmp_path):
    model = read_model(open_checkpoint(write_phi_checkpoint(tmp_path / "dense", seed=1)))
    with pytest.raises(ConfigError, match="is a dense phi: it has no experts, and no router"):
        measure_usage(model, WINDOWS)


def test_windows_cover_the_tokens_that_are_asked_for():
    assert [len(window) for window in text_windows(range(1200), 1100, 4096, "x")] == [512, 512, 76]
    assert [len(window) for window in text_windows(range(90), 1100, 40, "x")] == [40, 40, 10]
    assert text_windows(list(range(9)), 5, 512, "x") == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("count", "asked", "message"),
    [
        (100, 3, "routing: asked for 3 tokens, expected at least 4; ask for more tokens"),
        (100, 200, "routing: the text has 100 tokens, expected at least 200, .* pass a longer text, or --tokens 100"),
        (3, 200, "the text has 3 tokens, expected at least 200, .* pass a longer text$"),
    ],
)
def test_a_text_that_does_not_fill_a_window_is_refused(count, asked, message):
    with pytest.raises(ConfigError, match=message):
        text_windows(range(count), asked, 512, "routing")
