"""The control groups of this process, whose limits bound what a container may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def control_groups(proc: Path = PROC, cgroup: Path = CGROUP) -> Iterator[Path]:
    """The folder of each version 2 control group that bounds this process, from its own group up to the root. Source:
    the kernel's admin-guide/cgroup-v2.rst."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None:
        return
    folder = cgroup / own.strip("/")
    yield from (group for group in (folder, *folder.parents) if group.is_relative_to(cgroup))
