"""The figures of a comparison, worked by hand, and which of them miss which limit."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from trt_build.comparison import parity
from trt_build.comparison.parity import THRESHOLDS, ParityReport, Thresholds, combine, measure
from trt_build.trtllm.verify import LIMITS

EQUAL = ParityReport(
    num_tokens=9, num_decoded_tokens=4, max_logit_difference=0.0, mean_logit_difference=0.0,
    max_decoded_difference=0.0, mean_kl=0.0, mean_decoded_kl=0.0, p99_kl=0.0, max_kl=0.0, top1_agreement=1.0,
    near_ties=0, clear_top1_agreement=1.0, engine_perplexity=4.0,
    reference_perplexity=4.0, routing_agreement=1.0, tied_routings=0,
)  # fmt: skip
LIMIT = Thresholds(
    max_logit_difference=0.5, mean_kl=0.25, perplexity_increase=0.125, top1_agreement=0.75, routing_agreement=0.625
)


@pytest.mark.parametrize("slice_tokens", [1, 2, 4096])
def test_the_figures_of_two_windows_are_those_worked_by_hand(monkeypatch, slice_tokens):
    monkeypatch.setattr(parity, "SLICE_TOKENS", slice_tokens)
    high = math.log(3)  # against 0: probabilities 3/4 and 1/4
    found = np.array([[high, 0], [high, 0], [0, high]], dtype=np.float32)
    expected = np.zeros((3, 2), dtype=np.float32)  # probabilities 1/2; of equal logits the first is the likeliest
    first = measure(found, expected, [1, 0, 1])
    assert (first.num_tokens, first.same_top1.tolist(), first.routing) == (3, [True, True, False], None)
    assert first.max_difference == pytest.approx(high)
    assert first.sum_difference == pytest.approx(3 * high / 2)
    # Of each row: 1/2 log(1/2 / 3/4) + 1/2 log(1/2 / 1/4) = 1/2 log(4/3).
    assert first.kl == pytest.approx([math.log(4 / 3) / 2] * 3)
    # Tokens 0 and 1 follow the first and the second row; nothing follows the third.
    assert first.engine_loss == pytest.approx(-math.log(3 / 4) - math.log(1 / 4))
    assert first.reference_loss == pytest.approx(2 * math.log(2))
    second = measure(expected[:2], expected[:2], [0, 1])
    report = combine([first, second], decoded=first)
    assert (report.num_tokens, report.num_decoded_tokens, report.routing_agreement) == (5, 2, None)
    assert report.top1_agreement == 4 / 5
    assert report.mean_kl == pytest.approx(3 / 5 * math.log(4 / 3) / 2)
    assert report.mean_decoded_kl == pytest.approx(math.log(4 / 3) / 2)
    assert report.mean_logit_difference == pytest.approx(3 / 5 * high / 2)
    assert report.max_logit_difference == report.max_decoded_difference == pytest.approx(high)
    # Three tokens follow another: of probability 3/4, 1/4 and 1/2, and of 1/2 each in the reference.
    assert report.engine_perplexity == pytest.approx((3 / 4 * 1 / 4 * 1 / 2) ** (-1 / 3))
    assert report.reference_perplexity == pytest.approx(2)
    assert report.to_json()["perplexity_increase"] == pytest.approx((4 / 3) ** (1 / 3) - 1)


def test_the_tail_of_the_divergence_is_told_beside_its_mean():
    """100 positions of which one is as far off as log(4/3)/2, and the rest equal."""
    expected = np.zeros((100, 2), dtype=np.float32)
    found = expected.copy()
    found[70, 0] = math.log(3)
    report = combine([measure(found, expected, [0] * 100)], decoded=measure(found[:2], expected[:2], [0, 0]))
    worst = math.log(4 / 3) / 2
    assert report.max_kl == pytest.approx(worst)
    assert report.mean_kl == pytest.approx(worst / 100)
    # Between the 99th and the 100th of the sorted values, 1 % of the way.
    assert report.p99_kl == pytest.approx(worst / 100)


def test_near_ties_are_told_apart_by_the_engines_own_error():
    """All logits are off by 1 on average, so a lead below 2 is a near tie."""
    expected = np.array([[1.5, 0, -9], [2, 0, -9], [5, 0, -9], [3, 0, -9]], dtype=np.float32)
    found = expected + np.array([[-1, 1, 1], [1, -1, 1], [-1, 1, 1], [-2, 1, 0]], dtype=np.float32)
    report = combine([measure(found, expected, [0] * 4)], decoded=measure(found[:2], expected[:2], [0, 0]))
    assert report.mean_logit_difference == pytest.approx(1)
    assert report.near_ties == 1  # the first; in the last the order cannot be excused
    assert report.top1_agreement == 3 / 4
    assert report.clear_top1_agreement == 1
    found[3] = [0, 3, -9]
    moved = combine([measure(found, expected, [0] * 4)], decoded=measure(found[:2], expected[:2], [0, 0]))
    # Off by 1.25 on average: the second is a near tie too.
    assert (moved.near_ties, moved.top1_agreement, moved.clear_top1_agreement) == (2, 2 / 4, 1 / 2)
    constant, off = np.zeros((2, 2), dtype=np.float32), np.array([[1, -1]] * 2, dtype=np.float32)
    tied = combine([measure(off, constant, [0, 0])], decoded=measure(constant, constant, [0, 0]))
    assert (tied.near_ties, tied.clear_top1_agreement) == (2, None)


def test_routings_agree_where_the_sets_of_experts_are_equal_and_tie_where_the_choice_is_open():
    # Two layers of one position, three experts, two of them chosen.
    expected = np.array([[[3, 2, 1]], [[5, 1, 1]]], dtype=np.float32)  # {0, 1}; {0} and one of two equal ones
    found = np.array([[[2, 3, 1]], [[1, 2, 5]]], dtype=np.float32)  # {0, 1}; {1, 2}
    logits, window = np.zeros((2, 2), dtype=np.float32), [0, 1]
    sums = measure(logits, logits, window, found, expected, 2)
    assert sums.routing == (1, 1, 2)
    report = combine([sums, measure(logits, logits, window, expected, expected, 2)], sums)
    assert (report.routing_agreement, report.tied_routings) == (3 / 4, 2)
    assert measure(logits, logits, window, found, expected, 3).routing == (2, 0, 2)


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"max_logit_difference": 0.5}, "max |logit difference| "),
        ({"max_decoded_difference": 0.5}, "max |logit difference| "),
        ({"mean_kl": 0.25}, "mean KL "),
        ({"mean_decoded_kl": 0.25}, "mean KL of decoded tokens "),
        ({"engine_perplexity": 4.5}, "perplexity "),
        ({"top1_agreement": 0.75}, "top-1 agreement "),
        ({"routing_agreement": 0.625}, "routing agreement "),
    ],
)
def test_a_figure_on_its_limit_keeps_it_and_one_just_past_it_is_named(figures, message):
    assert dataclasses.replace(EQUAL, **figures).failures(LIMIT) == []
    [(name, value)] = figures.items()
    for past in (value * (1 - 1e-9 if name.endswith("agreement") else 1 + 1e-9), math.nan):
        [failure] = dataclasses.replace(EQUAL, **{name: past}).failures(LIMIT)
        assert failure.startswith(message)


FEW = dataclasses.replace(LIMIT, judged_tokens=2048)


@pytest.mark.parametrize(
    ("figures", "certain"),
    [
        # Standard errors of shares over 100 tokens: sqrt(0.75 * 0.25 / 100) = 0.043, sqrt(0.625 * 0.375 / 100) = 0.048.
        ({"mean_kl": 0.3, "kl_error": 0.011}, False),
        ({"mean_kl": 0.3, "kl_error": 0.009}, True),
        ({"mean_decoded_kl": 0.3, "decoded_kl_error": 0.011}, False),
        ({"mean_decoded_kl": 0.3, "decoded_kl_error": 0.009}, True),
        ({"top1_agreement": 0.54}, False),
        ({"top1_agreement": 0.53}, True),
        ({"routing_agreement": 0.39}, False),
        ({"routing_agreement": 0.38}, True),
        ({"engine_perplexity": 400.0}, False),
        ({"engine_perplexity": math.nan}, True),
        ({"mean_kl": math.nan, "kl_error": math.nan}, True),
        ({"max_logit_difference": 0.6}, True),
    ],
)
def test_of_few_tokens_a_figure_fails_where_it_is_past_its_limit_by_five_standard_errors(figures, certain):
    report = dataclasses.replace(EQUAL, num_tokens=100, **figures)
    assert bool(report.failures(FEW)) is certain
    findings = report.findings(10, FEW)
    assert [text.startswith("too few tokens to judge: 100, at least 2048: ") for text in findings] == [True] * (
        not certain
    )
    assert len(dataclasses.replace(report, num_tokens=2048).failures(FEW)) == 1
    assert dataclasses.replace(report, num_tokens=2048).findings(10, FEW) == ()


def test_of_fewer_than_sixteen_tokens_no_mean_is_past_its_limit_for_certain():
    report = dataclasses.replace(EQUAL, num_tokens=15, mean_kl=9.0, kl_error=0.1, top1_agreement=0.0)
    assert report.failures(FEW) == []
    [finding] = report.findings(10, FEW)
    assert "mean KL 9 nats, allowed 0.25; top-1 agreement 0.00%, expected 75.00%" in finding


def test_an_engine_without_experts_and_a_precision_without_a_limit_on_logits_are_not_judged_by_them():
    free = dataclasses.replace(LIMIT, max_logit_difference=None)
    assert dataclasses.replace(EQUAL, routing_agreement=None, max_logit_difference=9.0).failures(free) == []


@pytest.mark.parametrize("limits", [THRESHOLDS, LIMITS], ids=["ONNX Runtime", "TensorRT-LLM"])
def test_limits_can_be_kept_and_are_no_tighter_with_fewer_bits(limits):
    for name in limits:
        assert EQUAL.failures(limits[name]) == []
    for more, fewer in itertools.pairwise(("fp32", "fp16", "int8", "int4")):
        assert limits[more].mean_kl < limits[fewer].mean_kl
        assert limits[more].perplexity_increase < limits[fewer].perplexity_increase
        assert limits[more].top1_agreement > limits[fewer].top1_agreement
        assert limits[more].routing_agreement > limits[fewer].routing_agreement


def test_routing_by_layer_and_choices_are_those_worked_by_hand():
    # Two layers, two positions, three experts, one of them chosen.
    expected = np.array([[[3, 2, 1], [1, 2, 3]], [[5, 1, 0], [0, 1, 2]]], dtype=np.float32)
    found = np.array([[[2, 3, 1], [1, 2, 3]], [[5, 1, 0], [0, 1, 2]]], dtype=np.float32)
    logits = np.log([[0.25, 0.75], [0.5, 0.5]]).astype(np.float32)
    other = np.log([[0.625, 0.375], [0.125, 0.875]]).astype(np.float32)
    sums = measure(other, logits, [0, 1], found, expected, 1)
    report = combine([sums, sums], sums)
    assert report.routing_by_layer == (0.5, 1.0)
    assert report.to_json()["routing_by_layer"] == (0.5, 1.0)
    positions = parity.positions_of([[0, 1], [0, 1]], [sums, sums])
    assert positions.windows == ((0, 1), (0, 1))
    assert positions.choices.tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert positions.probabilities == pytest.approx(np.array([[0.625, 0.875] * 2, [0.75, 0.5] * 2]), rel=1e-6)
    assert positions.kl[0] == pytest.approx(0.25 * math.log(0.25 / 0.625) + 0.75 * math.log(0.75 / 0.375), rel=1e-5)
