"""What others put in the place of a build's own folder and files is refused, and nothing of theirs is written to."""

from __future__ import annotations

import os
import stat

import pytest

from export.errors import OutputError
from export.files.own_files import open_log
from export.files.resume import Fingerprint, SourceFile, partial_folder, partial_path
from triton_repo.errors import ServerError

FINGERPRINT = Fingerprint(settings={"a": 1}, sources={"s": SourceFile(bytes=1, modified_ns=2, sha256="0")})


def write(final, keep=("data",), then=None):
    with partial_folder(final, "the engine", FINGERPRINT, keep, 0) as folder:
        (folder.content / "data").write_bytes(b"whole")
        folder.append({"part": "one"})
        if then:
            raise then


def interrupted(final):
    """The folder that a run left."""
    with pytest.raises(KeyboardInterrupt):
        write(final, then=KeyboardInterrupt())
    return partial_path(final)


@pytest.fixture
def final(tmp_path):
    return tmp_path / "engine"


@pytest.fixture
def victim(tmp_path):
    """A file of the user's own that nothing here may touch."""
    path = tmp_path / "victim"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"


def refusal(final):
    with pytest.raises(OutputError) as caught:
        write(final)
    assert str(caught.value).startswith(f"writing the engine to {final}: ")
    assert not final.exists()
    return str(caught.value)


def test_an_undisturbed_folder_is_this_users_alone_and_what_it_makes_is_not(final):
    partial = interrupted(final)
    assert stat.S_IMODE(partial.stat().st_mode) == 0o700
    for name in ("lock", "journal"):
        assert stat.S_IMODE((partial / name).stat().st_mode) == 0o600
    write(final)
    assert stat.S_IMODE(final.stat().st_mode) & 0o755 == 0o755
    assert not partial.exists()


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_any_umask_resumes(final, umask):
    before = os.umask(umask)
    try:
        interrupted(final)
        write(final)
    finally:
        os.umask(before)


PLACES = ("lock", "journal", "content/data")


@pytest.mark.parametrize("name", PLACES)
def test_a_link_in_the_place_of_a_file_is_refused(final, victim, name):
    path = interrupted(final) / name
    path.unlink()
    path.symlink_to(victim)
    assert f"{path} is a symbolic link, expected a file that an earlier run wrote; remove it" in refusal(final)


@pytest.mark.parametrize("name", PLACES)
def test_a_hard_link_in_the_place_of_a_file_is_refused(final, victim, name):
    path = interrupted(final) / name
    path.unlink()
    path.hardlink_to(victim)
    assert f"{path} is a file with a second name (a hard link)" in refusal(final)


@pytest.mark.parametrize("name", PLACES)
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(final, name):
    path = interrupted(final) / name
    path.unlink()
    os.mkfifo(path)
    assert f"{path} is a pipe, expected a file that an earlier run wrote" in refusal(final)


@pytest.mark.parametrize("name", ["journal.new", "scratch"])
def test_a_link_in_the_place_of_what_is_made_anew_goes_and_what_it_points_to_stays(final, victim, name):
    partial = partial_path(final)
    partial.mkdir(mode=0o700)
    (partial / name).symlink_to(victim)
    write(final)
    assert (final / "data").read_bytes() == b"whole"


def test_a_journal_of_any_size_is_read_within_bounds(final):
    partial = interrupted(final)
    os.truncate(partial / "journal", 1 << 42)  # zeros that take no room on the disk
    write(final)
    assert (final / "data").read_bytes() == b"whole"


def test_a_lock_that_waits_as_a_link_before_the_first_run_is_refused(final, victim):
    partial = partial_path(final)
    partial.mkdir(mode=0o700)
    (partial / "lock").symlink_to(victim)
    assert f"{partial / 'lock'} is a symbolic link" in refusal(final)


def test_a_dangling_link_makes_no_file(final, tmp_path):
    partial = partial_path(final)
    partial.mkdir(mode=0o700)
    (partial / "lock").symlink_to(tmp_path / "made")
    assert "is a symbolic link" in refusal(final)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("target", ["elsewhere", "absent"])
def test_a_partial_folder_that_is_a_link_is_refused(final, tmp_path, target):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("kept")
    partial_path(final).symlink_to(tmp_path / target)
    assert f"{partial_path(final)} is a symbolic link, expected a folder of an earlier run; remove it" in refusal(final)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["file"]


def test_a_partial_folder_that_is_a_file_is_refused(final):
    partial_path(final).write_text("")
    assert f"{partial_path(final)} is a file, expected a folder of an earlier run; remove it" in refusal(final)


def test_content_that_is_a_link_is_refused_and_nothing_in_it_is_removed(final, tmp_path):
    partial = interrupted(final)
    (partial / "content").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "mine").write_text("kept")
    (partial / "content").symlink_to(tmp_path / "elsewhere")
    assert f"{partial / 'content'} is a symbolic link, expected a folder" in refusal(final)
    assert (tmp_path / "elsewhere" / "mine").exists()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
@pytest.mark.parametrize("name", ["", "content"])
def test_a_folder_that_others_can_write_to_is_refused(final, name, mode):
    path = interrupted(final) / name
    path.chmod(mode)
    assert f"the folder {path} can be written to by others (mode {mode:o})" in refusal(final)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("name", ["", "content"])
def test_a_folder_of_another_user_is_refused(final, name):
    path = interrupted(final) / name
    os.chown(path, 12345, -1)
    assert f"the folder {path} belongs to the user with the number 12345, expected the user root" in refusal(final)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_journal_of_another_user_is_refused(final):
    path = interrupted(final) / "journal"
    os.chown(path, 12345, -1)
    assert f"{path} is a file of the user with the number 12345" in refusal(final)


def test_folders_that_an_earlier_run_left_in_the_content_go(final):
    partial = interrupted(final)
    (partial / "content" / "templates").mkdir()
    (partial / "content" / "templates" / "x").write_text("")
    write(final)
    assert sorted(path.name for path in final.iterdir()) == ["data"]


def test_a_log_is_appended_to_and_no_link_is_followed(tmp_path, victim):
    for _ in range(2):
        with open_log(tmp_path / "log", "opening the log", ServerError) as descriptor:
            os.write(descriptor, b"line\n")
    assert (tmp_path / "log").read_text() == "line\nline\n"
    (tmp_path / "link").symlink_to(victim)
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("link", "a symbolic link"), ("pipe", "a pipe")):
        with (
            pytest.raises(ServerError, match=f"opening the log .*{name}: it is {kind}.*; name another file"),
            open_log(tmp_path / name, "opening the log", ServerError),
        ):
            pass
    with (
        pytest.raises(ServerError, match="No such file or directory; name another file"),
        open_log(tmp_path / "absent" / "log", "opening the log", ServerError),
    ):
        pass
