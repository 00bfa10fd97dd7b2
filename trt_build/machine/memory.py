"""The memory of this machine that is available to new programs."""

from __future__ import annotations

from pathlib import Path

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def available_memory(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int:
    """Bytes that new programs can allocate without swapping: the kernel's MemAvailable, or less if a control group of
    this process has less left. Files in the page cache, mapped files included, count as available.

    Sources: proc(5), /proc/meminfo; the kernel's admin-guide/cgroup-v2.rst, memory.max, memory.current, memory.stat.
    """
    lines = (proc / "meminfo").read_text().splitlines()
    machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(0, min([machine, *_left_by_groups(proc, cgroup)]))


def _left_by_groups(proc: Path, cgroup: Path) -> list[int]:
    """Bytes left in each version 2 control group that limits this process, from its own group up to the root."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:
        return []
    folder, left = cgroup / own.strip("/"), []
    for group in (folder, *folder.parents):
        if not group.is_relative_to(cgroup):
            break
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # the root group has no limit
        if limit != "max":
            left.append(int(limit) - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    return left
