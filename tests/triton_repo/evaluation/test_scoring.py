"""Scores of continuations against the float32 reference, and what is computed for them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from triton_repo.evaluation import scoring
from triton_repo.evaluation.errors import EvaluationError
from triton_repo.evaluation.scoring import Continuation, num_truncated, score
from trt_build.errors import EngineError

BAR = 1e-3


class Counting:
    """A session that notes the rows of its steps."""

    def __init__(self, session):
        self._session, self.steps = session, []

    def __getattr__(self, name):
        return getattr(self._session, name)

    def step(self, cache, rows):
        self.steps.append(rows)
        return self._session.step(cache, rows)

    @property
    def num_tokens(self):
        return sum(len(row.token_ids) for rows in self.steps for row in rows)


def continuations(pairs):
    return [Continuation(context=tuple(context), target=tuple(target)) for context, target in pairs]


def drawn(example, generator, length):
    return generator.integers(0, example.tokenizer.size, length).tolist()


def mixed_pairs(example, max_sequence):
    """Contexts that several targets share, targets of one token, a beginning that all share, a context alone, the same
    pair twice, and contexts of exactly and more than what fits."""
    generator = np.random.default_rng(5)
    shots = drawn(example, generator, 40)
    pairs = []
    for length in (1, 7, 150):
        context = [*shots, *drawn(example, generator, length)]
        pairs += [(context, drawn(example, generator, n)) for n in (1, 1, 1, 4, 9)]
        shared = drawn(example, generator, 3)
        pairs += [(context, [*shared, *drawn(example, generator, n)]) for n in (1, 1, 5)]
        best, after_best = example.greedy(context, 2)
        [after_other] = example.greedy([*context, 3], 1)
        pairs += [(context, [best]), (context, [best, after_best]), (context, [best, 3]), (context, [3, after_other])]
    pairs += [pairs[0], ([2], drawn(example, generator, 200))]
    pairs += [(drawn(example, generator, n), drawn(example, generator, 6)) for n in (max_sequence - 5, max_sequence)]
    return pairs


def kept(pairs, max_sequence):
    return [(context[-(max_sequence + 1 - len(target)) :], target) for context, target in pairs]


@pytest.mark.parametrize("lanes", [1, 5])
def test_scores_are_those_of_the_reference(example, lanes):
    pairs = mixed_pairs(example, example.session.max_sequence)
    found = score(example.session, continuations(pairs), lanes)
    expected = example.scores(kept(pairs, example.session.max_sequence))
    assert max(abs(ours.log_prob - theirs) for ours, (theirs, _) in zip(found, expected, strict=True)) < BAR
    assert [one.is_greedy for one in found] == [is_greedy for _, is_greedy in expected]
    assert {one.is_greedy for one in found} == {True, False}
    assert num_truncated(continuations(pairs), example.session.max_sequence) == 1


def test_small_steps_and_few_logits_at_a_time_change_nothing(phixtral, monkeypatch):
    pairs = mixed_pairs(phixtral, phixtral.session.max_sequence)
    expected = score(phixtral.session, continuations(pairs), lanes=3)
    monkeypatch.setattr(scoring, "STEP_TOKENS", 17)
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 4 * phixtral.session.vocab_size * 6)
    session = Counting(phixtral.session)
    found = score(session, continuations(pairs), lanes=3)
    assert [one.is_greedy for one in found] == [one.is_greedy for one in expected]
    assert max(abs(a.log_prob - b.log_prob) for a, b in zip(found, expected, strict=True)) < 1e-4
    assert max(sum(len(row.token_ids) for row in rows) for rows in session.steps) <= 17
    assert max(sum(row.num_logits for row in rows) for rows in session.steps) <= 6


def test_a_context_is_computed_once_for_all_of_its_continuations(phixtral):
    generator = np.random.default_rng(1)
    shots = drawn(phixtral, generator, 60)
    contexts = [[*shots, *drawn(phixtral, generator, 30)] for _ in range(3)]
    pairs = [(context, drawn(phixtral, generator, 5)) for context in contexts for _ in range(4)]
    session = Counting(phixtral.session)
    score(session, continuations(pairs), lanes=1)
    # Each continuation computes its own first four tokens and, but for the first of a context, the context's last.
    assert session.num_tokens == 60 + 3 * 30 + 12 * 4 + 9
    letters = Counting(phixtral.session)
    score(letters, continuations([(contexts[0], [token]) for token in range(4)]), lanes=1)
    assert letters.num_tokens == 90


def test_lanes_share_the_work_out(phixtral):
    generator = np.random.default_rng(1)
    pairs = [(drawn(phixtral, generator, 50), [7]) for _ in range(8)]
    session = Counting(phixtral.session)
    score(session, continuations(pairs), lanes=4)
    assert [len(rows) for rows in session.steps] == [4, 4]


def test_a_provider_that_computes_rows_one_by_one_gets_one_lane(phixtral):
    class Apart(Counting):
        @property
        def device(self):
            device = self._session.device
            return dataclasses.replace(device, provider=dataclasses.replace(device.provider, mixes_lengths=False))

    session = Apart(phixtral.session)
    score(session, continuations([([1, 2], [3]), ([4, 5], [6])]), lanes=4)
    assert [len(rows) for rows in session.steps] == [1, 1]


def test_progress_counts_every_continuation(phixtral):
    counts = []
    score(phixtral.session, continuations([([5, 6], [7]), ([5, 6], [8]), ([9], [1, 2])]), 2, counts.append)
    assert counts[-1] == 3
    assert counts == sorted(counts)


def test_nothing_is_nothing(phixtral):
    assert score(phixtral.session, [], lanes=4) == []


def test_lanes_fit_into_the_free_memory(phixtral, monkeypatch):
    facts = phixtral.session.engine.manifest.architecture
    each = 100 * 2 * facts.num_layers * facts.num_kv_heads * facts.head_size * 4
    free = phixtral.session.engine.resident_bytes + int(2.5 * each / 0.8)
    monkeypatch.setattr(scoring, "available_memory", lambda: free)
    assert scoring.lanes_that_fit(phixtral.session, 8, 100) == 2
    monkeypatch.setattr(scoring, "available_memory", lambda: 0)
    assert scoring.lanes_that_fit(phixtral.session, 8, 100) == 1


def test_a_target_longer_than_the_engine_is_refused(phixtral):
    longest = phixtral.session.max_sequence
    with pytest.raises(EvaluationError, match=f"continuation of {longest + 1} tokens: the engine takes {longest}"):
        score(phixtral.session, continuations([([1], [1] * (longest + 1))]), lanes=1)


def test_an_engine_of_an_earlier_format_is_refused(phixtral):
    class Old:
        engine = dataclasses.replace(phixtral.session.engine, old=object())

    with pytest.raises(EvaluationError, match="no graph for the logits of several positions"):
        score(Old(), continuations([([1], [2])]), lanes=1)


def test_logits_that_are_not_finite_are_refused(phixtral):
    class Broken(Counting):
        def step(self, cache, rows):
            logits = super().step(cache, rows)
            logits[-1, 3] = np.nan
            return logits

    with pytest.raises(EngineError, match="logits are not finite"):
        score(Broken(phixtral.session), continuations([([1, 2], [2, 3])]), lanes=1)
