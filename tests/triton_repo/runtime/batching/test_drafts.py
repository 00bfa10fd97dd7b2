"""Drafts: what is predicted, what it costs, and that answers are those without them. The invariants are in
test_histories.py, real engines in test_together.py."""

from __future__ import annotations

import random
import time
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
from batching_simulation import Simulation
from batching_standins import VOCABULARY, Cost, Wish, alone

from triton_repo.runtime.batching.drafts.costs import SIZES, Costs
from triton_repo.runtime.batching.drafts.drafter import Drafter
from triton_repo.runtime.batching.drafts.ngrams import Ngrams, Rates
from triton_repo.runtime.batching.scheduler import MOST_TOKENS, Limits

FULL_SIZE = Cost(step_s=0.085, prompt_token_s=0.012)


def expected_place(tokens: list[int]) -> int | None:
    """Where the text last had the three tokens, or else the two, that it ends with: by looking at all of it."""
    for size in (3, 2):
        for place in range(len(tokens) - 1, size - 1, -1):
            if tokens[place - size : place] == tokens[-size:]:
                return place
    return None


def test_what_followed_the_last_occurrence_is_predicted():
    ngrams = Ngrams([1, 2, 3, 4, 9, 1, 2, 3, 5, 8, 1, 2, 3], Rates())
    assert ngrams.draft(4)[0] == [5, 8, 1, 2]
    assert Ngrams([7, 1, 2, 9, 9, 1, 2], Rates()).draft(2)[0] == [9, 9]  # by two tokens, where there are no three
    assert Ngrams([1, 2, 3, 4, 5], Rates()).draft(4) == ([], [])
    assert Ngrams([1], Rates()).draft(4) == ([], [])


def test_a_text_that_repeats_itself_is_predicted_beyond_its_end():
    assert Ngrams([5, 6, 7, 5, 6, 7, 5, 6], Rates()).draft(7)[0] == [7, 5, 6, 7, 5, 6, 7]


@pytest.mark.parametrize("seed", range(20))
def test_an_index_finds_what_a_search_of_the_whole_text_finds(seed):
    """Where the prediction before it was wrong, or there was none: a match is else followed."""
    rng = random.Random(seed)
    text = rng.choices(range(rng.choice((3, 5, 9))), k=rng.randint(1, 40))
    tokens, followed = list(text), None
    ngrams = Ngrams(tokens, Rates())
    followed = expected_place(tokens)
    for _ in range(150):
        predicted = ngrams.draft(1)[0]
        assert predicted == ([] if followed is None else [tokens[followed]])
        for _ in range(rng.choice((1, 1, 3))):
            token = rng.randrange(3) if rng.random() < 0.5 or followed is None else tokens[followed]
            is_hit = followed is not None and tokens[followed] == token
            tokens.append(token)
            followed = followed + 1 if is_hit else expected_place(tokens)
        ngrams.catch_up()


def test_the_chance_of_a_prediction_is_the_rate_of_those_before_it():
    rates = Rates(Rates())
    before = rates.of(3)
    for _ in range(40):
        rates.learn(3, is_hit=True)
        rates.learn(2, is_hit=False)
    assert rates.of(3) > 0.9 > before
    assert rates.of(2) < 0.1
    assert rates.of(40) == before
    other = Rates(rates)
    assert other.of(3) == pytest.approx(rates.of(3))  # a new sequence begins with what is known


def learnt(costs: Costs, seconds: dict[int, float], times: int = 5) -> None:
    for _ in range(times):
        for drafted, each in seconds.items():
            costs.learn(1, drafted, each)


def test_costs_are_learnt_in_units_of_a_step_without_drafts():
    costs = Costs()
    assert costs.of(1) == {}
    costs.learn(1, 0, 0.1)
    assert costs.of(1) == {0: 1.0, 1: 1.05}  # nothing is known of the smallest draft: it is to be tried
    learnt(costs, {0: 0.1, 1: 0.125, 2: 0.14})
    assert costs.of(1) == pytest.approx({0: 1.0, 1: 1.25, 2: 1.4, 3: 1.05 * (1.4 + 0.1)})
    assert costs.of(2) == {}
    assert costs.plain_s(1) == pytest.approx(0.1)


def test_one_slow_step_changes_no_cost():
    costs = Costs()
    learnt(costs, {0: 0.1, 1: 0.125})
    costs.learn(1, 1, 9.0)
    costs.learn(1, 0, 9.0)
    assert costs.of(1)[1] == pytest.approx(1.25)


def test_a_cost_that_is_old_is_measured_again():
    costs = Costs()
    learnt(costs, {0: 0.1, 1: 0.5})
    assert costs.of(1)[1] == pytest.approx(5)
    for _ in range(129):
        costs.learn(1, 0, 0.1)
    assert costs.of(1)[1] == 1.05
    costs.learn(1, 1, 0.12)
    costs.learn(1, 1, 0.12)
    assert costs.of(1)[1] == pytest.approx(1.2)


def test_a_cost_that_stands_is_measured_more_and_more_rarely():
    costs, gaps, last = Costs(), [], 0
    for step in range(5000):
        drafted = int(costs.of(1).get(1) == 1.05)
        costs.learn(1, drafted, 0.2 if drafted else 0.1)
        if drafted:
            gaps.append(step - last)
            last = step
    assert [gap for gap in gaps if gap > 1] == [130, 258, 514, 1026, 1026, 1026]
    assert len(gaps) == 14  # a cost is measured twice each time, and the lower measurement counts


def test_a_step_without_drafts_is_measured_now_and_then():
    costs = Costs()
    learnt(costs, {0: 0.1})
    for _ in range(129):
        assert costs.of(1)
        costs.learn(1, 1, 0.12)
    assert costs.of(1) == {}


class Text:
    """A sequence whose text is `[1, 2, ... period]` again and again, or at random."""

    def __init__(self, period: int = 0, left: int = 1000, seed: int = 0):
        rng = random.Random(seed)
        self.tokens = [number % period if period else rng.randrange(10**6) for number in range(200)]
        self.ngrams = None
        self.writer = SimpleNamespace(sampler=SimpleNamespace(guide=None))
        self.request = SimpleNamespace(num_positions=len(self.tokens) + left)


def trained(seconds, sequences, steps=60) -> Drafter:
    """A drafter that knows the costs and how predictable the texts are."""
    drafter = Drafter()
    for _ in range(steps):
        drafts = drafter.drafts(sequences, MOST_TOKENS, 10.0)
        drafted = sum(map(len, drafts.values()))
        drafter.learn(len(sequences), drafted, seconds(drafted))
        for sequence in sequences:
            sequence.tokens.append(sequence.tokens[sequence.ngrams._next] if sequence.ngrams.draft(1)[0] else -1)
    return drafter


def test_drafts_are_as_long_as_they_pay():
    cheap = trained(lambda drafted: 0.1 + 0.001 * drafted, text := [Text(period=9)])
    assert len(cheap.drafts(text, MOST_TOKENS, 10.0)[text[0]]) == SIZES[-1]
    steep = trained(lambda drafted: 0.1 + 0.03 * max(0, drafted - 4), text := [Text(period=9)])
    assert 4 <= len(steep.drafts(text, MOST_TOKENS, 10.0)[text[0]]) <= 12
    dear = trained(lambda drafted: 0.1 + 0.11 * drafted, text := [Text(period=9)])
    assert not dear.drafts(text, MOST_TOKENS, 10.0)


def test_drafts_keep_to_the_positions_that_are_left_and_to_the_step():
    drafter = trained(lambda drafted: 0.1, text := [Text(period=9, left=70)])
    text[0].request.num_positions = len(text[0].tokens) + 5
    assert len(drafter.drafts(text, MOST_TOKENS, 10.0)[text[0]]) == 4
    text[0].request.num_positions = len(text[0].tokens)
    assert not drafter.drafts(text, MOST_TOKENS, 10.0)
    text[0].request.num_positions += 100
    assert len(drafter.drafts(text, 3, 10.0)[text[0]]) == 3
    assert not drafter.drafts(text, 0, 10.0)


def test_a_draft_ends_where_a_guide_would_not_take_it():
    def fail(_tokens):
        raise ValueError("no mask")

    drafter = trained(lambda drafted: 0.1, text := [Text(period=9)])
    text[0].writer.sampler.guide = SimpleNamespace(
        is_ready=lambda _wait_s: True, num_taken=lambda tokens: min(3, len(tokens))
    )
    assert len(drafter.drafts(text, MOST_TOKENS, 10.0)[text[0]]) == 3
    text[0].writer.sampler.guide.num_taken = fail
    assert not drafter.drafts(text, MOST_TOKENS, 10.0)


def test_a_guide_that_takes_long_is_shown_few_tokens_of_a_draft():
    shown = []

    def slow(tokens):
        shown.append(len(tokens))
        begun = time.thread_time()
        while time.thread_time() - begun < 0.002 * len(tokens):
            pass
        return len(tokens)

    drafter = trained(lambda drafted: 0.1, text := [Text(period=9)])
    text[0].writer.sampler.guide = SimpleNamespace(is_ready=lambda _wait_s: True, num_taken=slow)
    assert len(drafter.drafts(text, MOST_TOKENS, 10.0)[text[0]]) == 2
    assert shown == [2]
    text[0].writer.sampler.guide.num_taken = len
    assert len(drafter.drafts(text, MOST_TOKENS, 10.0)[text[0]]) == SIZES[-1]


@pytest.mark.parametrize("count", [1, 2])
def test_drafts_make_a_step_longer_by_half_of_the_pause_target_at_most(count):
    texts = [Text(period=9), Text(period=11)][:count]
    drafter = trained(lambda drafted: 0.1 + 0.01 * drafted, texts)

    def drafted(pause_s):
        return sum(map(len, drafter.drafts(texts, MOST_TOKENS, pause_s).values()))

    assert drafted(10.0) == SIZES[-1]
    assert drafted(0.3) in (12, 16)  # 0.15 s, as far as the cost of 16 is known
    assert drafted(0.13) in (6, 8)  # 0.065 s


def wish(number: int, **more) -> Wish:
    prompt = bytes(random.Random(number).choices(range(1, VOCABULARY), k=20))
    return Wish(**{"number": number, "prompt": prompt, "most_tokens": 200, "ends": False, **more})


def run(wishes: list[Wish], cost: Cost = FULL_SIZE, **more) -> Simulation:
    simulation = Simulation(cost, drafts=True, **more)
    clients = [simulation.submit(each) for each in wishes]
    simulation.run()
    for client in clients:
        answers = alone(client.wish, *simulation.session._text)
        assert [client.tokens_of(index) for index in range(client.wish.count)] == [each.tokens for each in answers]
    return simulation


def without(wishes: list[Wish], **more) -> float:
    """Seconds of the same without drafts."""
    simulation = Simulation(FULL_SIZE, **more)
    for each in wishes:
        simulation.submit(each)
    simulation.run()
    return simulation.clock.now


def test_a_text_that_repeats_itself_is_faster():
    wishes = [wish(1)]
    simulation = run(wishes, surprise_one_in=20)
    assert without(wishes, surprise_one_in=20) / simulation.clock.now > 1.5


def test_a_text_that_does_not_is_not_slower():
    """Bar: 0.97."""
    wishes = [wish(number, arrives_s=20.0 * number) for number in range(5)]
    simulation = run(wishes)
    assert without(wishes) / simulation.clock.now > 0.97


def test_several_answers_and_requests_are_drafted_beside_prompts():
    wishes = [wish(number, count=1 + number % 3, arrives_s=1.5 * number, most_tokens=120) for number in range(8)]
    simulation = run(wishes, Cost(step_s=0.085, prompt_token_s=0.002), surprise_one_in=20, keeps=True)
    stats = simulation.engine.stats
    assert stats.accepted_tokens > stats.output_tokens / 5


def test_a_small_memory_is_enough_for_drafts():
    """Positions that a rejected draft was written to count as in memory (Slots.held_bytes)."""
    simulation = Simulation(FULL_SIZE, drafts=True, surprise_one_in=5, slots=2, positions=300, budget=0.9, keeps=True)
    for number in range(12):
        simulation.submit(wish(number, arrives_s=0.2 * number, most_tokens=100))
    simulation.session.before = lambda _rows: check(simulation)
    simulation.run()
    assert simulation.engine.stats.drafted_tokens > simulation.engine.stats.accepted_tokens > 0


def check(simulation: Simulation) -> None:
    slots = simulation.scheduler.slots
    assert simulation.cache.touched_bytes <= slots.held_bytes <= slots.budget


def draws(first: int, count: int, *, drafts: bool) -> list[bytes]:
    """Answers that are drawn with the seeds from `first` on, from logits that the token before alone decides."""
    simulation = Simulation(
        Cost(step_s=0.01, prompt_token_s=0.0001), drafts=drafts, surprise_one_in=1 << 30,
        limits=Limits(max_waiting=count, max_wait_s=1e6),
    )  # fmt: skip
    prompt = bytes([3, 9, 3])
    clients = [
        simulation.submit(wish(number, prompt=prompt, temperature=0.5, most_tokens=50, arrives_s=0.08 * number))
        for number in range(first, first + count)
    ]
    simulation.run()
    if drafts:
        assert simulation.engine.stats.accepted_tokens > 5 * count
    return [client.tokens_of(0) for client in clients]


def transitions(answers: list[bytes]) -> np.ndarray:
    """How often each token followed each token."""
    counts = np.zeros((VOCABULARY, VOCABULARY))
    for answer in answers:
        np.add.at(counts, (list(answer[:-1]), list(answer[1:])), 1)
    return counts


def test_draws_with_drafts_are_those_without_and_distributed_alike():
    """20,000 draws of each: with the same seeds they are the same, and with others a chi-square test at 1 % finds no
    difference in how often each token followed each token."""
    with_drafts, without_drafts = draws(0, 400, drafts=True), draws(0, 400, drafts=False)
    assert with_drafts == without_drafts
    statistic = freedom = 0.0
    for rows in zip(transitions(with_drafts), transitions(draws(1000, 400, drafts=False)), strict=True):
        counts = np.array(rows)
        often = counts.sum(axis=0) >= 10
        counts = np.column_stack([counts[:, often], counts[:, ~often].sum(axis=1)])
        counts = counts[:, counts.sum(axis=0) >= 10]
        if counts.shape[1] > 1 and counts.sum(axis=1).min() > 0:
            expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / counts.sum()
            statistic += ((counts - expected) ** 2 / expected).sum()
            freedom += counts.shape[1] - 1
    assert freedom > 100
    # The cube root of chi-square over its freedom is all but normal (Wilson and Hilferty, 1931).
    spread = 2 / (9 * freedom)
    assert ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5 < NormalDist().inv_cdf(0.99)
