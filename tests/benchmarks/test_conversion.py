"""The conversion benchmark: what it measures, and that it notices a plan that does not come true."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import conversion
from export.errors import ConfigError

SCRIPT = Path(conversion.__file__)


def test_a_build_is_measured_beside_its_plan(tmp_path, tiny_checkpoint):
    words = ["--checkpoint", tiny_checkpoint, "--work", tmp_path / "work", "--output", tmp_path / "result.json"]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["engine"]["as_planned"]
    assert result["engine"]["bytes"] == result["engine"]["planned_bytes"] == result["write"]["bytes"]
    assert result["read"]["bytes"] == (tiny_checkpoint / "model.safetensors").stat().st_size
    assert result["build_over_plain"] == pytest.approx(
        result["build"]["seconds"] / (result["read"]["seconds"] + result["write"]["seconds"])
    )
    assert 30e6 < result["build"]["peak_bytes"] < 1e9
    assert "plan: every file of it exact" in done.stdout
    assert not (tmp_path / "work").exists()


def test_the_checkpoint_for_tensorrt_llm_is_measured_alike(tmp_path, tiny_checkpoint):
    result = conversion.measure(tiny_checkpoint, tmp_path / "work", "int4", "tensorrt-llm")
    assert result["engine"]["as_planned"]
    assert result["engine"]["bytes"] == result["write"]["bytes"] > 500_000
    assert 30e6 < result["build"]["peak_bytes"] < 1e9


def test_a_plan_that_does_not_come_true_is_told(tmp_path, tiny_checkpoint, monkeypatch):
    built = conversion.watch

    def longer(command):
        figures = built(command)
        with (tmp_path / "work" / "engine" / "genai_config.json").open("a") as file:
            file.write("\n")
        return figures

    monkeypatch.setattr(conversion, "watch", longer)
    result = conversion.measure(tiny_checkpoint, tmp_path / "work", "int8")
    assert not result["engine"]["as_planned"]
    assert result["engine"]["bytes"] == result["engine"]["planned_bytes"] + 1


def test_the_memory_of_children_counts(tmp_path):
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    child = "x = b'1' * 200_000_000; import time; time.sleep(0.5)"
    assert conversion.watch([sys.executable, "-c", program, child])["peak_bytes"] > 200_000_000


def test_what_cannot_be_planned_or_run_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"planning .*nowhere: CheckpointError"):
        conversion.measure(tmp_path / "nowhere", tmp_path / "work", "int4")
    with pytest.raises(ConfigError, match=r"running .* -c raise SystemExit\('odd'\): odd"):
        conversion.watch([sys.executable, "-c", "raise SystemExit('odd')"])


def test_a_file_is_written_whole_and_removed(tmp_path, monkeypatch):
    sizes = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path: (sizes.append(path.stat().st_size), unlink(path)))
    conversion.plain_write(tmp_path / "plain", conversion.PIECE_BYTES + 17)
    assert sizes == [conversion.PIECE_BYTES + 17]
