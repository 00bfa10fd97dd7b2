"""Workers: what they send back, how their failures are told, and that they end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from odd_converter import OddJob, odd_converter

from export.conversion.workers import convert_in_workers, peak_memory, worker_memory
from export.errors import MissingPackageError, OutputError, QuantizationError


@pytest.fixture(scope="module")
def converter(tiny_checkpoint):
    return odd_converter(tiny_checkpoint)


def convert(converter, *names, num_workers=2):
    counted = []
    records = convert_in_workers(converter, [OddJob(source=name) for name in names], num_workers, counted.append)
    return [record for record in records if record is not None], counted


def test_every_job_is_done_once_by_processes_of_their_own(converter):
    names = [f"job {number}" for number in range(20)]
    records, counted = convert(converter, *names)
    assert sorted(record.part for record in records) == sorted(names)
    assert sum(counted) == sum(map(len, names))
    workers = {record.regions[0].name for record in records}
    assert len(workers) <= 2
    assert str(os.getpid()) not in workers


def children():
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        (
            "die",
            OutputError,
            r"converting die: the process that did it ended with status -9, killed, perhaps because memory",
        ),
        ("refuse", QuantizationError, "quantising w: its values are odd"),
        ("lack", MissingPackageError, r"packing needs the package onnxruntime; install it with: pip"),
        ("fill", OSError, r"\[Errno 28\] No space left on device: 'data'"),
        ("break", AssertionError, r"a worker failed:\nTraceback (?s:.*)ValueError: a fault of ours"),
    ],
)
def test_what_a_worker_met_is_raised_here_and_no_worker_stays(converter, name, error, text):
    before = children()
    with pytest.raises(error, match=text):
        convert(converter, "one", name, "sleep", "sleep")
    assert children() == before


def test_a_worker_takes_the_memory_of_its_libraries_and_no_more(converter):
    assert 10_000_000 < worker_memory(converter) < peak_memory() + 50_000_000


PROGRAM = """
import sys
from odd_converter import OddJob, odd_converter
from export.conversion.workers import convert_in_workers
for record in convert_in_workers(odd_converter(sys.argv[1]), [OddJob(source="one"), OddJob(source="sleep")], 1, print):
    if record is not None:
        print("record", record.regions[0].name, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent_however_it_ends(tiny_checkpoint, number):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-c", PROGRAM, tiny_checkpoint]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as parent:
        worker = next(line.split()[1] for line in parent.stdout if line.startswith("record"))
        assert Path(f"/proc/{worker}").exists()
        parent.send_signal(number)
        errors = parent.communicate()[1]
    assert errors.count("Traceback") == (number == signal.SIGINT)  # the parent's own
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{worker}").exists()


def test_a_module_in_the_working_folder_does_not_stand_in_for_ours(converter, tmp_path, monkeypatch):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "__init__.py").write_text("raise SystemExit('taken in')")
    monkeypatch.chdir(tmp_path)
    assert [record.part for record in convert(converter, "one", num_workers=1)[0]] == ["one"]
