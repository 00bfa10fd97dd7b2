"""Files are replaced and folders appear whole, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from export.files.output import replace_file, staged_directory


def test_a_replaced_file_has_the_new_text_and_can_be_read_by_all(tmp_path):
    path = tmp_path / "engine.json"
    path.write_text("old")
    path.chmod(0o600)
    replace_file(path, "new ä")
    assert path.read_bytes() == "new ä".encode()
    assert path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == ["engine.json"]


@pytest.mark.parametrize(("moment", "text"), [("before", "old"), ("after", "new")])
def test_an_interrupt_beside_the_rename_is_passed_on_and_leaves_one_whole_file(tmp_path, monkeypatch, moment, text):
    path, rename = tmp_path / "engine.json", Path.replace
    path.write_text("old")

    def interrupted(temporary, target):
        if moment == "after":
            rename(temporary, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, "new")
    assert path.read_text() == text
    assert [entry.name for entry in tmp_path.iterdir()] == ["engine.json"]


def test_the_text_is_on_the_disk_before_it_gets_the_name(tmp_path, monkeypatch):
    path, synced, sync = tmp_path / "engine.json", [], os.fsync

    def noted(descriptor):
        synced.append((os.fstat(descriptor).st_size, path.exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    replace_file(path, "text")
    assert synced == [(4, False)]


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path):
    killed, written, young = (tmp_path / f".model.partial-{name}" for name in ("killed", "written", "young"))
    others = tmp_path / ".other.partial-killed"
    for folder in (killed, written, young, others):
        folder.mkdir()
        (folder / "shard").write_text("half")
    long_ago = time.time() - 3600
    for folder in (killed, written, others):
        os.utime(folder, (long_ago, long_ago))
    writing = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", writing, str(written)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with staged_directory(tmp_path / "model", "the model") as folder:
            (folder / "shard").write_text("whole")
        other.stdin.close()
    assert {path.name for path in tmp_path.iterdir()} == {"model", written.name, young.name, others.name}
