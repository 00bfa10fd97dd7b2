"""The lines of the request log, and a reader that does not read."""

from __future__ import annotations

import contextlib
import json
import os
import re

import pytest

from triton_repo.contracts.server_variables import REQUEST_LOG_VARIABLE
from triton_repo.runtime.batching.accounts import Ended
from triton_repo.runtime.reporting import request_log
from triton_repo.runtime.reporting.request_log import RequestLog

ENDED = Ended(
    request_id="7", end="length", status="OK", prompt_tokens=5, reused_tokens=3, output_tokens=2, queued_s=0.00049,
    first_token_s=0.5, total_s=1.23456,
)  # fmt: skip


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            assert end == ends[0]


def lines(text: bytes) -> list[dict]:
    return [json.loads(line) for line in text.decode().splitlines()]


def fill(write_end) -> None:
    """Write to a pipe until it takes no more."""
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, b"x" * 4096)
    os.set_blocking(write_end, True)


def test_a_line_has_the_requests_numbers_and_no_text(tmp_path):
    with (tmp_path / "log").open("ab", buffering=0) as file:
        log = RequestLog(file.fileno(), "tiny")
        log.add(ENDED)
        log.add(Ended(request_id="", end="invalid", status="INVALID_ARGUMENT", prompt_tokens=None))
        log.close()
    first, second = lines((tmp_path / "log").read_bytes())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert list(second) == ["time", *first]
    assert first == {
        "model": "tiny", "id": "7", "end": "length", "status": "OK", "prompt_tokens": 5, "reused_tokens": 3,
        "output_tokens": 2, "queued_s": 0.0, "first_token_s": 0.5, "total_s": 1.235,
    }  # fmt: skip
    names = ("id", "end", "prompt_tokens", "reused_tokens", "queued_s")
    assert [second[name] for name in names] == ["", "invalid", None, None, None]


def test_any_id_is_one_line_of_a_bounded_length(tmp_path):
    with (tmp_path / "log").open("ab", buffering=0) as file:
        log = RequestLog(file.fileno(), "m" * 255)
        log.add(Ended(request_id='a"\n\x00\u2028😀' * 10_000, end="waited_too_long", status="OK", prompt_tokens=10**9))
        log.close()
    text = (tmp_path / "log").read_bytes()
    assert len(text) < 4096
    assert text.count(b"\n") == 1
    assert text.isascii()
    assert json.loads(text)["id"] == ('a"\n\x00\u2028😀' * 10_000)[:256]


def test_a_reader_that_does_not_read_holds_nobody_up_and_is_told_what_it_missed(pipe, monkeypatch):
    monkeypatch.setattr(request_log, "MOST_LINES", 5)
    read_end, write_end = pipe
    fill(write_end)
    log = RequestLog(write_end, "tiny")
    for _ in range(100):
        log.add(ENDED)
    found = b""
    while found.count(b"\n") < 5:
        found += os.read(read_end, 1 << 16)
    log.add(ENDED)
    log.close()
    found += os.read(read_end, 1 << 16)
    *kept, last = lines(found.lstrip(b"x"))
    assert 5 <= len(kept) <= 6  # one more may have been under way
    assert not any("dropped_lines" in line for line in kept)
    assert last["dropped_lines"] == 100 - len(kept)


def test_the_end_of_a_model_does_not_wait_for_a_reader(pipe, monkeypatch):
    monkeypatch.setattr(request_log, "MOST_LINES", 5)
    fill(pipe[1])
    log = RequestLog(pipe[1], "tiny")
    for _ in range(100):
        log.add(ENDED)
    log.close(0.05)
    os.close(pipe[0])
    log.close()


def test_a_reader_that_has_gone_is_no_fault_of_the_requests(pipe, caplog):
    read_end, write_end = pipe
    os.close(read_end)
    log = RequestLog(write_end, "tiny")
    for _ in range(3):
        log.add(ENDED)
    log.close()
    assert caplog.text.count("the request log cannot be written") == 1


# The kernel numbers at most 1,048,576 files (fs.nr_open in proc(5)).
@pytest.mark.parametrize("said", [None, "", "three", "-1", "1048577"])
def test_without_a_file_nothing_is_logged(monkeypatch, said):
    monkeypatch.delenv(REQUEST_LOG_VARIABLE, raising=False)
    if said is not None:
        monkeypatch.setenv(REQUEST_LOG_VARIABLE, said)
    assert RequestLog.from_environment("tiny") is None
