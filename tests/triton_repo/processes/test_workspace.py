"""Private folders: who may enter them, and what becomes of those whose owner was killed."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from serve_command import wait_until

from triton_repo.errors import ServerError
from triton_repo.processes import workspace as module
from triton_repo.processes.program import MARK_VARIABLE, start_time
from triton_repo.processes.workspace import is_plain, private_workspace

OWNER = """
import subprocess, sys, time
from triton_repo.processes.workspace import private_workspace
with private_workspace(sys.argv[1]) as workspace:
    process = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, start_new_session=True)
    open("/dev/shm/" + sys.argv[1] + "region", "w").close()
    print(workspace, process.pid, flush=True)
    time.sleep(1000)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def mark() -> str:
    return f"moeship_{secrets.token_hex(8)}_"


def test_a_folder_is_its_owners_alone_and_goes_with_the_block(temporary):
    with private_workspace(mark()) as workspace:
        assert workspace.parent == temporary
        assert stat.S_IMODE(workspace.stat().st_mode) == 0o700
        with private_workspace(mark()) as other:  # whoever comes next leaves it alone
            assert workspace.is_dir()
            assert other != workspace
    assert list(temporary.iterdir()) == []


def test_what_a_killed_owner_left_goes_when_the_next_comes(temporary):
    their = mark()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, their], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3],
        env={**os.environ, "TMPDIR": str(temporary), MARK_VARIABLE: their},
    )  # fmt: skip
    folder, pid = owner.stdout.readline().split()
    with private_workspace(mark()):
        assert Path(folder).is_dir()
        assert start_time(int(pid)) is not None
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    with private_workspace(mark()):
        assert not Path(folder).exists()
        assert wait_until(lambda: start_time(int(pid)) is None)
        assert not Path("/dev/shm", f"{their}region").exists()


def test_what_is_no_folder_of_ours_stays(temporary):
    (temporary / "moeship-serve-empty").mkdir()
    strange = temporary / "moeship-serve-strange"
    strange.mkdir()
    (strange / "owner").write_text("{}")
    lying = temporary / "moeship-serve-lying"
    lying.mkdir()
    (lying / "owner").write_text(json.dumps({"pid": 1, "start_time": -1, "mark": "PATH"}))
    (temporary / "moeship-serve-link").symlink_to(strange)
    with private_workspace(mark()):
        pass
    assert len(list(temporary.iterdir())) == 4


def test_a_living_process_is_believed_where_locks_do_not_hold(temporary):
    folder = temporary / "moeship-serve-living"
    folder.mkdir()
    owner = {"pid": os.getpid(), "start_time": start_time(os.getpid()), "mark": mark()}
    (folder / "owner").write_text(json.dumps(owner))
    with private_workspace(mark()):
        assert folder.is_dir()


def test_a_lock_is_believed_whatever_the_file_says(temporary):
    folder = temporary / "moeship-serve-locked"
    folder.mkdir()
    (folder / "owner").write_text(json.dumps({"pid": 0, "start_time": 0, "mark": mark()}))
    with (folder / "owner").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with private_workspace(mark()):
            assert folder.is_dir()
    with private_workspace(mark()):
        assert not folder.exists()


@pytest.mark.parametrize("name", ["a b", "a'b", 'a"b', "a;b", "a$HOME", "ä", "a\nb", "a`b", "a(b)", "a\\b", "~a", "a*"])
def test_a_path_that_a_shell_would_read_otherwise_is_not_plain(name):
    assert not is_plain(Path("/tmp") / name)


def test_a_temporary_folder_of_an_odd_path_is_refused_where_no_other_is_there(temporary, monkeypatch):
    (temporary / "a b").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary / "a b"))
    monkeypatch.setattr(module, "_FALLBACKS", ())
    with pytest.raises(ServerError, match="cannot take that path, only ASCII letters.*name another folder in TMPDIR"):
        private_workspace(mark()).__enter__()
