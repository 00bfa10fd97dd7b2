"""Signs of life: what is written, what is read, and what a drain tells."""

from __future__ import annotations

import json
import os
import threading
import time

import pytest
from serve_command import wait_until

from triton_repo.processes import heartbeat as module
from triton_repo.processes.heartbeat import FOLDER_VARIABLE, Heartbeat, announce_drain, announce_end, read_beats


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "beats").mkdir()
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "beats"))
    monkeypatch.setattr(module, "BEAT_INTERVAL_S", 0.02)
    return tmp_path / "beats"


@pytest.fixture
def beating(folder):
    heartbeat = Heartbeat.start("phixtral", "phixtral_0_0")
    yield heartbeat
    heartbeat.stop()


def test_a_beat_says_who_lives_and_what_it_does(folder, beating):
    before = time.clock_gettime(time.CLOCK_MONOTONIC)
    beating.report(running=2, waiting=5)
    for _ in range(3):
        beating.step()
    assert wait_until(lambda: read_beats(folder)[0].steps == 3)
    [beat] = read_beats(folder)
    assert (beat.pid, beat.model, beat.instance) == (os.getpid(), "phixtral", "phixtral_0_0")
    assert (beat.running, beat.waiting, beat.draining) == (2, 5, False)
    assert before <= beat.step_at <= beat.beat_at <= time.clock_gettime(time.CLOCK_MONOTONIC)
    assert wait_until(lambda: read_beats(folder)[0].beat_at > beat.beat_at)
    assert read_beats(folder)[0].step_at == beat.step_at


def test_an_engine_is_stuck_while_it_computes_and_ends_no_step(folder, beating):
    def stuck_s() -> float:
        [beat] = read_beats(folder)
        return beat.stuck_s

    def step_at() -> float:
        [beat] = read_beats(folder)
        return beat.step_at

    beating.report(running=1, waiting=0)
    time.sleep(0.1)
    assert stuck_s() == 0, "a model that counts no steps is never stuck"
    beating.step()
    assert wait_until(lambda: stuck_s() > 0.2)
    before = time.monotonic()
    beating.step()
    assert wait_until(lambda: step_at() > before)
    assert wait_until(lambda: stuck_s() > 0.2)
    beating.report(running=0, waiting=0)
    assert wait_until(lambda: stuck_s() == 0)
    # A long rest counts for nothing when the next request comes.
    before = time.monotonic()
    assert wait_until(lambda: read_beats(folder)[0].beat_at > before + 0.2)
    beating.report(running=0, waiting=1)
    assert step_at() > before
    assert wait_until(lambda: stuck_s() > 0.2)


def test_instances_beat_side_by_side_and_leave_when_they_stop(folder, beating):
    other = Heartbeat.start("phixtral", "phixtral_0_1")
    assert [beat.instance for beat in read_beats(folder)] == ["phixtral_0_0", "phixtral_0_1"]
    other.stop()
    assert [beat.instance for beat in read_beats(folder)] == ["phixtral_0_0"]


def test_a_file_that_is_no_beat_is_passed_over(folder, beating):
    for name, content in (("1.json", "{"), ("2.json", "[1]"), ("3.json", json.dumps({"pid": 3}))):
        (folder / name).write_text(content)
    (folder / "4.json").write_bytes(b"\xff\xfe")
    assert [beat.pid for beat in read_beats(folder)] == [os.getpid()]


def test_a_drain_is_told_once_and_at_once_when_it_has_begun(folder, beating):
    told = []
    beating.on_drain(lambda: told.append(threading.current_thread().name))
    announce_drain(folder)
    assert wait_until(lambda: read_beats(folder)[0].draining)
    beating.on_drain(lambda: told.append(threading.current_thread().name))
    time.sleep(0.1)
    assert told == ["heartbeat", threading.current_thread().name]


def test_the_end_is_told_apart_from_the_drain_before_it(folder, beating):
    told = []
    beating.on_drain(lambda: told.append("drain"))
    beating.on_end(lambda: told.append("end"))
    announce_drain(folder)
    assert wait_until(lambda: told)
    time.sleep(0.1)
    assert told == ["drain"]
    announce_end(folder)
    assert wait_until(lambda: len(told) > 1)
    beating.on_end(lambda: told.append("at once"))
    time.sleep(0.1)
    assert told == ["drain", "end", "at once"]


def test_a_callback_that_fails_does_not_end_the_beats(folder, beating, capsys):
    told = []
    beating.on_drain(lambda: 1 / 0)
    beating.on_drain(lambda: told.append("second"))
    announce_drain(folder)
    assert wait_until(lambda: told)
    draining = read_beats(folder)[0].beat_at
    assert wait_until(lambda: read_beats(folder)[0].beat_at > draining)
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("named", [None, "", "/no/such/folder"])
def test_nothing_is_done_where_nobody_reads(monkeypatch, named):
    if named is None:
        monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    else:
        monkeypatch.setenv(FOLDER_VARIABLE, named)
    threads = threading.active_count()
    heartbeat = Heartbeat.start("phixtral", "phixtral_0_0")
    heartbeat.on_drain(lambda: pytest.fail("nobody drains"))
    heartbeat.report(running=1, waiting=0)
    heartbeat.step()
    assert threading.active_count() == threads
    heartbeat.stop()
