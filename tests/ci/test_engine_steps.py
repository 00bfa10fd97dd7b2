"""The commands behind the steps: their log, what becomes of one that fails, and of a run that is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "ci" / "gpu"
PATIENCE_S = 60


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import engine_steps

    return engine_steps


def python(code, *words):
    return [sys.executable, "-c", code, *map(str, words)]


def test_a_command_that_fails_is_told_with_the_end_of_its_log(steps, tmp_path):
    log = tmp_path / "log"
    log.write_text("earlier\n")
    code = "import sys; [print('line', n, file=sys.stderr) for n in range(30)]; sys.exit(int(sys.argv[1]))"
    with pytest.raises(steps.StepFailed, match=r"status 3, log .*log: its end is\nline 15\n") as failed:
        steps.run_logged(python(code, 3), log)
    assert str(failed.value).endswith("\nline 29")
    build = python("import sys; sys.exit('loading\\nEngineError: no room:\\n  - of 3 ranks')")
    with pytest.raises(steps.StepFailed, match="status 1, log .*: EngineError: no room:\n  - of 3 ranks$"):
        steps.run_logged(build, log)
    assert steps.run_logged(python(code, 1), log, allowed=(0, 1)) == ""
    said = log.read_text()
    assert said.startswith("earlier\n$ ")
    assert said.count("line 0\n") == 2


def test_a_checkpoint_is_made_once_and_counted(steps, tmp_path):
    folder, found = tmp_path / "checkpoints" / "small", {}
    code = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(); (p / 'a.safetensors').write_bytes(bytes(7))"
    steps.make_checkpoint(python(code, folder), folder, tmp_path / "log", found)
    assert found == {"bytes": 7}
    steps.make_checkpoint(python("raise SystemExit(5)"), folder, tmp_path / "log", found)
    steps.make_checkpoint(None, folder, tmp_path / "log", found)
    with pytest.raises(steps.StepFailed, match="status 5, log"):
        steps.make_checkpoint(python("raise SystemExit(5)"), tmp_path / "other", tmp_path / "log", found)


def test_a_build_that_compares_nothing_is_no_verification(steps, tmp_path, monkeypatch):
    (tmp_path / "engine.json").write_text('{"verification": null}')
    build = steps.Build(checkpoint=tmp_path, engine=tmp_path, precision="fp16", log=tmp_path / "log", options=())
    monkeypatch.setattr(steps.Build, "command", lambda self, stage, *words: python("print('{}')"))
    with pytest.raises(steps.StepFailed, match="the build ended without a comparison"):
        steps.verify_engine(build, 8, {})


def test_a_run_that_is_asked_to_stop_keeps_what_it_has(container, tiny_checkpoint, tmp_path):
    results = tmp_path / "out" / "results.json"
    words = ["--inside", "--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "out")]
    command = [SCRIPTS / "tensorrt_llm.sh", *words]
    with subprocess.Popen(command, env=container.environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + PATIENCE_S
        while '"running"' not in (results.read_text() if results.exists() else "") and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, said.splitlines()[-1]) == (130, "interrupted")
    steps = json.loads(results.read_text())["models"]["tiny-phixtral"]
    assert {entry["status"] for name, entry in steps.items() if name != "engines"} <= {"done", "running"}


def test_files_of_a_containers_root_become_the_folders_owners(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS)
    import run_tensorrt_llm as script

    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "python").symlink_to("/nowhere")
    given = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "chown", lambda path, *owner, follow_symlinks: given.append((path, owner, follow_symlinks)))
    owner = os.stat_result((0o40755, 0, 0, 1, 1234, 5678, 0, 0, 0, 0))
    monkeypatch.setattr(Path, "stat", lambda self, **_: owner)
    script.give_back(tmp_path)
    assert given == [(tmp_path / name, (1234, 5678), False) for name in ("venv", "venv/python")]
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    script.give_back(tmp_path)
    assert len(given) == 2
