"""Memory that is available, and engines that are refused for the lack of it."""

from __future__ import annotations

import pytest

from trt_build.engine import open_engine
from trt_build.errors import EngineError
from trt_build.memory import available_memory, require_memory
from trt_build.ort.session import Session


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


def test_an_engine_that_does_not_fit_is_refused_with_the_context_that_would(tiny_engine):
    engine = open_engine(tiny_engine)
    weights = engine.resident_bytes
    assert weights == engine.manifest.files["model.onnx.data"].bytes
    per_token = 3 * 2 * 192 * 4
    require_memory(engine, weights + 640 * per_token)
    with pytest.raises(
        EngineError, match=r"for sequences of 640 tokens: found 0.00 GB .* --max-sequence 639, which fits"
    ):
        require_memory(engine, weights + 640 * per_token - 1)
    with pytest.raises(EngineError, match="build a lower precision: the weights alone do not fit"):
        require_memory(engine, weights)


def test_the_session_refuses_before_it_loads_anything(tiny_engine, monkeypatch):
    monkeypatch.setattr("trt_build.memory.available_memory", lambda: 3_000_000)
    monkeypatch.setattr("trt_build.ort.session.load_graph", None)
    with pytest.raises(EngineError, match=r"loading .* for sequences of 640 tokens: found 0.00 GB of memory available"):
        Session(open_engine(tiny_engine))
