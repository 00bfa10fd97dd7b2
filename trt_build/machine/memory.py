"""What memory this machine has left for new programs."""

from __future__ import annotations

from pathlib import Path

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def available_memory(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int:
    """Bytes that new programs can take without swapping: what the kernel calls MemAvailable, or what the control
    groups of this process leave where that is less. Files in the page cache, mapped ones too, count as available.

    Sources: proc(5), /proc/meminfo; the kernel's admin-guide/cgroup-v2.rst, memory.max, memory.current, memory.stat.
    """
    lines = (proc / "meminfo").read_text().splitlines()
    machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(0, min([machine, *_left_by_groups(proc, cgroup)]))


def _left_by_groups(proc: Path, cgroup: Path) -> list[int]:
    """What each group of version 2 that bounds this process leaves, from its own up to the root."""
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
            continue  # the root has no limit
        if limit != "max":
            left.append(int(limit) - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    return left
