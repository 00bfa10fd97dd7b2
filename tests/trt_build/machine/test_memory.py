"""Memory that is available: what the kernel says, and what the control groups of this process leave of it."""

from __future__ import annotations

import pytest

from trt_build.machine.memory import available_memory


@pytest.fixture
def machine(tmp_path):
    """A /proc and a /sys/fs/cgroup: 16 GB available, this process in /a/b, no limits yet."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 20000000 kB\nMemAvailable: 16000000 kB\n")
    (proc / "self" / "cgroup").write_text("1:name=systemd:/x\n0::/a/b\n")
    (cgroup / "a" / "b").mkdir(parents=True)
    for group in (cgroup / "a", cgroup / "a" / "b"):
        limit(group, "max")
    return proc, cgroup


def limit(group, bound, used=0, cache=0):
    (group / "memory.max").write_text(f"{bound}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\nactive_file 7\n")


def test_without_a_limit_it_is_what_the_kernel_says(machine):
    assert available_memory(*machine) == 16_000_000 * 1024


def test_the_tightest_group_counts_and_its_page_cache_is_free(machine):
    _, cgroup = machine
    limit(cgroup / "a" / "b", 9_000_000_000, used=5_000_000_000, cache=2_000_000_000)
    assert available_memory(*machine) == 6_000_000_007
    limit(cgroup / "a", 8_000_000_000, used=6_000_000_000)
    assert available_memory(*machine) == 2_000_000_007


def test_a_group_past_its_limit_leaves_nothing(machine):
    _, cgroup = machine
    limit(cgroup / "a", 1_000, used=2_000_000)
    assert available_memory(*machine) == 0


def test_a_machine_without_groups_of_version_2_is_judged_by_the_kernel_alone(machine):
    proc, _ = machine
    (proc / "self" / "cgroup").write_text("4:memory:/a\n")
    assert available_memory(*machine) == 16_000_000 * 1024
    (proc / "self" / "cgroup").unlink()
    assert available_memory(*machine) == 16_000_000 * 1024


def test_this_machines_is_a_number_of_bytes_that_a_test_fits_into():
    assert 1 << 27 < available_memory() < 1 << 50
