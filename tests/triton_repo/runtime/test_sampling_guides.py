"""A guide beside everything else that decides a token: hand-worked numbers over five tokens. Token 4 ends a text."""

from __future__ import annotations

import numpy as np
import pytest

from tests.samplers import sampler
from triton_repo.errors import RequestError

END = 4


class Steps:
    """A guide that allows what it is told, step by step."""

    def __init__(self, *steps: set[int]) -> None:
        self.steps, self.taken = steps, []

    @property
    def is_complete(self):
        return len(self.taken) == len(self.steps)

    def allowed(self):
        return np.isin(np.arange(5), list(self.steps[len(self.taken)]))

    def take(self, token):
        assert token in self.steps[len(self.taken)]
        self.taken.append(token)


LOGITS = np.array([1, 4, 3, 2, 5, 90, 90], dtype=np.float32)  # with two rows of padding


def guided(*steps, **fields):
    return sampler(5, end_ids=(END,), guide=Steps(*steps), **fields)


def drawn(count=400, **fields) -> list[int]:
    made = guided(*[{0, 2, 3}] * count, temperature=2.0, random_seed=5, **fields)
    return [made.choose(LOGITS).token_id for _ in range(count)]


def test_a_greedy_choice_is_the_best_that_is_allowed():
    made = guided({0, 3}, {1, 2, END}, {0, 1})
    assert [made.choose(LOGITS).token_id for _ in range(3)] == [3, END, 1]
    assert made.guide.taken == [3, END, 1]
    assert made.is_complete
    assert not sampler(5).is_complete


def test_log_probabilities_are_the_models():
    choice = guided({0}, return_log_probs=True, num_log_probs=2).choose(LOGITS)
    assert choice.log_prob == pytest.approx(1 - np.log(np.exp([1, 4, 3, 2, 5]).sum()))
    assert choice.top_log_probs == sampler(5, num_log_probs=2).choose(LOGITS).top_log_probs


def test_draws_are_among_what_is_allowed_and_cuts_come_behind_it():
    assert set(drawn(top_p=1.0)) == {0, 2, 3}
    weights = np.exp(np.array([1, 3, 2]) / 2)
    found = np.bincount(drawn(4000, top_p=1.0), minlength=5)[[0, 2, 3]] / 4000
    assert found == pytest.approx(weights / weights.sum(), abs=0.03)
    assert set(drawn(top_k=2)) == {2, 3}  # the two likeliest of three
    assert set(drawn(top_k=1)) == {2}
    assert set(drawn(top_p=0.5)) == {2}
    assert set(drawn(min_p=0.5)) == {2, 3}
    assert set(drawn(top_k=4)) == {0, 2, 3}


def test_biases_and_penalties_choose_among_what_is_allowed():
    assert guided({0, 3}, logit_bias=((0, 1.5), (1, 100.0))).choose(LOGITS).token_id == 0
    made = guided({2, 3}, {2, 3}, {2, 3}, presence_penalty=1.5)
    assert [made.choose(LOGITS).token_id for _ in range(3)] == [2, 3, 2]
    made = sampler(5, prompt_ids=(2,), guide=Steps({2, 3}), repetition_penalty=2.0)
    assert made.choose(LOGITS).token_id == 3


def test_end_tokens_are_held_back_only_where_another_token_may_come():
    made = guided({2, END}, {END}, {2, END}, min_length=9)
    assert [made.choose(LOGITS).token_id for _ in range(3)] == [2, END, 2]
    assert guided({2, END}, min_length=0).choose(LOGITS).token_id == END


def test_what_is_banned_or_refused_is_left_out_of_what_is_allowed():
    banned = lambda: [np.array([2, 1])]  # noqa: E731
    assert guided({1, 2, 3}, banned=banned).choose(LOGITS).token_id == 3
    assert guided({1, 2, END}, banned=banned).choose(LOGITS).token_id == END
    assert guided({1, 2, 3}, refuses=lambda token: token == 1).choose(LOGITS).token_id == 2
    for fields in ({"banned": banned}, {"refuses": lambda token: token in (1, 2)}):
        with pytest.raises(RequestError, match="bad_words and min_length and the guide together leave none"):
            guided({1, 2}, **fields).choose(LOGITS)


def test_the_logits_are_only_read():
    given = LOGITS.copy()
    guided({0, 3}, logit_bias=((0, 1.5),), temperature=1.0, top_p=0.9, random_seed=1).choose(given)
    assert given.tolist() == LOGITS.tolist()


def test_draws_are_those_without_a_guide_where_it_allows_all():
    fields = {"temperature": 1.0, "top_p": 0.9, "random_seed": 3}
    free, kept = sampler(5, **fields), sampler(5, guide=Steps(*[set(range(5))] * 50), **fields)
    assert [free.choose(LOGITS).token_id for _ in range(50)] == [kept.choose(LOGITS).token_id for _ in range(50)]
