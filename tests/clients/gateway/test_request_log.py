"""The gateway's own log of requests."""

from __future__ import annotations

import json
import os

from serve_command import wait_until

from clients.gateway.request_log import RequestLog


def test_a_disk_that_was_full_for_a_while_costs_the_lines_of_that_while_alone(tmp_path, caplog):
    path, log = tmp_path / "log", RequestLog()
    full, descriptor = os.open("/dev/full", os.O_WRONLY), os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    room = os.dup(descriptor)
    with log.writing_to(descriptor):
        log.add({"id": "a"})
        assert wait_until(lambda: path.read_bytes().endswith(b"\n"))
        os.dup2(full, descriptor)
        for name in "bcd":
            log.add({"id": name})
        assert wait_until(lambda: "cannot be written" in caplog.text)
        os.dup2(room, descriptor)
        log.add({"id": "e"})
        log.add({"id": "f"})
    for one in (full, descriptor, room):
        os.close(one)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"id": "a"}
    assert lines[-1] == {"id": "f"}
    written = [line["id"] for line in lines]
    assert sum(line.get("dropped_lines", 0) for line in lines) == 6 - len(written)
    assert caplog.text.count("cannot be written (No space left on device)") == 1
