"""The memory of this machine that is available to new programs."""

from __future__ import annotations

from pathlib import Path

from trt_build.machine.control_groups import CGROUP, PROC, control_groups


def available_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Bytes that new programs can allocate without swapping: the kernel's MemAvailable, or less if a control group of
    this process has less left. Files in the page cache, mapped files included, count as available.

    Sources: proc(5), /proc/meminfo; the kernel's admin-guide/cgroup-v2.rst, memory.max, memory.current, memory.stat.
    """
    lines = (proc / "meminfo").read_text().splitlines()
    machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(0, min([machine, *_left_by_groups(proc, cgroup)]))


def _left_by_groups(proc: Path, cgroup: Path) -> list[int]:
    """Bytes left in each control group that limits this process."""
    left = []
    for group in control_groups(proc, cgroup):
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # the root group has no limit
        if limit != "max":
            left.append(int(limit) - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    return left
