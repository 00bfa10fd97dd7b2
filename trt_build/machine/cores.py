"""The processor cores that this process may use."""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from pathlib import Path

from trt_build.machine.control_groups import CGROUP, PROC, control_groups

_CPUS = Path("/sys/devices/system/cpu")


def physical_cores(affinity: Set[int] | None = None, cpus: Path = _CPUS) -> list[list[int]]:
    """The CPUs that this process may run on, those of one core together, in the order of their numbers. `affinity` has
    these CPUs (None: what the kernel says, as it was told by taskset or by a container's cpuset).

    Sources: sched_setaffinity(2); the kernel's admin-guide/cputopology.rst, thread_siblings_list.
    """
    cores: dict[str, list[int]] = {}
    for cpu in sorted(os.sched_getaffinity(0) if affinity is None else affinity):
        cores.setdefault(_siblings(cpus, cpu), []).append(cpu)
    return list(cores.values())


def _siblings(cpus: Path, cpu: int) -> str:
    """What all CPUs of a core have in common; the CPU itself where the kernel does not say."""
    try:
        return (cpus / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def usable_cores(cores: Sequence[Sequence[int]], proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """How many of the cores that this process may run on it can use at a time: fewer if a control group gives it less
    time; at least 1.

    A part of a core that a group gives is left out: a thread that is stopped in the middle of a step holds up the
    others. Source: the kernel's admin-guide/cgroup-v2.rst, cpu.max: microseconds of time in each period of
    microseconds.
    """
    return max(1, min([len(cores), *_cores_of_groups(proc, cgroup)]))


def _cores_of_groups(proc: Path, cgroup: Path) -> list[int]:
    """Whole cores in whose time each control group of this process is bounded."""
    found = []
    for group in control_groups(proc, cgroup):
        try:
            limit, period = (group / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue  # the root group has no limit
        if limit != "max":
            found.append(int(limit) // int(period))
    return found
