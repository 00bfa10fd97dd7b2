"""Which worker of pytest-xdist takes which file of tests, so that the cores compute while servers start and end."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable

from xdist.scheduler import LoadFileScheduling

from trt_build.machine.memory import available_memory

# Files that mostly wait for processes: for servers that start, and for what ends.
WAITING = (
    "tests/triton_repo/live/", "tests/triton_repo/serving/", "tests/triton_repo/supervision/",
    "tests/clients/test_live.py", "tests/clients/gateway/test_live.py", "tests/clients/gateway/test_serve_gateway.py",
    "tests/cli/test_ends.py", "tests/cli/test_commands.py", "tests/cli/test_gateway_command.py",
    "tests/cli/test_other_inputs.py",
)  # fmt: skip
WORKERS_BESIDE_A_WAITING_ONE = 2
MOST_WORKERS = 24  # Of more, each collects for longer than it computes, and the longest file decides.
WORKER_BYTES = 2 << 30  # with torch, transformers, and the processes that its tests start


def waits(file: str) -> bool:
    return file.startswith(WAITING)


def num_workers() -> int:
    """Half as many again as there are cores, as many as `choose_file` gives to files that wait; but not more than
    there is memory or use for."""
    cores = len(os.sched_getaffinity(0))
    wanted = cores + max(1, cores // WORKERS_BESIDE_A_WAITING_ONE)
    return max(1, min(wanted, MOST_WORKERS, available_memory() // WORKER_BYTES))


def choose_file(queue: Iterable[str], others_wait: Collection[bool]) -> str:
    """The file of `queue` that a free worker should take: the first that waits if too few other workers have one, else
    the first that computes. Where only files of the other kind are left, the first of those. `others_wait` says of each
    other worker whether it has a file that waits."""
    files = list(queue)
    wanted = sum(others_wait) < (len(others_wait) + 1) // (WORKERS_BESIDE_A_WAITING_ONE + 1)
    return next((file for file in files if waits(file) == wanted), files[0])


class Scheduling(LoadFileScheduling):
    """Files in their order, but so that one worker of three has those that wait. The servers that such files share are
    then started once, and not once a worker."""

    def mark_test_complete(self, node, item_index, duration=0):
        if self.workqueue:
            others_wait = [
                any(waits(file) and not all(done.values()) for file, done in files.items())
                for other, files in self.assigned_work.items()
                if other is not node
            ]
            self.workqueue.move_to_end(choose_file(self.workqueue, others_wait), last=False)
        super().mark_test_complete(node, item_index, duration)
