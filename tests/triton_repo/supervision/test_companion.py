"""A program beside a server: started again when it ends, ended with the server."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from serve_command import wait_until

from triton_repo.errors import ServerError
from triton_repo.supervision.companion import Companion
from triton_repo.supervision.supervisor import RestartPolicy

POLICY = RestartPolicy(max_restarts=2, first_pause_s=0.05, longest_pause_s=0.1)
SAYS = "import json, os, sys, time; print(json.dumps({'pid': os.getpid()}), flush=True); "


def companion(code: str) -> Companion:
    return Companion("the helper", [sys.executable, "-c", code], POLICY)


def test_a_program_that_ends_is_started_again_as_often_as_allowed(caplog):
    caplog.set_level("INFO")
    helper = companion(f"{SAYS} time.sleep(60)")
    assert helper.start()["pid"] == helper.pid
    for ended in (1, 2):
        before = helper.pid
        os.kill(before, signal.SIGKILL)
        assert wait_until(lambda before=before: helper.pid not in (None, before))
        assert wait_until(lambda ended=ended: caplog.text.count("the helper answers again") == ended)
    os.kill(helper.pid, signal.SIGKILL)
    assert wait_until(lambda: "ended with status -9 too often, and is not started again" in caplog.text)
    helper.stop()


def test_a_program_that_never_is_ready_is_an_error_at_once():
    with pytest.raises(ServerError, match="starting the helper: it ended"):
        companion("import sys; sys.exit(2)").start()


def test_stopping_asks_first_and_kills_a_program_that_does_not_heed(monkeypatch, caplog):
    monkeypatch.setattr("triton_repo.supervision.companion.END_TIMEOUT_S", 0.5)
    polite = companion(f"{SAYS} time.sleep(60)")
    polite.start()
    polite.stop()
    deaf = companion(f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SAYS} time.sleep(60)")
    deaf.start()
    deaf.stop()
    assert (polite.pid, deaf.pid) == (None, None)
    assert "started again" not in caplog.text
