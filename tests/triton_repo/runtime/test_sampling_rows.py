"""Choosing the tokens of all sequences of a step together: each row gets what it would get alone."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from tests.samplers import sampler
from triton_repo.errors import RequestError
from triton_repo.runtime.sampling import (
    Choice,
    choose_all,
)

NUM_TOKENS = 700
OPTIONS = {
    "temperature": (0.0, 0.3, 1.0, 3.0), "top_k": (0, 0, 1, 7, 300), "top_p": (0.0, 0.3, 0.95, 1.0),
    "min_p": (0.0, 0.0, 0.02, 0.5), "repetition_penalty": (1.0, 1.0, 1.3, 0.8), "presence_penalty": (0.0, 0.0, 0.7),
    "frequency_penalty": (0.0, 0.0, -0.2, 0.4), "min_length": (0, 0, 4), "num_log_probs": (0, 0, 3),
    "logit_bias": ((), (), ((0, 5.0), (699, -3.0))), "return_log_probs": (False, True),
}  # fmt: skip


def random_row(seed):
    """A function that makes the same sampler each time, and logits [6, V] for six steps."""
    rng = np.random.default_rng(seed)
    fields = {name: values[rng.integers(len(values))] for name, values in OPTIONS.items()}
    prompt, end_ids = tuple(rng.integers(0, NUM_TOKENS, 5).tolist()), tuple(rng.integers(0, NUM_TOKENS, 2).tolist())
    banned = [rng.integers(0, NUM_TOKENS, 3)] if seed % 4 == 0 else []
    refuses = (lambda token: token % 3 == seed % 3) if seed % 5 == 0 else None
    logits = (3 * rng.normal(size=(6, NUM_TOKENS + 4))).astype(np.float32)
    if seed % 11 == 0:
        logits[rng.integers(6), rng.integers(NUM_TOKENS)] = np.nan

    def make():
        return sampler(
            NUM_TOKENS, prompt, end_ids, refuses=refuses, banned=lambda: banned, random_seed=seed, **fields
        )  # fmt: skip

    return make, logits


def described(choice):
    return str(choice) if isinstance(choice, RequestError) else choice


def test_a_row_gets_the_same_choices_to_the_bit_in_any_batch():
    made = [random_row(seed) for seed in range(60)]
    alone = []
    for make, logits in made:
        one = make()
        alone.append([described(choose_all(step[None], [one])[0]) for step in logits])
    order = np.random.default_rng(0)
    for _ in range(3):
        samplers, steps = [make() for make, _ in made], [0] * len(made)
        got = [[] for _ in made]
        while left := [row for row, step in enumerate(steps) if step < 6]:
            rows = order.permutation(left)[: order.integers(1, 24)].tolist()
            batch = np.stack([made[row][1][steps[row]] for row in rows])
            for row, choice in zip(rows, choose_all(batch, [samplers[row] for row in rows]), strict=True):
                got[row].append(described(choice))
                steps[row] += 1
        assert got == alone


def test_a_broken_row_leaves_the_others_as_they_were():
    logits = np.zeros((4, 5), dtype=np.float32)
    logits[1, 2], logits[2, 0] = np.nan, np.inf
    logits[3, 4] = 1
    banned = [np.arange(5)]
    first, nan, infinite, none, last = choose_all(
        np.concatenate([logits, logits[3:]]),
        [sampler(5), sampler(5), sampler(5), sampler(5, banned=lambda: banned), sampler(5)],
    )
    assert (first, last) == (Choice(token_id=0, log_prob=None), Choice(token_id=4, log_prob=None))
    assert isinstance(nan, RequestError)
    assert nan.kind == infinite.kind == "INTERNAL"
    assert "leave none" in str(none)


@pytest.mark.parametrize("place", [0, 1, 15, 16, 31, 63, 64, 500, 699])
def test_nan_is_found_wherever_it_is(place):
    logits = np.arange(NUM_TOKENS, dtype=np.float32)
    logits[place] = np.nan
    assert isinstance(choose_all(logits[None], [sampler(NUM_TOKENS)])[0], RequestError)


def test_greedy_rows_are_not_copied():
    logits = np.random.default_rng(0).normal(size=(8, 50_000)).astype(np.float32)
    samplers = [sampler(49_990) for _ in range(8)]
    choose_all(logits, samplers)
    tracemalloc.start()
    choose_all(logits, samplers)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16_000
