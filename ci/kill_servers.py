"""Kills and stops every process of a served model in turn, and measures when `moeship serve` serves it again.

    python ci/kill_servers.py --engine ENGINE --work DIRECTORY [--busy-minutes 10]

For both layouts and each process of the server: SIGKILL, then SIGSTOP; how long the server still said that it was
ready, and how long until it answered again. With --busy-minutes, the requests of a full queue for as long instead,
during which nothing may be started again. Prints a line of JSON for each. The exit status is 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.packaging.package import LAYOUTS, PackageOptions, package_engine
from triton_repo.processes.program import children_of, read_process
from triton_repo.serving.readiness import model_of

SEEN_BAR_S, SERVED_BAR_S = 10.0, 40.0
NAME = "tiny"
PATIENCE_S = 120
BUSY_REQUESTS = 24


class Command:
    """A running `moeship serve` and the lines that it prints on stdout."""

    def __init__(self, repository: Path, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "serve", str(repository), "--json", *words],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
        )
        self.events: list[dict[str, Any]] = []
        self.ready = self._read()
        threading.Thread(target=self._follow, daemon=True).start()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        event: dict[str, Any] = json.loads(self.process.stdout.readline())
        return event

    def _follow(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.ready['http']}/v2/health/ready", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def ask(self, max_tokens: int) -> str:
        words = {"text_input": "def main(", "max_tokens": max_tokens, "min_tokens": max_tokens}
        url = f"{self.ready['http']}/v2/models/{NAME}/generate"
        with urllib.request.urlopen(url, data=json.dumps(words).encode(), timeout=PATIENCE_S) as response:
            return str(json.load(response)["text_output"])

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(PATIENCE_S)


def members(server: int) -> dict[str, int]:
    """The process ids of a server, by the kind of process."""
    found = {"tritonserver": server}
    for pid in children_of(server):
        process = read_process(pid)
        if process and (model := model_of(process.words())):
            found[model] = pid
    return found


def wait_until(holds: Any, since: float) -> float:  # noqa: ANN401 - a function
    """Wait until `holds()` is true, PATIENCE_S at most; returns the seconds since `since`."""
    while not holds() and time.monotonic() - since < PATIENCE_S:
        time.sleep(0.02)
    return time.monotonic() - since


def hurt(repository: Path, layout: str) -> Iterator[dict[str, Any]]:
    """Send each signal to each process of a server, with a fresh server each time; yields one result line for each."""
    probe = Command(repository)
    names = list(members(probe.ready["pid"]))
    probe.end()
    for name in names:
        for number in (signal.SIGKILL, signal.SIGSTOP):
            command = Command(repository)
            began = time.monotonic()
            os.kill(members(command.ready["pid"])[name], number)
            unready = wait_until(lambda command=command: not command.is_ready(), began)
            served = wait_until(lambda command=command: len(command.events) >= 2 and command.is_ready(), began)
            answers = bool(command.ask(4))
            yield {
                "layout": layout, "process": name, "signal": number.name, "unready_s": round(unready, 2),
                "served_s": round(served, 2), "answers": answers, "reason": command.events[0]["reason"],
                "status": command.end(),
                "ok": unready < SEEN_BAR_S and served < SERVED_BAR_S and answers and len(command.events) == 2,
            }  # fmt: skip


def keep_busy(repository: Path, layout: str, minutes: float) -> dict[str, Any]:
    """Keep the queue of a server full for `minutes`: more requests at a time than it computes."""
    command = Command(repository)
    until = time.monotonic() + 60 * minutes

    def ask_on(_number: int) -> int:
        answers = 0
        while time.monotonic() < until:
            answers += bool(command.ask(600))
        return answers

    with concurrent.futures.ThreadPoolExecutor(BUSY_REQUESTS) as pool:
        answers = sum(pool.map(ask_on, range(BUSY_REQUESTS)))
    status = command.end()
    return {
        "layout": layout, "busy_minutes": minutes, "answers": answers, "events": command.events, "status": status,
        "ok": not command.events and not status,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the repositories are made")
    parser.add_argument("--busy-minutes", type=float, default=0.0)
    parser.add_argument("--layout", choices=LAYOUTS, action="append")
    arguments = parser.parse_args()
    all_ok = True
    for layout in arguments.layout or LAYOUTS:
        repository = arguments.work / layout
        if not repository.exists():
            package_engine(
                PackageOptions(
                    engine=arguments.engine,
                    name=NAME,
                    output=repository,
                    layout=layout,
                    onnxruntime=ModelParameters(threads=1),
                )
            )
        lines = hurt(repository, layout)
        if arguments.busy_minutes:
            lines = iter([keep_busy(repository, layout, arguments.busy_minutes)])
        for line in lines:
            print(json.dumps(line), flush=True)
            all_ok = all_ok and line["ok"]
    return 0 if all_ok else 1


if __name__ == "__main__":
    sys.exit(main())
