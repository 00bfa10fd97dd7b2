"""How `make test` spreads files over workers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from scheduling import WAITING, Scheduling, choose_file, num_workers, waits

LIVE, LIVE_TOO = "tests/triton_repo/live/test_a.py", "tests/triton_repo/live/test_b.py"
GRID, LAYOUT = "tests/export/test_grid.py", "tests/export/test_layout.py"


@pytest.mark.parametrize(
    ("queue", "others_wait", "expected"),
    [
        ([GRID, LAYOUT, LIVE, LIVE_TOO], [False, False], LIVE),  # nobody waits yet
        ([GRID, LAYOUT, LIVE, LIVE_TOO], [True, False], GRID),
        ([LIVE, LIVE_TOO, LAYOUT, GRID], [False, True], LAYOUT),
        ([LIVE, LIVE_TOO], [True, False], LIVE),  # nothing else is left
        ([GRID, LAYOUT], [False, False], GRID),
        ([GRID, LIVE], [True, False, False, False, False], LIVE),  # two of six workers
        ([LIVE, GRID], [True, True, False, False, False], GRID),
        ([GRID, LIVE], [False], GRID),  # of two workers none is kept for files that wait
    ],
)
def test_one_worker_of_three_has_files_that_wait(queue, others_wait, expected):
    assert choose_file(queue, others_wait) == expected


@pytest.mark.parametrize(
    ("cores", "memory_gib", "expected"),
    [(1, 64, 2), (2, 64, 3), (4, 64, 6), (16, 64, 24), (64, 512, 24), (64, 16, 8), (2, 5, 2), (2, 1, 1)],
)
def test_there_are_more_workers_than_cores_where_memory_allows(monkeypatch, cores, memory_gib, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(cores)))
    monkeypatch.setattr("scheduling.available_memory", lambda: memory_gib << 30)
    assert num_workers() == expected


def test_files_that_wait_are_there():
    root = Path(__file__).parents[1]
    assert [name for name in WAITING if not (root / name).exists()] == []
    assert waits(LIVE)
    assert not waits(GRID)


class Worker:
    """Stands for pytest-xdist's WorkerController: it takes note of the tests that it is sent."""

    shutting_down = False

    def __init__(self, name: str) -> None:
        self.gateway, self.sent = SimpleNamespace(id=name), []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.sent += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def test_pytest_xdist_sends_the_files_that_wait_to_one_worker_while_there_are_others():
    waiting = [f"tests/triton_repo/live/test_{name}.py" for name in "abcd"]
    computing = [f"tests/export/test_{name}.py" for name in "abcdefghijkl"]
    collection = [f"{file}::test_{n}" for file in (waiting[0], *computing, *waiting[1:]) for n in range(5)]
    config = SimpleNamespace(
        getvalue=lambda name: ["popen"] * 3, option=SimpleNamespace(loadscopereorder=False, maxprocesses=None)
    )
    scheduling, workers = Scheduling(config), [Worker(name) for name in "xyz"]
    for worker in workers:
        scheduling.add_node(worker)
    for worker in workers:
        scheduling.add_node_collection(worker, collection)
    scheduling.schedule()
    done = [0, 0, 0]
    while not scheduling.tests_finished:  # side by side, test by test
        for n, worker in enumerate(workers):
            if done[n] < len(worker.sent):
                scheduling.mark_test_complete(worker, worker.sent[done[n]])
                done[n] += 1
    files = [[*dict.fromkeys(collection[test].split("::")[0] for test in worker.sent)] for worker in workers]
    assert sorted(file for own in files for file in own) == sorted([*waiting, *computing])
    assert files[0][:4] == waiting
    assert not set(waiting) & {*files[1], *files[2]}
    assert all(done)
