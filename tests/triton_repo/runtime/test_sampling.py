"""Choosing tokens: hand-worked numbers, and transformers' logits processors as the outside reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from triton_repo.errors import RequestError
from triton_repo.runtime.options import GenerationOptions, GenerationPlan
from triton_repo.runtime.sampling import (
    Sampler,
    heaviest_share,
    log_probability,
    penalise_repetition,
    top_k_ids,
)


def sampler(num_tokens: int, prompt_ids=(0,), end_ids=(), **fields) -> Sampler:
    options = GenerationOptions(**{"prompt": "-", "max_tokens": 1, **fields})
    plan = GenerationPlan(options=options, prompt_ids=prompt_ids, end_ids=end_ids, most_tokens=1)
    return Sampler(plan, num_tokens)


def floats(*values) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def kept_by(warper, logits) -> set[int]:
    scores = warper(torch.zeros((1, 1), dtype=torch.long), torch.from_numpy(logits)[None])
    return set(np.flatnonzero(np.isfinite(scores[0].numpy())).tolist())


def test_greedy_takes_the_lowest_of_equal_scores():
    assert sampler(5).choose(floats(1, 3, 2, 3, 3)).token_id == 1


def test_ids_past_the_tokenizer_are_never_chosen_and_weigh_nothing():
    logits = floats(1, 2, 0, 90, 95)
    assert sampler(3).choose(logits).token_id == 1
    choice = sampler(3, return_log_probs=True).choose(logits)
    assert choice.log_prob == pytest.approx(2 - np.log(np.exp(1) + np.exp(2) + 1))
    drawn = sampler(3, temperature=50.0, top_p=1.0, random_seed=1)
    assert {drawn.choose(logits).token_id for _ in range(200)} == {0, 1, 2}


@pytest.mark.parametrize("k", [1, 2, 7, 50, 999, 1000, 1001])
def test_top_k_keeps_what_transformers_keeps(k):
    logits = np.random.default_rng(k).normal(size=1000).astype(np.float32)
    assert set(top_k_ids(logits, k).tolist()) == kept_by(TopKLogitsWarper(k), logits)


def test_top_k_of_zero_keeps_all_and_ties_with_the_last_kept_stay():
    assert top_k_ids(floats(3, 1, 2), 0).tolist() == [0, 1, 2]
    assert top_k_ids(floats(5, 2, 7, 5, 1), 2).tolist() == [0, 2, 3]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_top_p_keeps_what_transformers_keeps(share, spread):
    logits = (spread * np.random.default_rng(3).normal(size=3000)).astype(np.float32)
    kept = heaviest_share(np.exp(logits.astype(np.float64)), share)
    expected = kept_by(TopPLogitsWarper(share), logits)
    # float32 sums upstream may differ by the last token of a nearly flat distribution.
    assert len(set(kept.tolist()) ^ expected) <= (1 if spread < 1 else 0)


def test_top_p_by_hand():
    weights = np.array([0.1, 0.4, 0.2, 0.3])
    assert heaviest_share(weights, 0.3).tolist() == [1]
    assert heaviest_share(weights, 0.4).tolist() == [1]
    assert heaviest_share(weights, 0.5).tolist() == [1, 3]
    assert heaviest_share(weights, 0.95).tolist() == [1, 3, 2, 0]


def test_temperature_top_k_and_top_p_give_transformers_distribution():
    logits = np.random.default_rng(9).normal(scale=2, size=12).astype(np.float32)
    scores = torch.from_numpy(logits)[None]
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(6), TopPLogitsWarper(0.85)):
        scores = warper(torch.zeros((1, 1), dtype=torch.long), scores)
    expected = torch.softmax(scores[0], 0).numpy()
    drawn = sampler(12, temperature=0.7, top_k=6, top_p=0.85, random_seed=4)
    rounds = 20_000
    counts = np.bincount([drawn.choose(logits).token_id for _ in range(rounds)], minlength=12)
    assert set(np.flatnonzero(counts).tolist()) == set(np.flatnonzero(expected).tolist())
    assert np.abs(counts / rounds - expected).max() < 4 * 0.5 / np.sqrt(rounds)


def test_repetition_penalty_is_transformers():
    logits = np.random.default_rng(2).normal(scale=3, size=40).astype(np.float32)
    ids = [3, 3, 17, 0, 39]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), torch.from_numpy(logits.copy())[None])[0]
    penalise_repetition(logits, np.unique(ids), 1.3)
    assert np.array_equal(logits, expected.numpy())


def test_repetition_penalty_sees_the_prompt_and_the_output():
    penalised = sampler(4, prompt_ids=(2,), repetition_penalty=2.0)
    logits = floats(0, 3.5, 6, 3.2)  # 6 / 2 = 3
    assert [penalised.choose(logits).token_id for _ in range(3)] == [1, 3, 2]


def test_presence_and_frequency_penalties_see_the_output_alone():
    logits = floats(5, 4.5, 0)
    present = sampler(3, prompt_ids=(0, 0, 0), presence_penalty=1.0)
    assert [present.choose(logits).token_id for _ in range(4)] == [0, 1, 0, 0]  # 4 against 3.5 for good
    frequent = sampler(3, prompt_ids=(0,), frequency_penalty=1.0)
    assert [frequent.choose(logits).token_id for _ in range(4)] == [0, 1, 0, 1]
    favoured = sampler(3, presence_penalty=-1.0)
    assert [favoured.choose(row).token_id for row in (logits, floats(4, 4.5, 0))] == [0, 0]


def test_min_length_keeps_end_ids_away_until_it_is_reached():
    drawn = sampler(3, end_ids=(0, 2), min_length=2)
    logits = floats(9, 1, 8)
    assert [drawn.choose(logits).token_id for _ in range(3)] == [1, 1, 0]


def test_a_refused_token_is_drawn_again_without_it():
    logits = floats(3, 9, 5)
    assert sampler(3).choose(logits, lambda token: token == 1).token_id == 2
    with pytest.raises(RequestError, match="bad_words and min_length together leave none"):
        sampler(3).choose(logits, lambda token: True)
    sampled = sampler(3, temperature=5.0, top_p=1.0, random_seed=0)
    assert 1 not in {sampled.choose(logits, lambda token: token == 1).token_id for _ in range(100)}


def test_the_same_seed_gives_the_same_tokens_and_another_does_not():
    rows = np.random.default_rng(0).normal(size=(30, 500)).astype(np.float32)

    def tokens(seed):
        drawn = sampler(500, top_p=1.0, random_seed=seed)
        return [drawn.choose(row).token_id for row in rows]

    assert tokens(11) == tokens(11)
    assert tokens(11) != tokens(12)
    assert tokens(None) != tokens(None)


def test_draws_are_pcg64s_numbers_laid_on_the_weights_in_the_order_of_ids():
    rows = np.random.Generator(np.random.PCG64(1)).normal(size=(6, 100)).astype(np.float32)
    drawn = sampler(100, temperature=0.8, top_k=20, random_seed=2024)
    numbers = np.random.Generator(np.random.PCG64(2024))
    expected = []
    for row in rows.tolist():
        kept = sorted(sorted(range(100), key=lambda token: -row[token])[:20])
        weights = [math.exp(row[token] / 0.8) for token in kept]
        reach = [sum(weights[: place + 1]) for place in range(20)]
        draw = numbers.random() * reach[-1]
        expected.append(next(token for token, end in zip(kept, reach, strict=True) if end > draw))
    assert [drawn.choose(row).token_id for row in rows] == expected == [67, 24, 44, 77, 92, 5]


def test_log_probabilities_are_the_models_own_whatever_is_asked():
    logits = floats(1, 2, 3)
    plain = sampler(3, return_log_probs=True).choose(logits)
    bent = sampler(3, return_log_probs=True, temperature=9.0, top_k=2, repetition_penalty=3.0, random_seed=1)
    choice = bent.choose(logits)
    expected = torch.log_softmax(torch.from_numpy(logits), 0).numpy()
    assert plain.log_prob == pytest.approx(expected[2], abs=1e-6)
    assert choice.log_prob == pytest.approx(expected[choice.token_id], abs=1e-6)
    assert sampler(3).choose(logits).log_prob is None


def test_a_log_probability_survives_huge_logits():
    assert log_probability(floats(3e38, -3e38, 0), 0) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_internal_error(bad):
    with pytest.raises(RequestError, match="the engine's logits hold NaN or infinity") as caught:
        sampler(3).choose(floats(1, bad, 2))
    assert caught.value.kind == "INTERNAL"


def test_the_logits_are_left_as_they_were():
    logits = floats(1, 5, 3)
    sampler(3, prompt_ids=(1,), repetition_penalty=2.0, end_ids=(0,), min_length=1).choose(logits, lambda t: t == 2)
    assert logits.tolist() == [1, 5, 3]
