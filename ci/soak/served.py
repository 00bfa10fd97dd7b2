"""A served model from outside: its addresses, its metrics, the memory of its processes, its log of requests."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from clients.errors import ClientError
from clients.generation import AsyncClient, ClientTls
from triton_repo.contracts.ensemble import TOKEN_ENGINE
from triton_repo.processes.program import children_of, read_process
from triton_repo.serving.readiness import model_of

# Gauges that are 0 where nothing is computed and nothing waits.
HELD = ("requests_running", "requests_waiting", "sequences_running", "kv_reserved_bytes")
PUBLISHED_S = 1.0  # the metrics are at most so old
IDLE_S = 30.0  # in which a server that computes nothing must have freed all that it held
BACK_S = 60.0  # in which a server that died must be served again
_SAMPLE = re.compile(r"^moeship_(\w+)\{([^}]*?)\} (\S+)$", re.M)
_MODEL = re.compile(r'model="([^"]*)"')


@dataclass
class Report:
    """What one scenario found: numbers, and faults. Each fault breaks a bar."""

    numbers: dict[str, Any] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def require(self, holds: bool, fault: str) -> None:
        """Note a fault unless a bar holds."""
        if not holds:
            self.faults.append(fault)

    def as_json(self) -> dict[str, Any]:
        return {**self.numbers, "counts": dict(sorted(self.counts.items())), "faults": self.faults[:20]}


class Served:
    """One model of a server. `said` has the lines of JSON that `moeship serve --json` printed: the addresses at least,
    and the pid where the server runs on this machine."""

    def __init__(self, said: Path, model: str, log: Path | None = None, tls: ClientTls | None = None) -> None:
        self.model, self.log, self._tls = model, log, tls
        self._said = said
        self.url: str = self.said["grpc"]

    @property
    def is_encrypted(self) -> bool:
        """Whether its clients encrypt."""
        return self._tls is not None

    def client(self) -> AsyncClient:
        return AsyncClient(self.url, tls=self._tls)

    def channel(self, url: str, options: Sequence[tuple[str, object]] = ()) -> grpc.aio.Channel:
        """A channel of gRPC's own to the server, or to a relay before it."""
        if self._tls is None:
            return grpc.aio.insecure_channel(url, options=options)
        return self._tls.load().channel(grpc.aio, url, options)

    @property
    def said(self) -> dict[str, Any]:
        """What was said last of the addresses."""
        lines = [json.loads(line) for line in self._said.read_text(encoding="utf-8").splitlines() if line.strip()]
        found: dict[str, Any] = [line for line in lines if "grpc" in line][-1]
        return found

    def metrics(self) -> dict[str, float]:
        """The engine's metrics without labels of their own, by name without its prefix."""
        with urllib.request.urlopen(self.said["metrics"], timeout=30) as response:
            text = response.read().decode()
        samples = [(name, labels, float(value)) for name, labels, value in _SAMPLE.findall(text)]
        models = {match[1] for _, labels, _ in samples if (match := _MODEL.search(labels))}
        holder = self.model if self.model in models else TOKEN_ENGINE
        return {name: value for name, labels, value in samples if labels == f'model="{holder}"'}

    async def settled(self) -> dict[str, float]:
        """The metrics once nothing is held, or what is still held after IDLE_S in which the engine made no step."""
        steps, due = -1.0, 0.0
        while True:
            await asyncio.sleep(PUBLISHED_S)
            found = await asyncio.to_thread(self.metrics)
            if found["steps_total"] != steps:
                steps, due = found["steps_total"], time.monotonic() + IDLE_S
            if not any(found[name] for name in HELD) or time.monotonic() > due:
                return found

    def resident(self) -> dict[str, int]:
        """Resident bytes of the process that computes ("model") and of tritonserver ("server"); nothing for a server
        on another machine."""
        if (server := self.said.get("pid")) is None:
            return {}
        found = {"server": _resident(server)}
        for pid in children_of(server):
            process = read_process(pid)
            if process and model_of(process.words()) in (self.model, TOKEN_ENGINE):
                found["model"] = _resident(pid)
        return found

    async def await_answers(self) -> bool:
        """Wait until the model answers; False if it does not within BACK_S."""
        due = time.monotonic() + BACK_S
        while time.monotonic() < due:
            try:
                async with self.client() as client:
                    if await client.model_ready(self.model):
                        return True
            except ClientError:
                pass
            await asyncio.sleep(0.2)
        return False

    def lines_of(self, ids: set[str]) -> dict[str, dict[str, Any]]:
        """The lines of these requests in the request log, by id."""
        if self.log is None:
            return {}
        lines = (json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines())
        return {line["id"]: line for line in lines if line.get("id") in ids}


def _resident(pid: int) -> int:
    match = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(encoding="ascii"), re.M)
    return int(match[1]) * 1024 if match else 0
