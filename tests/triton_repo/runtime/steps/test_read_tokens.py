"""Reading an engine's responses: which tokens and log-probabilities are this response's."""

from __future__ import annotations

import numpy as np
import pytest

from triton_repo.contracts.ensemble import ADDED_TOKEN_NAMES, TOKEN_NAMES
from triton_repo.errors import RequestError
from triton_repo.runtime.steps.postprocessing import (
    Tokens,
    read_tokens,
)


def response(ids, **arrays) -> dict[str, np.ndarray]:
    made = {
        "output_ids": np.array([[ids]], dtype=np.int32),
        "sequence_length": np.array([[len(ids)]], dtype=np.int32),
        **arrays,
    }
    return {TOKEN_NAMES[name]: array for name, array in made.items()}


def test_of_log_probabilities_of_all_tokens_so_far_the_last_are_this_responses():
    logs = np.array([[[-1.0, -2.0, -3.0]]], dtype=np.float32)
    cum = np.array([[-6.0]], dtype=np.float32)
    assert read_tokens(response([7], output_log_probs=logs, cum_log_probs=cum)) == Tokens(
        token_ids=(7,), log_probs=(-3.0,), cum_log_prob=-6.0
    )
    assert read_tokens(response([5, 6, 7], output_log_probs=logs)).log_probs == (-1.0, -2.0, -3.0)
    assert read_tokens(response([], output_log_probs=logs)).log_probs == ()


def test_the_outputs_that_only_our_engine_has_are_read():
    added = {
        "top_token_ids": np.array([[[5, 6], [7, 8]]], np.int32),
        "top_log_probs": np.array([[[-0.5, -1.0], [-0.25, -2.0]]], np.float32),
        "sequence_index": np.array([[3]], np.int32),
        "prompt_token_ids": np.array([[1, 2, 3]], np.int32),
        "prompt_log_probs": np.array([[-4.0, -5.0]], np.float32),
        "prompt_top_token_ids": np.array([[[2, 1], [3, 9]]], np.int32),
        "prompt_top_log_probs": np.array([[[-4.0, -5.0], [-0.5, -6.0]]], np.float32),
        "routed_experts": np.array([[[[0, 3]], [[2, 1]]]], np.int32),
        "expert_weights": np.array([[[[0.75, 0.25]], [[0.5, 0.5]]]], np.float32),
        "num_experts": np.array([[4]], np.int32),
        "is_complete": np.ones((1, 1), np.bool_),
    }
    assert set(added) == set(ADDED_TOKEN_NAMES)
    found = read_tokens({**response([7]), **{ADDED_TOKEN_NAMES[name]: array for name, array in added.items()}})
    assert found == Tokens(
        token_ids=(7,), tops=(((5, -0.5), (6, -1.0)), ((7, -0.25), (8, -2.0))), sequence_index=3,
        prompt_token_ids=(1, 2, 3), prompt_log_probs=(-4.0, -5.0), num_experts=4,
        prompt_tops=(((2, -4.0), (1, -5.0)), ((3, -0.5), (9, -6.0))), is_complete=True,
        routing=((((0, 0.75), (3, 0.25)),), (((2, 0.5), (1, 0.5)),)),
    )  # fmt: skip


def test_padding_past_the_sequences_length_is_cut_off():
    tensors = {**response([7, 8, -1]), TOKEN_NAMES["sequence_length"]: np.array([[2]], dtype=np.int32)}
    assert read_tokens(tensors).token_ids == (7, 8)


def test_responses_of_several_beams_or_without_their_tensors_are_refused():
    beams = {**response([7]), TOKEN_NAMES["output_ids"]: np.zeros((1, 2, 1), dtype=np.int32)}
    with pytest.raises(
        RequestError, match=r"shape \[1, 2, 1\], expected \[1, 1, n\]; build the engine with beam width 1"
    ):
        read_tokens(beams)
    with pytest.raises(RequestError, match="TOKENS_BATCH, SEQUENCE_LENGTH absent"):
        read_tokens({})
