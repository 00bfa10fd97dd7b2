"""Cores that a process may use: its affinity, the machine's topology, and its control groups' time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trt_build.machine.cores import physical_cores, usable_cores

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def machine(tmp_path):
    """Eight CPUs on four cores, 0 and 4 on the first; this process in /a/b, no limits yet."""
    cpus, proc, cgroup = tmp_path / "cpu", tmp_path / "proc", tmp_path / "cgroup"
    for cpu in range(8):
        (cpus / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("1:name=systemd:/x\n0::/a/b\n")
    (cgroup / "a" / "b").mkdir(parents=True)
    for group in (cgroup / "a", cgroup / "a" / "b"):
        (group / "cpu.max").write_text("max 100000\n")
    return cpus, proc, cgroup


@pytest.mark.parametrize(
    ("affinity", "cores"),
    [
        (range(8), [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ((0, 4), [[0, 4]]),
        ((5, 1, 0), [[0], [1, 5]]),
        ((3,), [[3]]),
        ((0, 1, 9), [[0], [1], [9]]),  # the kernel says nothing of the last one
    ],
)
def test_two_cpus_of_one_core_are_one(machine, affinity, cores):
    cpus, proc, cgroup = machine
    assert physical_cores(set(affinity), cpus) == cores
    assert usable_cores(cores, proc, cgroup) == len(cores)


@pytest.mark.parametrize(
    ("own", "above", "cores"),
    [
        ("200000 100000", "max 100000", 2),
        ("250000 100000", "max 100000", 2),
        ("50000 100000", "max 100000", 1),
        ("max 100000", "300000 100000", 3),
        ("200000 100000", "100000 100000", 1),
        ("1600000 100000", "max 100000", 4),
    ],
)
def test_a_control_group_bounds_them(machine, own, above, cores):
    _, proc, cgroup = machine
    (cgroup / "a" / "b" / "cpu.max").write_text(f"{own}\n")
    (cgroup / "a" / "cpu.max").write_text(f"{above}\n")
    assert usable_cores([[0, 4], [1, 5], [2, 6], [3, 7]], proc, cgroup) == cores


_ENGINE = """
import json, os, sys
from pathlib import Path
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session
session = Session(open_engine(Path(sys.argv[1])))
session.run(session.new_cache(), [1, 2, 3])
print(session.backend.get_session_options().intra_op_num_threads)
print(json.dumps([sorted(os.sched_getaffinity(int(task.name))) for task in Path("/proc/self/task").iterdir()]))
"""


def threads_of(engine, cpus) -> tuple[int, set[tuple[int, ...]]]:
    """The number of threads of a step, and the CPUs on which threads of a process may run that loaded an engine."""
    words = [sys.executable, "-c", _ENGINE, str(engine)]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=ROOT, preexec_fn=lambda: os.sched_setaffinity(0, cpus)
    )
    assert done.returncode == 0, done.stderr
    number, affinities = map(json.loads, done.stdout.splitlines())
    return number, set(map(tuple, affinities))


def test_no_thread_of_an_engine_leaves_the_cpus_of_its_process(tiny_engines):
    for cpu in sorted(os.sched_getaffinity(0))[:2]:
        assert threads_of(tiny_engines("fp32"), {cpu}) == (1, {(cpu,)})


def test_each_core_of_a_process_that_has_all_its_time_has_a_thread(tiny_engines):
    cores = physical_cores()[:2]
    if usable_cores(cores) < 2:
        pytest.skip("this process may use one core alone")
    cpus = {cpu for core in cores for cpu in core}
    assert threads_of(tiny_engines("fp32"), cpus) == (2, {tuple(sorted(cpus)), tuple(cores[1])})
