"""What memory an engine takes to run, against what there is: told before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from export.architecture import Architecture
from export.provider import PROVIDERS, Provider
from trt_build.engine import Engine
from trt_build.errors import EngineError

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def kv_bytes_per_token(architecture: Architecture, provider: Provider) -> int:
    """Key and value of one position in every layer, in the provider's float type."""
    values = 2 * architecture.num_layers * architecture.num_kv_heads * architecture.head_size
    return values * np.dtype(provider.float_type).itemsize


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


def require_memory(engine: Engine, available: int | None = None) -> None:
    """Raise EngineError where the weights and one sequence's cache exceed what is available (None: ask the machine).

    An engine whose provider has memory of its own is not judged.
    """
    manifest = engine.manifest
    if manifest.provider != "cpu":
        return
    have = available_memory() if available is None else available
    weights = engine.resident_bytes
    per_token = kv_bytes_per_token(manifest.architecture, PROVIDERS[manifest.provider])
    cache = per_token * manifest.max_sequence
    if weights + cache <= have:
        return
    fitting = (have - weights) // per_token
    remedy = (
        f"free memory, or build it with --max-sequence {fitting}, which fits"
        if fitting > 0
        else "free memory, or build a lower precision: the weights alone do not fit"
    )
    raise EngineError(
        f"loading {engine.folder} for sequences of {manifest.max_sequence} tokens: found {have / 1e9:.2f} GB of memory "
        f"available, expected {weights / 1e9:.2f} GB for the weights and {cache / 1e9:.2f} GB for keys and values; "
        f"{remedy}"
    )
