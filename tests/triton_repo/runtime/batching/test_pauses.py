"""Who waits for whom, and how long, in simulated time: the costs of steps are those of several machines."""

from __future__ import annotations

import itertools
import random

import pytest
from batching_simulation import Simulation
from batching_standins import Cost, Wish

FULL_SIZE = Cost(step_s=0.07, prompt_token_s=0.0126)
COSTS = {
    "a full-size engine": FULL_SIZE,
    "rows that cost": Cost(step_s=0.09, prompt_token_s=0.0126, row_s=0.05),
    "AMX": Cost(step_s=0.08, prompt_token_s=0.003, row_s=0.018),
    "AMX with rows that cost": Cost(step_s=0.05, prompt_token_s=0.003, row_s=0.04),
    "a small engine": Cost(step_s=0.003, prompt_token_s=0.0002, row_s=0.0005),
    "a middling engine": Cost(step_s=0.01, prompt_token_s=0.003, row_s=0.002),
    "answers that take longer than the target": Cost(step_s=0.3, prompt_token_s=0.001),
    "prompts that take long": Cost(step_s=0.07, prompt_token_s=0.03),
    "full size, memory now and then 2.3 times as slow": Cost(slowdown=2.3, period=10),
    "the same every second step": Cost(slowdown=2.3, period=2),
    "the same for longer": Cost(slowdown=2.3, period=40),
    "middling, memory now and then 2.3 times as slow": Cost(
        step_s=0.01, prompt_token_s=0.003, row_s=0.002, slowdown=2.3, period=40
    ),
    "small steps, memory now and then 2.3 times as slow": Cost(
        step_s=0.003, prompt_token_s=0.002, slowdown=2.3, period=12
    ),
}
TARGET_S = 0.25


def wish(number: int, size: int, most_tokens: int, arrives_s: float = 0.0) -> Wish:
    prompt = bytes(random.Random(number).choices(range(1, 48), k=size))
    return Wish(number=number, prompt=prompt, most_tokens=most_tokens, arrives_s=arrives_s, ends=False)


def simulate(cost: Cost, wishes: list[Wish], **more):
    """The simulation after its end, and when each client got its tokens."""
    simulation = Simulation(cost, **more)
    clients = [simulation.submit(each) for each in wishes]
    simulation.run()
    return simulation, [[moment for moment, _ in client.parts] for client in clients]


def first_token_s(cost: Cost, size: int) -> float:
    """How long a prompt takes alone."""
    _, [[moment]] = simulate(cost, [wish(99, size, 1)])
    return moment


@pytest.mark.parametrize("name", COSTS)
def test_a_long_prompt_neither_holds_up_running_answers_nor_waits_for_them(name):
    """The longest pause is one step without prompts and twice the target more; the prompt takes three times as long as
    alone."""
    cost = COSTS[name]
    longest_s = cost.slowdown * (cost.step_s + 4 * cost.row_s) + 2 * TARGET_S
    alone_s = first_token_s(cost, 1024)
    running = [wish(number, 30 + 7 * number, 900) for number in range(4)]
    ends = simulate(cost, running)[0].step_ends
    for step in (20, 27, 46, 55):
        arrives_s = ends[step] + 0.3 * (ends[step + 1] - ends[step])
        _, (*answers, long) = simulate(cost, [*running, wish(9, 1024, 50, arrives_s)])
        assert long[0] - arrives_s <= 3 * alone_s
        for moments in answers:
            pauses = [after - before for before, after in itertools.pairwise(moments)]
            assert max(pauses) <= longest_s


@pytest.mark.parametrize("name", COSTS)
def test_drafts_make_neither_pauses_nor_a_long_prompt_longer_and_the_whole_not_slower(name):
    """Pauses and the prompt's time are those that are allowed without drafts; answers repeat themselves in parts."""
    cost = COSTS[name]
    wishes = [*(wish(number, 30 + 7 * number, 500) for number in range(4)), wish(9, 1024, 50, 40 * cost.step_s)]
    without = simulate(cost, wishes, surprise_one_in=20)[0].clock.now
    simulation, (*answers, long) = simulate(cost, wishes, surprise_one_in=20, drafts=True)
    assert simulation.engine.stats.accepted_tokens > 0
    assert simulation.clock.now <= without / 0.97
    assert long[0] - 40 * cost.step_s <= 3 * first_token_s(cost, 1024)
    for moments in answers:
        pauses = [after - before for before, after in itertools.pairwise(moments)]
        assert max(pauses) <= cost.slowdown * (cost.step_s + 4 * cost.row_s) + 2 * TARGET_S


@pytest.mark.parametrize("size", [4, 16, 32])
def test_a_short_prompt_does_not_wait_for_seven_long_ones(size):
    """Whenever it arrives, it has its first token after the time that it takes alone and two seconds."""
    long = [wish(number, 1024, 40) for number in range(7)]
    ends = simulate(FULL_SIZE, long)[0].step_ends
    longest_s = first_token_s(FULL_SIZE, size) + 2.0
    for moment in [0.0, *ends[:-20:6]]:
        arrives_s = moment + 1e-6
        _, moments = simulate(FULL_SIZE, [*long, wish(9, size, 2, arrives_s)])
        assert moments[-1][0] - arrives_s <= longest_s


@pytest.mark.parametrize("most_tokens", [1, 20])
def test_a_long_prompt_moves_on_however_many_short_ones_arrive(most_tokens):
    """The oldest prompt gets half of what prompts get, which is 16 tokens at the least: it needs 128 steps at most,
    whether the short ones have one token to answer or go on."""
    simulation = Simulation(FULL_SIZE)
    for number in range(3):
        simulation.submit(wish(number, 4, 5))
    long = simulation.submit(wish(9, 1024, 1, 1.0))
    for number in range(10, 2000):
        simulation.submit(wish(number, 12, most_tokens, 1.0 + 0.02 * number))
    simulation.run()
    [[answered_s, _]] = long.parts
    steps = [end for end in simulation.step_ends if 1.0 < end <= answered_s]
    assert len(steps) <= 128


def test_eight_long_prompts_all_move_on():
    """With the oldest at half of each step and the others at the other half by turns, the last of eight has its first
    token when all are computed, and the first of them after twice its time alone."""
    _, moments = simulate(FULL_SIZE, [wish(number, 1024, 1) for number in range(8)])
    firsts = [each[0] for each in moments]
    alone_s = first_token_s(FULL_SIZE, 1024)
    assert firsts == sorted(firsts)
    assert firsts[0] <= 2.1 * alone_s
    assert firsts[-1] <= 8 * 1.1 * alone_s
