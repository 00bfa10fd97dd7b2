"""Diagnostics of gate matrices, against figures worked by hand or by numpy alone."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from export import routing


def random_gate(experts=5, hidden=40, seed=0):
    return np.random.default_rng(seed).standard_normal((experts, hidden)).astype(np.float32)


def top_k_lowest_first(logits, k):
    """The canonical choice, spelled out: largest logit first, equal ones by index."""
    return sorted(range(len(logits)), key=lambda expert: (-logits[expert], expert))[:k]


def test_distinct_rows_have_no_findings():
    report = routing.diagnose({0: random_gate(), 1: random_gate(seed=1)}, 2)
    assert [layer.duplicate_groups for layer in report.layers] == [(), ()]
    assert report.never_chosen == ()
    assert routing.warnings(report) == []


def test_equal_rows_are_grouped_and_the_k_lowest_indices_win():
    gate = random_gate(6)
    gate[[2, 3, 5]] = gate[0]
    layer = routing.diagnose({0: gate}, 2).layers[0]
    assert layer.duplicate_groups == ((0, 2, 3, 5),)
    assert layer.never_chosen == (3, 5)
    assert layer.condition_number is None


@pytest.mark.parametrize("experts_per_token", [1, 2, 3])
def test_never_chosen_experts_are_never_chosen_for_ten_thousand_inputs(experts_per_token):
    gate = random_gate(6)
    gate[[1, 4]] = gate[0]
    gate[5] = gate[2]
    report = routing.diagnose({0: gate}, experts_per_token)
    inputs = np.random.default_rng(3).integers(-8, 9, (10_000, 40))
    whole = np.round(gate * 64).astype(np.int64)  # integer logits: equal rows give equal logits exactly
    chosen = {expert for x in inputs for expert in top_k_lowest_first(whole @ x, experts_per_token)}
    assert set(range(6)) - chosen == set(report.never_chosen)


def test_an_expert_dead_in_one_layer_only_is_not_dead_in_the_model():
    tied = random_gate(3)
    tied[1] = tied[0]
    report = routing.diagnose({0: tied, 1: random_gate(3, seed=1)}, 1)
    assert report.layers[0].never_chosen == (1,)
    assert report.never_chosen == ()


def test_negative_zero_equals_zero():
    gate = np.zeros((2, 3), dtype=np.float32)
    gate[1] = -0.0
    assert routing.diagnose({0: gate}, 1).layers[0].duplicate_groups == ((0, 1),)


def test_near_duplicates_need_direction_and_length():
    gate = random_gate(3)
    gate[1] = gate[0] * 2
    gate[2] = gate[0] * (1 + 1e-4)
    pairs = routing.diagnose({0: gate}, 1).layers[0].near_duplicates
    assert [pair[:2] for pair in pairs] == [(0, 2)]
    assert pairs[0][2] == pytest.approx(1.0)


def test_condition_number_equals_numpys():
    gate = random_gate(5)
    layer = routing.diagnose({0: gate}, 2).layers[0]
    assert layer.condition_number == pytest.approx(np.linalg.cond(gate.astype(np.float64)), rel=1e-12)


def test_spread_of_rows_worked_by_hand():
    gate = np.array([[3.0, 1.0], [3.0, -1.0]])  # mean row [3, 0]; what is left is [0, 1], [0, -1]
    assert routing.diagnose({0: gate}, 1).layers[0].spread == pytest.approx(np.sqrt(2 / 20))


def test_bfloat16_gates_are_read():
    gate = random_gate(4).astype(ml_dtypes.bfloat16)
    gate[3] = gate[1]
    assert routing.diagnose({0: gate}, 1).layers[0].duplicate_groups == ((1, 3),)


def test_report_is_plain_json_even_when_the_condition_is_infinite():
    gate = np.ones((4, 8), dtype=np.float32)
    text = json.dumps(routing.diagnose({0: gate}, 2).to_json(), allow_nan=False)
    values = json.loads(text)
    assert values["never_chosen"] == [2, 3]
    assert values["layers"][0]["condition_number"] is None


def test_warning_for_four_equal_rows_names_the_dead_experts():
    gates = dict.fromkeys(range(3), np.ones((4, 8), dtype=np.float32))
    (sentence,) = routing.warnings(routing.diagnose(gates, 2))
    assert sentence == (
        "the gate rows of experts 0, 1, 2 and 3 are equal in all 3 layers: their logits always tie, ties go to the "
        "lowest index, and with 2 experts per token experts 2 and 3 can never be chosen there"
    )


def test_warning_for_nearly_equal_rows_names_the_pair():
    gate = random_gate(3)
    gate[2] = gate[1] * np.float32(1 + 1e-5)
    (sentence, *_) = routing.warnings(routing.diagnose({0: random_gate(3, seed=1), 4: gate}, 1))
    assert sentence.startswith("the gate rows of experts 1 and 2 are nearly equal in layer 4 (cosine up to 1.0000")


def test_an_expert_told_apart_by_little_is_warned_of_with_the_figures():
    gate = np.eye(3, 8)
    gate[2] = [0.5, 0.5, 0.1, 0, 0, 0, 0, 0]  # all but between the first two
    differences = np.linalg.svd(gate - gate.mean(axis=0), compute_uv=False)
    (sentence,) = routing.warnings(routing.diagnose({0: np.eye(3, 8), 1: gate}, 1))
    assert sentence.startswith(f"the gate's condition number is {np.linalg.cond(gate):.2f} in layer 1")
    assert f"that of its rows' differences {differences[0] / differences[1]:.2f}" in sentence


def test_rows_that_share_most_of_their_direction_are_warned_of():
    gate = np.eye(3, 8) * 0.1 + 1
    (sentence,) = routing.warnings(routing.diagnose({0: gate, 1: gate}, 1))
    spread = np.linalg.norm(gate - gate.mean(axis=0)) / np.linalg.norm(gate)
    assert f"in all 2 layers, and its rows differ by {spread:.2f} of their length" in sentence


def test_rows_that_add_up_to_zero_route_well_and_give_no_warning():
    gate = np.eye(4, 12) - 0.25 * np.eye(4, 12).sum(axis=0)
    layer = (report := routing.diagnose({0: gate}, 2)).layers[0]
    assert layer.condition_number is None
    assert layer.difference_condition_number == pytest.approx(1.0)
    assert routing.warnings(report) == []


def test_more_experts_than_dimensions_are_linearly_dependent():
    layer = routing.diagnose({0: random_gate(5, 3)}, 2).layers[0]
    assert layer.condition_number is None
    assert layer.difference_condition_number is None


def test_a_vector_added_to_every_row_changes_neither_the_choice_nor_the_differences_condition():
    gate = random_gate().astype(np.float64)
    plain, moved = (routing.diagnose({0: g}, 2).layers[0] for g in (gate, gate + 5.0))
    assert moved.difference_condition_number == pytest.approx(plain.difference_condition_number, rel=1e-6)
    assert moved.condition_number > 3 * plain.condition_number


@pytest.mark.parametrize(("experts_per_token"), [0, 6])
def test_k_outside_the_experts_is_refused(experts_per_token):
    with pytest.raises(ValueError, match=f"{experts_per_token} experts per token, expected 1 to 5"):
        routing.diagnose({0: random_gate()}, experts_per_token)


def test_gates_of_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match=r"found shapes \[\(4, 40\), \(5, 40\)\]"):
        routing.diagnose({0: random_gate(), 1: random_gate(4)}, 1)


def test_nan_in_a_gate_is_refused_naming_the_layer():
    gate = random_gate()
    gate[1, 2] = np.nan
    with pytest.raises(ValueError, match="layer 7 holds values that are NaN"):
        routing.diagnose({7: gate}, 1)


def test_number_ranges_draw_runs_together():
    assert routing.number_ranges([7, 0, 1, 2, 9, 10]) == "0-2, 7, 9-10"
