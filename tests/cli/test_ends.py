"""How commands end when nobody reads on, the disk is full, memory is short, or moeship itself is at fault."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_phixtral_checkpoint

from cli.main import COMMANDS
from export.command import INTERNAL_ERROR, INTERRUPTED, READER_GONE, run_command
from export.errors import ConfigError


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends") / "mixture"
    return write_phixtral_checkpoint(folder, seed=3, num_experts=3, experts_per_token=2)


def with_closed_stdout(words, stderr=subprocess.PIPE):
    """A command whose stdout nobody reads: its status and what it said on stderr."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "cli.main", *map(str, words)]
    done = subprocess.run(command, stdout=writing, stderr=stderr, check=False, timeout=60, stdin=subprocess.DEVNULL)
    os.close(writing)
    return done.returncode, done.stderr


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_inspect_ends_quietly_when_its_reader_has_gone(mixture, options):
    assert with_closed_stdout(["inspect", mixture, *options]) == (READER_GONE, b"")


def test_head_gets_its_lines_and_the_shell_no_complaint(mixture):
    line = f"{sys.executable} -m cli.main inspect {mixture} | head -2; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    *lines, status = done.stdout.splitlines()
    assert len(lines) == 2
    assert status in ("0", str(READER_GONE))  # 0 where all was written before head ended


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_ends_quietly_when_its_reader_has_gone(words):
    assert with_closed_stdout(words) == (READER_GONE, b"")


def test_the_demo_ends_as_every_command(tmp_path):
    assert with_closed_stdout(["demo", "--output", tmp_path / "demo"]) == (READER_GONE, b"")


def test_an_error_is_told_though_stdout_is_closed(tmp_path):
    status, said = with_closed_stdout(["inspect", tmp_path / "absent" / "folder"])
    assert status == 2
    assert said.startswith(b"CheckpointError: opening the checkpoint")
    assert b"Traceback" not in said


def test_both_streams_may_be_closed(mixture):
    assert with_closed_stdout(["inspect", mixture], stderr=subprocess.DEVNULL)[0] == READER_GONE
    reading, writing = os.pipe()
    os.close(reading)
    assert with_closed_stdout(["inspect", "absent/folder/x"], stderr=writing)[0] == 2
    os.close(writing)


def test_a_full_disk_is_one_line_and_status_2(mixture):
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "cli.main", "inspect", str(mixture)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "OSError: No space left on device; remove the cause, or name another path\n"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_the_terminal_cannot_show_do_not_end_a_command(tmp_path, encoding):
    def inspected(folder):
        return subprocess.run(
            [sys.executable, "-m", "cli.main", "inspect", os.fsencode(folder)],
            capture_output=True, check=False, timeout=60, env={**os.environ, "PYTHONIOENCODING": encoding},
        )  # fmt: skip

    plain = write_phixtral_checkpoint(tmp_path / "plain", seed=3, num_experts=2, experts_per_token=1)
    shown = inspected(folder := plain.rename(tmp_path / "ä"))
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert (rb"\xe4" if encoding == "ascii" else "ä".encode()) in shown.stdout
    refused = inspected(folder.rename(tmp_path / "ä\udcff"))  # a byte that is no UTF-8
    assert (refused.returncode, refused.stdout) == (2, b"")
    assert rb"\udcff" in refused.stderr
    assert refused.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "error", [MemoryError(), ConfigError("reading it: x"), OSError(36, "File name too long", "n" * 999)]
)
def test_errors_of_input_and_machine_are_one_line_with_status_2(capsys, error):
    def run():
        raise error

    assert run_command(run) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) < 400


def test_other_statuses_are_those_of_shells_and_of_sysexits():
    assert (INTERRUPTED, READER_GONE) == (128 + signal.SIGINT, 128 + signal.SIGPIPE)
    assert INTERNAL_ERROR == os.EX_SOFTWARE


def test_a_fault_of_moeships_own_says_what_to_report(capsys, caplog):
    def run():
        return {}["key\x1b[0m" + "x" * 5000]

    with caplog.at_level("DEBUG"):
        assert run_command(run) == INTERNAL_ERROR
    said = capsys.readouterr().err
    assert said.startswith("internal error: KeyError: 'key\\x1b[0mxxx")
    assert "report it with the command" in said
    assert len(said) < 700
    assert "Traceback" in caplog.text


def test_what_is_logged_and_printed_is_nothing_that_a_terminal_obeys(tmp_path):
    folder = write_phixtral_checkpoint(tmp_path / "c", seed=3, num_experts=2, experts_per_token=1)
    (folder / "x\x1b[2J\r.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    moved = folder.rename(tmp_path / "d\x1b[31m")
    for words in (["inspect", moved], ["x\x1b[31m"], ["inspect", tmp_path / "absent\x1b[31m"]):
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert "\\x1b[31m" in done.stdout + done.stderr
        assert (done.stdout + done.stderr).replace("\n", "").isprintable()
    assert done.returncode == 2
